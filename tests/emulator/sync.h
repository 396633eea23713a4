// What threads wait for: barriers of the block, mbarriers, and groups of asynchronous copies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "shadow.h"

namespace emulator {

class Execution;
struct Instruction;

// bar.sync and bar.arrive with an id. Warps arrive as a whole; who waits goes on when `expected` threads have arrived,
// ordered after all of them.
struct Barrier {
  int expected = 0;          // threads; meaningless while nobody has arrived
  bool whole_block = false;  // no count given: every warp that has not exited
  int arrived = 0;
  struct Waiter {
    int warp;
    const Instruction* instruction;
    std::uint32_t mask;
  };
  std::vector<Waiter> waiting;
  std::vector<std::uint32_t> row;  // joined clocks of those who arrived
  // bar.red: how many predicates were true, of how many threads.
  int true_predicates = 0, predicates = 0;
  const Statement* statement = nullptr;  // of the first arrival
};

// An mbarrier: a phase completes when no arrivals and no bytes are pending. An arrival releases what the arriving
// thread did, and nothing that other lanes did; who finds the phase completed is ordered after all arrivals.
struct Mbarrier {
  std::uint32_t count = 0, pending = 0, phase = 0;
  std::int64_t pending_bytes = 0;
  std::vector<std::uint32_t> arrived;   // joined clocks, of the phase that is filling
  std::vector<std::uint32_t> released;  // of all completed phases
};

struct PhaseWait {
  std::uint32_t mbarrier = 0, parity = 0;
};

// cp.async of one thread. Data arrive at the wait, never earlier: a kernel that reads too early sees what was there.
struct CopyGroups {
  struct Copy {
    std::uint32_t target;
    const std::uint8_t* source;
    int bytes, source_bytes;  // the rest is zero-filled
  };
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// Bulk stores of one thread, which read shared memory until a wait.
struct BulkGroups {
  struct Read {
    std::uint32_t offset;
    int bytes;
  };
  std::vector<Read> open;
  std::deque<std::vector<Read>> groups;
};

// A bulk copy into shared memory, on its way.
struct BulkCopy {
  virtual ~BulkCopy() = default;
  virtual void finish(Execution& execution) = 0;
};

}  // namespace emulator
