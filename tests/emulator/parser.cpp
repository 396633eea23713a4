#include "parser.h"

#include <sys/mman.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>

namespace emulator {
namespace {

constexpr const char* kSpace = " \t\r\n";
constexpr std::size_t kVariableAlignment = 256;  // at least what any access needs

[[noreturn]] void fail(int line, const std::string& what, const std::string& text) {
  throw std::runtime_error("emulator: PTX line " + std::to_string(line) + ": " + what + ": " + text.substr(0, 200));
}

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Reads numbers with the C library: where a compiler links its C++ library into each shared library, the streams of two
// of them confuse their locale facets, and the process aborts.
std::size_t number_of(const std::string& word, int line) {
  char* end = nullptr;
  const unsigned long long value = std::strtoull(word.c_str(), &end, 10);
  if (word.empty() || *end != '\0') fail(line, "no number", word);
  return static_cast<std::size_t>(value);
}

int count_lines(const std::string& text, std::size_t from, std::size_t to) {
  return static_cast<int>(std::count(text.begin() + from, text.begin() + to, '\n'));
}

// Comments become spaces: positions and line numbers stay.
std::string without_comments(std::string text) {
  for (std::size_t i = 0; i + 1 < text.size(); ++i) {
    if (text[i] == '"') {
      i = text.find('"', i + 1);
      if (i == std::string::npos) break;
    } else if (text[i] == '/' && text[i + 1] == '/') {
      while (i < text.size() && text[i] != '\n') text[i++] = ' ';
    } else if (text[i] == '/' && text[i + 1] == '*') {
      const std::size_t end = std::min(text.find("*/", i), text.size() - 2) + 2;
      for (; i < end; ++i) {
        if (text[i] != '\n') text[i] = ' ';
      }
    }
  }
  return text;
}

// The position after the bracket that closes the one at `open`.
std::size_t after_closing(const std::string& text, std::size_t open) {
  int depth = 0;
  for (std::size_t i = open; i < text.size(); ++i) {
    if (text[i] == '"') i = text.find('"', i + 1);
    if (text[i] == '{' || text[i] == '(') ++depth;
    if ((text[i] == '}' || text[i] == ')') && --depth == 0) return i + 1;
  }
  fail(count_lines(text, 0, open) + 1, "bracket is never closed", text.substr(open, 40));
}

// 0f3F800000 and 0d... are bits of a float and of a double; the rest are integers.
bool parse_number(const std::string& text, std::int64_t* value) {
  const char* begin = text.c_str();
  if (text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1]) != nullptr) {
    *value = static_cast<std::int64_t>(std::strtoull(begin + 2, nullptr, 16));
    return true;
  }
  if (!std::isdigit(static_cast<unsigned char>(text[0])) && text[0] != '-' && text[0] != '+') return false;
  char* end = nullptr;
  *value = text[0] == '-' ? std::strtoll(begin, &end, 0) : static_cast<std::int64_t>(std::strtoull(begin, &end, 0));
  if (*end == 'U') ++end;
  return *end == '\0';
}

// .shared .align 16 .b8 name[1024], .global .align 4 .b32 table[3] = {1, 2, 3}: the same form in every space.
struct Variable {
  std::string space, name;
  bool is_extern = false;
  std::size_t alignment = 1, bytes = 0;
  std::vector<std::uint8_t> initial;
};

