// attention, backward (docs/model.md#16.3): one pass, five products for every visible (query tile, key tile).
//
//   delta  = sum over channels of dout * out                         once per query row
//   for every key tile, for a split of the query heads:              one task, one thread
//     for every head of the split, every query tile that sees the key tile:
//       p  = 2^(q k^T + bias - lse)       recomputed
//       ds = p * (dout v^T - delta)
//       dv += p^T dout,  dk += ds^T q     float32 sums of this tile and split
//       dq += ds k                        one task after the other, in the order of the key tiles
//
// Every sum has a fixed order, whatever the number of threads: dk and dv of a split belong to one task at a time, and
// dq receives its keys from left to right. dk and dv of one key head are never expanded to its query heads: the heads
// are split only where there are too few key tiles to occupy many threads.
//
// Memory beyond the tensors, in float32: keys twice and values once per key head, dk and dv once per split, and dq of
// as many heads as fit into kMostDq bytes; longer sequences process their heads in several rounds. Plus one set of
// tiles per thread.
#include <atomic>
#include <thread>

#include "andromeda/dispatch.h"
#include "attention_tile.h"
#include "parallel.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

constexpr std::int64_t kMostDq = std::int64_t{128} << 20;
constexpr double kLog2EDouble = 1.4426950408889634;

// The order in which tasks add to a query tile's dq: its semaphore counts the key tiles that have been added, and a
// task waits until those before its own have been added. Tasks start in the order of the key tiles and visit query
// tiles in the same order, so a task waits only for tasks that run, one step ahead of it.
class Semaphores {
 public:
  explicit Semaphores(std::int64_t count) : values_(new std::atomic<std::int32_t>[count]) {
    for (std::int64_t i = 0; i < count; ++i) values_[i].store(0, std::memory_order_relaxed);
  }
  ~Semaphores() { delete[] values_; }
  Semaphores(const Semaphores&) = delete;
  Semaphores& operator=(const Semaphores&) = delete;
  void wait(std::int64_t index, std::int32_t value) const {
    for (int spins = 0; values_[index].load(std::memory_order_acquire) != value; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }
  void increment(std::int64_t index) { values_[index].fetch_add(1, std::memory_order_release); }

 private:
  std::atomic<std::int32_t>* values_;
};

// How the work is divided. Everything follows from the shape.
struct Plan {
  explicit Plan(const AttentionParams& params)
      : head_dim(params.head_dim),
        stride(row_stride(params.head_dim)),
        qhead_per_kvhead(params.num_heads / params.num_kv_heads),
        kv_heads(static_cast<std::int64_t>(params.batch) * params.num_kv_heads),
        heads(static_cast<std::int64_t>(params.batch) * params.num_heads),
        query_tiles(ceil_div(params.seqlen_q, kTileQ)),
        key_tiles(ceil_div(params.seqlen_k, kTileK)),
        dq_size(query_tiles * kTileQ * stride),
        key_size(key_tiles * kTileK * stride),
        heads_at_once(larger(1, smaller(kMostDq / 4 / larger(dq_size, 1), qhead_per_kvhead))),
        kv_at_once(heads_at_once < qhead_per_kvhead
                       ? 1
                       : larger(1, smaller(kMostDq / 4 / larger(dq_size * qhead_per_kvhead, 1), kv_heads))),
        num_splits(larger(1, smaller(kManyTasks / larger(kv_at_once * key_tiles, 1), heads_at_once))) {}
  int head_dim;
  std::int64_t stride;
  std::int64_t qhead_per_kvhead;
  std::int64_t kv_heads, heads;  // of all batch entries
  std::int64_t query_tiles, key_tiles;
  std::int64_t dq_size, key_size;  // floats of one head's dq, and of one key head's dk or dv
  std::int64_t heads_at_once;      // query heads of a key head
  std::int64_t kv_at_once, num_splits;
};

// The heads that are worked on at a time: some key heads, and some of the query heads of each, its members.
struct HeadsInWork {
  std::int64_t first_kv, num_kv;  // among the key heads of all batch entries
  std::int64_t first_member, num_members;
};

// A tile of keys of the `kv`-th key head in work.
struct KeyTileIndex {
  std::int64_t kv, tile;
  std::int64_t batch, head, key;  // its first key
  int num_keys;
};

KeyTileIndex locate_keys(const AttentionParams& params, const HeadsInWork& heads, std::int64_t kv, std::int64_t tile) {
  const std::int64_t head = heads.first_kv + kv, key = tile * kTileK;
  const int num_keys = static_cast<int>(smaller(kTileK, params.seqlen_k - key));
  return {kv, tile, head / params.num_kv_heads, head % params.num_kv_heads, key, num_keys};
}

// A tile of queries of one head.
struct QueryTileIndex {
  std::int64_t head_of_all, tile;  // among the heads of all batch entries
  std::int64_t batch, head, query, query_end;
  std::int64_t slot;  // of its dq in the workspace, while the head is in work
};

QueryTileIndex locate_queries(const AttentionParams& params, std::int64_t head_of_all, std::int64_t tile) {
  const std::int64_t query = tile * kTileQ, end = smaller(query + kTileQ, params.seqlen_q);
  return {head_of_all, tile, head_of_all / params.num_heads, head_of_all % params.num_heads, query, end, 0};
}

QueryTileIndex locate_queries(const AttentionParams& params, const Plan& plan, const HeadsInWork& heads,
                              std::int64_t kv, std::int64_t member, std::int64_t tile) {
  const std::int64_t head = (heads.first_kv + kv) * plan.qhead_per_kvhead + heads.first_member + member;
  QueryTileIndex index = locate_queries(params, head, tile);
  index.slot = (kv * plan.heads_at_once + member) * plan.query_tiles + tile;
  return index;
}

// The memory that the steps pass on: delta and `seen` of all heads, the rest of the heads in work.
struct Workspace {
  Workspace(const AttentionParams& params, const Plan& plan)
      : plan(plan),
        seqlen_q(params.seqlen_q),
        columns_size(kTileK * plan.head_dim),
        panels_size(kTileK * round_up(plan.head_dim, kCols)),
        delta(plan.heads * params.seqlen_q),
        seen(plan.heads * plan.query_tiles),
        key_columns(plan.kv_at_once * plan.key_tiles * columns_size),
        value_columns(plan.kv_at_once * plan.key_tiles * columns_size),
        key_panels(plan.kv_at_once * plan.key_tiles * panels_size),
        not_finite(plan.kv_at_once * plan.key_tiles),
        dk(plan.kv_at_once * plan.num_splits * plan.key_size),
        dv(plan.kv_at_once * plan.num_splits * plan.key_size),
        dq(plan.kv_at_once * plan.heads_at_once * plan.dq_size) {}

