// One kernel per instruction wrapper of csrc/cuda/mma.cuh and per tile function of csrc/cuda/attention/, for
// test_wrappers.py: the emulator and a GPU run the same PTX, and both must agree with plain torch.
//
// A kernel is one block. It moves operands between global memory and the registers of a lane by the layouts that the
// headers state, written out once more here, calls the one function under test, and stores its result.
#include <cstdint>
#include <cstring>

#include "attention/alibi.cuh"
#include "attention/mask.cuh"
#include "attention/tile.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

// ---- shared by the kernels ------------------------------------------------------------------------------------------

inline constexpr int kRows = 64;     // of every tile below
inline constexpr int kColumns = 64;  // of scores

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

// Two 16-bit elements as a register; `low` has the lower address.
template <typename T>
__device__ inline std::uint32_t join(T low, T high) {
  std::uint16_t halves[2];
  memcpy(&halves[0], &low, sizeof low);
  memcpy(&halves[1], &high, sizeof high);
  return halves[0] | static_cast<std::uint32_t>(halves[1]) << 16;
}

// Calls function(value, row, column) for every element a lane holds of 16 * kRowTiles rows.
template <int kRowTiles, int kColumnTiles, typename Function>
__device__ inline void for_each_element(float (&values)[kRowTiles][kColumnTiles][4], Function function) {
  const int g = lane_index() >> 2, c = lane_index() & 3;
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    for (int n = 0; n < kColumnTiles; ++n) {
      for (int i = 0; i < 4; ++i) {
        function(values[row_tile][n][i], 16 * row_tile + 8 * (i >> 1) + g, 8 * n + 2 * c + (i & 1));
      }
    }
  }
}

// Fills a tile with one bits, which are NaN in every 16-bit type: elements that a load leaves out stay visible.
template <int kBytes>
__device__ inline void poison(unsigned char (&tile)[kBytes]) {
  for (int i = static_cast<int>(threadIdx.x); i < kBytes / 4; i += static_cast<int>(blockDim.x)) {
    reinterpret_cast<std::uint32_t*>(tile)[i] = 0xFFFFFFFFu;
  }
  __syncthreads();  // the load that follows writes the same places from other threads
}

template <int kHeadDim, int kThreads, typename T>
__device__ inline void load_dense(std::uint32_t tile, const T* data) {
  load_tile<kRows, kHeadDim, kThreads>(tile, Rows<const T>{data, kHeadDim, kRows, kHeadDim, true}, 0);
}

__device__ inline void wait_for_loads() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();  // every thread's copies have arrived
}

// ---- mma.cuh --------------------------------------------------------------------------------------------------------

// d = c + a b: (16, 8) = (16, 8) + (16, 16) (16, 8), all row by row. One warp.
template <typename T>
__device__ inline void multiply_one(const T* a, const T* b, const float* c, float* d) {
  const int g = lane_index() >> 2, pair = 2 * (lane_index() & 3);
  std::uint32_t left[4], right[2];
  for (int r = 0; r < 4; ++r) {
    const T* element = a + 16 * (g + 8 * (r & 1)) + pair + 8 * (r >> 1);
    left[r] = join(element[0], element[1]);
  }
  for (int r = 0; r < 2; ++r) {
    const T* element = b + 8 * (pair + 8 * r) + g;
    right[r] = join(element[0], element[8]);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = c[8 * (g + 8 * (i >> 1)) + pair + (i & 1)];
  mma<T>(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[8 * (g + 8 * (i >> 1)) + pair + (i & 1)] = sum[i];
}

extern "C" __global__ void mma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, const float* c, float* d) {
  multiply_one(a, b, c, d);
}
extern "C" __global__ void mma_f16(const __half* a, const __half* b, const float* c, float* d) {
  multiply_one(a, b, c, d);
}

// Lane l points at row `rows[l]` of (64, 8) elements; its results are stored as (lane, register). One warp.
extern "C" __global__ void load_matrices(const std::uint16_t* source, const int* rows, std::uint32_t* plain,
                                         std::uint32_t* transposed) {
  __shared__ alignas(16) std::uint16_t tile[64 * 8];
  const int lane = lane_index();
  for (int i = lane; i < 64 * 8; i += kWarpLanes) tile[i] = source[i];
  __syncwarp();  // the rows are complete
  std::uint32_t matrices[4];
  ldmatrix(matrices, shared_address(tile + 8 * rows[lane]));
  for (int m = 0; m < 4; ++m) plain[4 * lane + m] = matrices[m];
  ldmatrix_transposed(matrices, shared_address(tile + 8 * rows[lane]));
  for (int m = 0; m < 4; ++m) transposed[4 * lane + m] = matrices[m];
}

// Two groups of 32 chunks of 8 elements; of chunk i only `bytes[i]` are read. The first group is stored while the
// second may still be in flight. One warp.
extern "C" __global__ void copy_vecs(const std::uint16_t* source, const int* bytes, std::uint16_t* target) {
  __shared__ alignas(16) std::uint16_t chunks[2][kWarpLanes * 8];
  const int lane = lane_index();
  for (int i = lane; i < 2 * kWarpLanes * 8; i += kWarpLanes) (&chunks[0][0])[i] = 0xFFFF;
  __syncwarp();  // the copies overwrite other lanes' values
  for (int half = 0; half < 2; ++half) {
    const int chunk = half * kWarpLanes + lane;
    cp_async(shared_address(chunks[half] + 8 * lane), source + 8 * chunk, bytes[chunk]);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncwarp();  // every lane's first copy has arrived
  for (int i = lane; i < kWarpLanes * 8; i += kWarpLanes) target[i] = chunks[0][i];
  cp_async_wait<0>();
  __syncwarp();  // and its second
  for (int i = lane; i < kWarpLanes * 8; i += kWarpLanes) target[kWarpLanes * 8 + i] = chunks[1][i];
}

extern "C" __global__ void pack_bf16(const float* low, const float* high, std::uint32_t* packed, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) packed[i] = pack<__nv_bfloat16>(low[i], high[i]);
}
extern "C" __global__ void pack_f16(const float* low, const float* high, std::uint32_t* packed, int count) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < count) packed[i] = pack<__half>(low[i], high[i]);
}

