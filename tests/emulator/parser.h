// PTX text as data: the entries of a file, and the statements of one entry with names replaced by places.
//
// A register is a row of 32 lanes in the register file of a warp; its place is the byte offset of the row. A predicate
// is one 32-bit word there, a bit per lane. Constants of the code and special registers (%tid.x) are rows as well, so
// that an instruction reads every operand in the same way. decode.h gives instructions their meaning.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"

namespace emulator {

enum class Type : std::uint8_t {
  kNone,
  kPred,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kF16,
  kBF16,
  kF32,
  kTF32,
  kF64,
  kF16x2,
  kBF16x2,
  kS16x2,
  kU16x2,
};

Type type_named(const std::string& name);  // kNone if it is no type
int bytes_of(Type type);                   // per lane; 0 for predicates
bool is_float(Type type);                  // of 16, 32 or 64 bits, or a pair
bool is_signed(Type type);                 // a signed integer

struct Operand {
  enum class Kind : std::uint8_t {
    kNone,      // _
    kRegister,  // at `place`
    kConstant,  // `value`; gets a place when its instruction says how wide it is
    kVector,    // {a, b}, or a|b: `elements`
    kAddress,   // [base + displacement, {further}]: base is elements[0], displacement is `value`
    kLabel,     // statement number `value`
  };
  Kind kind = Kind::kNone;
  bool negated = false;     // !p
  std::uint8_t width = 0;   // of a register, bytes per lane; 0: predicate
  std::uint32_t place = 0;  // in the register file
  std::int64_t value = 0;
  std::vector<Operand> elements;
};

struct Statement {
  std::string text;
  std::string opcode;
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;
  Operand guard;  // kNone: always executed
  int file = 0;   // of the last .loc, 0: none
  int line = 0;   // of the last .loc
  int ptx_line = 0;
};

// Variables of module scope that live in global memory (.global, .const), with their initial values.
struct ModuleVariable {
  std::vector<std::uint8_t> storage;
  Buffer buffer;  // within the storage, aligned
};

struct Module {
  std::vector<ModuleVariable> variables;
  std::map<int, std::string> files;  // of .file
};

// Fixed places, so that addresses in the code can be constants.
constexpr std::uint32_t kSharedStart = 1024;  // the first KiB of shared memory belongs to the system, as on a device
constexpr std::size_t kParameterBytes = 32764 + 4;
std::uint8_t* parameter_block();  // of the running launch

// One entry: the head at once, the body when it is first run.
struct Entry {
  struct Parameter {
    std::string name;
    std::size_t offset, bytes;
  };
  std::string name;
  std::vector<Parameter> parameters;
  std::size_t parameter_bytes = 0;
  std::size_t max_threads = 1024;
  Dim3 required_cluster{0, 0, 0};
  std::string body;
  int body_line = 0;                            // of the text
  std::map<std::string, std::int64_t> symbols;  // module variables and .shared arrays of module scope
  std::size_t shared_bytes = 0;                 // static
  std::size_t dynamic_alignment = 16;           // of the .extern .shared array
  std::shared_ptr<Module> module;
};

int special_bytes(const std::string& name);  // per lane of a special register

struct Body {
  std::vector<Statement> statements;
  std::map<std::string, std::uint32_t> special;  // register -> place of its row
  std::uint32_t register_bytes = 0;
  std::uint32_t local_bytes = 0;  // per thread
  std::size_t shared_bytes = 0;   // static, with the arrays declared in the body
};

std::vector<Entry> parse_entries(const std::string& text);

// The address of dynamic shared memory is known after all static arrays; until then this value stands for it.
constexpr std::int64_t kDynamicShared = INT64_MIN + 1;
Body parse_body(const Entry& entry);

std::string trim(const std::string& text);
std::vector<std::string> split(const std::string& text, char separator);  // outside of brackets

}  // namespace emulator
