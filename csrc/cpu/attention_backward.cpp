// attention, backward (docs/model.md#16.3): one pass, five products for every visible (query tile, key tile).
//
//   delta  = sum over channels of dout * out                         once per query row
//   for every key tile, for a share of the query heads:              one task, one thread
//     for every head of the share, every query tile that sees the key tile:
//       p  = 2^(q k^T + bias - lse)       recomputed
//       ds = p * (dout v^T - delta)
//       dv += p^T dout,  dk += ds^T q     float32 sums of this tile and share
//       dq += ds k                        handed from task to task, see Turns
//
// Every sum has a fixed order, whatever the number of threads: dk and dv of a share belong to one task at a time, dq
// receives its keys from left to right. dk and dv of one key head are never expanded to its query heads: the heads are
// cut into few shares, and only where there are too few key tiles to occupy many threads.
//
// Memory beyond the tensors, in float32: keys twice and values once per key head, dk and dv once per share, and dq of
// as many heads as fit into kMostDq bytes; longer sequences take their heads in several turns. Plus one set of tiles
// per thread.
#include <atomic>
#include <thread>

#include "attention_tile.h"
#include "parallel.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

constexpr std::int64_t kMostDq = std::int64_t{128} << 20;
constexpr double kLog2EDouble = 1.4426950408889634;
constexpr int kManyTasks = 64;  // enough for any number of threads

// The order in which tasks add to a query tile's dq: a task waits until the key tiles before its own have been added.
// Tasks are handed out in that order and visit query tiles in the same order, so whoever is waited for is always
// running, one step ahead.
class Turns {
 public:
  explicit Turns(std::int64_t count) : turns_(new std::atomic<std::int32_t>[count]) {
    for (std::int64_t i = 0; i < count; ++i) turns_[i].store(0, std::memory_order_relaxed);
  }
  ~Turns() { delete[] turns_; }
  Turns(const Turns&) = delete;
  Turns& operator=(const Turns&) = delete;
  void wait(std::int64_t index, std::int32_t turn) const {
    for (int spins = 0; turns_[index].load(std::memory_order_acquire) != turn; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }
  void pass(std::int64_t index) { turns_[index].fetch_add(1, std::memory_order_release); }

 private:
  std::atomic<std::int32_t>* turns_;
};

// How the work is cut. Everything follows from the shape.
struct Plan {
  explicit Plan(const AttentionParams& params)
      : head_dim(params.head_dim),
        stride(row_stride(params.head_dim)),
        group(params.num_heads / params.num_kv_heads),
        kv_heads(static_cast<std::int64_t>(params.batch) * params.num_kv_heads),
        heads(static_cast<std::int64_t>(params.batch) * params.num_heads),
        query_tiles(ceil_div(params.seqlen_q, kTileQ)),
        key_tiles(ceil_div(params.seqlen_k, kTileK)),
        dq_size(query_tiles * kTileQ * stride),
        key_size(key_tiles * kTileK * stride),
        heads_at_once(larger(1, smaller(kMostDq / 4 / larger(dq_size, 1), group))),
        kv_at_once(heads_at_once < group ? 1 : larger(1, smaller(kMostDq / 4 / larger(dq_size * group, 1), kv_heads))),
        shares(larger(1, smaller(kManyTasks / larger(kv_at_once * key_tiles, 1), heads_at_once))) {}
  int head_dim;
  std::int64_t stride;
  std::int64_t group, kv_heads, heads;  // kv_heads and heads count batches too
  std::int64_t query_tiles, key_tiles;
  std::int64_t dq_size, key_size;  // floats of one head's dq, and of one key head's dk or dv
  std::int64_t heads_at_once, kv_at_once, shares;
};

// Keys and values of the key heads in work.
struct PackedKeys {
  explicit PackedKeys(const Plan& plan)
      : columns_size(kTileK * plan.head_dim),
        panels_size(kTileK * round_up(plan.head_dim, kCols)),
        key_columns(plan.kv_at_once * plan.key_tiles * columns_size),
        value_columns(plan.kv_at_once * plan.key_tiles * columns_size),
        key_panels(plan.kv_at_once * plan.key_tiles * panels_size),
        not_finite(plan.kv_at_once * plan.key_tiles) {}
  std::int64_t columns_size, panels_size;
  Buffer key_columns;       // for q k^T
  Buffer value_columns;     // for dout v^T
  Buffer key_panels;        // for ds k
  Memory<bool> not_finite;  // of each tile: keys that the panels have as 0
};

// What one thread works on: a tile of query rows against a tile of keys.
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
  Buffer row, rest;              // one of each
  Noticed in_queries, in_douts;  // numbers that are not finite
  Row rows[kTileQ];
  RowBlock blocks[kBlocks];
  double lse[kTileQ];  // in base 2
  float delta[kTileQ];
  int num_rows, num_blocks;
  int rows_of(int block) const { return static_cast<int>(smaller(kRows, num_rows - block * kRows)); }
};

