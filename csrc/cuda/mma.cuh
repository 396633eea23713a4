// The instructions that the attention kernels use, one wrapper each (PTX ISA; sm_80).
//
// What lane l of a warp holds, with g = l / 4 and c = l % 4:
//
//   mma.m16n8k16   A (16 x 16)    a0: row g, columns 2c, 2c + 1        a1: row g + 8, the same columns
//                                 a2: row g, columns 2c + 8, 2c + 9    a3: row g + 8, the same columns
//                  B (16 x 8)     b0: rows 2c, 2c + 1, column g        b1: rows 2c + 8, 2c + 9, column g
//                  D (16 x 8)     d0 d1: row g, columns 2c, 2c + 1     d2 d3: row g + 8, the same columns
//
//   ldmatrix.x4    Matrix m has its eight rows of 16 bytes where lanes 8m ... 8m + 7 point. Lane l receives elements 2c
//                  and 2c + 1 of row g of each matrix, or with .trans rows 2c and 2c + 1 of column g.
//
// Two neighbouring D tiles, packed to 16 bits, are one A operand: a0 = d0 d1 and a1 = d2 d3 of the left tile, a2 a3
// those of the right one. So the result of a product is an operand of the next one without leaving its lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace andromeda::cuda {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, bypassing registers and L1. Only `source_bytes` of the source are read
// (0 outside a tensor); the rest of the target becomes zero.
__device__ inline void cp_async(std::uint32_t target, const void* source, int source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
}

// The copies issued since the last commit become one group. A thread waits for all but its last `kPending` groups.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

__device__ inline uint4 ld_shared16(std::uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

__device__ inline std::uint32_t ld_shared4(std::uint32_t address) {
  std::uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(word) : "r"(address) : "memory");
  return word;
}

__device__ inline void st_shared16(std::uint32_t address, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

__device__ inline void st_shared4(std::uint32_t address, std::uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(word) : "memory");
}

__device__ inline void ldmatrix(std::uint32_t (&matrices)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

__device__ inline void ldmatrix_transposed(std::uint32_t (&matrices)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// d += a b, in float32.
template <typename T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// A fence between blocks: before an atomic of the same thread it is a release, after one an acquire. It costs less than
// __threadfence(), which also puts all such fences into one order: MEMBAR.SC instead of MEMBAR.ALL.
__device__ inline void fence_device() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }

// Two floats as one register of T, rounded to nearest even; `low` has the lower address.
template <typename T>
__device__ inline std::uint32_t pack(float low, float high) {
  std::uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

// Replaces numbers that are not finite by the largest finite one: their product with 0 is then 0.
template <typename T>
__device__ inline std::uint32_t clamp_finite(std::uint32_t pair) {
  std::uint32_t result;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("min.bf16x2 %0, %1, %2;\n" : "=r"(result) : "r"(pair), "r"(0x7F7F7F7Fu));
    asm("max.bf16x2 %0, %0, %1;\n" : "+r"(result) : "r"(0xFF7FFF7Fu));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("min.f16x2 %0, %1, %2;\n" : "=r"(result) : "r"(pair), "r"(0x7BFF7BFFu));
    asm("max.f16x2 %0, %0, %1;\n" : "+r"(result) : "r"(0xFBFFFBFFu));
  }
  return result;
}

// Adds 0 * pair, element by element: a sum of zeros becomes NaN with the first number that is not finite.
template <typename T>
__device__ inline void detect_not_finite(std::uint32_t& sum, std::uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;\n" : "+r"(sum) : "r"(pair), "r"(0));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("fma.rn.f16x2 %0, %1, %2, %0;\n" : "+r"(sum) : "r"(pair), "r"(0));
  }
}

// Two ones of T: the B operand whose product is the sum of a row.
template <typename T>
inline constexpr std::uint32_t kPairOfOnes = std::is_same_v<T, __nv_bfloat16> ? 0x3F803F80u : 0x3C003C00u;

// 2^x, relative error 2^-22; subnormal results are 0. One instruction on the special function unit.
__device__ inline float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace andromeda::cuda