Variable parse_variable(const std::string& text, int line) {
  Variable variable;
  Type type = Type::kNone;
  const std::size_t equals = text.find('=');
  std::istringstream words(text.substr(0, equals));
  std::string word, declarator;
  while (words >> word) {
    if (word == ".align") {
      words >> word;
      variable.alignment = number_of(word, line);
    } else if (word == ".extern") {
      variable.is_extern = true;
    } else if (word == ".shared" || word == ".global" || word == ".const" || word == ".local" || word == ".param") {
      variable.space = word.substr(1);
    } else if (word[0] == '.' && type_named(word.substr(1)) != Type::kNone) {
      type = type_named(word.substr(1));
    } else if (word[0] != '.') {
      declarator += word;
    } else if (word != ".visible" && word != ".weak" && word != ".ptr" && word != ".common") {
      fail(line, "unknown word " + word + " in a declaration", text);
    }
  }
  if (type == Type::kNone) fail(line, "declaration without a type", text);
  std::size_t count = 1;
  const std::size_t bracket = declarator.find('[');
  variable.name = declarator.substr(0, bracket);
  for (std::size_t at = bracket; at != std::string::npos; at = declarator.find('[', at + 1)) {
    count *= std::strtoull(declarator.c_str() + at + 1, nullptr, 0);  // [] counts as 0: dynamic
  }
  const std::size_t element_bytes = bytes_of(type);
  variable.alignment = std::max(variable.alignment, element_bytes);
  variable.bytes = count * element_bytes;
  variable.initial.assign(variable.bytes, 0);
  if (equals != std::string::npos) {
    std::string list = trim(text.substr(equals + 1));
    list.erase(std::remove_if(list.begin(), list.end(), [](char c) { return c == '{' || c == '}'; }), list.end());
    std::size_t offset = 0;
    for (const std::string& item : split(list, ',')) {
      std::int64_t value = 0;
      if (!parse_number(item, &value)) fail(line, "initial value is not a number", item);
      if (offset + element_bytes > variable.bytes) fail(line, "more initial values than elements", variable.name);
      std::memcpy(&variable.initial[offset], &value, element_bytes);
      offset += element_bytes;
    }
  }
  return variable;
}

// The arrays of shared memory in the order of their declaration.
std::int64_t place_shared(const Variable& variable, std::size_t* shared_bytes) {
  const std::size_t offset = round_up(kSharedStart + *shared_bytes, variable.alignment);
  *shared_bytes = offset - kSharedStart + variable.bytes;
  return static_cast<std::int64_t>(offset);
}

class BodyParser {
 public:
  explicit BodyParser(const Entry& entry) : entry_(entry), text_(entry.body) {
    body_.shared_bytes = entry.shared_bytes;
    scopes_.push_back({0, {}, 0});
    parents_.push_back(-1);
  }

  Body parse() {
    std::size_t at = 0;
    while ((at = text_.find_first_not_of(kSpace, at)) != std::string::npos) {
      advance_to(at);
      at = parse_next(at);
    }
    resolve_labels();
    body_.register_bytes = high_water_;
    for (const std::string& name : special_order_) {
      body_.special[name] = body_.register_bytes;
      body_.register_bytes += kSpecialWidth * 32;
    }
    // Special registers were numbered while the size of the register file was unknown.
    for (Statement& statement : body_.statements) {
      for (Operand& operand : statement.operands) place_special(operand);
    }
    return std::move(body_);
  }

 private:
  static constexpr int kSpecialWidth = 8;  // wide enough for %clock64; most are read as 4 bytes

  struct Register {
    std::uint32_t place;
    std::uint8_t width;
  };
  struct Scope {
    int id;
    std::map<std::string, Register> registers;
    std::uint32_t first_place;  // registers of a closed scope leave their place to the next one
  };
  struct Reference {
    std::size_t statement, operand;
    int scope;
    std::string label;
  };

  void advance_to(std::size_t at) {
    line_ += count_lines(text_, line_counted_to_, at);
    line_counted_to_ = at;
  }

