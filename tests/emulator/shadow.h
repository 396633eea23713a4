// Happens-before: who may touch which byte of shared memory, and which blocks may meet in global memory.
//
// Clocks. Every thread counts its own steps of synchronisation, and keeps a row with the latest step of every other
// thread that it is ordered after (a vector clock). An access is remembered as (thread, clock of that thread); it
// happened before thread t if t's row has reached that clock. Edges come from barriers, warp barriers, completed phases
// of an mbarrier and completed copies: each joins rows. Shuffles, votes and matrix instructions order nothing.
//
// A row has two sections of equal length. The first is the order itself. The second is the part of it that has passed a
// proxy fence, which asynchronous copies and wgmma may rely on. Joining whole rows carries both along the same edges.
// The accesses that a fence at device scope covers are recorded for the thread that made it alone: a release pattern is
// a fence and an atomic of one thread, and no other thread inherits the fence.
//
// Agents do the work that no thread does. Their columns follow those of the threads: one for each mbarrier, for the
// bulk copies that complete on it, and one for each warp, for the reads of its wgmmas.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "report.h"

namespace emulator {

// 8 bytes, because every cell of shared memory has nine of them.
struct Access {
  std::uint32_t clock;
  std::uint32_t thread : 11;
  std::uint32_t statement : 21;
};

class Clocks {
 public:
  static constexpr int kMbarriers = 64;  // with a column of their own; more share them

  void reset(int threads);
  int threads() const { return threads_; }
  std::size_t row_size() const { return 2 * columns_; }
  std::uint32_t* row(int thread) { return &rows_[thread * row_size()]; }

  std::uint32_t now(int thread) { return row(thread)[thread]; }
  // Earlier accesses of the thread are released under the old clock; later ones are not.
  void advance(int thread) { ++row(thread)[thread]; }
  void join(std::uint32_t* row, const std::uint32_t* other) const;
  bool happened_before(const Access& access, int thread) { return access.clock <= row(thread)[access.thread]; }
  bool fenced_for_copies(const Access& access, int thread) {
    return access.clock <= row(thread)[columns_ + access.thread];
  }
  void fence_for_copies(int thread);
  void fence_for_device(int thread);
  // The clocks before the last fence at device scope that this thread made itself.
  const std::uint32_t* fenced_for_device(int thread) const { return &fenced_for_device_[thread * columns_]; }
  std::size_t columns() const { return columns_; }

  // The agent of an mbarrier (by number) or of a warp, one clock further on.
  Access next_of_mbarrier(int number) { return next_of_agent(threads_ + number % kMbarriers); }
  Access next_of_warp(int warp) { return next_of_agent(threads_ + kMbarriers + warp); }
  // Adds the accesses of the agent to a row. They went through the asynchronous proxy and need no fence.
  void join_agent(std::uint32_t* row, const Access& agent) const;

 private:
  Access next_of_agent(int column);

  int threads_ = 0;
  std::size_t columns_ = 0;
  std::vector<std::uint32_t> rows_;
  std::vector<std::uint32_t> fenced_for_device_;  // one section for every thread
  std::vector<std::uint32_t> agent_clocks_;       // by column
};

enum class Proxy { kGeneric, kAsync };

// The order between blocks that an operation on a word of global memory creates: by itself, or with a fence of its
// thread.
enum class Acquire { kNothing, kAtOnce, kWithNextFence };
enum class Release { kNothing, kWhatWasFenced, kEverything };

// One cell for every two bytes of shared memory: the last write, the reads since then, and copies in flight. Both bytes
// of a cell count as one.
class SharedShadow {
 public:
  SharedShadow(Clocks& clocks, Reporter& reporter) : clocks_(clocks), reporter_(reporter) {}

  // A new block with `bytes` of memory that starts at kSharedStart. Accesses number their statements within `code`.
  void reset(const std::uint8_t* memory, std::size_t bytes, const std::vector<Statement>* code);
  bool contains(std::uint64_t offset, std::size_t bytes) const {
    return offset >= kSharedStart && offset + bytes <= end_;
  }

  void read(const Site& site, std::uint32_t offset, int bytes, Proxy proxy = Proxy::kGeneric);
  // `value`: the value that will be written; writing an equal value is no race.
  void write(const Site& site, std::uint32_t offset, int bytes, const void* value);
  // Atomic operations do not race with each other.
  void atomic(const Site& site, std::uint32_t offset, int bytes);

  // A copy into shared memory: no thread may touch the cells until it has finished. It then counts as a write of `by`.
  void begin_copy(const Site& site, std::uint32_t offset, int bytes, Proxy proxy);
  void finish_copy(const Access& by, std::uint32_t offset, int bytes, Proxy proxy);
  // A read that continues after its instruction (wgmma, bulk store): until it has finished, no thread may write there.
  void begin_read(const Site& site, std::uint32_t offset, int bytes);
  void finish_read(const Access& by, std::uint32_t offset, int bytes);

