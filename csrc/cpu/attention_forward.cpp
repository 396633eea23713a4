// attention, forward (SPEC 5.4-5.6; the contract is in include/andromeda/attention.h).
//
//   for every tile of kTileQ query rows:                    one task, one thread
//     for key tiles from the diagonal outwards:             only those that visible_tiles() allows
//       scores  = q k^T                                     registers: kRows x kCols
//       weights = 2^(scores + bias - reference)             in place; reference = running maximum, or 0 when bounded
//       out    += weights v
//     out /= sum of weights
//
// A tile's rows are consecutive queries of one head; when there are fewer than kTileQ queries, of several heads that
// share a key head, so that a short continuation reads each key once for all of them. Keys and values are packed
// once per key head and shared by its query heads. Memory beyond the tensors: 8 * seqlen_k * head_dim bytes per key
// head (padded to tiles) plus one set of tiles per thread. Flops: 4 * head_dim per visible (query, key) pair.
#include "attention_tile.h"
#include "parallel.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

constexpr float kNegative = -1e30f;  // a finite "minus infinity": a row's first visible key takes it to weight 0

// Keys by columns and values by panels, tile after tile, for every (batch, key head).
struct PackedKeys {
  PackedKeys(const AttentionParams& params)
      : head_dim(params.head_dim),
        num_panels(static_cast<int>(ceil_div(params.head_dim, kCols))),
        num_tiles(ceil_div(params.seqlen_k, kTileK)),
        keys(static_cast<std::int64_t>(params.batch) * params.num_kv_heads * num_tiles * kTileK * head_dim),
        values(static_cast<std::int64_t>(params.batch) * params.num_kv_heads * num_tiles * kTileK * num_panels *
               kCols) {}

  float* key_tile(std::int64_t kv_head, std::int64_t tile) const {
    return keys.get() + (kv_head * num_tiles + tile) * kTileK * head_dim;
  }
  float* value_tile(std::int64_t kv_head, std::int64_t tile) const {
    return values.get() + (kv_head * num_tiles + tile) * kTileK * num_panels * kCols;
  }

  int head_dim, num_panels;
  std::int64_t num_tiles;
  Buffer keys, values;
};

template <typename T>
void pack_keys(const AttentionParams& params, const PackedKeys& packed, int num_threads) {
  const std::int64_t num_tasks = static_cast<std::int64_t>(params.batch) * params.num_kv_heads * packed.num_tiles;
  parallel_for(num_threads, num_tasks, [&](std::int64_t task) {
    const std::int64_t kv_head = task / packed.num_tiles, tile = task % packed.num_tiles;  // kv_head counts batches too
    const std::int64_t batch = kv_head / params.num_kv_heads, head = kv_head % params.num_kv_heads;
    const Buffer row(packed.num_panels * kCols);
    for (int i = 0; i < kTileK; ++i) {
      const std::int64_t key = tile * kTileK + i;
      const int width = key < params.seqlen_k ? params.head_dim : 0;  // zeros behind the end
      read_row(static_cast<const T*>(params.k) + batch * params.k_stride.batch + key * params.k_stride.seq +
                   head * params.k_stride.head,
               width, 1.0f, row.get());
      if (width == 0) clear(row.get(), packed.num_panels * kCols);
      place_in_columns(row.get(), i, params.head_dim, packed.key_tile(kv_head, tile));
      if (width != 0)
        read_row(static_cast<const T*>(params.v) + batch * params.v_stride.batch + key * params.v_stride.seq +
                     head * params.v_stride.head,
                 width, 1.0f, row.get());
      place_in_panels(row.get(), i, kTileK, packed.num_panels, packed.value_tile(kv_head, tile));
    }
  });
}

// What one thread works on: a tile of query rows.
struct QueryTile {
  QueryTile(int head_dim, int num_panels)
      : queries(kTileQ * head_dim),
        weights(kTileQ * kTileK),
        out(num_panels * kTileQ * kCols),
        sums(kTileQ * kLanes),
        row(num_panels * kCols) {}

  Buffer queries, weights, out, sums, row;
  Row rows[kTileQ];
  Head heads[kTileQ];
  float maxima[kTileQ];
  int num_rows;
  // Over the rows that see any key: where a tile of keys is visible to all of them, and needs no mask.
  std::int64_t last_first, first_end, first_position;
  bool bounded, biased;
};