  float* delta_of(const QueryTileIndex& index) const {
    return delta.get() + index.head_of_all * seqlen_q + index.query;
  }
  KeyRange& seen_by(const QueryTileIndex& index) const {
    return seen.get()[index.head_of_all * plan.query_tiles + index.tile];
  }
  float* key_columns_of(const KeyTileIndex& index) const { return key_columns.get() + tile_of(index) * columns_size; }
  float* value_columns_of(const KeyTileIndex& index) const {
    return value_columns.get() + tile_of(index) * columns_size;
  }
  float* key_panels_of(const KeyTileIndex& index) const { return key_panels.get() + tile_of(index) * panels_size; }
  bool& not_finite_of(const KeyTileIndex& index) const { return not_finite.get()[tile_of(index)]; }
  float* dk_of(const KeyTileIndex& index, std::int64_t split) const { return dk.get() + offset_of(index, split); }
  float* dv_of(const KeyTileIndex& index, std::int64_t split) const { return dv.get() + offset_of(index, split); }
  float* dq_of(const QueryTileIndex& index) const { return dq.get() + index.slot * kTileQ * plan.stride; }

 private:
  std::int64_t tile_of(const KeyTileIndex& index) const { return index.kv * plan.key_tiles + index.tile; }
  std::int64_t offset_of(const KeyTileIndex& index, std::int64_t split) const {
    return (index.kv * plan.num_splits + split) * plan.key_size + index.key * plan.stride;
  }

