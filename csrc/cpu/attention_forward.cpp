// attention, forward (docs/model.md#5; the contract is in include/andromeda/attention.h).
//
//   for every tile of up to kTileQ query rows, for every split of its keys:    one task, one thread
//     for tiles of kTileK keys from the diagonal outwards:                     only keys that some row sees
//       scores  = q k^T                                     registers: kRows x kCols
//       weights = 2^(scores + bias - row_max)               in place; row_max: an upper bound, or a running maximum
//       out    += weights v
//   out /= sum of weights                                   over the splits, each rescaled by its row_max
//
// A tile's rows are consecutive queries of one head. When there are fewer than kTileQ queries, they are queries of
// several heads that share a key head (the pack_gqa of other kernels), so that a short continuation reads each key once
// for all of them. There are few tiles then, and the keys are split to occupy all threads. The number of splits follows
// from the shape alone, so the result does not depend on the number of threads.
//
// With a bound on a row's logits its softmax needs no running maximum: weights relative to the bound are at most 1, and
// large enough while the bound is small (docs/attention.md#bounded-softmax). The caller gives the bound, or it is |q|
// times the longest key so far (Cauchy-Schwarz), which costs nothing where the operands are read anyway.
//
// The products read float32: keys by columns, and values by panels of channels. Where several query tiles share them
// they are packed once: 8 * seqlen_k * head_dim bytes per key head beyond the tensors. Where one tile reads each key
// once (decoding) every task packs its own panel by panel, and they never leave the first-level cache. Flops:
// 4 * head_dim per visible (query, key) pair.
#include "andromeda/dispatch.h"
#include "attention_tile.h"
#include "parallel.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

// A row's own weight, or any visible one without a bias, is at least 2^-(2 * 38) relative to the bound: 24 bits above
// the results that exp2() replaces by 0.
constexpr float kLargestBound = 38.0f;
constexpr float kMaskedScore = -1e30f;  // a finite "minus infinity": beside a visible key its weight is 0
constexpr int kFewestTiles = 2;         // of keys in a split: merging costs two passes over the output

// How the work is divided. Everything follows from the shape.
struct Plan {
  explicit Plan(const AttentionParams& params)
      : qhead_per_kvhead(params.num_heads / params.num_kv_heads),
        heads_per_tile(static_cast<int>(larger(1, smaller(qhead_per_kvhead, kTileQ / params.seqlen_q)))),
        queries_per_tile(kTileQ / heads_per_tile),
        head_tiles(ceil_div(qhead_per_kvhead, heads_per_tile)),
        query_tiles(ceil_div(params.seqlen_q, queries_per_tile)),
        kv_heads(static_cast<std::int64_t>(params.batch) * params.num_kv_heads),
        key_tiles(ceil_div(params.seqlen_k, kTileK)),
        tiles(kv_heads * head_tiles * query_tiles),
        num_splits(larger(1, smaller(kManyTasks / tiles, key_tiles / kFewestTiles))),
        shared_keys(head_tiles * query_tiles > 1) {}
  int qhead_per_kvhead, heads_per_tile, queries_per_tile;
  std::int64_t head_tiles, query_tiles;
  std::int64_t kv_heads;  // of all batch entries
  std::int64_t key_tiles, tiles, num_splits;
  bool shared_keys;
};

