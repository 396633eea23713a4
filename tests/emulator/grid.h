// A launch while it runs: which blocks are resident, and which warp runs next.
//
// A kernel that cannot observe other blocks runs them one after the other. Otherwise several are resident and their
// warps take turns. A block that waits for another one in a loop, because of a word in global memory, makes room for
// more blocks, up to the number that the device holds: only then is it a deadlock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "machine.h"
#include "report.h"
#include "shadow.h"

namespace emulator {

class Execution;
struct Code;

// Blocks that start together and share their clocks.
struct Cluster {
  Clocks clocks;
  Knowledge knowledge{clocks};
  std::vector<std::unique_ptr<Execution>> blocks;  // by rank
  // The barrier of the cluster. A phase completes when every living thread has arrived.
  std::uint32_t phase = 0;
  std::vector<std::uint32_t> arrived;   // joined clocks of the threads that arrived and released
  std::vector<std::uint32_t> released;  // of completed phases
  ~Cluster();
  void reset(std::int64_t number, int threads_per_block);
  void complete_phase_if_done();
};

class Grid {
 public:
  Grid(const Code& code, const Configuration& configuration, std::size_t parameter_bytes, const Settings& settings);
  ~Grid();
  std::vector<Report> run();

  const Code& code;
  const Configuration& configuration;
  const std::size_t parameter_bytes;
  const Settings& settings;
  const int cluster_size;  // blocks
  Counters counters = {};
  Reporter reporter;
  GlobalShadow global_shadow;
  std::mt19937_64 random;
  bool fatal = false;
  std::uint64_t activity = 0;
  std::uint64_t idle_polls = 0;  // since a block has changed global memory, started or finished

 private:
  std::vector<std::int64_t> order_of_clusters();
  bool start_next();
  bool take_turns();
  bool take_random_turn();
  bool take_turn(Execution& block, std::size_t index_of_warp);
  void retire();
  bool move_a_copy();
  bool wake();
  bool polls() const;
  Dim3 position_of(std::int64_t cluster, int rank) const;
  void report_deadlock(const char* what);

  std::vector<std::int64_t> order_;  // of clusters
  std::size_t started_ = 0;          // of the order
  std::size_t max_resident_;         // clusters
  std::vector<std::unique_ptr<Cluster>> resident_, unused_;
  std::vector<Execution*> running_;  // the blocks that have not finished
  std::uint64_t idle_turns_ = 0, idle_rounds_ = 0;
  std::uint64_t activity_at_time_out_ = 0;
  int idle_time_outs_ = 0;
};

}  // namespace emulator