  // Parses the item at `at`; returns the position after it.
  std::size_t parse_next(std::size_t at) {
    if (text_[at] == '{') {
      scopes_.push_back({static_cast<int>(parents_.size()), {}, next_place_});
      parents_.push_back(scopes_[scopes_.size() - 2].id);
      return at + 1;
    }
    if (text_[at] == '}') {
      next_place_ = scopes_.back().first_place;
      scopes_.pop_back();
      return at + 1;
    }
    if (starts_with(text_.substr(at, 5), ".loc ") || starts_with(text_.substr(at, 5), ".loc\t")) {
      const std::size_t end = std::min(text_.find('\n', at), text_.size());
      std::istringstream words(text_.substr(at + 4, end - at - 4));
      std::string file_word, line_word;
      words >> file_word >> line_word;
      const int file = static_cast<int>(number_of(file_word, line_));
      const int line = static_cast<int>(number_of(line_word, line_));
      if (line != 0) {  // 0: code without a line
        source_file_ = file;
        source_line_ = line;
      }
      return end;
    }
    std::size_t end = at;
    int depth = 0;
    for (; end < text_.size(); ++end) {
      const char c = text_[end];
      if (c == '{' || c == '[' || c == '(') ++depth;
      if (c == '}' || c == ']' || c == ')') --depth;
      if (c == ';' && depth == 0) break;
      const bool scoped = text_[end + 1] == ':' || (end > 0 && text_[end - 1] == ':');  // shared::cta
      if (c == ':' && depth == 0 && !scoped) {
        const std::string label = text_.substr(at, end - at);
        if (label.find_first_of(" \t.") != std::string::npos) continue;
        labels_[{scopes_.back().id, label}] = static_cast<std::int64_t>(body_.statements.size());
        return end + 1;
      }
    }
    if (end == text_.size()) fail(line_, "statement without an end", text_.substr(at, 60));
    std::string statement = trim(text_.substr(at, end - at));
    std::replace(statement.begin(), statement.end(), '\n', ' ');
    std::replace(statement.begin(), statement.end(), '\t', ' ');
    if (statement.empty()) return end + 1;
    if (statement[0] == '.') {
      parse_directive(statement);
    } else {
      parse_instruction(statement);
    }
    return end + 1;
  }

  void parse_directive(const std::string& text) {
    if (starts_with(text, ".pragma")) return;  // hints about unrolling
    if (starts_with(text, ".branchtargets")) fail(line_, "not supported", text);
    if (!starts_with(text, ".reg")) return declare_variable(parse_variable(text, line_));
    const std::string rest = trim(text.substr(4));
    const std::size_t space = rest.find(' ');
    const Type type = type_named(rest.substr(1, space - 1));
    if (type == Type::kNone) fail(line_, "unknown register type", text);
    for (const std::string& item : split(rest.substr(space), ',')) {
      const std::size_t range = item.find('<');  // %r<40>: %r0 ... %r39
      if (range == std::string::npos) {
        declare_register(item, bytes_of(type));
        continue;
      }
      const int count = std::atoi(item.c_str() + range + 1);
      for (int i = 0; i < count; ++i) declare_register(item.substr(0, range) + std::to_string(i), bytes_of(type));
    }
  }

  void declare_register(const std::string& name, int width) {
    scopes_.back().registers[name] = {next_place_, static_cast<std::uint8_t>(width)};
    // Rows are multiples of 32 bytes apart, so that rows of numbers can be read with vector loads.
    next_place_ += width == 0 ? 32 : width * 32;
    high_water_ = std::max(high_water_, next_place_);
  }

  void declare_variable(const Variable& variable) {
    if (variable.space == "shared") {
      if (variable.bytes == 0) {
        symbols_[variable.name] = kDynamicShared;
      } else {
        symbols_[variable.name] = place_shared(variable, &body_.shared_bytes);
      }
    } else if (variable.space == "local") {
      const std::size_t offset = round_up(body_.local_bytes, variable.alignment);
      symbols_[variable.name] = static_cast<std::int64_t>(offset);
      body_.local_bytes = static_cast<std::uint32_t>(offset + variable.bytes);
    } else {
      fail(line_, "a declaration in state space ." + variable.space + " within a body is not supported", variable.name);
    }
  }