// The panels of one tile of keys: in memory that several query tiles share or, when one query tile alone reads them,
// packed when they are needed, in a buffer that stays in the first-level cache.
template <typename T>
struct KeyTile {
  KeyTile(const AttentionParams& params, std::int64_t kv_head, std::int64_t tile)
      : head_dim(params.head_dim),
        num_keys(static_cast<int>(smaller(kTileK, params.seqlen_k - tile * kTileK))),
        k_stride(params.k_stride.seq),
        v_stride(params.v_stride.seq) {
    const std::int64_t batch = kv_head / params.num_kv_heads, head = kv_head % params.num_kv_heads;
    k = row_of<T>(params.k, params.k_stride, batch, tile * kTileK, head);
    v = row_of<T>(params.v, params.v_stride, batch, tile * kTileK, head);
  }
  void pack_keys(int column, float* panel) const {
    const int rows = static_cast<int>(smaller(kCols, num_keys - column));
    pack_columns(k + column * k_stride, k_stride, rows, head_dim, panel);
  }
  // Returns whether there are values that are not finite, which are 0 in the panel.
  bool pack_values(int channel, float* panel) const {
    const int width = static_cast<int>(smaller(kCols, head_dim - channel));
    return pack_panel(v + channel, v_stride, num_keys, width, panel);
  }
  // (head_dim, kCols): the columns of kCols keys.
  const float* keys(int column) const {
    if (buffer == nullptr) return columns + column * head_dim;
    pack_keys(column, buffer);
    return buffer;
  }
  // (kTileK, kCols): kCols channels of the values.
  const float* values(int channel) {
    if (buffer == nullptr) return panels + channel * kTileK;
    not_finite |= pack_values(channel, buffer);
    return buffer;
  }
  // Values that one query tile alone reads need no panel, if there are kCols channels of them and no row multiplies
  // hidden values by 0.
  bool values_in_place(int channel) const { return buffer != nullptr && channel + kCols <= head_dim; }

  int head_dim, num_keys;
  std::int64_t k_stride, v_stride;
  const T *k, *v;
  const float *columns = nullptr, *panels = nullptr;
  float* buffer = nullptr;
  bool not_finite = false;  // whether there are values that are not finite; they are 0 in their panels
};

// The lengths of a tile's keys, read from their columns.
void measure_keys(const float* columns, int num_keys, int head_dim, float* lengths) {
  for (int key = 0; key < num_keys; key += kLanes) {
    const float* panel = columns + key / kCols * kCols * head_dim + key % kCols;
    Vec squares{};
    for (int channel = 0; channel < head_dim; ++channel)
      squares += load(panel + channel * kCols) * load(panel + channel * kCols);
    for (int i = 0; i < kLanes && key + i < num_keys; ++i) lengths[key + i] = std::sqrt(squares[i]);
  }
}

// All keys and values, tile after tile, for every (batch, key head); empty when tasks pack their own.
class PackedKeys {
 public:
  PackedKeys(const AttentionParams& params, const Plan& plan)
      : key_tiles_(plan.key_tiles),
        columns_size_(std::int64_t{kTileK} * params.head_dim),
        values_size_(kTileK * round_up(params.head_dim, kCols)),
        columns_(plan.shared_keys ? plan.kv_heads * plan.key_tiles * columns_size_ : 0),
        values_(plan.shared_keys ? plan.kv_heads * plan.key_tiles * values_size_ : 0),
        lengths_(plan.shared_keys ? plan.kv_heads * plan.key_tiles * kTileK : 0),
        infinite_(plan.shared_keys ? plan.kv_heads * plan.key_tiles * kTileK : 0),
        not_finite_(plan.shared_keys ? plan.kv_heads * plan.key_tiles : 0) {}

