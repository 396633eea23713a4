// Scratch memory of a call: plain numbers, and objects of which every thread has one.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "andromeda/integers.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

// Uninitialised memory of plain numbers, aligned to a cache line.
template <typename T>
class Memory {
 public:
  explicit Memory(std::int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(larger(count, 1) * sizeof(T), 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }
  T* get() const { return data_; }

 private:
  T* data_;
};
using Buffer = Memory<float>;

inline void clear(float* x, std::int64_t count) { std::memset(x, 0, count * sizeof(float)); }

// One T per thread, made by the constructor that takes the other arguments.
template <typename T>
class Scratch {
 public:
  template <typename... Args>
  explicit Scratch(int num_threads, const Args&... args)
      : items_(static_cast<T*>(std::aligned_alloc(64, round_up(larger(num_threads, 1) * sizeof(T), 64)))) {
    if (items_ == nullptr) throw std::bad_alloc();
    try {
      for (; count_ < larger(num_threads, 1); ++count_) new (items_ + count_) T(args...);
    } catch (...) {
      destroy();
      throw;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { destroy(); }
  T& operator[](int worker) const { return items_[worker]; }

 private:
  void destroy() {
    while (count_ > 0) items_[--count_].~T();
    std::free(items_);
  }
  T* items_;
  int count_ = 0;
};

}  // namespace andromeda::cpu::ANDROMEDA_ISA