  void parse_instruction(std::string text) {
    Statement statement;
    statement.text = text;
    statement.file = source_file_;
    statement.line = source_line_;
    statement.ptx_line = line_;
    if (text[0] == '@') {
      const std::size_t space = text.find(' ');
      statement.guard = parse_operand(trim(text.substr(1, space - 1)));
      text = trim(text.substr(space));
    }
    const std::size_t space = text.find(' ');
    std::istringstream parts(text.substr(0, space));
    std::string part;
    std::getline(parts, statement.opcode, '.');
    while (std::getline(parts, part, '.')) statement.modifiers.push_back(part);
    if (space != std::string::npos) {
      for (const std::string& item : split(text.substr(space), ',')) {
        statement.operands.push_back(parse_operand(item));
        if (statement.operands.back().kind == Operand::Kind::kLabel) {
          references_.push_back({body_.statements.size(), statement.operands.size() - 1, scopes_.back().id, item});
        }
      }
    }
    body_.statements.push_back(std::move(statement));
  }

  Operand parse_operand(const std::string& text) {
    Operand operand;
    if (text.empty()) fail(line_, "empty operand", "");
    if (text == "_") return operand;
    if (text[0] == '!') {
      operand = parse_operand(trim(text.substr(1)));
      operand.negated = true;
      return operand;
    }
    if (text[0] == '{' || (text[0] != '[' && text.find('|') != std::string::npos)) {
      operand.kind = Operand::Kind::kVector;
      const bool braces = text[0] == '{';
      for (const std::string& item : split(braces ? text.substr(1, text.rfind('}') - 1) : text, braces ? ',' : '|')) {
        operand.elements.push_back(parse_operand(item));
      }
      return operand;
    }
    if (text[0] == '[') return parse_address(text);
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(text);
      if (found == scope->registers.end()) continue;
      operand.kind = Operand::Kind::kRegister;
      operand.place = found->second.place;
      operand.width = found->second.width;
      return operand;
    }
    if (text[0] == '%') return parse_special(text);
    operand.kind = Operand::Kind::kConstant;
    if (parse_number(text, &operand.value) || parse_symbol(text, &operand.value)) return operand;
    operand.kind = Operand::Kind::kLabel;
    return operand;
  }

  // [base], [base+16], [base, {x, y}], [symbol+16], [16]
  Operand parse_address(const std::string& text) {
    Operand operand;
    operand.kind = Operand::Kind::kAddress;
    const std::vector<std::string> items = split(trim(text.substr(1, text.rfind(']') - 1)), ',');
    std::string base = items[0];
    const std::size_t sign = base.find_first_of("+-", 1);
    if (sign != std::string::npos) {
      const std::string number = trim(base.substr(base[sign] == '+' ? sign + 1 : sign));
      if (!parse_number(number, &operand.value)) fail(line_, "displacement is not a number", text);
      base = trim(base.substr(0, sign));
    }
    operand.elements.push_back(parse_operand(base));
    for (std::size_t i = 1; i < items.size(); ++i) operand.elements.push_back(parse_operand(items[i]));
    if (operand.elements[0].kind == Operand::Kind::kLabel) fail(line_, "unknown name in an address", text);
    return operand;
  }

  bool parse_symbol(const std::string& text, std::int64_t* value) {
    const auto local = symbols_.find(text);
    if (local != symbols_.end()) {
      *value = local->second;
      return true;
    }
    for (const Entry::Parameter& parameter : entry_.parameters) {
      if (parameter.name != text) continue;
      *value = reinterpret_cast<std::int64_t>(parameter_block() + parameter.offset);
      return true;
    }
    const auto found = entry_.symbols.find(text);
    if (found == entry_.symbols.end()) return false;
    *value = found->second;
    return true;
  }

  Operand parse_special(const std::string& text) {
    static const char* const kNames[] = {"%tid.",       "%ntid.",       "%ctaid.",         "%nctaid.",
                                         "%clusterid.", "%nclusterid.", "%cluster_ctaid.", "%cluster_nctaid."};
    static const char* const kPlain[] = {"%laneid",
                                         "%warpid",
                                         "%nwarpid",
                                         "%lanemask_eq",
                                         "%lanemask_lt",
                                         "%lanemask_le",
                                         "%lanemask_gt",
                                         "%lanemask_ge",
                                         "%cluster_ctarank",
                                         "%cluster_nctarank",
                                         "%smid",
                                         "%nsmid",
                                         "%gridid",
                                         "%clock",
                                         "%clock64",
                                         "%globaltimer",
                                         "%globaltimer_lo",
                                         "%dynamic_smem_size",
                                         "%total_smem_size",
                                         "%is_explicit_cluster"};
    const bool known =
        std::any_of(std::begin(kNames), std::end(kNames), [&](const char* n) { return starts_with(text, n); }) ||
        std::any_of(std::begin(kPlain), std::end(kPlain), [&](const char* n) { return text == n; });
    if (!known) fail(line_, "unknown register", text);
    auto found = std::find(special_order_.begin(), special_order_.end(), text);
    if (found == special_order_.end()) found = special_order_.insert(found, text);
    Operand operand;
    operand.kind = Operand::Kind::kRegister;
    operand.width = kUnplacedSpecial;
    operand.place = static_cast<std::uint32_t>(found - special_order_.begin());
    return operand;
  }

  static constexpr std::uint8_t kUnplacedSpecial = 255;

  void place_special(Operand& operand) {
    for (Operand& element : operand.elements) place_special(element);
    if (operand.width != kUnplacedSpecial) return;
    const std::string& name = special_order_[operand.place];
    operand.width = static_cast<std::uint8_t>(special_bytes(name));
    operand.place = body_.special[name];
  }

  void resolve_labels() {
    for (const Reference& reference : references_) {
      bool found = false;
      for (int scope = reference.scope; scope >= 0 && !found; scope = parents_[scope]) {
        const auto label = labels_.find({scope, reference.label});
        if (label == labels_.end()) continue;
        body_.statements[reference.statement].operands[reference.operand].value = label->second;
        found = true;
      }
      const Statement& statement = body_.statements[reference.statement];
      if (!found && statement.opcode != "call")
        fail(statement.ptx_line, "unknown name " + reference.label, statement.text);
    }
  }

  const Entry& entry_;
  const std::string& text_;
  Body body_;
  std::vector<Scope> scopes_;
  std::vector<int> parents_;  // of every scope; -1: none
  std::map<std::pair<int, std::string>, std::int64_t> labels_;
  std::vector<Reference> references_;
  std::map<std::string, std::int64_t> symbols_;
  std::vector<std::string> special_order_;
  std::uint32_t next_place_ = 0, high_water_ = 0;
  int source_file_ = 0, source_line_ = 0;
  int line_ = entry_.body_line;
  std::size_t line_counted_to_ = 0;
};

