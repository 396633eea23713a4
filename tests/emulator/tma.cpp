#include "tma.h"

#include <algorithm>
#include <cstring>

namespace emulator {
namespace {

constexpr std::uint64_t kMagic = 0x70616d726f736e74;

}  // namespace

std::string encode_tensor_map(void* map, int element_bytes, int rank, void* address, const std::uint64_t* sizes,
                              const std::uint64_t* byte_strides, const std::uint32_t* box,
                              const std::uint32_t* element_strides, int swizzle) {
  const auto number = [](auto value) { return std::to_string(value); };
  if (reinterpret_cast<std::uint64_t>(map) % 64 != 0) return "the tensor map must be aligned to 64 bytes";
  if (element_bytes != 1 && element_bytes != 2 && element_bytes != 4 && element_bytes != 8) {
    return "elements of " + number(element_bytes) + " bytes";
  }
  if (rank < 1 || rank > TensorMap::kMaxRank) return "rank " + number(rank) + ", must be 1 to 5";
  if (swizzle != 0 && swizzle != 32 && swizzle != 64 && swizzle != 128)
    return "swizzle of " + number(swizzle) + " bytes";
  if (reinterpret_cast<std::uint64_t>(address) % 16 != 0) return "the address must be a multiple of 16";
  TensorMap tensor{};
  tensor.magic = kMagic;
  tensor.address = static_cast<std::uint8_t*>(address);
  tensor.rank = static_cast<std::uint8_t>(rank);
  tensor.element_bytes = static_cast<std::uint8_t>(element_bytes);
  tensor.swizzle = static_cast<std::uint8_t>(swizzle);
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > std::uint64_t{1} << 32) return "size " + number(i) + " is " + number(sizes[i]);
    if (box[i] == 0 || box[i] > 256) return "box " + number(i) + " is " + number(box[i]) + ", must be 1 to 256";
    if (element_strides[i] != 1) return "element stride " + number(i) + " is not 1: the emulator supports no other";
    tensor.sizes[i] = sizes[i];
    tensor.box[i] = static_cast<std::uint16_t>(box[i]);
  }
  for (int i = 0; i + 1 < rank; ++i) {
    if (byte_strides[i] % 16 != 0 || byte_strides[i] >= std::uint64_t{1} << 40) {
      return "stride " + number(i) + " is " + number(byte_strides[i]) + " bytes, must be a multiple of 16 below 2^40";
    }
    tensor.byte_strides[i] = byte_strides[i];
  }
  const std::uint32_t row_bytes = box[0] * element_bytes;
  if (row_bytes % 16 != 0) return "the box is " + number(row_bytes) + " bytes wide, must be a multiple of 16";
  if (swizzle != 0 && row_bytes > static_cast<std::uint32_t>(swizzle)) {
    return "the box is " + number(row_bytes) + " bytes wide, more than its swizzle of " + number(swizzle);
  }
  if (swizzle != 0 && row_bytes < static_cast<std::uint32_t>(swizzle)) {
    return "the box is " + number(row_bytes) + " bytes wide, less than its swizzle: the emulator does not support this";
  }
  std::memset(map, 0, 128);
  std::memcpy(map, &tensor, sizeof tensor);
  return "";
}

bool TensorMap::valid() const { return magic == kMagic; }

std::uint32_t TensorMap::box_bytes() const {
  std::uint32_t bytes = element_bytes;
  for (int i = 0; i < rank; ++i) bytes *= box[i];
  return bytes;
}

std::uint32_t TensorMap::shared_alignment() const { return swizzle == 0 ? 128 : 8 * swizzle; }

void for_each_row(const TensorMap& map, const std::int32_t* coordinates,
                  const std::function<void(const BoxRow&)>& visit) {
  const std::int64_t first = std::max<std::int64_t>(coordinates[0], 0);
  const std::int64_t last = std::min<std::int64_t>(std::int64_t{coordinates[0]} + map.box[0], map.sizes[0]);
  const std::uint32_t row_bytes = std::uint32_t{map.box[0]} * map.element_bytes;
  std::uint32_t index[TensorMap::kMaxRank] = {};
  for (std::uint32_t offset = 0; offset < map.box_bytes(); offset += row_bytes) {
    bool inside = first < last;
    std::uint8_t* row = map.address;
    for (int i = 1; i < map.rank; ++i) {
      const std::int64_t position = std::int64_t{coordinates[i]} + index[i];
      inside &= position >= 0 && static_cast<std::uint64_t>(position) < map.sizes[i];
      if (inside) row += position * map.byte_strides[i - 1];
    }
    if (inside) {
      visit({offset + static_cast<std::uint32_t>((first - coordinates[0]) * map.element_bytes),
             row + first * map.element_bytes, static_cast<std::uint32_t>((last - first) * map.element_bytes)});
    }
    for (int i = 1; i < map.rank && ++index[i] == map.box[i]; ++i) index[i] = 0;
  }
}

}  // namespace emulator
