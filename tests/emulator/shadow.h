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
//
// The blocks of a cluster share one set of clocks, in which their threads are numbered through (a block of 40 threads
// has 64 numbers: whole warps). Blocks of different clusters are ordered by words of global memory alone.
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
constexpr std::size_t kMaxStatements = 1 << 17;
struct Access {
  std::uint32_t clock;
  std::uint32_t thread : 15;
  std::uint32_t statement : 17;
};

class Clocks {
 public:
  static constexpr int kMbarriers = 64;  // with a column of their own; more share them

  void reset(int blocks, int threads_per_block);
  int blocks() const { return blocks_; }
  int threads() const { return threads_; }  // of all blocks
  int threads_per_block() const { return threads_ / blocks_; }
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

  // The agent of an mbarrier (by number in its block) or of a warp, one clock further on.
  Access next_of_mbarrier(int block, int number) {
    return next_of_agent(threads_ + block * kMbarriers + number % kMbarriers);
  }
  Access next_of_warp(int warp) { return next_of_agent(threads_ + blocks_ * kMbarriers + warp); }
  // "thread 5 at kernel.cu:17", of an access that `observer` meets.
  std::string describe(const Access& access, int observer, const std::string& place) const;
  // Adds the accesses of the agent to a row. Those that went through the asynchronous proxy need no fence.
  void join_agent(std::uint32_t* row, const Access& agent, bool asynchronous_proxy = true) const;

 private:
  Access next_of_agent(int column);

  int blocks_ = 1, threads_ = 0;
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
  SharedShadow(Clocks& clocks, Reporter& reporter);
  ~SharedShadow();

  // A new block with `bytes` of memory that starts at kSharedStart. Accesses number their statements within `code`.
  void reset(const std::uint8_t* memory, std::size_t bytes, const std::vector<Statement>* code,
             const std::string& name);
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
  // The same for a reduction (red.async). Several may be in flight.
  void begin_reduction(const Site& site, std::uint32_t offset, int bytes);
  void finish_reduction(const Access& by, std::uint32_t offset, int bytes);
  // A read that continues after its instruction (wgmma, bulk store): until it has finished, no thread may write there.
  void begin_read(const Site& site, std::uint32_t offset, int bytes);
  void finish_read(const Access& by, std::uint32_t offset, int bytes);

  void mark_mbarrier(std::uint32_t offset, bool live);
  // Checks that the initialisation of an mbarrier is visible to this thread, and to copies. `known`: the thread knows
  // of it by other means than its clocks. `fence`: of fence.mbarrier_init, with clock 0 if there was none.
  void check_mbarrier(const Site& site, std::uint32_t offset, bool used_by_copy, bool known, const Access& fence);
  Access access_of(const Site& site);

 private:
  enum State : std::uint8_t { kWritten = 1, kInFlight = 2, kByCopy = 4, kMbarrier = 8, kAtomic = 16, kReduced = 32 };
  static constexpr int kReaders = 8;
  struct Cell {
    std::uint32_t block;  // the last block that used it; for another block it is new
    Access write;
    Access reads[kReaders];
    std::uint8_t state;
    std::uint8_t num_reads;  // in `reads`
    std::uint16_t reads_in_flight, reductions_in_flight;
    bool more_reads;  // in `more_reads_`
  };

  static std::vector<std::vector<Cell>>& spare_cells();  // of earlier blocks: new memory costs time

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
  std::string describe(const Access& access, const Site& observer) const;
  std::string at(std::uint32_t offset) const { return name_ + ", byte " + std::to_string(offset - kSharedStart); }

  Clocks& clocks_;
  Reporter& reporter_;
  const std::vector<Statement>* code_ = nullptr;
  const std::uint8_t* memory_ = nullptr;
  std::string name_;
  std::size_t end_ = kSharedStart;
  std::uint32_t block_ = 0;  // a count of all blocks so far, not a place in the grid
  std::vector<Cell> cells_;
  std::unordered_map<const Cell*, std::vector<Access>> more_reads_;  // when more than eight read a cell
};

class GlobalShadow;

// A release or an acquisition concerns the publications on a word that were made before it: the first `count`.
struct Publications;
struct Covered {
  const Publications* word;
  std::size_t count;
};