class ModuleParser {
 public:
  explicit ModuleParser(const std::string& text) : text_(without_comments(text)), module_(std::make_shared<Module>()) {}

  std::vector<Entry> parse() {
    std::size_t at = 0;
    while ((at = text_.find_first_not_of(kSpace, at)) != std::string::npos) at = parse_next(at);
    for (Entry& entry : entries_) {
      entry.symbols = symbols_;
      entry.shared_bytes = shared_bytes_;
      entry.dynamic_alignment = dynamic_alignment_;
      entry.module = module_;
    }
    return std::move(entries_);
  }

 private:
  int line_at(std::size_t at) const { return count_lines(text_, 0, at) + 1; }

  std::size_t parse_next(std::size_t at) {
    static const char* const kLines[] = {".version", ".target", ".address_size", ".file", ".loc", ".alias"};
    for (const char* word : kLines) {
      if (text_.compare(at, std::strlen(word), word) != 0) continue;
      const std::size_t end = std::min(text_.find('\n', at), text_.size());
      if (std::strcmp(word, ".file") == 0) parse_file(text_.substr(at + 5, end - at - 5));
      return end;
    }
    if (text_.compare(at, 8, ".section") == 0) return after_closing(text_, text_.find('{', at));
    const std::size_t end = text_.find_first_of(";{", at);
    if (end == std::string::npos) fail(line_at(at), "statement without an end", text_.substr(at, 60));
    const std::string head = text_.substr(at, end - at);
    if (head.find(".entry") != std::string::npos) return parse_entry(at);
    if (head.find(".func") != std::string::npos) {  // a call of it stops the kernel that makes it
      return text_[end] == ';' ? end + 1 : after_closing(text_, end);
    }
    if (starts_with(trim(head), ".pragma")) return end + 1;
    const std::size_t semicolon = text_.find(';', at);
    declare(parse_variable(trim(text_.substr(at, semicolon - at)), line_at(at)));
    return semicolon + 1;
  }

