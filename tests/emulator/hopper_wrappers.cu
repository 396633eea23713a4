// One kernel per wrapper of csrc/cuda/hopper/, for test_hopper_wrappers.py: the emulator and a GPU of compute capability
// 9.0 run the same PTX, and both must agree with plain torch.
//
// A kernel is one block of one warpgroup. Ordinary copies fill its tiles, except where TMA is under test.
#include <cstdint>

#include "attention/tile.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/wgmma.cuh"

namespace andromeda::cuda::hopper {

inline constexpr int kRows = kWarpgroupRows;

// Calls function(value, row, column) for every element of a result that a lane holds.
template <int kColumnTiles, typename Function>
__device__ inline void for_each_element(float (&values)[kColumnTiles][4], Function function) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpLanes;
  const int first_row = thread / kWarpLanes * 16;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      function(values[n][i], first_row + 8 * (i >> 1) + (lane >> 2), 8 * n + 2 * (lane & 3) + (i & 1));
  }
}

template <int kTileRows, int kHeadDim, typename T>
__device__ inline void load_dense(std::uint32_t tile, const T* data) {
  load_tile<kTileRows, kHeadDim, kWarpgroupThreads>(tile, Rows<const T>{data, kHeadDim, kTileRows, kHeadDim, true}, 0);
}

__device__ inline void wait_for_loads() {
  cp_async_commit();
  cp_async_wait<0>();
  fence_async_proxy();  // wgmma reads what ordinary copies wrote
  __syncthreads();
}

// result (64, kColumns) = before + a b^T; a (64 or 128, 128), of which rows `a_row` ... are used, b (kColumns, 128).
template <typename T, int kColumns, int kRowsA>
__device__ inline void score(const T* a, const T* b, float* result, int a_row, unsigned char* a_bytes,
                             unsigned char* b_bytes) {
  constexpr int kHeadDim = 64;
  const std::uint32_t a_tile = shared_address(a_bytes), b_tile = shared_address(b_bytes);
  load_dense<kRowsA, kHeadDim>(a_tile, a);
  load_dense<kColumns, kHeadDim>(b_tile, b);
  wait_for_loads();
  float d[kColumns / 8][4];
  for_each_element(d, [&](float& value, int row, int column) { value = result[row * kColumns + column]; });
  pin(d);
  fence_products();
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    multiply<T, false>(d, rows_descriptor<kRowsA>(a_tile, a_row, step), rows_descriptor<kColumns>(b_tile, 0, step));
  }
  commit_products();
  wait_products<0>();
  pin(d);
  for_each_element(d, [&](float& value, int row, int column) { result[row * kColumns + column] = value; });
}

// result (64, kColumns) = weights b, without the values before; weights (64, 64) become registers, b (64, kColumns).
template <typename T, int kColumns>
__device__ inline void multiply_weights(const float* weights, const T* b, float* result, unsigned char* b_bytes) {
  constexpr int kKeys = 64;
  static_assert(kColumns % kPanelWidth == 0, "b has whole panels");
  const std::uint32_t b_tile = shared_address(b_bytes);
  load_dense<kKeys, kColumns>(b_tile, b);
  float values[kKeys / 8][4];
  for_each_element(values, [&](float& value, int row, int column) { value = weights[row * kKeys + column]; });
  std::uint32_t a[kKeys / 16][4];
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) pack_operand<T>(a[step], values, step);
  wait_for_loads();
  float d[kColumns / 8][4];
  for_each_element(d, [](float& value, int, int) { value = 7.0f; });  // to be overwritten
  pin(d);
  pin(a);
  fence_products();
#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    multiply<T, true>(d, a[step], channels_descriptor<kKeys>(b_tile, step), step > 0);
  }
  commit_products();
  wait_products<0>();
  pin(d);
  pin(a);
  for_each_element(d, [&](float& value, int row, int column) { result[row * kColumns + column] = value; });
}

#define TILE(name, bytes)              \
  __shared__ __align__(kTileAlignment) \
  unsigned char name[bytes]
