// Applies an operation on values to whole rows of registers.
#pragma once

#include <cstddef>
#include <utility>

#include "decode.h"

namespace emulator {

template <typename F, typename R, typename... A, std::size_t... kIndex>
void map_rows(Execution& x, const Instruction& i, std::index_sequence<kIndex...>) {
  alignas(64) R result[kLanes];
  const F f{};
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = f(x.row<A>(i.operands[kIndex + 1])[lane]...);
  x.store(i.operands[0], result);
}

// operand 0 = F(operands 1, 2, ...)
template <typename F, typename R, typename... A>
Step map(Execution& x, const Instruction& i) {
  map_rows<F, R, A...>(x, i, std::index_sequence_for<A...>{});
  return Step::kNext;
}

}  // namespace emulator
