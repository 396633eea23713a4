// Compiled once per instruction set, like every kernel file: the functions named here are those of ANDROMEDA_ISA.
#include "kernels.h"

#define ANDROMEDA_STRINGIFY_(x) #x
#define ANDROMEDA_STRINGIFY(x) ANDROMEDA_STRINGIFY_(x)

namespace andromeda::cpu::ANDROMEDA_ISA {

void attention_forward(const AttentionParams& params, int num_threads);
void attention_backward(const AttentionBackwardParams& params, int num_threads);
void qk_norm_rotary_forward(const QkNormRotaryParams& params, int num_threads);
void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, int num_threads);
void token_shift_norm_forward(const TokenShiftNormParams& params, int num_threads);
void token_shift_norm_backward(const TokenShiftNormBackwardParams& params, int num_threads);

extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    ANDROMEDA_STRINGIFY(ANDROMEDA_ISA),
    attention_forward,
    attention_backward,
    qk_norm_rotary_forward,
    qk_norm_rotary_backward,
    token_shift_norm_forward,
    token_shift_norm_backward,
};

}  // namespace andromeda::cpu::ANDROMEDA_ISA
