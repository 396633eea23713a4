// wgmma: products of whole warpgroups, with operands in shared memory, that continue after their instruction.
//
// Every warp computes its 16 rows when it issues. Its operands stay marked as being read until its wait, and its
// results appear only then. PTX does not say which warp reads which rows of A, so each reads all 64. An agent counts as
// the reader, and the wait orders it before every lane of the warp, so one lane may tell others that the operands are
// free.
#include <algorithm>
#include <cstdlib>

#include "decode.h"
#include "matrix.h"
#include "numbers.h"

namespace emulator {
namespace {

constexpr int kRows = 16;  // of the 64, per warp
constexpr int kWarpsOfGroup = 4;
constexpr int kChunk = 8;                // elements of 16 bits that are side by side in every layout
constexpr std::uint32_t kRowBytes = 32;  // of a register of a warp; also 16 elements of a row of an operand

std::uint32_t number_of(const Operand& reg) { return reg.place / kRowBytes; }

// All lanes of the four warps of an aligned warpgroup; here at least all lanes of the warp.
bool whole_warp(Execution& x, const Instruction& i) {
  if (!x.gather_warp(i)) return false;
  if (x.warp->launched != kAllLanes) x.report("divergence", i, "wgmma needs all 32 lanes of the warp");
  return true;
}

float to_float(std::uint16_t bits, bool bfloat) {
  return bfloat ? static_cast<float>(bits_as<BFloat>(bits)) : static_cast<float>(bits_as<Half>(bits));
}

// One operand in shared memory: `rows` x 16 elements, row m of A or column m of B.
class SharedOperand {
 public:
  SharedOperand(Execution& x, const Instruction& i, std::uint64_t descriptor, bool k_major, bool bfloat)
      : x_(x), i_(i), descriptor_(decode_descriptor(descriptor)), k_major_(k_major), bfloat_(bfloat) {
    if (descriptor_.base_offset != 0) x.report("wgmma", i, "a descriptor with a base offset is not supported");
  }

  // put(m, k, value) for rows [first, first + count).
  template <typename F>
  void load(int first, int count, F&& put) {
    const int ms = k_major_ ? count : count / kChunk, ks = k_major_ ? 16 / kChunk : 16;
    for (int m = 0; m < ms; ++m) {
      for (int k = 0; k < ks; ++k) {
        const int row = first + (k_major_ ? m : m * kChunk), depth = k_major_ ? k * kChunk : k;
        std::uint16_t chunk[kChunk];
        read(operand_address(descriptor_, row, depth, k_major_), chunk);
        for (int e = 0; e < kChunk; ++e) {
          put(row - first + (k_major_ ? 0 : e), depth + (k_major_ ? e : 0), to_float(chunk[e], bfloat_));
        }
      }
    }
  }

 private:
  void read(std::uint32_t address, std::uint16_t* chunk) {
    constexpr int kBytes = kChunk * sizeof(std::uint16_t);
    if (!x_.shared_shadow.contains(address, kBytes)) {
      x_.report("out-of-bounds", i_,
                "the descriptor reaches byte " + std::to_string(static_cast<std::int64_t>(address) - kSharedStart) +
                    " of the block's " + std::to_string(x_.shared_bytes) + " bytes of shared memory");
      std::fill_n(chunk, kChunk, std::uint16_t{0x7fff});
      return;
    }
    if (x_.check) {
      x_.shared_shadow.begin_read(x_.site(i_, 0), address, kBytes);
      x_.warp->wgmma.open.shared_reads.push_back({address, kBytes});
    }
    std::memcpy(chunk, x_.shared + address, kBytes);
  }

