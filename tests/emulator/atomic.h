// Atomic operations on values, as atom, red and red.async do them.
#pragma once

#include <cstdint>

#include "parser.h"

namespace emulator {

enum Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap, kIncrement, kDecrement };

// The new value; `c` is the last operand of a compare-and-swap.
std::uint64_t apply_atomic(Type type, int operation, std::uint64_t old, std::uint64_t b, std::uint64_t c);

}  // namespace emulator
