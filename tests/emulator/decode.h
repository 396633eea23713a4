// From a statement to an instruction: which function executes it, and what its operands and modifiers mean.
//
// The decoder of an instruction must take every modifier; one that is left over stops the kernel. So nothing that
// changes a result is ever ignored.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "execution.h"

namespace emulator {

// The rows of constants, after the registers; equal constants share one.
class Constants {
 public:
  explicit Constants(std::uint32_t first_place) : next_place_(first_place) {}
  std::uint32_t place_of(std::int64_t value, int bytes);
  std::uint32_t end() const { return next_place_; }
  void fill(std::uint8_t* register_file) const;

 private:
  std::map<std::pair<std::int64_t, int>, std::uint32_t> places_;
  std::uint32_t next_place_;
};

class Decoder {
 public:
  Decoder(const Statement& statement, Constants& constants, std::uint32_t dynamic_shared)
      : statement_(statement), constants_(constants), dynamic_shared_(dynamic_shared), modifiers_(statement.modifiers) {
    instruction.operands = statement.operands;
    instruction.statement = &statement;
  }

  const Statement& statement() const { return statement_; }
  const std::string& opcode() const { return statement_.opcode; }
  bool is(const char* opcode) const { return statement_.opcode == opcode; }
  bool has(const char* modifier) const;
  bool take(const std::string& modifier);
  // The index of the first of these modifiers that the statement has, or -1.
  int take_one_of(const std::vector<std::string>& modifiers);
  Type take_type();                               // the first type among the modifiers; kNone if there is none
  std::string take_prefixed(const char* prefix);  // the first modifier that starts with it, or ""
  // Hints for caches: no result depends on them.
  void take_cache_hints();
  Space take_space();

  std::size_t num_operands() const { return instruction.operands.size(); }
  Operand& operand(std::size_t index);
  // Operand `index` is a register of this many bytes per lane (0: a predicate), or a constant that gets a row of them.
  void source(std::size_t index, int bytes) { place(operand(index), bytes); }
  void place(Operand& operand, int bytes);
  void place_any_width(Operand& operand, int bytes);  // a register of any width: loads, stores, conversions
  void address(std::size_t index);

  [[noreturn]] void fail(const std::string& what) const;
  void finish();  // an error for modifiers that were not taken

  Instruction instruction;

 private:
  const Statement& statement_;
  Constants& constants_;
  const std::uint32_t dynamic_shared_;
  std::vector<std::string> modifiers_;
};

// Each decodes some opcodes and returns false for the others.
bool decode_predicate(Decoder& decoder);
bool decode_conversion(Decoder& decoder);
bool decode_arithmetic(Decoder& decoder);
bool decode_data_movement(Decoder& decoder);
bool decode_synchronisation(Decoder& decoder);
bool decode_matrix(Decoder& decoder);
bool decode_bulk_copy(Decoder& decoder);
bool decode_hopper(Decoder& decoder);

}  // namespace emulator