  void mark_mbarrier(std::uint32_t offset, bool live);
  // Checks that the initialisation of an mbarrier is visible to this thread, and to copies.
  void check_mbarrier(const Site& site, std::uint32_t offset, bool used_by_copy);
  Access access_of(const Site& site);

 private:
  enum State : std::uint8_t { kWritten = 1, kInFlight = 2, kByCopy = 4, kMbarrier = 8, kAtomic = 16 };
  static constexpr int kReaders = 8;
  struct Cell {
    std::uint32_t block;  // the last block that used it; for another block it is new
    Access write;
    Access reads[kReaders];
    std::uint8_t state;
    std::uint8_t num_reads;  // in `reads`
    std::uint16_t reads_in_flight;
    bool more_reads;  // in `more_reads_`
  };

  Cell& cell(std::uint32_t offset) {
    Cell& found = cells_[(offset - kSharedStart) / 2];
    if (found.block != block_) {
      found = Cell{};
      found.block = block_;
    }
    return found;
  }
  void remember_read(Cell& cell, const Access& access);
  void check_no_reader(const Site& site, std::uint32_t offset, const Cell& cell);
  void check_write(const Site& site, std::uint32_t offset, const Cell& cell, bool same_value);
  void forget_reads(Cell& cell);
  std::string describe(const Access& access) const;
  std::string at(std::uint32_t offset) const { return "shared memory, byte " + std::to_string(offset - kSharedStart); }

  Clocks& clocks_;
  Reporter& reporter_;
  const std::vector<Statement>* code_ = nullptr;
  const std::uint8_t* memory_ = nullptr;
  std::size_t end_ = kSharedStart;
  std::uint32_t block_ = 0;  // a count of blocks, not a place in the grid
  std::vector<Cell> cells_;
  std::unordered_map<const Cell*, std::vector<Access>> more_reads_;  // when more than eight read a cell
};

// Writes of the blocks of one launch to global memory. A word written by another block may be read if a release pattern
// there synchronises with an acquire pattern here, as PTX's memory model defines them: the pattern of "the last block
// reduces". On either side one thread executes the whole pattern.
//
//   release   a fence at device scope, then an atomic operation by the same thread (or one that releases). It covers
//             the accesses ordered before the fence: also those of other threads of the block before a barrier, but not
//             those that other threads alone have fenced.
//   acquire   an atomic operation on the same word, then a fence at device scope by the same thread (or an operation
//             that acquires). It covers all accesses ordered after that fence: also those of other threads of the
//             block after a barrier. Their own fences do not replace a missing one.
//
// Two fence.sc of different threads are ordered as well and could create more order; no kernel here relies on it.
// Blocks run one after the other, so the writes that an earlier one published are final.
class GlobalShadow {
 public:
  GlobalShadow(Clocks& clocks, Reporter& reporter) : clocks_(clocks), reporter_(reporter) {}

  void enter_block(std::uint32_t block);
  void read(const Site& site, const std::uint8_t* address, int bytes, const Buffer& buffer);
  void write(const Site& site, const std::uint8_t* address, int bytes, const Buffer& buffer, bool atomic,
             bool in_flight = false);
  // An atomic operation, or a strong load or store, on the word at this address.
  void synchronise(int thread, const std::uint8_t* address, Acquire acquire, Release release);
  // A fence at device scope. After Clocks::fence_for_device.
  void fence(int thread);
  // The number of bytes that the block has read so far and other blocks wrote.
  std::uint64_t foreign_bytes() const { return foreign_bytes_; }

 private:
  static constexpr std::size_t kPageBytes = 4096;
  struct Cell {  // of two bytes
    std::uint32_t block_plus_one;
    std::uint32_t clock;
    std::uint16_t thread;
    bool atomic;
  };
  struct Page {
    Cell cells[kPageBytes / 2];
  };
  struct Publication {
    std::uint32_t block;
    std::vector<std::uint32_t> clocks;
  };
  struct Acquisition {
    const std::uint8_t* address;
    int thread;
    std::uint32_t clock;  // of the operation
    std::uint32_t end;    // clock of the end of the pattern: the operation itself, or the fence
    bool complete;        // until then it acquires nothing
  };

  Page* page_at(const std::uint8_t* address, bool create);
  void publish(int thread, const std::uint8_t* address, Release release);
  bool published(const Cell& cell, int reader, const std::uint8_t* address);
  std::string describe(const std::uint8_t* address, const Buffer& buffer) const;

  Clocks& clocks_;
  Reporter& reporter_;
  std::uint32_t block_ = 0;
  std::uint64_t foreign_bytes_ = 0;
  std::unordered_map<std::size_t, std::unique_ptr<Page>> pages_;
  std::size_t last_page_number_ = ~std::size_t{0};
  Page* last_page_ = nullptr;
  std::unordered_map<const std::uint8_t*, std::vector<Publication>> publications_;
  std::vector<Acquisition> acquisitions_;  // of the running block
};

}  // namespace emulator
