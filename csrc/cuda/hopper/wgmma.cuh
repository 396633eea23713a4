// wgmma: products of tiles by a warpgroup, four warps whose first thread has a number divisible by 128 (PTX ISA,
// "wgmma.mma_async"; sm_90a).
//
//   d (64 x kColumns) += a (64 x 16) b (16 x kColumns)      in float32
//
// Warp w of the warpgroup owns rows 16 w ... 16 w + 15 of `a` and `d`, and a lane holds of them what it holds of mma.sync
// (mma.cuh). b comes from shared memory, a from shared memory or from registers. The product goes on after the
// instruction:
//
//   pin(d); fence_products(); multiply(d, a, b) ...; commit_products();  ...other work...  wait_products<0>(); pin(d);
//
// A warpgroup waits for all but its last kPending commits. Until then nobody may touch d, registers of a, or the tiles.
// ptxas would make every product wait for the one before if d or a were written after the fence. pin() keeps the
// compiler from moving such writes there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "attention/tile.cuh"

namespace andromeda::cuda::hopper {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWarpgroupRows = 64;

__device__ inline void fence_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// The values of an accumulator or of an operand are in their registers here, for the compiler too.
template <int kColumnTiles>
__device__ inline void pin(float (&d)[kColumnTiles][4]) {
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
  }
}
template <int kSteps>
__device__ inline void pin(std::uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[step][i])::"memory");
  }
}

// Registers per thread from here on. All warps of a warpgroup execute it; the sum over the block must fit into those
// that the block was launched with.
template <int kRegisters>
__device__ inline void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Descriptors of an operand in a tile (attention/tile.cuh); all counts are in units of 16 bytes:
//
//   bits 0-13 address   16-29 leading byte offset   32-45 stride byte offset   62-63 swizzle, 1: 128 bytes
//
// Eight rows of a panel are 1024 bytes, the stride. The leading offset is the distance between panels where an operand
// has more than one, which only b with kTransposed has: its columns are channels.
//
// The offset within a tile is added last, so that the descriptors of all steps of a product share what comes before.
__device__ inline std::uint64_t tile_descriptor(std::uint32_t tile, int offset, int panel_bytes = 16) {
  const std::uint32_t low =
      ((tile & 0x3FFFFu) >> 4) + (offset >> 4) + (static_cast<std::uint32_t>(panel_bytes >> 4) << 16);
  return low | static_cast<std::uint64_t>(8 * kPanelRowBytes >> 4) << 32 | std::uint64_t{1} << 62;
}

// Rows of a tile of kRows rows as rows of a, or as columns of b (a b^T of two tiles): step `step` has channels 16 step
// ... 16 step + 15. `row` is the first row, a multiple of 8.
template <int kRows>
__device__ inline std::uint64_t rows_descriptor(std::uint32_t tile, int row, int step) {
  return tile_descriptor(tile, row * kPanelRowBytes + (step >> 2) * (kRows * kPanelRowBytes) + ((step & 3) << 5));
}

// Channels of a tile of kRows rows as columns of b, kTransposed: step `step` has rows 16 step ... 16 step + 15, and
// `panel` is the panel of the first channel.
template <int kRows>
__device__ inline std::uint64_t channels_descriptor(std::uint32_t tile, int step, int panel = 0) {
  return tile_descriptor(tile, panel * (kRows * kPanelRowBytes) + step * (16 * kPanelRowBytes), kRows * kPanelRowBytes);
}

// What multiply() has for each number of columns: the accumulators as asm operands.
#define ANDROMEDA_D1(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ANDROMEDA_D8(n)                                                                                \
  ANDROMEDA_D1(n), ANDROMEDA_D1(n + 1), ANDROMEDA_D1(n + 2), ANDROMEDA_D1(n + 3), ANDROMEDA_D1(n + 4), \
      ANDROMEDA_D1(n + 5), ANDROMEDA_D1(n + 6), ANDROMEDA_D1(n + 7)

#define ANDROMEDA_NAMES_64                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ANDROMEDA_D_64 ANDROMEDA_D8(0)
#define ANDROMEDA_NAMES_96                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ANDROMEDA_D_96 ANDROMEDA_D8(0), ANDROMEDA_D1(8), ANDROMEDA_D1(9), ANDROMEDA_D1(10), ANDROMEDA_D1(11)
#define ANDROMEDA_NAMES_128                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ANDROMEDA_D_128 ANDROMEDA_D8(0), ANDROMEDA_D8(8)