  Execution& x_;
  const Instruction& i_;
  const MatrixDescriptor descriptor_;
  const bool k_major_, bfloat_;
};

// The same instruction with the same descriptors in the same order by all warps of the group.
void check_group(Execution& x, const Instruction& i, std::uint64_t a, std::uint64_t b) {
  const int first_warp = x.warp->index / kWarpsOfGroup * kWarpsOfGroup;
  if (first_warp + kWarpsOfGroup > x.num_warps) {
    x.report("wgmma", i, "the block has no full warpgroup here: " + std::to_string(x.num_threads) + " threads");
  }
  WarpgroupTrace& trace = x.warpgroups[x.warp->index / kWarpsOfGroup];
  const std::size_t position = x.warp->wgmma.issued++;
  if (position == trace.issues.size()) trace.issues.push_back({i.statement, a, b});
  const WarpgroupTrace::Issue& issue = trace.issues[position];
  if (issue.statement != i.statement) {
    x.report("wgmma", i,
             "another warp of the warpgroup issues the wgmma at " + x.reporter.place_of(*issue.statement) + " here");
  } else if (issue.a != a || issue.b != b) {
    x.report("wgmma", i, "the descriptors differ between the warps of the warpgroup");
  }
}

std::uint64_t uniform(Execution& x, const Instruction& i, const Operand& descriptor) {
  const std::uint64_t value = x.lane_bits(descriptor, 0);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (x.lane_bits(descriptor, lane) == value) continue;
    x.report("wgmma", i, "a descriptor differs between lanes");
    break;
  }
  return value;
}

// Registers touched since the fence by anything but wgmma.
void check_fence(Execution& x, const Instruction& i, const Operand& reg, bool accumulator) {
  const WgmmaState& state = x.warp->wgmma;
  const WgmmaState::Register& entry = state.registers[number_of(reg)];
  if (entry.hidden != nullptr && accumulator) return;  // passed from one wgmma to the next
  const bool touched = entry.last_write > state.fence || (accumulator && entry.last_read > state.fence);
  if (touched) {
    x.report("wgmma", i,
             std::string("a register of ") + (accumulator ? "the accumulator" : "A") +
                 " was used by another instruction after the last wgmma.fence");
  } else if (accumulator && entry.copied > state.fence && !entry.constant) {
    x.report("slow", i, "a mov set a register of the accumulator after the last wgmma.fence");
  }
}

// The hidden values of an accumulator register, taken over from the register by the first wgmma.
WgmmaState::Values& hide(Execution& x, const Operand& reg) {
  WgmmaState& state = x.warp->wgmma;
  WgmmaState::Register& entry = state.registers[number_of(reg)];
  if (entry.hidden == nullptr) {
    entry.hidden = std::make_shared<WgmmaState::Values>();
    std::memcpy(entry.hidden->lanes, x.row<float>(reg), sizeof entry.hidden->lanes);
    std::memset(x.row<float>(reg), 0xff, sizeof entry.hidden->lanes);
    ++state.in_flight;
  } else if (entry.hidden.use_count() > 1) {  // renamed: the old name keeps the old values
    entry.hidden = std::make_shared<WgmmaState::Values>(*entry.hidden);
  }
  entry.constant = false;
  state.open.accumulators.push_back(number_of(reg));
  return *entry.hidden;
}

// mma_async d, a, b, scale-d, ...; option: columns, bfloat, transposed a, transposed b, sign of a, sign of b
Step multiply_async(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  ++x.counters.wgmma;
  ++x.activity;
  WgmmaState& state = x.warp->wgmma;
  const int columns = i.option[0];
  const bool bfloat = i.option[1];
  const std::vector<Operand>& d = i.operands[0].elements;
  const bool a_in_registers = i.operands[1].kind == Operand::Kind::kVector;
  const std::uint64_t b_descriptor = uniform(x, i, i.operands[2]);
  const std::uint64_t a_descriptor = a_in_registers ? 0 : uniform(x, i, i.operands[1]);
  check_group(x, i, a_descriptor, b_descriptor);
  if (state.fence == 0) x.report("wgmma", i, "no wgmma.fence before the first wgmma");
  // 128 bytes a clock: A by each warp, B by the warpgroup.
  if (!a_in_registers) x.counters.shared_clocks += kRows * kRowBytes / 128;
  if (x.warp->index % kWarpsOfGroup == 0) x.counters.shared_clocks += columns * kRowBytes / 128;
  for (const Operand& reg : d) check_fence(x, i, reg, true);

  float a[kRows][16];
  std::vector<float> b(16 * columns);  // (k, column)
  if (a_in_registers) {
    const std::vector<Operand>& registers = i.operands[1].elements;
    for (int index = 0; index < static_cast<int>(registers.size()); ++index) {
      check_fence(x, i, registers[index], false);
      WgmmaState::Register& entry = state.registers[number_of(registers[index])];
      if (entry.operand_of++ == 0) ++state.in_flight;
      state.open.operands.push_back(number_of(registers[index]));
      const std::uint32_t* row = x.row<std::uint32_t>(registers[index]);
      for (int lane = 0; lane < kLanes; ++lane) {
        const Place place = mma_a(lane, index, 0);
        a[place.row][place.column] = to_float(static_cast<std::uint16_t>(row[lane]), bfloat);
        a[place.row][place.column + 1] = to_float(static_cast<std::uint16_t>(row[lane] >> 16), bfloat);
      }
    }
  } else {
    const int first = x.warp->index % kWarpsOfGroup * kRows;
    SharedOperand(x, i, a_descriptor, !i.option[2], bfloat)
        .load(0, kWarpsOfGroup * kRows, [&](int m, int k, float value) {
          if (m / kRows * kRows == first) a[m - first][k] = value;
        });
  }
  SharedOperand(x, i, b_descriptor, !i.option[3], bfloat).load(0, columns, [&](int n, int k, float value) {
    b[k * columns + n] = value;
  });

  std::vector<double> sums(kRows * columns, 0.0);
  const double sign = i.option[4] * i.option[5];
  for (int m = 0; m < kRows; ++m) {
    double* row = &sums[m * columns];
    for (int k = 0; k < 16; ++k) {
      const double factor = sign * a[m][k];
      const float* b_row = &b[k * columns];
      for (int n = 0; n < columns; ++n) row[n] += factor * b_row[n];
    }
  }
  const bool accumulate = x.predicate(i.operands[3]) & 1;
  for (int index = 0; index < static_cast<int>(d.size()); ++index) {
    WgmmaState::Values& values = hide(x, d[index]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const Place place = wgmma_d(lane, index);
      const double start = accumulate ? values.lanes[lane] : 0.0;
      values.lanes[lane] = static_cast<float>(start + sums[place.row * columns + place.column]);
    }
  }
  return Step::kNext;
}

Step fence(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  x.warp->wgmma.fence = x.warp->wgmma.step;
  return Step::kNext;
}

Step commit(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  WgmmaState& state = x.warp->wgmma;
  state.groups.push_back(std::move(state.open));
  state.open = WgmmaState::Group();
  return Step::kNext;
}

// Whether an accumulator is part of a later group, or of one that is not committed: then it stays hidden.
bool used_later(const WgmmaState& state, std::uint32_t number) {
  const auto uses = [number](const WgmmaState::Group& group) {
    return std::find(group.accumulators.begin(), group.accumulators.end(), number) != group.accumulators.end();
  };
  return uses(state.open) || std::any_of(state.groups.begin() + 1, state.groups.end(), uses);
}

void finish_group(Execution& x, const WgmmaState::Group& group) {
  WgmmaState& state = x.warp->wgmma;
  for (const std::uint32_t number : group.accumulators) {
    WgmmaState::Register& entry = state.registers[number];
    if (entry.hidden == nullptr || used_later(state, number)) continue;
    std::memcpy(x.warp->registers + number * kRowBytes, entry.hidden->lanes, sizeof entry.hidden->lanes);
    entry.hidden = nullptr;
    --state.in_flight;
  }
  for (const std::uint32_t number : group.operands) {
    if (--state.registers[number].operand_of == 0) --state.in_flight;
  }
  if (!x.check || group.shared_reads.empty()) return;
  const Access agent = x.clocks.next_of_warp(x.warp->number);
  for (const auto& [offset, bytes] : group.shared_reads) x.shared_shadow.finish_read(agent, offset, bytes);
  x.for_each_lane([&](int lane) { x.clocks.join_agent(x.clocks.row(x.thread_of(lane)), agent); });
}

// wait_group n
Step wait(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  WgmmaState& state = x.warp->wgmma;
  while (static_cast<int>(state.groups.size()) > i.option[0]) {
    finish_group(x, state.groups.front());
    state.groups.pop_front();
  }
  return Step::kNext;
}

// setmaxnreg.inc|dec n
Step set_max_registers(Execution& x, const Instruction& i) {
  if (!whole_warp(x, i)) return Step::kStay;
  x.warp->wgmma.max_registers = i.option[0];
  ++x.activity;
  return Step::kNext;
}

int constant(Decoder& d, std::size_t index) {
  if (d.operand(index).kind != Operand::Kind::kConstant)
    d.fail("operand " + std::to_string(index) + " must be a constant");
  return static_cast<int>(d.operand(index).value);
}

void decode_wgmma(Decoder& d) {
  const int action = d.take_one_of({"mma_async", "fence", "commit_group", "wait_group"});
  d.take("sync");
  d.take("aligned");
  Instruction& instruction = d.instruction;
  if (action == 1) instruction.handler = &fence;
  if (action == 2) instruction.handler = &commit;
  if (action == 3) {
    instruction.option[0] = constant(d, 0);
    instruction.handler = &wait;
  }
  if (action != 0) return;
  const std::string shape = d.take_prefixed("m64n");
  const int columns = std::atoi(shape.c_str() + 4);
  if (shape != "m64n" + std::to_string(columns) + "k16" || columns % 8 != 0 || columns < 8 || columns > 256) {
    d.fail("this shape is not supported");
  }
  const Type sum = d.take_type(), a = d.take_type(), b = d.take_type();
  if (sum != Type::kF32 || a != b || (a != Type::kF16 && a != Type::kBF16)) d.fail("these types are not supported");
  if (static_cast<int>(d.operand(0).elements.size()) != columns / 2) d.fail("the accumulator must be N / 2 registers");
  d.source(0, 4);
  const bool a_in_registers = d.operand(1).kind == Operand::Kind::kVector;
  if (a_in_registers && d.operand(1).elements.size() != 4) d.fail("A must be 4 registers");
  d.source(1, a_in_registers ? 4 : 8);
  d.source(2, 8);
  d.source(3, 0);
  const int sign_a = constant(d, 4), sign_b = constant(d, 5);
  int transposed_a = 0, transposed_b = 0;
  if (d.num_operands() > 6) {
    transposed_a = a_in_registers ? 0 : constant(d, 6);
    transposed_b = constant(d, a_in_registers ? 6 : 7);
  }
  if (std::abs(sign_a) != 1 || std::abs(sign_b) != 1) d.fail("the signs must be 1 or -1");
  instruction.option = {columns, a == Type::kBF16, transposed_a, transposed_b, sign_a, sign_b};
  instruction.handler = &multiply_async;
}

}  // namespace