  void parse_file(const std::string& text) {
    const std::size_t open = text.find('"'), close = text.find('"', open + 1);
    if (open == std::string::npos || close == std::string::npos) return;
    const std::string path = text.substr(open + 1, close - open - 1);
    module_->files[std::atoi(text.c_str())] = path.substr(path.rfind('/') + 1);
  }

  void declare(const Variable& variable) {
    if (variable.space == "shared") {
      if (variable.bytes == 0) {
        symbols_[variable.name] = kDynamicShared;
        dynamic_alignment_ = std::max(dynamic_alignment_, variable.alignment);
      } else {
        symbols_[variable.name] = place_shared(variable, &shared_bytes_);
      }
      return;
    }
    ModuleVariable stored;
    stored.storage.assign(variable.bytes + kVariableAlignment, 0);
    const std::size_t address = reinterpret_cast<std::size_t>(stored.storage.data());
    std::uint8_t* begin = stored.storage.data() + (round_up(address, kVariableAlignment) - address);
    std::copy(variable.initial.begin(), variable.initial.end(), begin);
    stored.buffer = {begin, variable.bytes, variable.name, variable.space == "global"};
    symbols_[variable.name] = reinterpret_cast<std::int64_t>(begin);
    module_->variables.push_back(std::move(stored));  // moving a vector leaves its elements in place
  }

  // .visible .entry name(parameters) .maxntid 128, 1, 1 { body }
  std::size_t parse_entry(std::size_t at) {
    Entry entry;
    const std::size_t name = text_.find(".entry", at) + 6;
    const std::size_t name_end = text_.find_first_of("({", name);
    entry.name = trim(text_.substr(name, name_end - name));
    std::size_t open = name_end;
    if (text_[name_end] == '(') {
      const std::size_t close = after_closing(text_, name_end);
      for (const std::string& item : split(text_.substr(name_end + 1, close - name_end - 2), ',')) {
        add_parameter(&entry, item, line_at(name));
      }
      open = text_.find('{', close);
      parse_limits(&entry, text_.substr(close, open - close));
    }
    const std::size_t end = after_closing(text_, open);
    entry.body = text_.substr(open + 1, end - open - 2);
    entry.body_line = line_at(open);
    entries_.push_back(std::move(entry));
    return end;
  }

  void add_parameter(Entry* entry, std::string text, int line) {
    const std::size_t ptr = text.find(".ptr");  // .param .u64 .ptr .global .align 1 name: the alignment of the target
    std::size_t alignment = 0;
    if (ptr != std::string::npos) {
      std::istringstream words(text.substr(ptr + 4));
      std::string word, last;
      while (words >> word) last = word;
      text = text.substr(0, ptr) + " " + last;
    }
    const Variable variable = parse_variable(text, line);
    alignment = std::max(alignment, variable.alignment);
    const std::size_t offset = round_up(entry->parameter_bytes, alignment);
    entry->parameters.push_back({variable.name, offset, variable.bytes});
    entry->parameter_bytes = offset + variable.bytes;
  }