extern "C" __global__ void power_of_two(const float* x, float* result, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    result[i] = exp2_approx(x[i]);
  }
}

// ---- attention/ -----------------------------------------------------------------------------------------------------

// The bytes of a tile of rows `first` ... `first + 63`, as they lie in shared memory.
template <int kHeadDim, int kThreads>
__device__ inline void load_one(const __nv_bfloat16* data, std::int64_t stride, int count, int head_dim,
                                int is_aligned16, int first, uint4* bytes) {
  __shared__ alignas(kTileAlignment) unsigned char tile[kTileBytes<kRows, kHeadDim>];
  poison(tile);
  const Rows<const __nv_bfloat16> rows{data, stride, count, head_dim, is_aligned16 != 0};
  load_tile<kRows, kHeadDim, kThreads>(shared_address(tile), rows, first);
  wait_for_loads();
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof tile) / 16; i += kThreads) {
    bytes[i] = reinterpret_cast<const uint4*>(tile)[i];
  }
}

extern "C" __global__ void load_tile_64(const __nv_bfloat16* data, std::int64_t stride, int count, int head_dim,
                                        int is_aligned16, int first, uint4* bytes) {
  load_one<64, 128>(data, stride, count, head_dim, is_aligned16, first, bytes);
}
extern "C" __global__ void load_tile_128(const __nv_bfloat16* data, std::int64_t stride, int count, int head_dim,
                                         int is_aligned16, int first, uint4* bytes) {
  load_one<128, 128>(data, stride, count, head_dim, is_aligned16, first, bytes);
}

// scores (64, 64) += a (64, kHeadDim) b (64, kHeadDim)^T. A warp has 16 * kRowTiles rows.
template <typename T, int kHeadDim, int kRowTiles>
__device__ inline void score(const T* a, const T* b, float* scores) {
  constexpr int kThreads = kRows / (16 * kRowTiles) * kWarpLanes;
  __shared__ alignas(kTileAlignment) unsigned char a_tile[kTileBytes<kRows, kHeadDim>];
  __shared__ alignas(kTileAlignment) unsigned char b_tile[kTileBytes<kRows, kHeadDim>];
  load_dense<kHeadDim, kThreads>(shared_address(a_tile), a);
  load_dense<kHeadDim, kThreads>(shared_address(b_tile), b);
  wait_for_loads();
  const int first = static_cast<int>(threadIdx.x) / kWarpLanes * 16 * kRowTiles;
  Accumulator<kRowTiles, kColumns / 8> values;
  for_each_element(values, [&](float& value, int row, int j) { value = scores[kColumns * (first + row) + j]; });
  multiply_transposed<T, kHeadDim, kRows, kRows>(values, shared_address(a_tile), first, shared_address(b_tile));
  for_each_element(values, [&](float value, int row, int j) { scores[kColumns * (first + row) + j] = value; });
}

extern "C" __global__ void score_bf16_64(const __nv_bfloat16* a, const __nv_bfloat16* b, float* scores) {
  score<__nv_bfloat16, 64, 1>(a, b, scores);
}
extern "C" __global__ void score_bf16_128(const __nv_bfloat16* a, const __nv_bfloat16* b, float* scores) {
  score<__nv_bfloat16, 128, 2>(a, b, scores);
}
extern "C" __global__ void score_f16_128(const __half* a, const __half* b, float* scores) {
  score<__half, 128, 1>(a, b, scores);
}