// `accumulate`, the numbers of the operands after d: those of a, of b, of the flag and of the transposition.
#define ANDROMEDA_WGMMA_SHARED(columns, type, b, flag, transposed, a)                                         \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" flag                                    \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                    \
               " {" ANDROMEDA_NAMES_##columns "}, %" a ", %" b ", accumulate, 1, 1, 0, %" transposed ";\n}\n" \
               : ANDROMEDA_D_##columns                                                                        \
               : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)), "n"(kTransposed)    \
               : "memory")
#define ANDROMEDA_WGMMA_REGISTERS(columns, type, b, flag, transposed, a0, a1, a2, a3)                              \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" flag                                         \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                         \
               " {" ANDROMEDA_NAMES_##columns "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b                       \
                                              ", accumulate, 1, 1, %" transposed ";\n}\n"                          \
               : ANDROMEDA_D_##columns                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(static_cast<int>(accumulate)), \
                 "n"(kTransposed)                                                                                  \
               : "memory")

// d += a b, or d = a b without `accumulate`. kTransposed: the columns of b are channels of a tile
// (channels_descriptor), otherwise rows (rows_descriptor).
template <typename T, bool kTransposed, int kColumnTiles>
__device__ inline void multiply(float (&d)[kColumnTiles][4], std::uint64_t a_descriptor, std::uint64_t b_descriptor,
                                bool accumulate = true) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  if constexpr (kColumnTiles == 8 && kBf16) {
    ANDROMEDA_WGMMA_SHARED(64, "bf16", "33", "34", "35", "32");
  } else if constexpr (kColumnTiles == 8) {
    ANDROMEDA_WGMMA_SHARED(64, "f16", "33", "34", "35", "32");
  } else if constexpr (kColumnTiles == 12 && kBf16) {
    ANDROMEDA_WGMMA_SHARED(96, "bf16", "49", "50", "51", "48");
  } else if constexpr (kColumnTiles == 12) {
    ANDROMEDA_WGMMA_SHARED(96, "f16", "49", "50", "51", "48");
  } else if constexpr (kColumnTiles == 16 && kBf16) {
    ANDROMEDA_WGMMA_SHARED(128, "bf16", "65", "66", "67", "64");
  } else if constexpr (kColumnTiles == 16) {
    ANDROMEDA_WGMMA_SHARED(128, "f16", "65", "66", "67", "64");
  } else {
    static_assert(kColumnTiles == 8, "products have 64, 96 or 128 columns");
  }
}

// The same with a in registers, packed as for mma.sync.
template <typename T, bool kTransposed, int kColumnTiles>
__device__ inline void multiply(float (&d)[kColumnTiles][4], const std::uint32_t (&a)[4], std::uint64_t b_descriptor,
                                bool accumulate = true) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>);
  if constexpr (kColumnTiles == 8 && kBf16) {
    ANDROMEDA_WGMMA_REGISTERS(64, "bf16", "36", "37", "38", "32", "33", "34", "35");
  } else if constexpr (kColumnTiles == 8) {
    ANDROMEDA_WGMMA_REGISTERS(64, "f16", "36", "37", "38", "32", "33", "34", "35");
  } else if constexpr (kColumnTiles == 12 && kBf16) {
    ANDROMEDA_WGMMA_REGISTERS(96, "bf16", "52", "53", "54", "48", "49", "50", "51");
  } else if constexpr (kColumnTiles == 12) {
    ANDROMEDA_WGMMA_REGISTERS(96, "f16", "52", "53", "54", "48", "49", "50", "51");
  } else if constexpr (kColumnTiles == 16 && kBf16) {
    ANDROMEDA_WGMMA_REGISTERS(128, "bf16", "68", "69", "70", "64", "65", "66", "67");
  } else if constexpr (kColumnTiles == 16) {
    ANDROMEDA_WGMMA_REGISTERS(128, "f16", "68", "69", "70", "64", "65", "66", "67");
  } else {
    static_assert(kColumnTiles == 8, "products have 64, 96 or 128 columns");
  }
}

#undef ANDROMEDA_D1
#undef ANDROMEDA_D8
#undef ANDROMEDA_NAMES_64
#undef ANDROMEDA_D_64
#undef ANDROMEDA_NAMES_96
#undef ANDROMEDA_D_96
#undef ANDROMEDA_NAMES_128
#undef ANDROMEDA_D_128
#undef ANDROMEDA_WGMMA_SHARED
#undef ANDROMEDA_WGMMA_REGISTERS

}  // namespace andromeda::cuda::hopper