void Execution::track_registers(const Instruction& instruction) {
  WgmmaState& state = warp->wgmma;
  if (state.registers.empty()) state.registers.resize(code.register_file.size() / kRowBytes + 1);
  ++state.step;
  if (instruction.statement->opcode == "wgmma") return;
  const bool is_move =
      instruction.statement->opcode == "mov" && instruction.operands[0].kind == Operand::Kind::kRegister;
  if (is_move && !instruction.writes.empty()) {
    WgmmaState::Register& target = state.registers[instruction.writes[0] / kRowBytes];
    target.copied = state.step;
    target.constant = instruction.reads.empty() || state.registers[instruction.reads[0] / kRowBytes].constant;
    if (instruction.reads.empty()) {  // of a constant: the register begins a new live range
      if (target.hidden == nullptr) target.last_write = target.last_read = 0;
    } else {
      const std::uint32_t from = instruction.reads[0] / kRowBytes, to = instruction.writes[0] / kRowBytes;
      const WgmmaState::Register& source = state.registers[from];
      target.last_write = source.last_write;
      target.last_read = source.last_read;
      if (source.hidden != nullptr && from != to) {
        state.in_flight += target.hidden == nullptr;
        target.hidden = source.hidden;
        const auto add_name = [from, to](WgmmaState::Group& group) {
          if (std::count(group.accumulators.begin(), group.accumulators.end(), from) != 0)
            group.accumulators.push_back(to);
        };
        for (WgmmaState::Group& group : state.groups) add_name(group);
        add_name(state.open);
        return;
      }
    }
  }
  if (state.in_flight > 0) {
    const auto check_register = [&](std::uint32_t place, bool write) {
      const WgmmaState::Register& entry = state.registers[place / kRowBytes];
      if (entry.hidden != nullptr && !(is_move && write)) {
        report("wgmma", instruction, "touches a register of an accumulator while a wgmma is in flight");
      } else if (write && entry.operand_of != 0 && !is_move) {
        report("wgmma", instruction, "writes a register that a wgmma in flight reads as A");
      }
    };
    for (const std::uint32_t place : instruction.reads) check_register(place, false);
    for (const std::uint32_t place : instruction.writes) check_register(place, true);
  }
  if (is_move) return;
  for (const std::uint32_t place : instruction.reads) state.registers[place / kRowBytes].last_read = state.step;
  for (const std::uint32_t place : instruction.writes) {
    WgmmaState::Register& written = state.registers[place / kRowBytes];
    written.last_write = state.step;
    written.constant = false;
  }
}

