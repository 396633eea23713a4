// Tensor-core layouts: which element of a tile a lane holds in which register, and where a tile lies in shared memory.
//
// Lane l has group g = l / 4 and column pair c = l % 4. The maps are functions on their own, so that a test can print
// them next to the tables of the PTX manual.
//
// Sums: products are exact in double, summed in double with the accumulator, and rounded once to float32 at the end of
// the k step. Tensor cores truncate aligned sums instead; the difference is below what a kernel may rely on.
#pragma once

#include <cstdint>

namespace emulator {

struct Place {
  int row, column;
};

// mma m16n8k*: A (row, k), registers of two 16-bit elements; half is 0 for the low one.
constexpr Place mma_a(int lane, int index, int half) {
  return {lane / 4 + 8 * (index & 1), 2 * (lane % 4) + half + 8 * (index >> 1)};
}
// B (k, column)
constexpr Place mma_b(int lane, int index, int half) { return {2 * (lane % 4) + half + 8 * index, lane / 4}; }
// C and D
constexpr Place mma_c(int lane, int index) { return {lane / 4 + 8 * (index >> 1), 2 * (lane % 4) + (index & 1)}; }
// The same with one 32-bit element (TF32) in a register: k counts in steps of four.
constexpr Place mma_a32(int lane, int index) { return {lane / 4 + 8 * (index & 1), lane % 4 + 4 * (index >> 1)}; }
constexpr Place mma_b32(int lane, int index) { return {lane % 4 + 4 * index, lane / 4}; }
// ldmatrix: the elements of an 8x8 matrix that a lane gets; half as above. With .trans rows and columns change places.
constexpr Place ldmatrix_element(int lane, int half, bool transposed) {
  const int row = lane / 4, column = 2 * (lane % 4) + half;
  return transposed ? Place{column, row} : Place{row, column};
}
// wgmma D, of the warp's 16 rows
constexpr Place wgmma_d(int lane, int index) {
  return {lane / 4 + 8 * (index >> 1 & 1), 8 * (index >> 2) + 2 * (lane % 4) + (index & 1)};
}

// Shared memory is swizzled by exclusive or on absolute address bits: 128, 64, 32 bytes, or none (0).
constexpr std::uint32_t swizzled(std::uint32_t address, int swizzle) {
  const std::uint32_t bits = swizzle == 128 ? 0x70 : swizzle == 64 ? 0x30 : swizzle == 32 ? 0x10 : 0;
  return address ^ (address >> 3 & bits);
}

// A wgmma descriptor, decoded.
struct MatrixDescriptor {
  std::uint32_t start, leading, stride;  // bytes
  int base_offset;
  int swizzle;
};
constexpr MatrixDescriptor decode_descriptor(std::uint64_t bits) {
  constexpr int kSwizzles[] = {0, 128, 64, 32};
  const auto field = [bits](int at) { return static_cast<std::uint32_t>(bits >> at & 0x3fff) << 4; };
  return {field(0), field(16), field(32), static_cast<int>(bits >> 49 & 7), kSwizzles[bits >> 62]};
}
// The address of 16-bit element k of row m of A, or of column m of B.
constexpr std::uint32_t operand_address(const MatrixDescriptor& d, int m, int k, bool k_major) {
  const int width = d.swizzle == 0 ? 16 : d.swizzle;  // bytes of one row of the pattern
  std::uint32_t offset = 0;
  if (k_major) {
    offset = (m / 8) * d.stride + (m % 8) * width;
    offset += d.swizzle == 0 ? (k / 8) * d.leading + 2 * (k % 8) : 2 * k;
  } else {
    const int run = width / 2;  // elements that lie side by side
    const std::uint32_t between_runs = d.swizzle == 0 ? d.stride : d.leading;
    const std::uint32_t between_eights = d.swizzle == 0 ? d.leading : d.stride;
    offset = (m / run) * between_runs + 2 * (m % run) + (k % 8) * width + (k / 8) * between_eights;
  }
  return swizzled(d.start + offset, d.swizzle);
}

}  // namespace emulator
