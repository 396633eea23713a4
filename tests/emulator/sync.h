// Barriers of the block, mbarriers, and groups of asynchronous copies, which threads wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "shadow.h"

namespace emulator {

class Execution;
struct Instruction;

// bar.sync and bar.arrive with an id. Warps arrive as a whole. When `expected` threads have arrived, the waiting ones
// continue, ordered after all of them.
struct Barrier {
  int expected = 0;  // threads; meaningless while nobody has arrived
  bool whole_block = false;
  int arrived = 0;
  struct Waiter {
    int warp;
    const Instruction* instruction;
    std::uint32_t mask;
  };
  std::vector<Waiter> waiting;
  std::vector<std::uint32_t> row;  // joined clocks of the threads that arrived
  // bar.red: the number of true predicates, and of threads.
  int true_predicates = 0, predicates = 0;
  const Statement* statement = nullptr;  // of the first arrival
};

// An mbarrier: a phase completes when no arrivals and no bytes are pending. An arrival releases what the arriving
// thread did, and nothing that other lanes did. A thread that finds the phase completed is ordered after all arrivals,
// but after those of other blocks of the cluster only if both name the scope .cluster.
struct Mbarrier {
  std::uint32_t count = 0, pending = 0, phase = 0;
  std::int64_t pending_bytes = 0;
  int number = 0;                       // in the order of initialisation
  std::vector<std::uint32_t> arrived;   // joined clocks, of the phase that is filling
  std::vector<std::uint32_t> released;  // of all completed phases
  // The same for arrivals that release to the whole cluster, and threads that acquire from it.
  std::vector<std::uint32_t> arrived_cluster, released_cluster;
  // fence.mbarrier_init by the thread that initialised it: its clock, 0: none. With it an arrival at the barrier of the
  // cluster makes the initialisation known, also a relaxed one, when this phase has completed.
  Access fence{};
  std::uint32_t known_after_phase = ~0u;

  void complete_if_done() {
    if (pending != 0 || pending_bytes != 0) return;
    phase ^= 1;
    pending = count;
    released = arrived;  // clocks only grow: earlier phases are included
    released_cluster = arrived_cluster;
  }
};

struct PhaseWait {
  static constexpr std::uint32_t kCluster = 0;  // no mbarrier: the barrier of the cluster
  std::uint32_t mbarrier = 0, parity = 0;
};

// A word of global memory that a warp has read again and again.
struct Poll {
  const Instruction* instruction = nullptr;
  const std::uint8_t* address = nullptr;
  std::uint64_t value = 0;
  bool unchanged = false;  // the last two values are equal
  bool idle = false;       // and that ended the last turn of the warp
};

// cp.async of one thread. Data arrive at the wait, never earlier: a kernel that reads too early sees the old contents.
struct CopyGroups {
  struct Copy {
    std::uint32_t target;
    const std::uint8_t* source;
    int bytes, source_bytes;  // the rest is zero-filled
  };
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// A bulk copy, or a store or reduction into another block, in flight: `move` moves the data, once, at a moment that the scheduler picks.
struct BulkCopy {
  std::function<void(Execution&)> move;  // called with the block that issued it
  bool uses_issuer = true;               // it reads or writes shared memory of this block
  bool moved = false;
};

// A bulk store reads shared memory until its thread has waited for it.
struct BulkStore {
  std::shared_ptr<BulkCopy> copy;
  Site site;
  std::uint32_t offset;  // in shared memory
  int bytes;
  std::function<void(Execution&)> publish;  // after a wait for the writes: they count as made by the thread
};
struct BulkGroups {
  struct Group {
    std::vector<BulkStore> stores;
    bool read = false;  // wait_group.read has seen it
  };
  std::vector<BulkStore> open;
  std::deque<Group> groups;
};

}  // namespace emulator