void Execution::finish_asynchronous(const Statement* last) {
  for (const Warp& each : warps) {
    const Site site{each.number * kLanes, last};
    if (!each.wgmma.groups.empty() || !each.wgmma.open.accumulators.empty()) {
      reporter.add("leak", site, "the warp exits with a wgmma in flight");
    }
    const WarpgroupTrace& trace = warpgroups[each.index / kWarpsOfGroup];
    if (each.wgmma.issued != trace.issues.size()) {
      reporter.add("wgmma", site,
                   "the warp issued " + std::to_string(each.wgmma.issued) + " wgmmas, its warpgroup " +
                       std::to_string(trace.issues.size()));
    }
  }
  for (int thread = 0; thread < num_threads; ++thread) {
    const BulkGroups& of_thread = bulk[thread];
    const bool reading =
        !of_thread.open.empty() || std::any_of(of_thread.groups.begin(), of_thread.groups.end(),
                                               [](const auto& g) { return !g.read && !g.stores.empty(); });
    if (reading)
      reporter.add("leak", {first_thread + thread, last},
                   "the thread exits while a bulk store may still read shared memory");
  }
  const auto lost = [](const auto& copy) { return copy->uses_issuer && copy.use_count() == 1; };
  if (std::any_of(in_flight.begin(), in_flight.end(), lost)) {
    reporter.add("leak", {first_thread, last}, "the block ends with a bulk load in flight");
  }
  // All registers after setmaxnreg must fit into those that the block was launched with, at most 65536.
  const int launched = 65536 / (num_warps * kLanes) / 8 * 8;
  int total = 0;
  bool changed = false;
  for (const Warp& each : warps) {
    changed |= each.wgmma.max_registers != 0;
    total += each.wgmma.max_registers != 0 ? each.wgmma.max_registers : std::min(launched, 255);
  }
  if (changed && total > launched * num_warps) {
    reporter.add("deadlock", {0, last},
                 "setmaxnreg asks for " + std::to_string(total * kLanes) + " registers of " +
                     std::to_string(launched * num_warps * kLanes));
  }
}

bool decode_hopper(Decoder& d) {
  if (d.is("wgmma")) return decode_wgmma(d), true;
  if (d.is("setmaxnreg")) {
    d.take_one_of({"inc", "dec"});
    d.take("sync");
    d.take("aligned");
    d.take_type();
    const int count = constant(d, 0);
    if (count % 8 != 0 || count < 24 || count > 256) d.fail("must be a multiple of 8 from 24 to 256");
    d.instruction.option[0] = count;
    d.instruction.handler = &set_max_registers;
    return true;
  }
  return decode_bulk_copy(d);
}

}  // namespace emulator