  // The numbers after a directive; empty if there is none.
  static std::vector<unsigned> numbers_after(const std::string& text, const char* directive) {
    const std::size_t at = text.find(directive);
    if (at == std::string::npos) return {};
    const char* next = text.c_str() + at + std::strlen(directive);
    std::vector<unsigned> numbers;
    do {
      char* end = nullptr;
      numbers.push_back(static_cast<unsigned>(std::strtoul(next, &end, 10)));
      next = end + std::strspn(end, kSpace);
    } while (*next++ == ',');
    return numbers;
  }

  static void parse_limits(Entry* entry, const std::string& text) {
    for (const char* word : {".maxntid", ".reqntid"}) {
      const std::vector<unsigned> sizes = numbers_after(text, word);
      if (sizes.empty()) continue;
      entry->max_threads = 1;
      for (const unsigned size : sizes) entry->max_threads *= size;
    }
    std::vector<unsigned> cluster = numbers_after(text, ".reqnctapercluster");
    if (cluster.empty()) return;
    cluster.resize(3, 1);
    entry->required_cluster = {cluster[0], cluster[1], cluster[2]};
  }

  const std::string text_;
  std::shared_ptr<Module> module_;
  std::vector<Entry> entries_;
  std::map<std::string, std::int64_t> symbols_;
  std::size_t shared_bytes_ = 0, dynamic_alignment_ = 16;
};

}  // namespace

Type type_named(const std::string& name) {
  static const std::map<std::string, Type> kTypes = {
      {"pred", Type::kPred},     {"u8", Type::kU8},       {"u16", Type::kU16},    {"u32", Type::kU32},
      {"u64", Type::kU64},       {"s8", Type::kS8},       {"s16", Type::kS16},    {"s32", Type::kS32},
      {"s64", Type::kS64},       {"b8", Type::kB8},       {"b16", Type::kB16},    {"b32", Type::kB32},
      {"b64", Type::kB64},       {"b128", Type::kB128},   {"f16", Type::kF16},    {"bf16", Type::kBF16},
      {"f32", Type::kF32},       {"tf32", Type::kTF32},   {"f64", Type::kF64},    {"f16x2", Type::kF16x2},
      {"bf16x2", Type::kBF16x2}, {"s16x2", Type::kS16x2}, {"u16x2", Type::kU16x2}};
  const auto found = kTypes.find(name);
  return found == kTypes.end() ? Type::kNone : found->second;
}

int bytes_of(Type type) {
  switch (type) {
    case Type::kNone:
    case Type::kPred:
      return 0;
    case Type::kU8:
    case Type::kS8:
    case Type::kB8:
      return 1;
    case Type::kU16:
    case Type::kS16:
    case Type::kB16:
    case Type::kF16:
    case Type::kBF16:
      return 2;
    case Type::kU64:
    case Type::kS64:
    case Type::kB64:
    case Type::kF64:
      return 8;
    case Type::kB128:
      return 16;
    default:
      return 4;
  }
}

bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBF16 || type == Type::kF32 || type == Type::kF64 ||
         type == Type::kF16x2 || type == Type::kBF16x2;
}

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

int special_bytes(const std::string& name) {
  return name == "%clock64" || name == "%globaltimer" || name == "%gridid" ? 8 : 4;
}

std::uint8_t* parameter_block() {
  static std::uint8_t* const block = static_cast<std::uint8_t*>(
      mmap(nullptr, kParameterBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  return block;
}

std::string trim(const std::string& text) {
  const std::size_t begin = text.find_first_not_of(kSpace);
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (const char c : text) {
    if (c == '{' || c == '[' || c == '(') ++depth;
    if (c == '}' || c == ']' || c == ')') --depth;
    if (c == separator && depth == 0) {
      parts.push_back(trim(part));
      part.clear();
    } else {
      part += c;
    }
  }
  if (!trim(part).empty()) parts.push_back(trim(part));
  return parts;
}

std::vector<Entry> parse_entries(const std::string& text) { return ModuleParser(text).parse(); }

Body parse_body(const Entry& entry) { return BodyParser(entry).parse(); }

}  // namespace emulator