  template <typename T>
  void fill(const AttentionParams& params, const Plan& plan, int num_threads) const {
    parallel_for(num_threads, plan.kv_heads * plan.key_tiles, [&](std::int64_t task) {
      const std::int64_t kv_head = task / plan.key_tiles, tile = task % plan.key_tiles;
      const KeyTile<T> keys(params, kv_head, tile);
      float* packed = columns(kv_head, tile);
      for (int column = 0; column < keys.num_keys; column += kCols)
        keys.pack_keys(column, packed + column * keys.head_dim);
      bool not_finite = false;
      for (int channel = 0; channel < keys.head_dim; channel += kCols)
        not_finite |= keys.pack_values(channel, values(kv_head, tile) + channel * kTileK);
      not_finite_.get()[task] = not_finite;
      measure_keys(packed, keys.num_keys, keys.head_dim, lengths_.get() + task * kTileK);
    });
    // The longest key up to each one: a causal row's bound must not depend on later keys. A NaN is skipped, because the
    // rows that see it are NaN anyway. Infinite lengths are recorded separately, because `key_start` may hide them.
    for (std::int64_t kv_head = 0; kv_head < plan.kv_heads; ++kv_head) {
      float* lengths = lengths_.get() + kv_head * plan.key_tiles * kTileK;
      std::int64_t* infinite = infinite_.get() + kv_head * plan.key_tiles * kTileK;
      float longest = 0.0f;
      std::int64_t last_infinite = -1;
      for (std::int64_t key = 0; key < params.seqlen_k; ++key) {
        if (lengths[key] == HUGE_VALF) {
          last_infinite = key;
        } else if (lengths[key] > longest) {
          longest = lengths[key];
        }
        lengths[key] = longest;
        infinite[key] = last_infinite;
      }
    }
  }
  float* columns(std::int64_t kv_head, std::int64_t tile) const {
    return columns_.get() + (kv_head * key_tiles_ + tile) * columns_size_;
  }
  float* values(std::int64_t kv_head, std::int64_t tile) const {
    return values_.get() + (kv_head * key_tiles_ + tile) * values_size_;
  }
  bool not_finite(std::int64_t kv_head, std::int64_t tile) const {
    return not_finite_.get()[kv_head * key_tiles_ + tile];
  }
  // An upper bound on the length of the keys that the row sees.
  float longest(std::int64_t kv_head, const Row& row) const {
    const std::int64_t last = kv_head * key_tiles_ * kTileK + row.end - 1;
    return infinite_.get()[last] >= row.first ? HUGE_VALF : lengths_.get()[last];
  }

 private:
  std::int64_t key_tiles_, columns_size_, values_size_;
  Buffer columns_, values_;
  Buffer lengths_;                 // of the longest key up to each one; infinite lengths do not count
  Memory<std::int64_t> infinite_;  // the last key of infinite length up to each one, or -1
  Memory<bool> not_finite_;        // whether a tile has values that are not finite; they are 0 in the panels
};

// The scratch memory of one thread: a tile of query rows, and a panel of keys or values where they are not shared.
struct QueryTile {
  explicit QueryTile(const AttentionParams& params)
      : stride(row_stride(params.head_dim)),
        queries(kTileQ * stride),
        weights(kTileQ * kTileK),
        out(kTileQ * stride),
        sums(kTileQ * kLanes),
        panel(kCols * larger(kTileK, params.head_dim)),
        values(stride),
        rest(stride) {}

  std::int64_t stride;  // of queries and out
  Buffer queries, weights, out, sums, panel;
  Buffer values, rest;  // one row each
  Row rows[kTileQ];
  Head heads[kTileQ];
  bool bounded[kTileQ];
  float row_max[kTileQ];  // whole numbers: a bound on the row's logits, or on its logits so far
  RowBlock blocks[kBlocks];
  int num_rows, num_blocks;
  int rows_of(int block) const { return static_cast<int>(smaller(kRows, num_rows - block * kRows)); }
};

// Row r is query `query + r / heads` of head `head + r % heads`.
struct TileIndex {
  std::int64_t batch;
  std::int64_t kv_head;  // among those of all batch entries
  std::int64_t query, queries;
  int head, heads;
  std::int64_t query_of(int r) const { return query + r / heads; }
  int head_of(int r) const { return head + r % heads; }
};

TileIndex locate(const AttentionParams& params, const Plan& plan, std::int64_t index) {
  // The last queries see the most keys: longest tasks first, so that no thread is left with one at the end.
  const std::int64_t columns = plan.kv_heads * plan.head_tiles, column = index % columns;
  TileIndex tile;
  tile.query = (plan.query_tiles - 1 - index / columns) * plan.queries_per_tile;
  tile.queries = smaller(plan.queries_per_tile, params.seqlen_q - tile.query);
  tile.kv_head = column / plan.head_tiles;
  tile.batch = tile.kv_head / params.num_kv_heads;
  const int first = static_cast<int>(column % plan.head_tiles) * plan.heads_per_tile;
  tile.head = static_cast<int>(tile.kv_head % params.num_kv_heads) * plan.qhead_per_kvhead + first;
  tile.heads = static_cast<int>(smaller(plan.heads_per_tile, plan.qhead_per_kvhead - first));
  return tile;
}