// The softmax of one row and kTileK keys starting at `key`: scores become weights in place, their sum is added to
// `sum`. Returns the factor that brings earlier sums and outputs to the new maximum.
//
// kPlain: every key is visible and lies at or left of the row's position, so the bias is linear in the key.
template <bool kPlain, bool kBounded>
inline float soften_row(float* scores, const Row& row, float slope, std::int64_t key, float* maximum, float* sum) {
  constexpr int kVecs = kTileK / kLanes;
  const IntVec lanes = lane_index();
  const Vec distance = __builtin_convertvector(lanes, Vec) + static_cast<float>(key - row.position);  // j - i, exact
  const int first = static_cast<int>(larger(row.first - key, 0));
  const int end = static_cast<int>(smaller(row.end - key, kTileK));
  Vec x[kVecs];
#pragma GCC unroll 24
  for (int c = 0; c < kVecs; ++c) {
    const Vec offset = distance + static_cast<float>(c * kLanes);
    const Vec minus_abs = kPlain ? offset : (offset > 0.0f ? -offset : offset);
    x[c] = load(scores + c * kLanes) + slope * minus_abs;
    if (!kPlain) {
      const IntVec index = lanes + c * kLanes;
      x[c] = select((index >= first) & (index < end), x[c], broadcast(kNegative));
    }
  }
  float rescale = 1.0f;
  if (!kBounded) {
    Vec largest = x[0];
#pragma GCC unroll 24
    for (int c = 1; c < kVecs; ++c) largest = max(largest, x[c]);
    const float new_maximum = std::fmax(*maximum, reduce_max(largest));
    rescale = new_maximum == *maximum ? 1.0f : exp2(broadcast(*maximum - new_maximum))[0];
    *maximum = new_maximum;
#pragma GCC unroll 24
    for (int c = 0; c < kVecs; ++c) x[c] -= new_maximum;
  }
  Vec total = load(sum) * rescale;
#pragma GCC unroll 24
  for (int c = 0; c < kVecs; ++c) {
    Vec weight = exp2(x[c]);
    if (!kPlain) {
      // A masked weight is 0 whatever the score: a row that has seen no key yet has its maximum at the mask value.
      const IntVec index = lanes + c * kLanes;
      weight = select((index >= first) & (index < end), weight, Vec{});
    }
    store(scores + c * kLanes, weight);
    total += weight;
  }
  store(sum, total);
  return rescale;
}

template <bool kPlain, bool kBounded>
void soften_tile(QueryTile& tile, std::int64_t key, int num_panels) {
  for (int r = 0; r < tile.num_rows; ++r) {
    const float rescale =
        soften_row<kPlain, kBounded>(tile.weights.get() + r * kTileK, tile.rows[r], tile.heads[r].slope, key,
                                     &tile.maxima[r], tile.sums.get() + r * kLanes);
    if (kBounded || rescale == 1.0f) continue;
    for (int panel = 0; panel < num_panels; ++panel) {
      float* out = tile.out.get() + (panel * kTileQ + r) * kCols;
      store(out, load(out) * rescale);
      store(out + kLanes, load(out + kLanes) * rescale);
    }
  }
}

void soften(QueryTile& tile, std::int64_t key, int num_panels) {
  const bool plain = tile.last_first <= key && tile.first_end >= key + kTileK &&
                     (!tile.biased || tile.first_position >= key + kTileK - 1);
  if (plain) {
    tile.bounded ? soften_tile<true, true>(tile, key, num_panels) : soften_tile<true, false>(tile, key, num_panels);
  } else {
    tile.bounded ? soften_tile<false, true>(tile, key, num_panels) : soften_tile<false, false>(tile, key, num_panels);
  }
}

// Rows query-major: row r is query `query + r / heads`, head `head + r % heads`.
template <typename T>
TileRange load_queries(const AttentionParams& params, int batch, int head, int heads, std::int64_t query,
                       std::int64_t queries, QueryTile& tile) {
  TileRange range{params.seqlen_k, 0};
  for (int a = 0; a < heads; ++a) {
    const Head description = describe_head(params, head + a);
    const TileRange visible = visible_tiles(params, description, batch, query, queries);
    if (visible.begin < visible.end) {
      range.begin = smaller(range.begin, visible.begin);
      range.end = larger(range.end, visible.end);
    }
    for (std::int64_t i = 0; i < queries; ++i) tile.heads[i * heads + a] = description;
  }
  tile.num_rows = static_cast<int>(queries * heads);
  tile.last_first = 0;
  tile.first_end = tile.first_position = kUnlimited;
  tile.bounded = true;
  tile.biased = false;
  const int padded_rows = static_cast<int>(round_up(tile.num_rows, kRows));
  clear(tile.queries.get(), padded_rows * params.head_dim);
  clear(tile.out.get(), static_cast<int>(ceil_div(params.head_dim, kCols)) * kTileQ * kCols);
  clear(tile.sums.get(), kTileQ * kLanes);
  for (int r = 0; r < tile.num_rows; ++r) {
    const std::int64_t i = query + r / heads;
    const Row row = tile.rows[r] = describe_row(params, batch, i);
    tile.maxima[r] = kNegative;
    if (row.first < row.end) {
      tile.last_first = larger(tile.last_first, row.first);
      tile.first_end = smaller(tile.first_end, row.end);
      tile.first_position = smaller(tile.first_position, row.position);
      tile.biased |= tile.heads[r].slope != 0.0f;
      tile.bounded &= tile.heads[r].bounded && (tile.heads[r].slope == 0.0f || row.sees_itself());
    } else {
      tile.first_end = 0;  // a row that sees nothing: every tile needs the mask
    }
    read_row(static_cast<const T*>(params.q) + batch * params.q_stride.batch + i * params.q_stride.seq +
                 (head + r % heads) * params.q_stride.head,
             params.head_dim, params.softmax_scale * kLog2E, tile.row.get());
    place_in_rows(tile.row.get(), r, params.head_dim, tile.queries.get());
  }
  return range;
}

