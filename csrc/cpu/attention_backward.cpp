// attention, backward (SPEC 16.3): one pass, five products for every visible (query tile, key tile).
//
//   delta  = sum over channels of dout * out                         once per query row
//   for every block of kBlockTiles key tiles of one key head:        one task, one thread
//     for every query head of the group, every query tile that sees the block:
//       for every key tile of the block:
//         p  = 2^(q k^T + bias - lse)       recomputed
//         ds = p * (dout v^T - delta)
//         dv += p^T dout,  dk += ds^T q     in the task's own memory
//         dq += ds k                        handed from task to task, see Turns
//
// Every sum has a fixed order, whatever the number of threads: dk and dv belong to one task, dq receives its blocks of
// keys from left to right. dk and dv of one key head are never expanded to its query heads. Memory beyond the tensors:
// 4 * seqlen_q * head_dim bytes per query head for dq in float32, 12 * seqlen_k * head_dim per key head for packed keys
// and values (both padded to tiles), and one set of tiles per thread.
#include <atomic>
#include <thread>

#include "attention_tile.h"
#include "parallel.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

constexpr int kBlockTiles = 2;  // 192 keys: dk, dv, and the packed keys of a block stay in the second-level cache

// The order in which tasks add to a query tile's dq: a task waits until the tiles before its own have been added. Tasks
// are handed out in that order and visit query tiles in the same order, so whoever is waited for is always running, one
// step ahead.
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

template <typename T>
const T* row_of(const void* tensor, const SeqStrides& stride, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return static_cast<const T*>(tensor) + batch * stride.batch + seq * stride.seq + head * stride.head;
}

template <typename T>
T* row_of(void* tensor, const SeqStrides& stride, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return static_cast<T*>(tensor) + batch * stride.batch + seq * stride.seq + head * stride.head;
}

// Sizes that everything below needs.
struct Shape {
  explicit Shape(const AttentionParams& params)
      : head_dim(params.head_dim),
        num_panels(static_cast<int>(ceil_div(params.head_dim, kCols))),
        group(params.num_heads / params.num_kv_heads),
        kv_heads(static_cast<std::int64_t>(params.batch) * params.num_kv_heads),
        heads(static_cast<std::int64_t>(params.batch) * params.num_heads),
        query_tiles(ceil_div(params.seqlen_q, kTileQ)),
        key_tiles(ceil_div(params.seqlen_k, kTileK)),
        blocks(ceil_div(key_tiles, kBlockTiles)),
        key_panels(std::int64_t{kTileK} * num_panels * kCols),
        query_panels(std::int64_t{kTileQ} * num_panels * kCols) {}
  int head_dim, num_panels, group;
  std::int64_t kv_heads, heads, query_tiles, key_tiles, blocks;
  std::int64_t key_panels, query_panels;  // floats of one tile packed by panels
};

// What one thread works on.
struct BlockTile {
  explicit BlockTile(const Shape& shape)
      : queries(kTileQ * shape.head_dim),
        douts(kTileQ * shape.head_dim),
        query_panels(shape.query_panels),
        dout_panels(shape.query_panels),
        p(kTileQ * kTileK),
        ds(kTileQ * kTileK),
        dk(kBlockTiles * shape.key_panels),
        dv(kBlockTiles * shape.key_panels),
        row(shape.num_panels * kCols) {}
  Buffer queries, douts;             // left operands of q k^T and dout v^T
  Buffer query_panels, dout_panels;  // right operands of ds^T q and p^T dout
  Buffer p, ds, dk, dv, row;
  Row rows[kTileQ];
  float lse[kTileQ], delta[kTileQ];  // lse in base 2
  int num_rows;
};

// One row of scores and of dout v^T becomes one row of p and of ds, in place.
inline void differentiate_row(float* scores, float* dweights, const Row& row, float slope, float lse, float delta,
                              std::int64_t key) {
  const IntVec lanes = lane_index();
  const Vec distance = __builtin_convertvector(lanes, Vec) + static_cast<float>(key - row.position);
  const int first = static_cast<int>(larger(smaller(row.first - key, kTileK), 0));
  const int end = static_cast<int>(larger(smaller(row.end - key, kTileK), 0));
  const bool masked = first > 0 || end < kTileK;
#pragma GCC unroll 24
  for (int c = 0; c < kTileK / kLanes; ++c) {
    const Vec offset = distance + static_cast<float>(c * kLanes);
    const Vec minus_abs = offset > 0.0f ? -offset : offset;
    Vec p = exp2(load(scores + c * kLanes) + (slope * minus_abs - lse));
    Vec ds = p * (load(dweights + c * kLanes) - delta);
    if (masked) {
      const IntVec index = lanes + c * kLanes;
      const IntVec visible = (index >= first) & (index < end);
      p = select(visible, p, Vec{});
      ds = select(visible, ds, Vec{});
    }
    store(scores + c * kLanes, p);
    store(dweights + c * kLanes, ds);
  }
}