float length(const float* row, int width) {
  Vec squares{};
  for (int channel = 0; channel < width; channel += kLanes) squares += load(row + channel) * load(row + channel);
  return std::sqrt(reduce_add(squares));
}

// Reads the queries and returns the keys that they see.
template <typename T>
KeyRange load_queries(const AttentionParams& params, const Plan& plan, const PackedKeys& packed, const TileIndex& index,
                      QueryTile& tile) {
  KeyRange seen{0, 0};
  tile.num_rows = static_cast<int>(index.queries) * index.heads;
  tile.num_blocks = static_cast<int>(ceil_div(tile.num_rows, kRows));
  // Rows lie too far apart for the hardware prefetcher. Those of out are fetched while the products run.
  const auto query_row = [&](int r) {
    return row_of<T>(params.q, params.q_stride, index.batch, index.query_of(r), index.head_of(r));
  };
  for (int r = 0; r < tile.num_rows; ++r) prefetch(query_row(r), params.head_dim);
  const std::int64_t padded_rows = round_up(tile.num_rows, kRows);
  clear(tile.out.get(), padded_rows * tile.stride);
  clear(tile.sums.get(), padded_rows * kLanes);
  clear(tile.queries.get() + tile.num_rows * tile.stride, (padded_rows - tile.num_rows) * tile.stride);
  for (int block = 0; block < tile.num_blocks; ++block) tile.blocks[block] = kNoRows;
  for (int r = 0; r < index.heads; ++r) tile.heads[r] = describe_head(params, index.head_of(r));
  for (int r = 0; r < tile.num_rows; ++r) {
    const Head& head = tile.heads[r] = tile.heads[r % index.heads];
    const Row row = tile.rows[r] = describe_row(params, head, index.batch, index.query_of(r));
    const bool biased = head.slope != 0.0f;
    tile.blocks[r / kRows].include(row, biased);
    seen.include(row.first, row.end);
    float* query = tile.queries.get() + r * tile.stride;
    read_row(query_row(r), params.head_dim, params.softmax_scale * kLog2E, query);
    float bound = head.bound;
    if (params.logit_bound == nullptr && plan.shared_keys && !row.empty())
      bound = length(query, params.head_dim) * packed.longest(index.kv_head, row);
    tile.bounded[r] = bound <= kLargestBound && (!biased || row.sees_itself());  // false for NaN
    tile.row_max[r] = tile.bounded[r] ? std::ceil(bound) : kMaskedScore;
  }
  return seen;
}

template <typename T>
void multiply_scores(const QueryTile& tile, const KeyTile<T>& keys, std::int64_t key, Prefetcher& next) {
  for (int column = 0; column < keys.num_keys; column += kCols) {
    const float* panel = nullptr;
    for (int block = 0; block < tile.num_blocks; ++block) {
      const KeyRange columns = tile.blocks[block].columns(key, keys.num_keys);
      if (column < columns.begin || column >= columns.end) continue;
      if (panel == nullptr) panel = keys.keys(column);
      multiply_rows<Order::kByRows, Result::kSet>(tile.queries.get() + block * kRows * tile.stride, tile.stride, panel,
                                                  kCols, tile.weights.get() + block * kRows * kTileK + column, kTileK,
                                                  tile.rows_of(block), keys.head_dim, next.take(keys.head_dim, panel));
    }
  }
}

// out += weights * values for the values that are not finite, which are 0 in the products.
template <typename T>
void add_not_finite(const QueryTile& tile, const KeyTile<T>& keys, std::int64_t key) {
  for (int column = 0; column < keys.num_keys; ++column) {
    read_row(keys.v + column * keys.v_stride, keys.head_dim, 1.0f, tile.values.get());
    if (!separate_not_finite(tile.values.get(), keys.head_dim, tile.rest.get())) continue;
    for (int r = 0; r < tile.num_rows; ++r)
      if (tile.rows[r].sees(key + column))
        add_scaled(tile.out.get() + r * tile.stride, tile.weights.get()[r * kTileK + column], tile.rest.get(),
                   keys.head_dim);
  }
}