// The accesses of a cluster (or of a single block) that an operation on this word released, and those of others that
// it had acquired itself.
struct Publication {
  std::uint32_t cluster;
  std::vector<std::uint32_t> clocks;
  std::vector<Covered> acquired;
};
struct Publications {
  std::vector<Publication> made;
  std::size_t acquired = 0;  // some thread has acquired so many of them
};

// What a cluster knows of the others: the operations of its threads that acquired.
class Knowledge {
 public:
  explicit Knowledge(Clocks& clocks) : clocks(clocks) {}
  void reset(std::uint32_t number) {
    cluster = number;
    acquisitions_.clear();
  }
  Clocks& clocks;
  std::uint32_t cluster = 0;  // its number in the grid

 private:
  friend GlobalShadow;
  struct Acquisition {
    const std::uint8_t* address;
    Covered covered;
    int thread;
    std::uint32_t clock;  // of the operation
    std::uint32_t end;    // clock of the end of the pattern: the operation itself, or the fence
    bool complete;        // until then it acquires nothing
  };
  std::vector<Acquisition> acquisitions_;
};

// What the blocks of one launch do in global memory. A word written by another block may be read, and one that it wrote
// or read may be overwritten, if a release pattern there synchronises with an acquire pattern here, as PTX's memory model defines them: the pattern of "the last block
// reduces". On either side one thread executes the whole pattern.
//
//   release   a fence at device scope, then an atomic operation by the same thread (or one that releases). It covers
//             the accesses ordered before the fence: also those of other threads of the block before a barrier, but not
//             those that other threads alone have fenced.
//   acquire   an atomic operation on the same word, then a fence at device scope by the same thread (or an operation
//             that acquires). It covers all accesses ordered after that fence: also those of other threads of the
//             block after a barrier. Their own fences do not replace a missing one.
//
// An acquisition sees the releases of its word that were made before it, and what these blocks had acquired themselves.
// Blocks of one cluster may also be ordered by its barriers. Two fence.sc of different threads are ordered as well and
// could create more order; no kernel here relies on it.
class GlobalShadow {
 public:
  explicit GlobalShadow(Reporter& reporter) : reporter_(reporter) {}

  // Returns the number of bytes that other blocks wrote.
  int read(Knowledge& reader, const Site& site, const std::uint8_t* address, int bytes, const Buffer& buffer,
           bool strong = false);
  void write(Knowledge& writer, const Site& site, const std::uint8_t* address, int bytes, const Buffer& buffer,
             bool atomic, bool in_flight = false);
  // An atomic operation, or a strong load or store, on the word at this address.
  void synchronise(Knowledge& cluster, int thread, const std::uint8_t* address, Acquire acquire, Release release);
  // A fence at device scope. After Clocks::fence_for_device.
  void fence(Knowledge& cluster, int thread);

 private:
  static constexpr std::size_t kPageBytes = 4096;
  struct Use {
    std::uint32_t cluster_plus_one;  // 0: none
    std::uint32_t clock;
    std::uint16_t thread;
    bool atomic;
  };
  struct Cell {       // of two bytes
    Use write, read;  // the last write, and one of the reads since then
    bool more_reads;  // in `more_reads_`: of each block the last one
  };
  struct Page {
    Cell cells[kPageBytes / 2];
  };

  Page* page_at(const std::uint8_t* address, bool create);
  void publish(const Knowledge& cluster, int thread, Publications& word, Release release);
  // Whether another block than the thread's did it, and whether it happened before.
  static bool is_foreign(const Use& use, const Knowledge& here, int thread);
  static bool happened_before(const Use& use, const Knowledge& here, int thread, const std::uint8_t* address);
  void remember_read(Cell& cell, const Use& use, const Knowledge& here);
  void check_no_reader(const Cell& cell, const Knowledge& writer, const Site& site, const std::uint8_t* address,
                       const Buffer& buffer);
  std::string describe(const Use& use, const Knowledge& here) const;
  std::string describe(const std::uint8_t* address, const Buffer& buffer) const;

  Reporter& reporter_;
  std::unordered_map<std::size_t, std::unique_ptr<Page>> pages_;
  std::size_t last_page_number_ = ~std::size_t{0};
  Page* last_page_ = nullptr;
  std::unordered_map<const Cell*, std::vector<Use>> more_reads_;
  std::unordered_map<const std::uint8_t*, Publications> publications_;  // by word
};

}  // namespace emulator
