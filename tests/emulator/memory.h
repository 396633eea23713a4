// Global memory of the emulated device: one arena of address space, buffers with exact extents, red zones between them.
//
// A device pointer is an address of this process, so host code can fill and read buffers directly. Every access of a
// kernel is looked up here: an address that no buffer covers is outside, wherever it points. New memory is all ones,
// which is NaN in every floating-point type, so a result that was never written is visible.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace emulator {

struct Buffer {
  std::uint8_t* begin;
  std::size_t bytes;
  std::string name;
  bool writable;
};

class GlobalMemory {
 public:
  // Aligned to 256 bytes as by cudaMalloc, plus `misalignment` bytes.
  void* allocate(std::size_t bytes, std::string name, bool writable, std::size_t misalignment = 0);
  // Address space only: pages appear, filled with zeros, when they are touched. For tensors larger than the machine.
  void* reserve(std::size_t bytes, std::string name, bool writable);
  void release(void* pointer);
  void release_all();
  // The buffer that covers the address, or nullptr.
  const Buffer* find(const void* address) const;
  // The closest buffer below the address: probably the one that an access out of bounds was meant for.
  const Buffer* closest(const void* address) const;

 private:
  void* place(std::size_t bytes, std::string name, bool writable, std::size_t misalignment);

  std::map<const std::uint8_t*, Buffer> buffers_;  // by address
  std::uint8_t* arena_ = nullptr;
  std::size_t used_ = 0;
};

GlobalMemory& global_memory();  // one per process

}  // namespace emulator