  const Plan& plan;
  std::int64_t seqlen_q, columns_size, panels_size;
  Buffer delta;
  Memory<KeyRange> seen;    // key tiles that a query tile sees
  Buffer key_columns;       // for q k^T
  Buffer value_columns;     // for dout v^T
  Buffer key_panels;        // for ds k
  Memory<bool> not_finite;  // whether a tile has keys that are not finite; they are 0 in the panels
  Buffer dk, dv;            // of every split
  Buffer dq;
};

// The scratch memory of one thread: a tile of query rows, and their weights for a tile of keys.
struct QueryTile {
  explicit QueryTile(const Plan& plan)
      : stride(plan.stride),
        queries(kTileQ * stride),
        douts(kTileQ * stride),
        p(kTileQ * kTileK),
        ds(kTileQ * kTileK),
        row(stride),
        rest(stride) {}
  std::int64_t stride;  // of queries and douts
  Buffer queries, douts, p, ds;
  Buffer row, rest;                    // one row each
  NonFiniteFlag in_queries, in_douts;  // numbers that are not finite
  Row rows[kTileQ];
  RowBlock blocks[kBlocks];
  double lse[kTileQ];  // in base 2
  float delta[kTileQ];
  int num_rows, num_blocks;
  int rows_of(int block) const { return static_cast<int>(smaller(kRows, num_rows - block * kRows)); }
};

template <typename T>
void load_rows(const AttentionBackwardParams& params, const Head& head, const QueryTileIndex& index, const float* delta,
               QueryTile& tile) {
  const AttentionParams& forward = params.forward;
  tile.in_queries = tile.in_douts = NonFiniteFlag();
  const auto q_row = [&](std::int64_t query) {
    return row_of<T>(forward.q, forward.q_stride, index.batch, query, index.head);
  };
  const auto dout_row = [&](std::int64_t query) {
    return row_of<T>(params.dout, params.dout_stride, index.batch, query, index.head);
  };
  const float* lse = forward.softmax_lse + index.head_of_all * forward.seqlen_q + index.query;
  tile.num_rows = static_cast<int>(index.query_end - index.query);
  tile.num_blocks = static_cast<int>(ceil_div(tile.num_rows, kRows));
  const std::int64_t padding = round_up(tile.num_rows, kRows) - tile.num_rows;
  clear(tile.queries.get() + tile.num_rows * tile.stride, padding * tile.stride);
  clear(tile.douts.get() + tile.num_rows * tile.stride, padding * tile.stride);
  for (int block = 0; block < tile.num_blocks; ++block) tile.blocks[block] = kNoRows;
  for (int r = 0; r < tile.num_rows; ++r) {
    const Row row = tile.rows[r] = describe_row(forward, head, index.batch, index.query + r);
    tile.blocks[r / kRows].include(row, head.slope != 0.0f);
    tile.lse[r] = row.empty() ? 0.0 : lse[r] * kLog2EDouble;  // an empty row's is infinite
    tile.delta[r] = delta[r];
    read_row(q_row(index.query + r), forward.head_dim, forward.softmax_scale * kLog2E,
             tile.queries.get() + r * tile.stride, tile.in_queries);
    read_row(dout_row(index.query + r), forward.head_dim, 1.0f, tile.douts.get() + r * tile.stride, tile.in_douts);
  }
  // The next tile's rows lie too far apart for the hardware prefetcher. They arrive while this one is computed.
  const std::int64_t next_end = smaller(index.query + 2 * kTileQ, forward.seqlen_q);
  for (std::int64_t query = index.query + kTileQ; query < next_end; ++query) {
    prefetch(q_row(query), forward.head_dim);
    prefetch(dout_row(query), forward.head_dim);
  }
}

// (kTileQ x kTileK) = rows (kTileQ x head_dim) * columns.
void multiply_columns(const QueryTile& tile, const float* rows, const float* columns, float* scores, std::int64_t key,
                      int num_keys, int head_dim) {
  for (int column = 0; column < num_keys; column += kCols) {
    for (int block = 0; block < tile.num_blocks; ++block) {
      const KeyRange seen = tile.blocks[block].columns(key, num_keys);
      if (column < seen.begin || column >= seen.end) continue;
      multiply_rows<Order::kByRows, Result::kSet>(
          rows + block * kRows * tile.stride, tile.stride, columns + column * head_dim, kCols,
          scores + block * kRows * kTileK + column, kTileK, tile.rows_of(block), head_dim);
    }
  }
}

// sums (kTileK x head_dim) += weights^T (kTileK x kTileQ) * rows (kTileQ x head_dim). Numbers of the rows that are not
// finite are added first and replaced by 0.
void add_transposed(const QueryTile& tile, const float* weights, float* rows, const NonFiniteFlag& in_rows, float* sums,
                    std::int64_t key, int num_keys, int head_dim) {
  for (int r = 0; in_rows.any() && r < tile.num_rows; ++r) {
    if (!separate_not_finite(rows + r * tile.stride, head_dim, tile.rest.get())) continue;
    for (int column = 0; column < num_keys; ++column)
      if (tile.rows[r].sees(key + column))
        add_scaled(sums + column * tile.stride, weights[r * kTileK + column], tile.rest.get(), head_dim);
  }
  for (int channel = 0; channel < head_dim; channel += kCols) {
    for (int column = 0; column < num_keys; column += kRows) {
      int first_block = tile.num_blocks, end_block = 0;  // of rows that see one of the keys
      for (int block = 0; block < tile.num_blocks; ++block) {
        const KeyRange seen = tile.blocks[block].columns(key, num_keys);
        if (seen.begin >= column + kRows || seen.end <= column) continue;
        if (end_block == 0) first_block = block;
        end_block = block + 1;
      }
      if (end_block == 0) continue;
      const std::int64_t begin = first_block * kRows, end = smaller(end_block * kRows, tile.num_rows);
      multiply_rows<Order::kByColumns, Result::kAdd>(
          weights + begin * kTileK + column, kTileK, rows + begin * tile.stride + channel, tile.stride,
          sums + column * tile.stride + channel, tile.stride, static_cast<int>(smaller(kRows, num_keys - column)),
          static_cast<int>(end - begin));
    }
  }
}

// dq += ds * keys for the keys, rows of a tensor, that are not finite; they are 0 in the products.
template <typename T>
void add_not_finite(const QueryTile& tile, const T* keys, std::int64_t stride, float* dq, std::int64_t key,
                    int num_keys, int head_dim) {
  for (int column = 0; column < num_keys; ++column) {
    read_row(keys + column * stride, head_dim, 1.0f, tile.row.get());
    if (!separate_not_finite(tile.row.get(), head_dim, tile.rest.get())) continue;
    for (int r = 0; r < tile.num_rows; ++r)
      if (tile.rows[r].sees(key + column))
        add_scaled(dq + r * tile.stride, tile.ds.get()[r * kTileK + column], tile.rest.get(), head_dim);
  }
}

// dq (kTileQ x head_dim) += ds (kTileQ x kTileK) * keys (kTileK x head_dim).
void add_dq(const QueryTile& tile, const float* key_panels, float* dq, std::int64_t key, int num_keys, int head_dim) {
  for (int channel = 0; channel < head_dim; channel += kCols) {
    for (int block = 0; block < tile.num_blocks; ++block) {
      const KeyRange seen = tile.blocks[block].columns(key, num_keys);
      if (seen.empty()) continue;
      multiply_rows<Order::kByRows, Result::kAdd>(tile.ds.get() + block * kRows * kTileK + seen.begin, kTileK,
                                                  key_panels + (channel / kCols * kTileK + seen.begin) * kCols, kCols,
                                                  dq + block * kRows * tile.stride + channel, tile.stride,
                                                  tile.rows_of(block), static_cast<int>(seen.end - seen.begin));
    }
  }
}

// Turns one row of scores into one row of p, and of dout v^T into one of ds, in place, in the columns [begin, end).
//
// kUnmasked: every key is visible, and the bias, if any, is linear in the key.
template <bool kUnmasked, bool kBiased>
void differentiate_row(float* scores, float* dweights, const Row& row, float slope, double lse, float delta,
                       std::int64_t key, int begin, int end) {
  // The log-sum-exp in two parts: half an ulp of 8 would be an error of 8 round-offs in every weight of the row.
  const float whole = static_cast<float>(std::rint(lse)), rest = static_cast<float>(lse - whole);
  const IntVec lanes = lane_index();
  const Vec distance = __builtin_convertvector(lanes, Vec) + static_cast<float>(key - row.position);
  const int first_seen = static_cast<int>(smaller(larger(row.first - key, 0), kTileK));
  const int end_seen = static_cast<int>(larger(smaller(row.end - key, kTileK), 0));
#pragma GCC unroll 4
  for (int column = begin; column < end; column += kLanes) {
    Vec x = load(scores + column);
    const Vec offset = distance + static_cast<float>(column);
    if (kBiased) x += slope * (kUnmasked ? offset : (offset > 0.0f ? -offset : offset));
    Vec p = exp2(x - rest, -whole);
    Vec ds = p * (load(dweights + column) - delta);
    if (!kUnmasked) {
      const IntVec index = lanes + column;
      const IntVec seen = (index >= first_seen) & (index < end_seen);
      p = select(seen, p, Vec{});
      ds = select(seen, ds, Vec{});
    }
    store(scores + column, p);
    store(dweights + column, ds);
  }
}

constexpr decltype(&differentiate_row<false, false>) kDifferentiateRow[2][2] = {
    // not biased, biased
    {differentiate_row<false, false>, differentiate_row<false, true>},
    {differentiate_row<true, false>, differentiate_row<true, true>},  // unmasked
};

// Scores become p, and dout v^T becomes ds. Both are 0 where a row sees nothing.
void differentiate(const QueryTile& tile, float slope, std::int64_t key, int num_keys) {
  for (int block = 0; block < tile.num_blocks; ++block) {
    const KeyRange seen = tile.blocks[block].columns(key, num_keys);
    const bool unmasked = tile.blocks[block].is_unmasked(key);
    const auto& row_function = kDifferentiateRow[unmasked][slope != 0.0f];
    const int begin = static_cast<int>(seen.begin), end = static_cast<int>(round_up(seen.end, kLanes));
    for (int r = block * kRows; r < block * kRows + tile.rows_of(block); ++r) {
      float* p = tile.p.get() + r * kTileK;
      float* ds = tile.ds.get() + r * kTileK;
      row_function(p, ds, tile.rows[r], slope, tile.lse[r], tile.delta[r], key, begin, end);
      if (unmasked) continue;
      for (float* weights : {p, ds}) {
        clear(weights, begin);
        clear(weights + end, kTileK - end);
      }
    }
  }
}

// Computes delta, and finds the key tiles that each query tile sees.
template <typename T>
void compute_delta(const AttentionBackwardParams& params, const Plan& plan, const Workspace& work, int num_threads) {
  const AttentionParams& forward = params.forward;
  parallel_for(num_threads, plan.heads * plan.query_tiles, [&](std::int64_t task) {
    const QueryTileIndex index = locate_queries(forward, task / plan.query_tiles, task % plan.query_tiles);
    const Head head = describe_head(forward, static_cast<int>(index.head));
    KeyRange seen{0, 0};
    const Buffer rows(2 * plan.stride);
    float* out = rows.get();
    float* dout = rows.get() + plan.stride;
    for (std::int64_t query = index.query; query < index.query_end; ++query) {
      const Row row = describe_row(forward, head, index.batch, query);
      seen.include(row.first, row.end);
      read_row(row_of<T>(forward.out, forward.out_stride, index.batch, query, index.head), plan.head_dim, 1.0f, out);
      read_row(row_of<T>(params.dout, params.dout_stride, index.batch, query, index.head), plan.head_dim, 1.0f, dout);
      Vec sum{};
      for (int channel = 0; channel < plan.head_dim; channel += kLanes)
        sum += load(out + channel) * load(dout + channel);
      work.delta_of(index)[query - index.query] = reduce_add(sum);
    }
    work.seen_by(index) = seen.empty() ? seen : KeyRange{seen.begin / kTileK, ceil_div(seen.end, kTileK)};
  });
}

// Packs keys and values of the key heads in work, and clears their dk and dv.
template <typename T>
void pack_operands(const AttentionParams& params, const Plan& plan, const HeadsInWork& heads, const Workspace& work,
                   int num_threads) {
  parallel_for(num_threads, heads.num_kv * plan.key_tiles, [&](std::int64_t task) {
    const KeyTileIndex index = locate_keys(params, heads, task / plan.key_tiles, task % plan.key_tiles);
    for (std::int64_t split = 0; split < plan.num_splits; ++split) {
      clear(work.dk_of(index, split), kTileK * plan.stride);
      clear(work.dv_of(index, split), kTileK * plan.stride);
    }
    const std::int64_t k_stride = params.k_stride.seq, v_stride = params.v_stride.seq;
    const T* k = row_of<T>(params.k, params.k_stride, index.batch, index.key, index.head);
    const T* v = row_of<T>(params.v, params.v_stride, index.batch, index.key, index.head);
    for (int column = 0; column < index.num_keys; column += kCols) {
      const int rows = static_cast<int>(smaller(kCols, index.num_keys - column));
      const std::int64_t offset = column * plan.head_dim;
      pack_columns(k + column * k_stride, k_stride, rows, plan.head_dim, work.key_columns_of(index) + offset);
      pack_columns(v + column * v_stride, v_stride, rows, plan.head_dim, work.value_columns_of(index) + offset);
    }
    bool not_finite = false;
    for (int channel = 0; channel < plan.head_dim; channel += kCols) {
      const int width = static_cast<int>(smaller(kCols, plan.head_dim - channel));
      float* panel = work.key_panels_of(index) + channel * kTileK;
      not_finite |= pack_panel(k + channel, k_stride, index.num_keys, width, panel);
    }
    work.not_finite_of(index) = not_finite;
  });
}

// The five products of a query tile and a key tile.
template <typename T>
void accumulate_tile(const AttentionBackwardParams& params, const Plan& plan, const Workspace& work,
                     const QueryTileIndex& queries, const KeyTileIndex& keys, std::int64_t split,
                     Semaphores& dq_semaphores, QueryTile& tile) {
  const AttentionParams& forward = params.forward;
  const Head head = describe_head(forward, static_cast<int>(queries.head));
  const std::int64_t key = keys.key;
  const int num_keys = keys.num_keys, head_dim = plan.head_dim;
  load_rows<T>(params, head, queries, work.delta_of(queries), tile);
  multiply_columns(tile, tile.queries.get(), work.key_columns_of(keys), tile.p.get(), key, num_keys, head_dim);
  multiply_columns(tile, tile.douts.get(), work.value_columns_of(keys), tile.ds.get(), key, num_keys, head_dim);
  differentiate(tile, head.slope, key, num_keys);
  add_transposed(tile, tile.p.get(), tile.douts.get(), tile.in_douts, work.dv_of(keys, split), key, num_keys, head_dim);
  add_transposed(tile, tile.ds.get(), tile.queries.get(), tile.in_queries, work.dk_of(keys, split), key, num_keys,
                 head_dim);

  float* dq = work.dq_of(queries);
  const std::int64_t first_key_tile = work.seen_by(queries).begin;
  dq_semaphores.wait(queries.slot, static_cast<std::int32_t>(keys.tile - first_key_tile));
  if (keys.tile == first_key_tile) clear(dq, kTileQ * plan.stride);
  add_dq(tile, work.key_panels_of(keys), dq, key, num_keys, head_dim);
  if (work.not_finite_of(keys)) {
    const T* k = row_of<T>(forward.k, forward.k_stride, keys.batch, key, keys.head);
    add_not_finite(tile, k, forward.k_stride.seq, dq, key, num_keys, head_dim);
  }
  dq_semaphores.increment(queries.slot);
}

// dk, dv and dq of the heads in work, in float32.
template <typename T>
void accumulate(const AttentionBackwardParams& params, const Plan& plan, const HeadsInWork& heads,
                const Workspace& work, const Scratch<QueryTile>& scratch, int num_threads) {
  const AttentionParams& forward = params.forward;
  Semaphores dq_semaphores(plan.kv_at_once * plan.heads_at_once * plan.query_tiles);
  const std::int64_t columns = heads.num_kv * plan.num_splits;
  parallel_for(num_threads, columns * plan.key_tiles, [&](std::int64_t task, int worker) {
    const std::int64_t kv = task % columns / plan.num_splits, split = task % columns % plan.num_splits;
    const KeyTileIndex keys = locate_keys(forward, heads, kv, task / columns);
    const std::int64_t end = heads.num_members * (split + 1) / plan.num_splits;
    for (std::int64_t member = heads.num_members * split / plan.num_splits; member < end; ++member) {
      for (std::int64_t query_tile = 0; query_tile < plan.query_tiles; ++query_tile) {
        const QueryTileIndex queries = locate_queries(forward, plan, heads, kv, member, query_tile);
        const KeyRange seen = work.seen_by(queries);
        if (seen.begin <= keys.tile && keys.tile < seen.end)
          accumulate_tile<T>(params, plan, work, queries, keys, split, dq_semaphores, scratch[worker]);
      }
    }
  });
}

template <typename T>
void write_dq(const AttentionBackwardParams& params, const Plan& plan, const HeadsInWork& heads, const Workspace& work,
              int num_threads) {
  const std::int64_t tiles_of_kv = heads.num_members * plan.query_tiles;
  parallel_for(num_threads, heads.num_kv * tiles_of_kv, [&](std::int64_t task) {
    const std::int64_t kv = task / tiles_of_kv, member = task % tiles_of_kv / plan.query_tiles;
    const QueryTileIndex index = locate_queries(params.forward, plan, heads, kv, member, task % plan.query_tiles);
    float* dq = work.dq_of(index);
    if (work.seen_by(index).empty()) clear(dq, kTileQ * plan.stride);
    for (std::int64_t query = index.query; query < index.query_end; ++query, dq += plan.stride)
      write_row(dq, plan.head_dim, params.forward.softmax_scale,
                row_of<T>(params.dq, params.dq_stride, index.batch, query, index.head));
  });
}

// Adds the splits of dk and dv, and writes the sums.
template <typename T>
void write_dk_dv(const AttentionBackwardParams& params, const Plan& plan, const HeadsInWork& heads,
                 const Workspace& work, int num_threads) {
  const AttentionParams& forward = params.forward;
  parallel_for(num_threads, heads.num_kv * forward.seqlen_k, [&](std::int64_t task) {
    const std::int64_t kv = task / forward.seqlen_k, key = task % forward.seqlen_k;
    const KeyTileIndex index = locate_keys(forward, heads, kv, key / kTileK);
    float* dk = work.dk_of(index, 0) + key % kTileK * plan.stride;
    float* dv = work.dv_of(index, 0) + key % kTileK * plan.stride;
    for (float* sum : {dk, dv})
      for (std::int64_t split = 1; split < plan.num_splits; ++split)
        for (int channel = 0; channel < plan.head_dim; channel += kLanes)
          store(sum + channel, load(sum + channel) + load(sum + split * plan.key_size + channel));
    // ds was multiplied by queries that carry the factor log2(e).
    write_row(dk, plan.head_dim, kLn2, row_of<T>(params.dk, params.dk_stride, index.batch, key, index.head));
    write_row(dv, plan.head_dim, 1.0f, row_of<T>(params.dv, params.dv_stride, index.batch, key, index.head));
  });
}

template <typename T>
void backward(const AttentionBackwardParams& params, int num_threads) {
  const Plan plan(params.forward);
  const Workspace work(params.forward, plan);
  const Scratch<QueryTile> scratch(num_threads, plan);
  compute_delta<T>(params, plan, work, num_threads);
  for (std::int64_t kv = 0; kv < plan.kv_heads; kv += plan.kv_at_once) {
    HeadsInWork heads{kv, smaller(plan.kv_at_once, plan.kv_heads - kv), 0, 0};
    pack_operands<T>(params.forward, plan, heads, work, num_threads);
    for (std::int64_t member = 0; member < plan.qhead_per_kvhead; member += plan.heads_at_once) {
      heads.first_member = member;
      heads.num_members = smaller(plan.heads_at_once, plan.qhead_per_kvhead - member);
      accumulate<T>(params, plan, heads, work, scratch, num_threads);
      write_dq<T>(params, plan, heads, work, num_threads);
    }
    write_dk_dv<T>(params, plan, heads, work, num_threads);
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& params, int num_threads) {
  dispatch_dtype<StorageTypes>(params.forward.dtype,
                               [&](auto dtype) { backward<typename decltype(dtype)::type>(params, num_threads); });
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
