// Tensor maps: what cuTensorMapEncodeTiled makes of a tensor, and the walk of a copy engine over one box of it.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

// Fills 128 opaque bytes as a CUtensorMap; returns "" or the reason why the driver would refuse. swizzle is 0, 32, 64
// or 128 bytes, element_bytes 1, 2, 4 or 8; sizes and box count elements, innermost dimension first; byte_strides has
// rank - 1 entries, for dimensions 1 and up.
std::string encode_tensor_map(void* map, int element_bytes, int rank, void* address, const std::uint64_t* sizes,
                              const std::uint64_t* byte_strides, const std::uint32_t* box,
                              const std::uint32_t* element_strides, int swizzle);

}  // namespace emulator
