// Global memory in vectors of 16 bytes, the widest access of a lane, and half precision as pairs of floats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

namespace andromeda::cuda {

// The types that dispatch_dtype passes on in this backend.
struct StorageTypes {
  using Float32 = float;
  using Float16 = __half;
  using BFloat16 = __nv_bfloat16;
};

// Two adjacent elements, the operand of one conversion instruction.
template <typename T>
struct PairOf;
template <>
struct PairOf<float> {
  using type = float2;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <typename T>
using Pair = typename PairOf<T>::type;

__device__ inline float2 to_floats(float2 pair) { return pair; }
__device__ inline float2 to_floats(__half2 pair) { return __half22float2(pair); }
__device__ inline float2 to_floats(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }

// Rounds to nearest even.
template <typename T>
__device__ inline Pair<T> from_floats(float2 pair) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return pair;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float22half2_rn(pair);
  } else {
    return __float22bfloat162_rn(pair);
  }
}

inline constexpr int kVec16Bytes = 16;  // the widest access a lane can make

template <typename T>
inline constexpr int kVec16Width = kVec16Bytes / sizeof(T);  // in elements

template <typename T>
struct alignas(kVec16Bytes) Vec16 {
  static constexpr int kPairs = kVec16Width<T> / 2;
  Pair<T> pairs[kPairs];
};

// How a row is read: in vectors of 16 bytes, if it starts at a multiple of 16 bytes and is a whole number of vectors,
// or one element at a time, which costs more instructions and moves the same bytes from memory.
enum class Access { kVec16, kElement };

// The row has `count` more elements from `source` on, an even number; elements past them (count may be <= 0) read as
// zero. The data are used once: the caches evict them first, so that tables and scales stay.
template <Access kAccess, typename T>
__device__ inline Vec16<T> load_once(const T* source, int count) {
  static_assert(sizeof(Vec16<T>) == sizeof(uint4) && alignof(Vec16<T>) == alignof(uint4));
  Vec16<T> vec;
  if constexpr (kAccess == Access::kVec16) {
    const uint4 bits = count > 0 ? __ldcs(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
    memcpy(&vec, &bits, sizeof vec);
  } else {
#pragma unroll
    for (int i = 0; i < Vec16<T>::kPairs; ++i) {
      const bool inside = 2 * i < count;
      vec.pairs[i].x = inside ? __ldcs(source + 2 * i) : T(0.0f);
      vec.pairs[i].y = inside ? __ldcs(source + 2 * i + 1) : T(0.0f);
    }
  }
  return vec;
}

template <Access kAccess, typename T>
__device__ inline void store(T* target, const Vec16<T>& vec, int count) {
  if constexpr (kAccess == Access::kVec16) {
    uint4 bits;
    memcpy(&bits, &vec, sizeof bits);
    if (count > 0) *reinterpret_cast<uint4*>(target) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < Vec16<T>::kPairs; ++i) {
      if (2 * i < count) {
        target[2 * i] = vec.pairs[i].x;
        target[2 * i + 1] = vec.pairs[i].y;
      }
    }
  }
}

// Stores the first `count` of kCount elements of T, which lie side by side in `bits`.
template <int kCount, typename T, typename Bits>
__device__ inline void store_elements(T* target, const Bits& bits, int count) {
  static_assert(sizeof bits == kCount * sizeof(T));
  const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i < count) target[i] = elements[i];
  }
}

// Loads float constants that many lanes share, through the read-only path. Pairs past the first `count` elements, an
// even number, read as `fill`. With Access::kVec16 the address is a multiple of 16 bytes and `count` a multiple of 4.
template <Access kAccess, int kPairs>
__device__ inline void load_constants(float2* pairs, const float* source, int count, float2 fill) {
  static_assert(kPairs % 2 == 0, "a 16-byte access loads two pairs");
#pragma unroll
  for (int i = 0; i < kPairs; i += 2) {
    pairs[i] = pairs[i + 1] = fill;
    if constexpr (kAccess == Access::kVec16) {
      if (2 * i < count) {
        const float4 two = __ldg(reinterpret_cast<const float4*>(source + 2 * i));
        pairs[i] = make_float2(two.x, two.y);
        pairs[i + 1] = make_float2(two.z, two.w);
      }
    } else {
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        if (2 * j < count) pairs[j] = make_float2(__ldg(source + 2 * j), __ldg(source + 2 * j + 1));
      }
    }
  }
}

}  // namespace andromeda::cuda