template <typename T>
void multiply_values(const QueryTile& tile, KeyTile<T>& keys, std::int64_t key, Prefetcher& next) {
  const auto multiply = [&](int channel, const auto* values, std::int64_t stride) {
    for (int block = 0; block < tile.num_blocks; ++block) {
      const KeyRange columns = tile.blocks[block].columns(key, keys.num_keys);
      if (columns.empty()) continue;
      const int depth = static_cast<int>(columns.end - columns.begin);
      multiply_rows<Order::kByRows, Result::kAdd>(tile.weights.get() + block * kRows * kTileK + columns.begin, kTileK,
                                                  values + columns.begin * stride, stride,
                                                  tile.out.get() + block * kRows * tile.stride + channel, tile.stride,
                                                  tile.rows_of(block), depth, next.take(depth, values));
    }
  };
  bool hides_nothing = true;
  for (int block = 0; block < tile.num_blocks; ++block)
    hides_nothing = hides_nothing && tile.blocks[block].hides_nothing(key, keys.num_keys);
  for (int channel = 0; channel < keys.head_dim; channel += kCols) {
    if (hides_nothing && keys.values_in_place(channel)) {
      multiply(channel, keys.v + channel, keys.v_stride);
    } else {
      multiply(channel, keys.values(channel), kCols);
    }
  }
  if (keys.not_finite) add_not_finite(tile, keys, key);
}

// The softmax of one row over the keys `columns` of a tile that starts at `key`: turns scores into weights in place and
// adds them to `sum`. Returns the factor that rescales earlier sums and outputs to the new maximum.
//
// kUnmasked: every key of the whole tile is visible, and the bias, if any, is linear in the key.
template <bool kUnmasked, bool kBounded, bool kBiased>
inline float softmax_row(float* scores, const Row& row, float slope, std::int64_t key, KeyRange columns, float* row_max,
                         float* sum) {
  const int begin = kUnmasked ? 0 : static_cast<int>(columns.begin),
            end = kUnmasked ? kTileK : static_cast<int>(columns.end);
  const IntVec lanes = lane_index();
  const Vec distance = __builtin_convertvector(lanes, Vec) + static_cast<float>(key - row.position);  // j - i, exact
  const int first_seen = static_cast<int>(smaller(larger(row.first - key, 0), kTileK));
  const int end_seen = static_cast<int>(larger(smaller(row.end - key, kTileK), 0));
  const auto seen = [&](int column) { return (lanes + column >= first_seen) & (lanes + column < end_seen); };
  const auto score = [&](int column) {
    Vec x = load(scores + column);
    const Vec offset = distance + static_cast<float>(column);
    if (kBiased) x += slope * (kUnmasked ? offset : (offset > 0.0f ? -offset : offset));
    return kUnmasked ? x : select(seen(column), x, broadcast(kMaskedScore));
  };
  constexpr bool kVanishing = !(kUnmasked && kBounded && !kBiased);  // twice the bound is less than 100
  float rescale = 1.0f;
  if (!kBounded) {
    Vec largest = broadcast(kMaskedScore);
#pragma GCC unroll 4
    for (int column = begin; column < end; column += kLanes) {
      const Vec x = score(column);
      store(scores + column, x);
      largest = max(largest, x);
    }
    const float maximum = std::fmax(*row_max, std::ceil(reduce_max(largest)));
    rescale = maximum == *row_max ? 1.0f : exp2(*row_max - maximum);
    *row_max = maximum;
  }
  Vec total = load(sum) * rescale;
#pragma GCC unroll 4
  for (int column = begin; column < end; column += kLanes) {
    Vec weight = exp2<kVanishing>(kBounded ? score(column) : load(scores + column), -*row_max);
    // A masked weight is 0 whatever the score: the maximum of a row that has seen no key yet is kMaskedScore itself.
    if (!kUnmasked) weight = select(seen(column), weight, Vec{});
    store(scores + column, weight);
    total += weight;
  }
  store(sum, total);
  return rescale;
}

