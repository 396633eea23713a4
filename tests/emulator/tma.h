// Tensor maps: the result of cuTensorMapEncodeTiled, and the walk of a copy engine over one box of a tensor.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

// Fills the 128 opaque bytes of a CUtensorMap; returns "" or the reason why the driver would refuse. swizzle is 0, 32,
// 64 or 128 bytes, element_bytes 1, 2, 4 or 8; sizes and box count elements, innermost dimension first; byte_strides
// has rank - 1 entries, for dimensions 1 and up.
std::string encode_tensor_map(void* map, int element_bytes, int rank, void* address, const std::uint64_t* sizes,
                              const std::uint64_t* byte_strides, const std::uint32_t* box,
                              const std::uint32_t* element_strides, int swizzle);

// The same 128 bytes, decoded.
struct TensorMap {
  static constexpr int kMaxRank = 5;
  std::uint64_t magic;
  std::uint8_t* address;
  std::uint64_t sizes[kMaxRank];
  std::uint64_t byte_strides[kMaxRank - 1];
  std::uint16_t box[kMaxRank];
  std::uint8_t rank, element_bytes, swizzle;

  bool valid() const;
  std::uint32_t box_bytes() const;
  std::uint32_t shared_alignment() const;  // of the box in shared memory
};
static_assert(sizeof(TensorMap) <= 128);

// A row of a box: `bytes` of the tensor at `global`, which belong at `offset` of the box as it lies in shared memory
// before swizzling. Bytes outside of the tensor are left out.
struct BoxRow {
  std::uint32_t offset;
  std::uint8_t* global;
  std::uint32_t bytes;
};
void for_each_row(const TensorMap& map, const std::int32_t* coordinates,
                  const std::function<void(const BoxRow&)>& visit);

}  // namespace emulator
