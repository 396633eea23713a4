#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

namespace emulator {
namespace {

constexpr std::size_t kArenaBytes = std::size_t{1} << 40;  // of address space; pages cost memory only when touched
constexpr std::size_t kAlignment = 256;                    // of cudaMalloc
constexpr std::size_t kRedZoneBytes = 4096;  // between buffers: no row or tile reaches from one into another

std::size_t round_up(std::size_t value, std::size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

void* GlobalMemory::place(std::size_t bytes, std::string name, bool writable, std::size_t misalignment) {
  if (arena_ == nullptr) {
    void* arena =
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) throw std::runtime_error("emulator: cannot reserve 1 TiB of address space");
    arena_ = static_cast<std::uint8_t*>(arena);
  }
  const std::size_t start = round_up(used_ + kRedZoneBytes, kAlignment) + misalignment;
  if (start + bytes + kRedZoneBytes > kArenaBytes) {
    throw std::runtime_error("emulator: " + name + " of " + std::to_string(bytes) +
                             " bytes does not fit the address space that is left; release_all() gives it back");
  }
  used_ = start + bytes;
  std::uint8_t* begin = arena_ + start;
  buffers_[begin] = {begin, bytes, std::move(name), writable};
  return begin;
}

void* GlobalMemory::allocate(std::size_t bytes, std::string name, bool writable, std::size_t misalignment) {
  void* pointer = place(bytes, std::move(name), writable, misalignment);
  std::memset(pointer, 0xff, bytes);
  return pointer;
}

void* GlobalMemory::reserve(std::size_t bytes, std::string name, bool writable) {
  return place(bytes, std::move(name), writable, 0);
}

void GlobalMemory::release(void* pointer) {
  const auto found = buffers_.find(static_cast<std::uint8_t*>(pointer));
  if (found == buffers_.end()) throw std::runtime_error("emulator: release of a pointer that was never allocated");
  // Red zones are a page wide, so no other buffer shares these pages.
  const auto first = reinterpret_cast<std::size_t>(found->second.begin) / kRedZoneBytes * kRedZoneBytes;
  const auto last = round_up(reinterpret_cast<std::size_t>(found->second.begin) + found->second.bytes, kRedZoneBytes);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  buffers_.erase(found);
}

void GlobalMemory::release_all() {
  buffers_.clear();
  if (arena_ != nullptr) madvise(arena_, used_, MADV_DONTNEED);
  used_ = 0;
}

const Buffer* GlobalMemory::closest(const void* address) const {
  auto next = buffers_.upper_bound(static_cast<const std::uint8_t*>(address));
  return next == buffers_.begin() ? nullptr : &std::prev(next)->second;
}

const Buffer* GlobalMemory::find(const void* address) const {
  const Buffer* buffer = closest(address);
  const auto* byte = static_cast<const std::uint8_t*>(address);
  return buffer != nullptr && byte < buffer->begin + buffer->bytes ? buffer : nullptr;
}

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

}  // namespace emulator