template <bool kUnmasked, bool kBounded>
void softmax_block(QueryTile& tile, int block, std::int64_t key, KeyRange columns) {
  const int begin = block * kRows, end = begin + tile.rows_of(block);
  for (int r = begin; r < end; ++r) {
    if (tile.bounded[r] != kBounded) continue;
    float* scores = tile.weights.get() + r * kTileK;
    float* sum = tile.sums.get() + r * kLanes;
    const float slope = tile.heads[r].slope;
    float* row_max = &tile.row_max[r];
    const float rescale =
        slope == 0.0f ? softmax_row<kUnmasked, kBounded, false>(scores, tile.rows[r], slope, key, columns, row_max, sum)
                      : softmax_row<kUnmasked, kBounded, true>(scores, tile.rows[r], slope, key, columns, row_max, sum);
    if (kBounded || rescale == 1.0f) continue;
    float* out = tile.out.get() + r * tile.stride;
    for (int channel = 0; channel < tile.stride; channel += kLanes) store(out + channel, load(out + channel) * rescale);
  }
}

void scores_to_weights(QueryTile& tile, std::int64_t key, int num_keys) {
  for (int block = 0; block < tile.num_blocks; ++block) {
    const KeyRange columns = tile.blocks[block].columns(key, num_keys);
    if (columns.empty()) continue;
    if (tile.blocks[block].is_unmasked(key)) {
      softmax_block<true, true>(tile, block, key, columns);
      softmax_block<true, false>(tile, block, key, columns);
    } else {
      softmax_block<false, true>(tile, block, key, columns);
      softmax_block<false, false>(tile, block, key, columns);
    }
  }
}

// Writes one row's result: out / sum, and its log-sum-exp.
template <typename T>
void store_row(const AttentionParams& params, const TileIndex& index, int r, bool empty, float row_max, float sum,
               float* row) {
  T* out = row_of<T>(params.out, params.out_stride, index.batch, index.query_of(r), index.head_of(r));
  write_row(row, params.head_dim, empty ? 0.0f : 1.0f / sum, out);
  const std::int64_t head = index.batch * params.num_heads + index.head_of(r);
  params.softmax_lse[head * params.seqlen_q + index.query_of(r)] =
      empty ? -HUGE_VALF : static_cast<float>((row_max + std::log2(static_cast<double>(sum))) * 0.69314718055994530942);
}

// The results of every split of the keys for every tile of rows: out, not yet divided, and per row its maximum and sum.
struct Partials {
  Partials(const AttentionParams& params, const Plan& plan)
      : stride(row_stride(params.head_dim)),
        rows(plan.heads_per_tile * plan.queries_per_tile),
        num_splits(plan.num_splits),
        memory(num_splits > 1 ? plan.tiles * num_splits * rows * stride : 0) {}
  // The last kLanes numbers of a row are padding: maximum and sum lie there.
  float* row(std::int64_t tile, std::int64_t split, int r) const {
    return memory.get() + ((tile * num_splits + split) * rows + r) * stride;
  }
  std::int64_t stride, rows, num_splits;
  Buffer memory;
};

template <typename T>
void merge_splits(const AttentionParams& params, const Plan& plan, const Partials& partials, int num_threads) {
  parallel_for(num_threads, plan.tiles, [&](std::int64_t task) {
    const TileIndex index = locate(params, plan, task);
    const std::int64_t last = partials.stride - kLanes;
    const Buffer out(partials.stride);
    for (int r = 0; r < index.queries * index.heads; ++r) {
      const Head head = describe_head(params, index.head_of(r));
      const bool empty = describe_row(params, head, index.batch, index.query_of(r)).empty();
      float maximum = kMaskedScore, sum = 0.0f;
      for (std::int64_t split = 0; split < plan.num_splits; ++split)
        maximum = std::fmax(maximum, partials.row(task, split, r)[last]);
      clear(out.get(), partials.stride);
      for (std::int64_t split = 0; split < plan.num_splits; ++split) {
        const float* row = partials.row(task, split, r);
        const float factor = exp2(row[last] - maximum);
        if (factor == 0.0f) continue;  // no visible key in this split
        sum += factor * row[last + 1];
        for (std::int64_t channel = 0; channel < last; channel += kLanes)
          store(out.get() + channel, load(out.get() + channel) + factor * load(row + channel));
      }
      store_row<T>(params, index, r, empty, maximum, sum, out.get());
    }
  });
}

