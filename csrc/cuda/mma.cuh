// The instructions that attention is made of, one wrapper each (PTX ISA; sm_80). Lane l of a warp: g = l / 4, c = l
// % 4.
//
//   mma.m16n8k16     A (16 x 16)   a0 a1 a2 a3: rows g, g + 8, g, g + 8; columns 2c, 2c + 1 (a0 a1), 2c + 8, 2c + 9 (a2
//   a3)
//                    B (16 x 8)    b0 b1: k = 2c, 2c + 1 and 2c + 8, 2c + 9; column g
//                    D (16 x 8)    d0 d1: row g, columns 2c, 2c + 1; d2 d3: row g + 8
//   ldmatrix.x4      matrix m has its eight rows of 16 bytes where lanes 8m ... 8m + 7 point; lane l receives elements
//                    2c, 2c + 1 of row g, or with .trans rows 2c, 2c + 1 of column g
//
// Two neighbouring D tiles, packed to 16 bits, are one A operand: a0 = d0 d1 and a1 = d2 d3 of the left tile, a2 a3
// those of the right one. So a product's result is the next product's operand without leaving its lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace andromeda::cuda {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past the registers and past L1. Of the source only `source_bytes` are read,
// the rest of the target is zero: 0 for what lies outside a tensor.
__device__ inline void cp_async(std::uint32_t target, const void* source, int source_bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(target),
               "l"(__cvta_generic_to_global(source)), "r"(source_bytes)
               : "memory");
}

// Copies issued since the last commit become one group; a thread waits for all but its last `kPending` groups.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
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

// A fence between blocks: with an atomic of the same thread after it a release, with one before it an acquire. Lighter
// than __threadfence(), which also puts all such fences into one order: MEMBAR.SC instead of MEMBAR.ALL.
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

// Numbers that are not finite become the largest one: what is multiplied by 0 is then 0.
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

// Adds 0 * pair, element by element: a sum that was zero is a NaN from the first number on that is not finite.
template <typename T>
__device__ inline void look_at(std::uint32_t& sum, std::uint32_t pair) {
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