template <typename T>
void store_outputs(const AttentionParams& params, int batch, int head, int heads, std::int64_t query, int num_panels,
                   const QueryTile& tile) {
  for (int r = 0; r < tile.num_rows; ++r) {
    const std::int64_t i = query + r / heads;
    const int a = head + r % heads;
    const float sum = reduce_add(load(tile.sums.get() + r * kLanes));
    const bool empty = tile.rows[r].first >= tile.rows[r].end;
    const float inverse = empty ? 0.0f : 1.0f / sum;
    T* out = static_cast<T*>(params.out) + batch * params.out_stride.batch + i * params.out_stride.seq +
             a * params.out_stride.head;
    // The weights of a row that sees nothing are all 0, but 0 * NaN of a value row would not be.
    if (empty)
      for (int panel = 0; panel < num_panels; ++panel) clear(tile.out.get() + (panel * kTileQ + r) * kCols, kCols);
    write_row(tile.out.get(), r, kTileQ, params.head_dim, inverse, out);
    const float reference = tile.bounded ? 0.0f : tile.maxima[r];
    params.softmax_lse[(static_cast<std::int64_t>(batch) * params.num_heads + a) * params.seqlen_q + i] =
        empty ? -HUGE_VALF : kLn2 * (reference + std::log2(sum));
  }
}

template <typename T>
void forward(const AttentionParams& params, int num_threads) {
  const PackedKeys packed(params);
  pack_keys<T>(params, packed, num_threads);

  const int group = params.num_heads / params.num_kv_heads;
  const int heads_per_tile = static_cast<int>(larger(1, smaller(group, kTileQ / params.seqlen_q)));
  const int queries_per_tile = kTileQ / heads_per_tile;
  const std::int64_t head_tiles = ceil_div(group, heads_per_tile);
  const std::int64_t query_tiles = ceil_div(params.seqlen_q, queries_per_tile);
  const std::int64_t columns = static_cast<std::int64_t>(params.batch) * params.num_kv_heads * head_tiles;

  Scratch<QueryTile> scratch(num_threads, params.head_dim, packed.num_panels);
  parallel_for(num_threads, columns * query_tiles, [&](std::int64_t task, int worker) {
    QueryTile& tile = scratch[worker];
    // The last queries see the most keys: longest tasks first, so that no thread is left with one at the end.
    const std::int64_t query = (query_tiles - 1 - task / columns) * queries_per_tile;
    const std::int64_t column = task % columns;
    const std::int64_t kv_head = column / head_tiles;  // counts batches too
    const int batch = static_cast<int>(kv_head / params.num_kv_heads);
    const int first_head = static_cast<int>(column % head_tiles) * heads_per_tile;
    const int heads = static_cast<int>(smaller(heads_per_tile, group - first_head));
    const int head = static_cast<int>(kv_head % params.num_kv_heads) * group + first_head;
    const std::int64_t queries = smaller(queries_per_tile, params.seqlen_q - query);

    const TileRange range = load_queries<T>(params, batch, head, heads, query, queries, tile);
    for (std::int64_t t = range.end - 1; t >= range.begin; --t) {
      const int num_keys = static_cast<int>(smaller(kTileK, params.seqlen_k - t * kTileK));
      multiply_scores(tile.queries.get(), packed.key_tile(kv_head, t), tile.weights.get(), tile.num_rows, num_keys,
                      params.head_dim);
      soften(tile, t * kTileK, packed.num_panels);
      multiply_values(tile.weights.get(), packed.value_tile(kv_head, t), tile.out.get(), tile.num_rows, num_keys,
                      packed.num_panels);
    }
    store_outputs<T>(params, batch, head, heads, query, packed.num_panels, tile);
  });
}

}  // namespace

void attention_forward(const AttentionParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kBFloat16:
      return forward<BFloat16>(params, num_threads);
    case DType::kFloat16:
      return forward<Float16>(params, num_threads);
    default:
      return forward<float>(params, num_threads);
  }
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