template <typename T>
void load_rows(const AttentionBackwardParams& backward_params, const Head& head, std::int64_t batch, std::int64_t a,
               std::int64_t query, const float* delta, QueryTile& tile) {
  const AttentionParams& params = backward_params.forward;
  tile.in_queries = tile.in_douts = Noticed();
  const auto q_row = [&](std::int64_t i) { return row_of<T>(params.q, params.q_stride, batch, i, a); };
  const auto dout_row = [&](std::int64_t i) {
    return row_of<T>(backward_params.dout, backward_params.dout_stride, batch, i, a);
  };
  const float* lse = params.softmax_lse + (batch * params.num_heads + a) * params.seqlen_q + query;
  tile.num_rows = static_cast<int>(smaller(kTileQ, params.seqlen_q - query));
  tile.num_blocks = static_cast<int>(ceil_div(tile.num_rows, kRows));
  const std::int64_t padding = round_up(tile.num_rows, kRows) - tile.num_rows;
  clear(tile.queries.get() + tile.num_rows * tile.stride, padding * tile.stride);
  clear(tile.douts.get() + tile.num_rows * tile.stride, padding * tile.stride);
  for (int block = 0; block < tile.num_blocks; ++block) tile.blocks[block] = kNoRows;
  for (int r = 0; r < tile.num_rows; ++r) {
    const Row row = tile.rows[r] = describe_row(params, head, batch, query + r);
    tile.blocks[r / kRows].include(row, head.slope != 0.0f);
    tile.lse[r] = row.empty() ? 0.0 : lse[r] * kLog2EDouble;  // infinite for an empty row; every weight of it is masked
    tile.delta[r] = delta[r];
    read_row(q_row(query + r), params.head_dim, params.softmax_scale * kLog2E, tile.queries.get() + r * tile.stride,
             tile.in_queries);
    read_row(dout_row(query + r), params.head_dim, 1.0f, tile.douts.get() + r * tile.stride, tile.in_douts);
  }
  // The next tile's rows, which lie too far apart for the hardware to foresee them, come while this one is computed.
  for (std::int64_t i = query + kTileQ; i < smaller(query + 2 * kTileQ, params.seqlen_q); ++i) {
    prefetch(q_row(i), params.head_dim);
    prefetch(dout_row(i), params.head_dim);
  }
}

// (kTileQ x kTileK) = rows (kTileQ x head_dim) * columns.
void multiply_columns(const QueryTile& tile, const float* rows, const float* columns, float* scores, std::int64_t key,
                      int num_keys, int head_dim) {
  for (int column = 0; column < num_keys; column += kCols) {
    for (int block = 0; block < tile.num_blocks; ++block) {
      const Range seen = tile.blocks[block].columns(key, num_keys);
      if (column < seen.begin || column >= seen.end) continue;
      multiply_rows<Order::kByRows, Result::kSet>(
          rows + block * kRows * tile.stride, tile.stride, columns + column * head_dim, kCols,
          scores + block * kRows * kTileK + column, kTileK, tile.rows_of(block), head_dim);
    }
  }
}