template <typename T>
void backward(const AttentionBackwardParams& backward_params, int num_threads) {
  const AttentionParams& params = backward_params.forward;
  const Shape shape(params);
  const int head_dim = shape.head_dim, num_panels = shape.num_panels;

  // Keys by columns for q k^T and by panels for ds k; values by columns for dout v^T.
  const Buffer key_columns(shape.kv_heads * shape.key_tiles * kTileK * head_dim);
  const Buffer value_columns(shape.kv_heads * shape.key_tiles * kTileK * head_dim);
  const Buffer key_panels(shape.kv_heads * shape.key_tiles * shape.key_panels);
  parallel_for(num_threads, shape.kv_heads * shape.key_tiles, [&](std::int64_t task) {
    const std::int64_t batch = task / shape.key_tiles / params.num_kv_heads;
    const std::int64_t head = task / shape.key_tiles % params.num_kv_heads;
    const Buffer row(num_panels * kCols);
    for (int i = 0; i < kTileK; ++i) {
      const std::int64_t key = task % shape.key_tiles * kTileK + i;
      const bool exists = key < params.seqlen_k;
      clear(row.get(), num_panels * kCols);
      if (exists) read_row(row_of<T>(params.k, params.k_stride, batch, key, head), head_dim, 1.0f, row.get());
      place_in_columns(row.get(), i, head_dim, key_columns.get() + task * kTileK * head_dim);
      place_in_panels(row.get(), i, kTileK, num_panels, key_panels.get() + task * shape.key_panels);
      if (exists) read_row(row_of<T>(params.v, params.v_stride, batch, key, head), head_dim, 1.0f, row.get());
      place_in_columns(row.get(), i, head_dim, value_columns.get() + task * kTileK * head_dim);
    }
  });

  // delta, and which key tiles each query tile sees: (batch * head, query tile).
  const Buffer delta(shape.heads * params.seqlen_q);
  const Buffer range_memory(shape.heads * shape.query_tiles * (sizeof(TileRange) / sizeof(float)));
  TileRange* ranges = reinterpret_cast<TileRange*>(range_memory.get());
  const Buffer dq_panels(shape.heads * shape.query_tiles * shape.query_panels);
  parallel_for(num_threads, shape.heads * shape.query_tiles, [&](std::int64_t task) {
    const int batch = static_cast<int>(task / shape.query_tiles / params.num_heads);
    const int head = static_cast<int>(task / shape.query_tiles % params.num_heads);
    const std::int64_t query = task % shape.query_tiles * kTileQ;
    const std::int64_t count = smaller(kTileQ, params.seqlen_q - query);
    ranges[task] = visible_tiles(params, describe_head(params, head), batch, query, count);
    const Buffer row(2 * num_panels * kCols);
    float* out = row.get();
    float* dout = row.get() + num_panels * kCols;
    for (std::int64_t i = query; i < query + count; ++i) {
      read_row(row_of<T>(params.out, params.out_stride, batch, i, head), head_dim, 1.0f, out);
      read_row(row_of<T>(backward_params.dout, backward_params.dout_stride, batch, i, head), head_dim, 1.0f, dout);
      Vec sum{};
      for (int channel = 0; channel < num_panels * kCols; channel += kLanes)
        sum += load(out + channel) * load(dout + channel);
      delta.get()[task / shape.query_tiles * params.seqlen_q + i] = reduce_add(sum);
    }
    if (ranges[task].begin >= ranges[task].end)
      clear(dq_panels.get() + task * shape.query_panels, shape.query_panels);  // nobody will add to it
  });

  Turns turns(shape.heads * shape.query_tiles);
  Scratch<BlockTile> scratch(num_threads, shape);
  parallel_for(num_threads, shape.kv_heads * shape.blocks, [&](std::int64_t task, int worker) {
    BlockTile& tile = scratch[worker];
    const std::int64_t kv_head = task / shape.blocks, block = task % shape.blocks;  // kv_head counts batches too
    const int batch = static_cast<int>(kv_head / params.num_kv_heads);
    const int first_head = static_cast<int>(kv_head % params.num_kv_heads) * shape.group;
    const std::int64_t block_begin = block * kBlockTiles;
    const std::int64_t block_end = smaller(block_begin + kBlockTiles, shape.key_tiles);
    clear(tile.dk.get(), kBlockTiles * shape.key_panels);
    clear(tile.dv.get(), kBlockTiles * shape.key_panels);

    for (int head = first_head; head < first_head + shape.group; ++head) {
      const Head description = describe_head(params, head);
      const std::int64_t head_index = static_cast<std::int64_t>(batch) * params.num_heads + head;
      for (std::int64_t query_tile = 0; query_tile < shape.query_tiles; ++query_tile) {
        const std::int64_t index = head_index * shape.query_tiles + query_tile;
        const TileRange range = ranges[index];
        const std::int64_t begin = larger(range.begin, block_begin), end = smaller(range.end, block_end);
        if (begin >= end) continue;

        const std::int64_t query = query_tile * kTileQ;
        tile.num_rows = static_cast<int>(smaller(kTileQ, params.seqlen_q - query));
        const int padded_rows = static_cast<int>(round_up(tile.num_rows, kRows));
        if (padded_rows > tile.num_rows) {
          clear(tile.queries.get() + (padded_rows - kRows) * head_dim, kRows * head_dim);
          clear(tile.douts.get() + (padded_rows - kRows) * head_dim, kRows * head_dim);
        }
        for (int r = 0; r < tile.num_rows; ++r) {
          tile.rows[r] = describe_row(params, batch, query + r);
          tile.lse[r] = params.softmax_lse[head_index * params.seqlen_q + query + r] * kLog2E;
          tile.delta[r] = delta.get()[head_index * params.seqlen_q + query + r];
          // A row that sees nothing has an infinite lse; every weight of it is masked.
          if (tile.rows[r].first >= tile.rows[r].end) tile.lse[r] = 0.0f;
          const T* q = row_of<T>(params.q, params.q_stride, batch, query + r, head);
          read_row(q, head_dim, params.softmax_scale * kLog2E, tile.row.get());
          place_in_rows(tile.row.get(), r, head_dim, tile.queries.get());
          read_row(q, head_dim, params.softmax_scale, tile.row.get());
          place_in_panels(tile.row.get(), r, kTileQ, num_panels, tile.query_panels.get());
          read_row(row_of<T>(backward_params.dout, backward_params.dout_stride, batch, query + r, head), head_dim, 1.0f,
                   tile.row.get());
          place_in_rows(tile.row.get(), r, head_dim, tile.douts.get());
          place_in_panels(tile.row.get(), r, kTileQ, num_panels, tile.dout_panels.get());
        }

        float* dq = dq_panels.get() + index * shape.query_panels;
        for (std::int64_t t = begin; t < end; ++t) {
          const std::int64_t packed = kv_head * shape.key_tiles + t;
          const int num_keys = static_cast<int>(smaller(kTileK, params.seqlen_k - t * kTileK));
          multiply_scores(tile.queries.get(), key_columns.get() + packed * kTileK * head_dim, tile.p.get(),
                          tile.num_rows, num_keys, head_dim);
          multiply_scores(tile.douts.get(), value_columns.get() + packed * kTileK * head_dim, tile.ds.get(),
                          tile.num_rows, num_keys, head_dim);
          for (int r = 0; r < tile.num_rows; ++r)
            differentiate_row(tile.p.get() + r * kTileK, tile.ds.get() + r * kTileK, tile.rows[r], description.slope,
                              tile.lse[r], tile.delta[r], t * kTileK);
          const std::int64_t offset = (t - block_begin) * shape.key_panels;
          multiply_transposed(tile.p.get(), tile.dout_panels.get(), tile.dv.get() + offset, tile.num_rows, num_keys,
                              num_panels);
          multiply_transposed(tile.ds.get(), tile.query_panels.get(), tile.dk.get() + offset, tile.num_rows, num_keys,
                              num_panels);
          if (t == begin) {
            turns.wait(index, static_cast<std::int32_t>(block - range.begin / kBlockTiles));
            if (t == range.begin) clear(dq, shape.query_panels);
          }
          multiply_values(tile.ds.get(), key_panels.get() + packed * shape.key_panels, dq, tile.num_rows, num_keys,
                          num_panels);
        }
        turns.pass(index);
      }
    }

    for (std::int64_t key = block_begin * kTileK; key < smaller(block_end * kTileK, params.seqlen_k); ++key) {
      const std::int64_t tile_offset = (key / kTileK - block_begin) * shape.key_panels;
      const std::int64_t row = key % kTileK, kv = kv_head % params.num_kv_heads;
      write_row(tile.dk.get() + tile_offset, row, kTileK, head_dim, 1.0f,
                row_of<T>(backward_params.dk, backward_params.dk_stride, batch, key, kv));
      write_row(tile.dv.get() + tile_offset, row, kTileK, head_dim, 1.0f,
                row_of<T>(backward_params.dv, backward_params.dv_stride, batch, key, kv));
    }
  });

  parallel_for(num_threads, shape.heads * shape.query_tiles, [&](std::int64_t task) {
    const std::int64_t batch = task / shape.query_tiles / params.num_heads;
    const std::int64_t head = task / shape.query_tiles % params.num_heads;
    const std::int64_t query = task % shape.query_tiles * kTileQ;
    for (std::int64_t i = query; i < smaller(query + kTileQ, params.seqlen_q); ++i)
      write_row(dq_panels.get() + task * shape.query_panels, i - query, kTileQ, head_dim, params.softmax_scale,
                row_of<T>(backward_params.dq, backward_params.dq_stride, batch, i, head));
  });
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
