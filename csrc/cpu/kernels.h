// The table of CPU kernels of one instruction set. select_isa.cpp picks a table when the library is loaded.
//
// To add an operation: one field here, one line in kernel_table.cpp, one forwarding function in select_isa.cpp.
#pragma once

#include "andromeda/attention.h"
#include "andromeda/qk_norm_rotary.h"
#include "andromeda/token_shift_norm.h"

namespace andromeda::cpu {

struct KernelTable {
  const char* isa;
  decltype(&cpu::attention_forward) attention_forward;
  decltype(&cpu::attention_backward) attention_backward;
  decltype(&cpu::qk_norm_rotary_forward) qk_norm_rotary_forward;
  decltype(&cpu::qk_norm_rotary_backward) qk_norm_rotary_backward;
  decltype(&cpu::token_shift_norm_forward) token_shift_norm_forward;
  decltype(&cpu::token_shift_norm_backward) token_shift_norm_backward;
};

}  // namespace andromeda::cpu