// sums (kTileK x head_dim) += weights^T (kTileK x kTileQ) * rows (kTileQ x head_dim). Of the rows only what is finite
// is left, and the rest is added first.
void add_transposed(const QueryTile& tile, const float* weights, float* rows, const Noticed& in_rows, float* sums,
                    std::int64_t key, int num_keys, int head_dim) {
  for (int r = 0; in_rows.any() && r < tile.num_rows; ++r) {
    if (!set_apart(rows + r * tile.stride, head_dim, tile.rest.get())) continue;
    for (int column = 0; column < num_keys; ++column)
      if (tile.rows[r].sees(key + column))
        add_scaled(sums + column * tile.stride, weights[r * kTileK + column], tile.rest.get(), head_dim);
  }
  for (int channel = 0; channel < head_dim; channel += kCols) {
    for (int column = 0; column < num_keys; column += kRows) {
      Range blocks{0, 0};  // of rows that see one of the keys
      for (int block = 0; block < tile.num_blocks; ++block) {
        const Range seen = tile.blocks[block].columns(key, num_keys);
        if (seen.begin < column + kRows && seen.end > column) blocks.include(block, block + 1);
      }
      if (blocks.empty()) continue;
      const std::int64_t begin = blocks.begin * kRows, end = smaller(blocks.end * kRows, tile.num_rows);
      multiply_rows<Order::kByColumns, Result::kAdd>(
          weights + begin * kTileK + column, kTileK, rows + begin * tile.stride + channel, tile.stride,
          sums + column * tile.stride + channel, tile.stride, static_cast<int>(smaller(kRows, num_keys - column)),
          static_cast<int>(end - begin));
    }
  }
}

// dq += ds * keys for what is not finite in `keys`, rows of a tensor, of which the products know nothing.
template <typename T>
void add_not_finite(const QueryTile& tile, const T* keys, std::int64_t stride, float* dq, std::int64_t key,
                    int num_keys, int head_dim) {
  for (int column = 0; column < num_keys; ++column) {
    read_row(keys + column * stride, head_dim, 1.0f, tile.row.get());
    if (!set_apart(tile.row.get(), head_dim, tile.rest.get())) continue;
    for (int r = 0; r < tile.num_rows; ++r)
      if (tile.rows[r].sees(key + column))
        add_scaled(dq + r * tile.stride, tile.ds.get()[r * kTileK + column], tile.rest.get(), head_dim);
  }
}

// dq (kTileQ x head_dim) += ds (kTileQ x kTileK) * keys (kTileK x head_dim).
void add_dq(const QueryTile& tile, const float* key_panels, float* dq, std::int64_t key, int num_keys, int head_dim) {
  for (int channel = 0; channel < head_dim; channel += kCols) {
    for (int block = 0; block < tile.num_blocks; ++block) {
      const Range seen = tile.blocks[block].columns(key, num_keys);
      if (seen.empty()) continue;
      multiply_rows<Order::kByRows, Result::kAdd>(tile.ds.get() + block * kRows * kTileK + seen.begin, kTileK,
                                                  key_panels + (channel / kCols * kTileK + seen.begin) * kCols, kCols,
                                                  dq + block * kRows * tile.stride + channel, tile.stride,
                                                  tile.rows_of(block), static_cast<int>(seen.end - seen.begin));
    }
  }
}