template <typename T>
void forward(const AttentionParams& params, int num_threads) {
  const Plan plan(params);
  const PackedKeys packed(params, plan);
  if (plan.shared_keys) packed.fill<T>(params, plan, num_threads);
  const Partials partials(params, plan);
  const Scratch<QueryTile> scratch(num_threads, params);
  parallel_for(num_threads, plan.tiles * plan.num_splits, [&](std::int64_t task, int worker) {
    QueryTile& tile = scratch[worker];
    const std::int64_t split = task % plan.num_splits;
    const TileIndex index = locate(params, plan, task / plan.num_splits);
    const KeyRange seen = load_queries<T>(params, plan, packed, index, tile);
    for (int r = 0; plan.num_splits == 1 && r < tile.num_rows; ++r)
      prefetch_for_writing(row_of<T>(params.out, params.out_stride, index.batch, index.query_of(r), index.head_of(r)),
                           params.head_dim);

    const std::int64_t first = seen.begin / kTileK, count = ceil_div(seen.end, kTileK) - first;
    const std::int64_t begin = first + count * split / plan.num_splits,
                       end = first + count * (split + 1) / plan.num_splits;
    for (std::int64_t t = end - 1; t >= begin; --t) {
      const std::int64_t key = t * kTileK;
      KeyTile<T> keys(params, index.kv_head, t);
      Prefetcher next_keys, next_values;
      if (plan.shared_keys) {
        keys.columns = packed.columns(index.kv_head, t);
        keys.panels = packed.values(index.kv_head, t);
        keys.not_finite = packed.not_finite(index.kv_head, t);
        const int width = params.head_dim;
        next_values = Prefetcher(keys.panels, width, kTileK, width);
        if (t > begin) next_keys = Prefetcher(packed.columns(index.kv_head, t - 1), width, kTileK, width);
      } else {
        keys.buffer = tile.panel.get();
        if (t > begin) {
          const KeyTile<T> next(params, index.kv_head, t - 1);
          next_keys = Prefetcher(next.k, next.k_stride, kTileK, params.head_dim);
          next_values = Prefetcher(next.v, next.v_stride, kTileK, params.head_dim);
        }
      }
      multiply_scores(tile, keys, key, next_values);
      scores_to_weights(tile, key, keys.num_keys);
      multiply_values(tile, keys, key, next_keys);
    }

    for (int r = 0; r < tile.num_rows; ++r) {
      float* row = tile.out.get() + r * tile.stride;
      const float sum = reduce_add(load(tile.sums.get() + r * kLanes));
      if (plan.num_splits == 1) {
        store_row<T>(params, index, r, tile.rows[r].empty(), tile.row_max[r], sum, row);
        continue;
      }
      const std::int64_t last = tile.stride - kLanes;
      float* target = partials.row(task / plan.num_splits, split, r);
      for (std::int64_t channel = 0; channel < last; channel += kLanes) store(target + channel, load(row + channel));
      target[last] = tile.row_max[r];
      target[last + 1] = sum;
    }
  });
  if (plan.num_splits > 1) merge_splits<T>(params, plan, partials, num_threads);
}

}  // namespace

void attention_forward(const AttentionParams& params, int num_threads) {
  dispatch_dtype<StorageTypes>(params.dtype,
                               [&](auto dtype) { forward<typename decltype(dtype)::type>(params, num_threads); });
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
