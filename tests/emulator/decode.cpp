#include "decode.h"

#include <algorithm>
#include <stdexcept>

namespace emulator {

// ---- constants

std::uint32_t Constants::place_of(std::int64_t value, int bytes) {
  const int stored = std::max(bytes, 1);
  if (bytes < 8) value &= (std::int64_t{1} << 8 * stored) - 1;
  const auto [found, inserted] = places_.insert({{value, bytes}, next_place_});
  if (inserted) next_place_ += kLanes * stored;
  return found->second;
}

void Constants::fill(std::uint8_t* register_file) const {
  for (const auto& [key, place] : places_) {
    const auto& [value, bytes] = key;
    if (bytes == 0) {  // a predicate: the same bit for all lanes
      const std::uint32_t word = value != 0 ? kAllLanes : 0;
      std::memcpy(register_file + place, &word, sizeof word);
      continue;
    }
    for (int lane = 0; lane < kLanes; ++lane) std::memcpy(register_file + place + lane * bytes, &value, bytes);
  }
}

// ---- decoder

bool Decoder::has(const char* modifier) const {
  return std::find(modifiers_.begin(), modifiers_.end(), modifier) != modifiers_.end();
}

bool Decoder::take(const std::string& modifier) {
  const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
  if (found == modifiers_.end()) return false;
  modifiers_.erase(found);
  return true;
}

int Decoder::take_one_of(const std::vector<std::string>& modifiers) {
  for (auto at = modifiers_.begin(); at != modifiers_.end(); ++at) {
    const auto found = std::find(modifiers.begin(), modifiers.end(), *at);
    if (found == modifiers.end()) continue;
    modifiers_.erase(at);
    return static_cast<int>(found - modifiers.begin());
  }
  return -1;
}

Type Decoder::take_type() {
  for (auto at = modifiers_.begin(); at != modifiers_.end(); ++at) {
    const Type type = type_named(*at);
    if (type == Type::kNone) continue;
    modifiers_.erase(at);
    return type;
  }
  return Type::kNone;
}

std::string Decoder::take_prefixed(const char* prefix) {
  for (auto at = modifiers_.begin(); at != modifiers_.end(); ++at) {
    if (at->rfind(prefix, 0) != 0) continue;
    const std::string modifier = *at;
    modifiers_.erase(at);
    return modifier;
  }
  return "";
}

void Decoder::take_cache_hints() {
  while (take_one_of({"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}) >= 0) {
  }
  while (!take_prefixed("L1::").empty() || !take_prefixed("L2::").empty()) {
  }
}

Space Decoder::take_space() {
  const std::string shared = take_prefixed("shared"), param = take_prefixed("param");
  if (shared == "shared::cluster") return Space::kCluster;
  if (!shared.empty()) return Space::kShared;
  if (!param.empty()) return Space::kParam;
  constexpr Space kSpaces[] = {Space::kGlobal, Space::kLocal, Space::kConst};
  const int found = take_one_of({"global", "local", "const"});
  return found < 0 ? Space::kGeneric : kSpaces[found];
}

Operand& Decoder::operand(std::size_t index) {
  if (index >= instruction.operands.size()) fail("operand " + std::to_string(index) + " is missing");
  return instruction.operands[index];
}

void Decoder::place(Operand& operand, int bytes) {
  if (operand.kind == Operand::Kind::kRegister && operand.width != bytes) {
    fail("a register of " + std::to_string(operand.width) + " bytes where " + std::to_string(bytes) +
         " are needed (0: a predicate)");
  }
  place_any_width(operand, bytes);
}

void Decoder::place_any_width(Operand& operand, int bytes) {
  switch (operand.kind) {
    case Operand::Kind::kNone:
      return;
    case Operand::Kind::kRegister:
      if (operand.width < bytes) fail("a register is too narrow");
      return;
    case Operand::Kind::kConstant:
      operand.place = constants_.place_of(operand.value == kDynamicShared ? dynamic_shared_ : operand.value, bytes);
      operand.width = static_cast<std::uint8_t>(bytes);
      return;
    case Operand::Kind::kVector:
      for (Operand& element : operand.elements) place(element, bytes);
      return;
    default:
      fail("an operand is not a register or a constant");
  }
}

void Decoder::address(std::size_t index) {
  Operand& address = operand(index);
  if (address.kind != Operand::Kind::kAddress) fail("operand " + std::to_string(index) + " must be an address");
  Operand& base = address.elements[0];
  place(base, base.kind == Operand::Kind::kRegister ? base.width : 8);
}

void Decoder::fail(const std::string& what) const {
  throw std::runtime_error("emulator: PTX line " + std::to_string(statement_.ptx_line) + ": " + what + ": " +
                           statement_.text.substr(0, 200));
}

void Decoder::finish() {
  if (!modifiers_.empty()) fail("modifier ." + modifiers_.front() + " is not known here");
}

// ---- a whole body

namespace {

// Registers by place, for the rules of wgmma.
void list_registers(const Operand& operand, std::vector<std::uint32_t>* places) {
  if (operand.kind == Operand::Kind::kRegister && operand.width > 0) places->push_back(operand.place);
  for (const Operand& element : operand.elements) list_registers(element, places);
}

void find_accesses(Instruction* instruction) {
  static const char* const kNoResult[] = {"st", "red", "cp", "bar", "barrier", "stmatrix", "fence", "membar", "bra"};
  const std::string& opcode = instruction->statement->opcode;
  const bool no_result =
      std::any_of(std::begin(kNoResult), std::end(kNoResult), [&](const char* o) { return opcode == o; });
  for (std::size_t index = 0; index < instruction->operands.size(); ++index) {
    const Operand& operand = instruction->operands[index];
    const bool written = index == 0 && !no_result && operand.kind != Operand::Kind::kAddress;
    list_registers(operand, written ? &instruction->writes : &instruction->reads);
  }
}

Instruction decode_statement(const Statement& statement, Constants& constants, std::uint32_t dynamic_shared) {
  Decoder decoder(statement, constants, dynamic_shared);
  Instruction& instruction = decoder.instruction;
  if (statement.opcode == "bra") {
    decoder.take("uni");
    instruction.flow = Instruction::Flow::kBranch;
    instruction.target = static_cast<std::uint32_t>(decoder.operand(0).value);
  } else if (statement.opcode == "ret" || statement.opcode == "exit") {
    decoder.take("uni");
    instruction.flow = Instruction::Flow::kExit;
  } else if (!decode_predicate(decoder) && !decode_conversion(decoder) && !decode_arithmetic(decoder) &&
             !decode_data_movement(decoder) && !decode_synchronisation(decoder) && !decode_matrix(decoder) &&
             !decode_hopper(decoder)) {
    decoder.fail("unknown instruction");
  }
  decoder.finish();
  if (statement.guard.kind == Operand::Kind::kRegister) {
    instruction.guarded = true;
    instruction.guard = statement.guard.place;
    instruction.guard_negated = statement.guard.negated;
  }
  find_accesses(&instruction);
  return std::move(decoder.instruction);
}

}  // namespace

std::unique_ptr<Code> decode(const Entry& entry) {
  auto code = std::make_unique<Code>();
  code->entry = entry;
  code->body = parse_body(entry);
  // The end of the code is a return.
  Statement last;
  last.opcode = last.text = "ret";
  if (!code->body.statements.empty()) last.ptx_line = code->body.statements.back().ptx_line;
  code->body.statements.push_back(last);
  const std::size_t static_end = kSharedStart + code->body.shared_bytes;
  code->dynamic_shared = static_cast<std::uint32_t>((static_end + entry.dynamic_alignment - 1) /
                                                    entry.dynamic_alignment * entry.dynamic_alignment);
  if (code->body.statements.size() > kMaxStatements) {
    throw std::runtime_error("emulator: " + entry.name + " has more than " + std::to_string(kMaxStatements) +
                             " instructions");
  }
  Constants constants((code->body.register_bytes + 63) / 64 * 64);
  for (const Statement& statement : code->body.statements) {
    code->instructions.push_back(decode_statement(statement, constants, code->dynamic_shared));
    code->uses_wgmma |= statement.opcode == "wgmma";
    code->may_poll |= code->instructions.back().may_poll;
  }
  code->register_file.assign(constants.end(), 0xff);
  constants.fill(code->register_file.data());
  return code;
}

}  // namespace emulator