// One row of scores and of dout v^T becomes one row of p and of ds, in place. Columns outside [begin, end) become 0.
// kPlain: every key is visible, and the bias, if any, is linear in the key.
template <bool kPlain, bool kBiased>
inline void differentiate_row(float* scores, float* dweights, const Row& row, float slope, double lse2, float delta,
                              std::int64_t key, int begin, int end) {
  // In two parts: half an ulp of a log-sum-exp of 8 would be an error of 8 round-offs in every weight of the row.
  const float whole = static_cast<float>(std::rint(lse2)), rest = static_cast<float>(lse2 - whole);
  const IntVec lanes = lane_index();
  const Vec distance = __builtin_convertvector(lanes, Vec) + static_cast<float>(key - row.position);
  const int first_seen = static_cast<int>(smaller(larger(row.first - key, 0), kTileK));
  const int end_seen = static_cast<int>(larger(smaller(row.end - key, kTileK), 0));
#pragma GCC unroll 4
  for (int column = begin; column < end; column += kLanes) {
    Vec x = load(scores + column);
    const Vec offset = distance + static_cast<float>(column);
    if (kBiased) x += slope * (kPlain ? offset : (offset > 0.0f ? -offset : offset));
    Vec p = exp2(x - rest, -whole);
    Vec ds = p * (load(dweights + column) - delta);
    if (!kPlain) {
      const IntVec index = lanes + column;
      const IntVec seen = (index >= first_seen) & (index < end_seen);
      p = select(seen, p, Vec{});
      ds = select(seen, ds, Vec{});
    }
    store(scores + column, p);
    store(dweights + column, ds);
  }
}

void differentiate(const QueryTile& tile, float slope, std::int64_t key, int num_keys) {
  for (int block = 0; block < tile.num_blocks; ++block) {
    const Range seen = tile.blocks[block].columns(key, num_keys);
    const bool plain = tile.blocks[block].is_plain(key);
    const int begin = static_cast<int>(seen.begin), end = static_cast<int>(round_up(seen.end, kLanes));
    for (int r = block * kRows; r < block * kRows + tile.rows_of(block); ++r) {
      float* p = tile.p.get() + r * kTileK;
      float* ds = tile.ds.get() + r * kTileK;
      const auto differentiate = plain ? slope == 0.0f ? differentiate_row<true, false> : differentiate_row<true, true>
                                 : slope == 0.0f ? differentiate_row<false, false>
                                                 : differentiate_row<false, true>;
      differentiate(p, ds, tile.rows[r], slope, tile.lse[r], tile.delta[r], key, begin, end);
      if (plain) continue;
      for (float* weights : {p, ds}) {
        clear(weights, begin);
        clear(weights + end, kTileK - end);
      }
    }
  }
}

