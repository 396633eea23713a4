// Rows of any length as vectors, the last one partial.
#pragma once

#include "simd.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

template <typename T>
inline Vec load_up_to(const T* p, int count) {
  return count < kLanes ? load_first(p, count) : load(p);
}

template <typename T>
inline void store_up_to(T* p, Vec v, int count) {
  if (count < kLanes) {
    store_first(p, v, count);
  } else {
    store(p, v);
  }
}

// body(channel, count) for each vector of channels [begin, end). `count` is a constant in all but the last call.
template <typename Body>
inline void for_each_vector(int begin, int end, const Body& body) {
  int channel = begin;
  for (; channel + kLanes <= end; channel += kLanes) body(channel, kLanes);
  if (channel < end) body(channel, end - channel);
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
