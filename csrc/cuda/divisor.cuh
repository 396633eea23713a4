// Division by a number that the host knows: one multiplication and a shift instead of some 25 instructions, one after
// the other.
#pragma once

#include <cstdint>

namespace andromeda::cuda {

// A divisor d >= 1, for numerators below 2^31. With 2^(s - 1) < d <= 2^s the multiplier m = ceil(2^(31 + s) / d) has 32
// bits. It is too large by e / d, e < d <= 2^s, so that n m / 2^(31 + s) exceeds n / d by less than 1 / d: the floor is
// the same.
struct Divisor {
  int value;
  std::uint32_t multiplier;
  int shift;

  static constexpr Divisor of(std::int64_t d) {
    int shift = 31;
    while ((std::int64_t{1} << (shift - 31)) < d) ++shift;
    const std::uint64_t power = std::uint64_t{1} << shift, divisor = static_cast<std::uint64_t>(d);
    return {static_cast<int>(d), static_cast<std::uint32_t>((power + divisor - 1) / divisor), shift};
  }
};

struct Quotient {
  int quotient, remainder;
};

__host__ __device__ constexpr int operator/(int numerator, const Divisor& divisor) {
  return static_cast<int>((static_cast<std::uint64_t>(static_cast<std::uint32_t>(numerator)) * divisor.multiplier) >>
                          divisor.shift);
}

__host__ __device__ constexpr Quotient divide(int numerator, const Divisor& divisor) {
  const int quotient = numerator / divisor;
  return {quotient, numerator - quotient * divisor.value};
}

// Around the first and the last multiples, where a quotient changes.
constexpr bool divides(int d) {
  const Divisor divisor = Divisor::of(d);
  for (const std::int64_t multiple : {d, 0x7FFFFFFF / d * d}) {
    for (std::int64_t n = multiple - 1; n <= multiple + 1 && n <= 0x7FFFFFFF; ++n) {
      if (static_cast<int>(n) / divisor != n / d) return false;
    }
  }
  return 0 / divisor == 0;
}
static_assert(divides(1) && divides(2) && divides(3) && divides(7) && divides(24) && divides(641) && divides(65535));
static_assert(divides(65537) && divides(0x3FFFFFFF) && divides(0x40000001) && divides(0x7FFFFFFE) &&
              divides(0x7FFFFFFF));

}  // namespace andromeda::cuda