// result (64, kHeadDim) += weights (64, 64), rounded to T, times v (64, kHeadDim).
template <typename T, int kHeadDim, int kRowTiles>
__device__ inline void multiply_weights(const float* weights, const T* v, float* result) {
  constexpr int kThreads = kRows / (16 * kRowTiles) * kWarpLanes;
  __shared__ alignas(kTileAlignment) unsigned char v_tile[kTileBytes<kRows, kHeadDim>];
  load_dense<kHeadDim, kThreads>(shared_address(v_tile), v);
  wait_for_loads();
  const int first = static_cast<int>(threadIdx.x) / kWarpLanes * 16 * kRowTiles;
  Accumulator<kRowTiles, kColumns / 8> left;
  Accumulator<kRowTiles, kHeadDim / 8> sum;
  for_each_element(left, [&](float& value, int row, int j) { value = weights[kColumns * (first + row) + j]; });
  for_each_element(sum, [&](float& value, int row, int d) { value = result[kHeadDim * (first + row) + d]; });
  for (int step = 0; step < kColumns / 16; ++step) {
    std::uint32_t operand[kRowTiles][4];
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) pack_operand<T>(operand[row_tile], left[row_tile], step);
    multiply_step<T, kHeadDim, kRows>(sum, operand, shared_address(v_tile), step);
  }
  for_each_element(sum, [&](float value, int row, int d) { result[kHeadDim * (first + row) + d] = value; });
}

extern "C" __global__ void multiply_weights_bf16_64(const float* weights, const __nv_bfloat16* v, float* result) {
  multiply_weights<__nv_bfloat16, 64, 2>(weights, v, result);
}
extern "C" __global__ void multiply_weights_bf16_128(const float* weights, const __nv_bfloat16* v, float* result) {
  multiply_weights<__nv_bfloat16, 128, 1>(weights, v, result);
}
extern "C" __global__ void multiply_weights_f16_64(const float* weights, const __half* v, float* result) {
  multiply_weights<__half, 64, 1>(weights, v, result);
}

// Rows `first` ... of the target: values (64, kHeadDim) times factor (64,).
template <typename T, int kHeadDim, int kRowTiles>
__device__ inline void store(const float* values, const float* factor, T* data, std::int64_t stride, int count,
                             int head_dim, int is_aligned16, int first) {
  __shared__ alignas(kTileAlignment) unsigned char tile[kTileBytes<kRows, kHeadDim>];
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpLanes * 16 * kRowTiles;
  Accumulator<kRowTiles, kHeadDim / 8> held;
  for_each_element(held, [&](float& value, int row, int d) { value = values[kHeadDim * (warp_row + row) + d]; });
  float factors[kRowTiles][2];
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    for (int half = 0; half < 2; ++half) {
      factors[row_tile][half] = factor[warp_row + 16 * row_tile + 8 * half + (lane_index() >> 2)];
    }
  }
  const Rows<T> target{data, stride, count, head_dim, is_aligned16 != 0};
  store_rows<T, kHeadDim, kRows, kRowTiles>(target, first + warp_row, held, factors, shared_address(tile), warp_row);
}

extern "C" __global__ void store_rows_bf16_64(const float* values, const float* factor, __nv_bfloat16* data,
                                              std::int64_t stride, int count, int head_dim, int is_aligned16,
                                              int first) {
  store<__nv_bfloat16, 64, 2>(values, factor, data, stride, count, head_dim, is_aligned16, first);
}
extern "C" __global__ void store_rows_f16_128(const float* values, const float* factor, __half* data,
                                              std::int64_t stride, int count, int head_dim, int is_aligned16,
                                              int first) {
  store<__half, 128, 1>(values, factor, data, stride, count, head_dim, is_aligned16, first);
}

// Scores (32, 64) before the product: row 0 is aligned with key `position`, column 0 is key `key`. One warp.
extern "C" __global__ void bias(float raw_slope, int position, int key, int left_of_diagonal, float* scores) {
  Accumulator<2, kColumns / 8> values;
  const int row_position = position + (lane_index() >> 2), column_key = key + 2 * (lane_index() & 3);
  seed_bias(values, raw_slope, row_position, column_key);
  if (left_of_diagonal == 0) mirror_bias(values, raw_slope, row_position, column_key);
  for_each_element(values, [&](float value, int row, int j) { scores[kColumns * row + j] = value; });
}

// Scores (32, 64) after the product: row i sees keys range[i][0] <= j < range[i][1], column 0 is key `key`. One warp.
extern "C" __global__ void mask_keys(const int* range, int key, float* scores) {
  __shared__ Row rows[32];
  const int lane = lane_index();
  rows[lane] = Row{0, range[2 * lane], range[2 * lane + 1]};
  __syncwarp();  // the rows are complete
  Accumulator<2, kColumns / 8> values;
  for_each_element(values, [&](float& value, int row, int j) { value = scores[kColumns * row + j]; });
  apply_mask(values, rows, key + 2 * (lane & 3));
  for_each_element(values, [&](float value, int row, int j) { scores[kColumns * row + j] = value; });
}

}  // namespace andromeda::cuda
