// Tiles of query rows and of keys, for attention_forward.cpp and attention_backward.cpp.
#pragma once

#include "attention_mask.h"
#include "exp2.h"
#include "operands.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

inline constexpr int kTileQ = 96;
inline constexpr int kTileK = 192;  // so deep that reading and writing the output costs little beside a product
inline constexpr int kBlocks = kTileQ / kRows;  // blocks of kRows query rows in a tile
static_assert(kTileQ % kRows == 0 && kTileK % kRows == 0, "tiles are whole register blocks");
static_assert(kTileK % kCols == 0, "a tile of scores is whole panels");

inline constexpr int kManyTasks = 64;  // enough for any number of threads; less work than this is divided further

template <typename T>
const T* row_of(const void* tensor, const SeqStrides& stride, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return static_cast<const T*>(tensor) + batch * stride.batch + seq * stride.seq + head * stride.head;
}

template <typename T>
T* row_of(void* tensor, const SeqStrides& stride, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return static_cast<T*>(tensor) + batch * stride.batch + seq * stride.seq + head * stride.head;
}

// kRows rows that a product computes at once. Together they decide which keys are skipped and which tiles need no mask.
struct RowBlock {
  KeyRange seen;    // keys that some row sees
  KeyRange common;  // keys that every row sees
  // The keys that every row sees and, if it has a bias, that lie at or left of its position, where the bias is linear.
  KeyRange unmasked;

  void include(const Row& row, bool biased) {
    seen.include(row.first, row.end);
    const std::int64_t end = row.empty() ? 0 : row.end;
    common = {larger(common.begin, row.first), smaller(common.end, end)};
    unmasked = {common.begin, smaller(unmasked.end, biased ? smaller(end, row.position + 1) : end)};
  }
  // The part of a tile of num_keys keys from `key` on that the products compute: it begins with a whole panel.
  KeyRange columns(std::int64_t key, int num_keys) const {
    const std::int64_t begin = larger(seen.begin - key, 0) / kCols * kCols, end = smaller(seen.end - key, num_keys);
    return begin < end ? KeyRange{begin, end} : KeyRange{0, 0};
  }
  // Whether every row sees every key that the products compute.
  bool hides_nothing(std::int64_t key, int num_keys) const {
    const KeyRange computed = columns(key, num_keys);
    return computed.empty() || (common.begin <= key + computed.begin && key + computed.end <= common.end);
  }
  bool is_unmasked(std::int64_t key) const { return unmasked.begin <= key && key + kTileK <= unmasked.end; }
};

inline constexpr RowBlock kNoRows{{0, 0}, {0, kUnlimited}, {0, kUnlimited}};

}  // namespace andromeda::cpu::ANDROMEDA_ISA
