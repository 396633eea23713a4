// Numbers that are not finite, kept away from products.
//
// A product over keys or queries multiplies by 0 the rows that a result does not see, and 0 * NaN is NaN. So wherever a
// product sums over the rows of an operand, the operand is finite: a NaN or an infinity is replaced by 0, and
// add_scaled() adds it afterwards to the sums of the rows that see it.
#pragma once

#include "simd.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

// Whether any of the included numbers is not finite, for two operations per vector.
class NonFiniteFlag {
 public:
  void include(Vec x) { bits_ |= (IntVec)(x * 0.0f); }  // a zero of either sign, or a NaN
  bool any() const { return ANDROMEDA_ISA::any(bits_ & 0x7f800000); }

 private:
  IntVec bits_{};
};

inline IntVec is_finite(Vec x) { return ((IntVec)x & 0x7f800000) != 0x7f800000; }

// Moves the numbers that are not finite from `row` to `rest`; both are 0 where the other has the number. Returns
// whether there are any.
inline bool separate_not_finite(float* row, int width, float* rest) {
  NonFiniteFlag not_finite;
  for (int channel = 0; channel < width; channel += kLanes) {
    const Vec x = load(row + channel);
    not_finite.include(x);
    store(row + channel, select(is_finite(x), x, Vec{}));
    store(rest + channel, select(is_finite(x), Vec{}, x));
  }
  return not_finite.any();
}

inline void add_scaled(float* sums, float weight, const float* row, int width) {
  for (int channel = 0; channel < width; channel += kLanes)
    store(sums + channel, load(sums + channel) + weight * load(row + channel));
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