#define SCORE(name, type, columns, a_rows)                                                                         \
  extern "C" __global__ void __launch_bounds__(128) name(const type* a, const type* b, float* result, int a_row) { \
    TILE(a_tile, (kTileBytes<a_rows, 64>));                                                                        \
    TILE(b_tile, (kTileBytes<columns, 64>));                                                                       \
    score<type, columns, a_rows>(a, b, result, a_row, a_tile, b_tile);                                             \
  }
#define WEIGHTS(name, type, columns)                                                                           \
  extern "C" __global__ void __launch_bounds__(128) name(const float* weights, const type* b, float* result) { \
    TILE(b_tile, (kTileBytes<64, columns>));                                                                   \
    multiply_weights<type, columns>(weights, b, result, b_tile);                                               \
  }

SCORE(score_bf16_64, __nv_bfloat16, 64, 64)
SCORE(score_bf16_96, __nv_bfloat16, 96, 128)
SCORE(score_bf16_128, __nv_bfloat16, 128, 128)
SCORE(score_f16_64, __half, 64, 128)
SCORE(score_f16_96, __half, 96, 64)
SCORE(score_f16_128, __half, 128, 64)
WEIGHTS(multiply_weights_bf16_64, __nv_bfloat16, 64)
WEIGHTS(multiply_weights_bf16_128, __nv_bfloat16, 128)
WEIGHTS(multiply_weights_f16_64, __half, 64)
WEIGHTS(multiply_weights_f16_128, __half, 128)

// The bytes of a tile of 64 rows and 128 channels that TMA fills.
extern "C" __global__ void __launch_bounds__(128)
    copy_by_tma(const __grid_constant__ CUtensorMap map, uint4* result, int row, int head, int batch) {
  constexpr int kBytes = kTileBytes<kRows, 128>;
  TILE(tile, kBytes);
  __shared__ __align__(kMbarrierBytes) unsigned char barrier_bytes[kMbarrierBytes];
  const std::uint32_t barrier = shared_address(barrier_bytes);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&map);
    init_mbarrier(barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();  // the barrier exists
  if (threadIdx.x == 0) {
    arrive_expect(barrier, kBytes);
    copy_tile<kRows, 128>(shared_address(tile), &map, barrier, row, head, batch);
  }
  wait(barrier, 0);
  for (int at = threadIdx.x; at < kBytes / 16; at += kWarpgroupThreads)
    result[at] = reinterpret_cast<const uint4*>(tile)[at];
}

// Warp 0 copies `count` tiles of 64 rows and 64 channels through a ring of two, the other warps add their words up.
extern "C" __global__ void __launch_bounds__(128)
    add_through_ring(const __grid_constant__ CUtensorMap map, unsigned* result, int count) {
  constexpr int kStages = 2, kBytes = kTileBytes<kRows, 64>, kConsumers = 96;
  TILE(tiles, kStages * kBytes);
  __shared__ __align__(kMbarrierBytes) unsigned char barrier_bytes[2 * kStages * kMbarrierBytes];
  const std::uint32_t full = shared_address(barrier_bytes), empty = full + kStages * kMbarrierBytes;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_mbarrier(full + stage * kMbarrierBytes, 1);
      init_mbarrier(empty + stage * kMbarrierBytes, kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // the barriers exist
  RingPlace<kStages> place;
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < count; ++tile, place.advance()) {
      wait(empty + place.stage * kMbarrierBytes, place.parity ^ 1);
      arrive_expect(full + place.stage * kMbarrierBytes, kBytes);
      copy_tile<kRows, 64>(shared_address(tiles) + place.stage * kBytes, &map, full + place.stage * kMbarrierBytes,
                           tile * kRows, 0, 0);
    }
  } else if (threadIdx.x >= kWarpLanes) {
    unsigned sum = 0;
    for (int tile = 0; tile < count; ++tile, place.advance()) {
      wait(full + place.stage * kMbarrierBytes, place.parity);
      const auto* words = reinterpret_cast<const unsigned*>(tiles + place.stage * kBytes);
      for (int at = threadIdx.x - kWarpLanes; at < kBytes / 4; at += kConsumers) sum += (tile + 1) * words[at];
      arrive(empty + place.stage * kMbarrierBytes);
    }
    atomicAdd(result, sum);
  }
}

}  // namespace andromeda::cuda::hopper