template <typename T>
void backward(const AttentionBackwardParams& backward_params, int num_threads) {
  const AttentionParams& params = backward_params.forward;
  const Plan plan(params);
  const int head_dim = plan.head_dim;

  // delta, and which key tiles each query tile sees: (batch * head, query tile).
  const Buffer delta(plan.heads * params.seqlen_q);
  const Memory<Range> range_memory(plan.heads * plan.query_tiles);
  Range* ranges = range_memory.get();
  parallel_for(num_threads, plan.heads * plan.query_tiles, [&](std::int64_t task) {
    const std::int64_t batch = task / plan.query_tiles / params.num_heads;
    const std::int64_t head = task / plan.query_tiles % params.num_heads;
    const Head description = describe_head(params, static_cast<int>(head));
    const std::int64_t query = task % plan.query_tiles * kTileQ;
    Range seen{0, 0};
    const Buffer row(2 * plan.stride);
    float* out = row.get();
    float* dout = row.get() + plan.stride;
    for (std::int64_t i = query; i < smaller(query + kTileQ, params.seqlen_q); ++i) {
      const Row described = describe_row(params, description, batch, i);
      seen.include(described.first, described.end);
      read_row(row_of<T>(params.out, params.out_stride, batch, i, head), head_dim, 1.0f, out);
      read_row(row_of<T>(backward_params.dout, backward_params.dout_stride, batch, i, head), head_dim, 1.0f, dout);
      Vec sum{};
      for (int channel = 0; channel < head_dim; channel += kLanes) sum += load(out + channel) * load(dout + channel);
      delta.get()[task / plan.query_tiles * params.seqlen_q + i] = reduce_add(sum);
    }
    ranges[task] = seen.empty() ? seen : Range{seen.begin / kTileK, ceil_div(seen.end, kTileK)};
  });

  const PackedKeys packed(plan);
  const Buffer dk(plan.kv_at_once * plan.shares * plan.key_size), dv(plan.kv_at_once * plan.shares * plan.key_size);
  const Buffer dq(plan.kv_at_once * plan.heads_at_once * plan.dq_size);
  const Scratch<QueryTile> scratch(num_threads, plan);
  for (std::int64_t first_kv = 0; first_kv < plan.kv_heads; first_kv += plan.kv_at_once) {
    const std::int64_t kv_count = smaller(plan.kv_at_once, plan.kv_heads - first_kv);
    parallel_for(num_threads, kv_count * plan.key_tiles, [&](std::int64_t task) {
      const std::int64_t kv_head = first_kv + task / plan.key_tiles, key = task % plan.key_tiles * kTileK;
      const std::int64_t batch = kv_head / params.num_kv_heads, head = kv_head % params.num_kv_heads;
      const int num_keys = static_cast<int>(smaller(kTileK, params.seqlen_k - key));
      for (std::int64_t share = 0; share < plan.shares; ++share) {
        const std::int64_t offset = (task / plan.key_tiles * plan.shares + share) * plan.key_size + key * plan.stride;
        clear(dk.get() + offset, kTileK * plan.stride);
        clear(dv.get() + offset, kTileK * plan.stride);
      }
      const T* k = row_of<T>(params.k, params.k_stride, batch, key, head);
      const T* v = row_of<T>(params.v, params.v_stride, batch, key, head);
      for (int column = 0; column < num_keys; column += kCols) {
        const int rows = static_cast<int>(smaller(kCols, num_keys - column));
        const std::int64_t offset = task * packed.columns_size + column * head_dim;
        pack_columns(k + column * params.k_stride.seq, params.k_stride.seq, rows, head_dim,
                     packed.key_columns.get() + offset);
        pack_columns(v + column * params.v_stride.seq, params.v_stride.seq, rows, head_dim,
                     packed.value_columns.get() + offset);
      }
      bool not_finite = false;
      for (int channel = 0; channel < head_dim; channel += kCols)
        not_finite |=
            pack_panel(k + channel, params.k_stride.seq, num_keys, static_cast<int>(smaller(kCols, head_dim - channel)),
                       packed.key_panels.get() + task * packed.panels_size + channel * kTileK);
      packed.not_finite.get()[task] = not_finite;
    });

    for (std::int64_t first_head = 0; first_head < plan.group; first_head += plan.heads_at_once) {
      const std::int64_t head_count = smaller(plan.heads_at_once, plan.group - first_head);
      // Of query head `member` of the `kv`-th key head in work.
      const auto head_of = [&](std::int64_t kv, std::int64_t member) {
        return (first_kv + kv) * plan.group + first_head + member;  // counts batches too
      };
      Turns turns(kv_count * head_count * plan.query_tiles);
      const std::int64_t columns = kv_count * plan.shares;
      parallel_for(num_threads, columns * plan.key_tiles, [&](std::int64_t task, int worker) {
        QueryTile& tile = scratch[worker];
        const std::int64_t column = task % columns, key_tile = task / columns, key = key_tile * kTileK;
        const std::int64_t kv = column / plan.shares, share = column % plan.shares;
        const std::int64_t pack = kv * plan.key_tiles + key_tile;
        const int num_keys = static_cast<int>(smaller(kTileK, params.seqlen_k - key));
        float* dk_tile = dk.get() + column * plan.key_size + key * plan.stride;
        float* dv_tile = dv.get() + column * plan.key_size + key * plan.stride;
        for (std::int64_t member = head_count * share / plan.shares; member < head_count * (share + 1) / plan.shares;
             ++member) {
          const std::int64_t head = head_of(kv, member), batch = head / params.num_heads;
          const Head description = describe_head(params, static_cast<int>(head % params.num_heads));
          for (std::int64_t query_tile = 0; query_tile < plan.query_tiles; ++query_tile) {
            const Range range = ranges[head * plan.query_tiles + query_tile];
            if (key_tile < range.begin || key_tile >= range.end) continue;
            const std::int64_t query = query_tile * kTileQ;
            load_rows<T>(backward_params, description, batch, head % params.num_heads, query,
                         delta.get() + head * params.seqlen_q + query, tile);
            multiply_columns(tile, tile.queries.get(), packed.key_columns.get() + pack * packed.columns_size,
                             tile.p.get(), key, num_keys, head_dim);
            multiply_columns(tile, tile.douts.get(), packed.value_columns.get() + pack * packed.columns_size,
                             tile.ds.get(), key, num_keys, head_dim);
            differentiate(tile, description.slope, key, num_keys);
            add_transposed(tile, tile.p.get(), tile.douts.get(), tile.in_douts, dv_tile, key, num_keys, head_dim);
            add_transposed(tile, tile.ds.get(), tile.queries.get(), tile.in_queries, dk_tile, key, num_keys, head_dim);
            const std::int64_t index = (kv * head_count + member) * plan.query_tiles + query_tile;
            float* dq_tile = dq.get() + (kv * plan.heads_at_once + member) * plan.dq_size + query * plan.stride;
            turns.wait(index, static_cast<std::int32_t>(key_tile - range.begin));
            if (key_tile == range.begin) clear(dq_tile, kTileQ * plan.stride);
            add_dq(tile, packed.key_panels.get() + pack * packed.panels_size, dq_tile, key, num_keys, head_dim);
            if (packed.not_finite.get()[pack]) {
              const T* keys = row_of<T>(params.k, params.k_stride, batch, key, (first_kv + kv) % params.num_kv_heads);
              add_not_finite(tile, keys, params.k_stride.seq, dq_tile, key, num_keys, head_dim);
            }
            turns.pass(index);
          }
        }
      });

      parallel_for(num_threads, kv_count * head_count * plan.query_tiles, [&](std::int64_t task) {
        const std::int64_t kv = task / plan.query_tiles / head_count, member = task / plan.query_tiles % head_count;
        const std::int64_t query = task % plan.query_tiles * kTileQ, head = head_of(kv, member);
        float* dq_tile = dq.get() + (kv * plan.heads_at_once + member) * plan.dq_size + query * plan.stride;
        if (ranges[head * plan.query_tiles + query / kTileQ].empty()) clear(dq_tile, kTileQ * plan.stride);
        for (std::int64_t i = query; i < smaller(query + kTileQ, params.seqlen_q); ++i)
          write_row(dq_tile + (i - query) * plan.stride, head_dim, params.softmax_scale,
                    row_of<T>(backward_params.dq, backward_params.dq_stride, head / params.num_heads, i,
                              head % params.num_heads));
      });
    }

    parallel_for(num_threads, kv_count * params.seqlen_k, [&](std::int64_t task) {
      const std::int64_t kv = task / params.seqlen_k, key = task % params.seqlen_k;
      const std::int64_t batch = (first_kv + kv) / params.num_kv_heads, head = (first_kv + kv) % params.num_kv_heads;
      for (const Buffer* sums : {&dk, &dv}) {
        float* row = sums->get() + kv * plan.shares * plan.key_size + key * plan.stride;
        for (std::int64_t share = 1; share < plan.shares; ++share)
          for (int channel = 0; channel < head_dim; channel += kLanes)
            store(row + channel, load(row + channel) + load(row + share * plan.key_size + channel));
      }
      const std::int64_t offset = kv * plan.shares * plan.key_size + key * plan.stride;
      // The queries carry the factor log2(e).
      write_row(dk.get() + offset, head_dim, kLn2,
                row_of<T>(backward_params.dk, backward_params.dk_stride, batch, key, head));
      write_row(dv.get() + offset, head_dim, 1.0f,
                row_of<T>(backward_params.dv, backward_params.dv_stride, batch, key, head));
    });
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& params, int num_threads) {
  switch (params.forward.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(params, num_threads);
    case DType::kFloat16:
      return backward<Float16>(params, num_threads);
    default:
      return backward<float>(params, num_threads);
  }
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
