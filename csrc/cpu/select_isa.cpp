// Picks the kernels of one instruction set when the library is loaded, and forwards every call to them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "andromeda/cpu_isa.h"
#include "kernels.h"

namespace andromeda::cpu {

namespace baseline {
extern const KernelTable kernel_table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kernel_table;
}
namespace avx512 {
extern const KernelTable kernel_table;
}
#endif

namespace {

std::vector<const KernelTable*> usable_tables() {
  std::vector<const KernelTable*> tables = {&baseline::kernel_table};
#if defined(__x86_64__)
  // The same levels that CMakeLists.txt passes to -march; the check includes the operating system's support.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) tables.push_back(&avx2::kernel_table);
  if (__builtin_cpu_supports("x86-64-v4")) tables.push_back(&avx512::kernel_table);
#endif
  return tables;
}

const KernelTable& select_table() {
  const std::vector<const KernelTable*> tables = usable_tables();
  const char* wanted = std::getenv("ANDROMEDA_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *tables.back();
  std::string choices;
  for (const KernelTable* table : tables) {
    if (std::string(table->isa) == wanted) return *table;
    choices += (choices.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::runtime_error("andromeda: ANDROMEDA_CPU_ISA must be one of {" + choices + "} on this machine, got '" +
                           wanted + "'");
}

const KernelTable& selected() {
  static const KernelTable& table = select_table();
  return table;
}

}  // namespace

std::vector<const char*> cpu_isas() {
  std::vector<const char*> names;
  for (const KernelTable* table : usable_tables()) names.push_back(table->isa);
  return names;
}

const char* cpu_isa() { return selected().isa; }

void attention_forward(const AttentionParams& params, int num_threads) {
  selected().attention_forward(params, num_threads);
}

void attention_backward(const AttentionBackwardParams& params, int num_threads) {
  selected().attention_backward(params, num_threads);
}

void qk_norm_rotary_forward(const QkNormRotaryParams& params, int num_threads) {
  selected().qk_norm_rotary_forward(params, num_threads);
}

void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, int num_threads) {
  selected().qk_norm_rotary_backward(params, num_threads);
}

void token_shift_norm_forward(const TokenShiftNormParams& params, int num_threads) {
  selected().token_shift_norm_forward(params, num_threads);
}

void token_shift_norm_backward(const TokenShiftNormBackwardParams& params, int num_threads) {
  selected().token_shift_norm_backward(params, num_threads);
}

}  // namespace andromeda::cpu
