// A vector of floats on the compiler's vector extensions, as wide as the instruction set this file is compiled for.
//
// Every file in this folder that includes simd.h is compiled once per instruction set (CMakeLists.txt) with
// ANDROMEDA_ISA naming it. All code sits in the namespace of that name, so that the linker cannot merge an inline
// function of one instruction set with its twin of another.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace andromeda::cpu::ANDROMEDA_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;  // SSE2, NEON
#endif

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = std::int32_t __attribute__((vector_size(kLanes * sizeof(float))));
using HalfBits = std::uint16_t __attribute__((vector_size(kLanes * sizeof(std::uint16_t))));

// bfloat16 and float16 are only converted, never computed with.
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// For dispatch_dtype().
struct StorageTypes {
  using Float32 = float;
  using Float16 = ANDROMEDA_ISA::Float16;
  using BFloat16 = ANDROMEDA_ISA::BFloat16;
};

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  // GCC 12 compiles the generic form below to five instructions.
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  HalfBits h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, IntVec) << 16);
#endif
}

inline Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  // GCC 12 has no _Float16 here.
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))));
#else
  Vec v;
  for (int lane = 0; lane < kLanes; ++lane) {
    _Float16 h;
    std::memcpy(&h, p + lane, sizeof h);
    v[lane] = static_cast<float>(h);
  }
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec select(IntVec mask, Vec yes, Vec no) { return (Vec)(((IntVec)yes & mask) | ((IntVec)no & ~mask)); }

// Round to nearest even, as torch does. A NaN keeps its upper bits and a set quiet bit, so it stays a NaN.
inline void store(BFloat16* p, Vec v) {
  const IntVec bits = (IntVec)v;
  const IntVec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const IntVec is_nan = v != v;
  const HalfBits h = __builtin_convertvector(((rounded & ~is_nan) | ((bits | 0x400000) & is_nan)) >> 16, HalfBits);
  std::memcpy(p, &h, sizeof h);
}

inline void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const _Float16 h = static_cast<_Float16>(v[lane]);
    std::memcpy(p + lane, &h, sizeof h);
  }
#endif
}

// Fetches `count` numbers into the caches, for reading or for writing.
template <typename T>
inline void prefetch(const T* p, int count) {
  for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 0, 2);
}
template <typename T>
inline void prefetch_for_writing(T* p, int count) {
  for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(p + i, 1, 2);
}

// The first `count` lanes. The memory of the others is not read; they are 0.
template <typename T>
inline Vec load_first(const T* p, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <typename T>
inline void store_first(T* p, Vec v, int count) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline bool any(IntVec mask) {
  std::int32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= mask[lane];
  return bits != 0;
}

inline IntVec lane_index() {
  IntVec v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = lane;
  return v;
}

// Lane i of the result is lane (i ^ kDistance) of v.
template <int kDistance, int... kLane>
inline Vec exchange(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ kDistance)...);
}

template <int kDistance>
inline Vec exchange(Vec v) {
  return exchange<kDistance>(v, std::make_integer_sequence<int, kLanes>{});
}

// Interleaves the lanes of a and b whose index has bit kDistance clear (kUpper: set): those of a go to the lanes with
// the bit clear, those of b to the lanes with the bit set.
template <int kDistance, bool kUpper, int... kLane>
inline Vec merge(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b, ((kLane & kDistance ? kLanes + kLane - kDistance : kLane) + (kUpper ? kDistance : 0))...);
}

// Four vectors as matrices of four columns side by side, each transposed: lane 4 q + j of rows[i] becomes lane 4 q + i
// of rows[j].
inline void transpose_quads(Vec (&rows)[4]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
  const Vec a = merge<1, false>(rows[0], rows[1], kAll), b = merge<1, true>(rows[0], rows[1], kAll);
  const Vec c = merge<1, false>(rows[2], rows[3], kAll), d = merge<1, true>(rows[2], rows[3], kAll);
  rows[0] = merge<2, false>(a, c, kAll);
  rows[1] = merge<2, false>(b, d, kAll);
  rows[2] = merge<2, true>(a, c, kAll);
  rows[3] = merge<2, true>(b, d, kAll);
}

// Lanes 4 q ... 4 q + 3 from 16 bytes at p + q * stride bytes.
inline Vec gather_quads(const void* p, std::int64_t stride) {
#if defined(__AVX__)
  const auto quad = [=](int q) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(p) + q * stride));
  };
#endif
#if defined(__AVX512F__)
  const __m512 a = _mm512_insertf32x4(_mm512_castps128_ps512(quad(0)), quad(1), 1);
  return (Vec)_mm512_insertf32x4(_mm512_insertf32x4(a, quad(2), 2), quad(3), 3);
#elif defined(__AVX__)
  return (Vec)_mm256_insertf128_ps(_mm256_castps128_ps256(quad(0)), quad(1), 1);
#else
  static_cast<void>(stride);
  return load(static_cast<const float*>(p));
#endif
}

// kLanes rows of four numbers, `stride` bytes apart, become four vectors: number i of every row.
inline void load_columns(const void* p, std::int64_t stride, Vec (&columns)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) columns[i] = gather_quads(static_cast<const char*>(p) + i * stride, 4 * stride);
  transpose_quads(columns);
}

// Sums and maxima over the lanes by a fixed butterfly.
inline float reduce_add(Vec v) {
  if constexpr (kLanes == 16) v += exchange<8 % kLanes>(v);
  if constexpr (kLanes >= 8) v += exchange<4 % kLanes>(v);
  v += exchange<2>(v);
  v += exchange<1>(v);
  return v[0];
}

inline float reduce_max(Vec v) {
  if constexpr (kLanes == 16) v = max(v, exchange<8 % kLanes>(v));
  if constexpr (kLanes >= 8) v = max(v, exchange<4 % kLanes>(v));
  v = max(v, exchange<2>(v));
  v = max(v, exchange<1>(v));
  return v[0];
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
