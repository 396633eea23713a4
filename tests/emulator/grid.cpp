#include "grid.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <unordered_set>

#include "execution.h"

namespace emulator {
namespace {

// Blocks whose warps take turns from the start, if they may wait for each other.
constexpr std::size_t kInterleaved = 4;
// Polls of unchanged words before a further block starts.
constexpr std::uint64_t kPollsBeforeNextBlock = 100;
// It is a deadlock after so many rounds in which all warps only poll, or so many polls for each block while others work
// but change nothing.
constexpr std::uint64_t kIdleRounds = 1000;
constexpr std::uint64_t kIdlePolls = 30000;
// Under the random schedule, all warps have probably had a turn after so many turns for each.
constexpr std::uint64_t kTurnsOfARound = 8;

}  // namespace

// ---- a cluster

Cluster::~Cluster() = default;

void Cluster::reset(std::int64_t number, int threads_per_block) {
  clocks.reset(static_cast<int>(blocks.size()), threads_per_block);
  knowledge.reset(static_cast<std::uint32_t>(number));
  phase = 0;
  arrived.assign(clocks.row_size(), 0);
  released.assign(clocks.row_size(), 0);
}

void Cluster::complete_phase_if_done() {
  bool any = false;
  for (const auto& block : blocks) {
    for (const Warp& warp : block->warps) {
      if ((warp.alive & ~warp.cluster_arrived) != 0) return;
      any |= warp.cluster_arrived != 0;
    }
  }
  if (!any) return;
  ++phase;
  released = arrived;  // clocks only grow: earlier phases are included
  for (const auto& block : blocks) {
    ++block->activity;
    for (Warp& warp : block->warps) {
      warp.cluster_passes |= warp.cluster_arrived;
      warp.cluster_arrived = 0;
      for (std::uint32_t rest = warp.sleeping; rest != 0; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        if (warp.phase_wait[lane].mbarrier == PhaseWait::kCluster) warp.sleeping &= ~(1u << lane);
      }
    }
  }
}

// ---- a launch

namespace {

int blocks_of(const Dim3& size) { return static_cast<int>(size.x * size.y * size.z); }

Dim3 clusters_of(const Configuration& c) {
  return {c.grid.x / c.cluster.x, c.grid.y / c.cluster.y, c.grid.z / c.cluster.z};
}

}  // namespace

Grid::~Grid() = default;

Grid::Grid(const Code& code, const Configuration& configuration, std::size_t parameter_bytes, const Settings& settings)
    : code(code),
      configuration(configuration),
      parameter_bytes(parameter_bytes),
      settings(settings),
      cluster_size(blocks_of(configuration.cluster)),
      reporter(*code.entry.module, settings.max_reports),
      global_shadow(reporter),
      random(settings.seed),
      order_(order_of_clusters()),
      max_resident_(std::max<std::int64_t>(configuration.max_resident / cluster_size, 1)) {}

std::vector<std::int64_t> Grid::order_of_clusters() {
  const Dim3& grid = configuration.grid;
  const std::int64_t num_blocks = std::int64_t{grid.x} * grid.y * grid.z;
  std::vector<std::int64_t> order = settings.blocks;
  for (const std::int64_t index : order) {
    if (index >= 0 && index < num_blocks) continue;
    throw std::runtime_error("emulator: block " + std::to_string(index) + " of a grid of " +
                             std::to_string(num_blocks));
  }
  const Dim3 &cluster = configuration.cluster, clusters = clusters_of(configuration);
  for (std::int64_t& index : order) {  // of a block, and now of its cluster
    index = index % grid.x / cluster.x +
            std::int64_t{clusters.x} * (index / grid.x % grid.y / cluster.y +
                                        std::int64_t{clusters.y} * (index / grid.x / grid.y / cluster.z));
  }
  if (order.empty()) {
    order.resize(num_blocks / cluster_size);
    std::iota(order.begin(), order.end(), 0);
  } else if (cluster_size > 1) {
    std::sort(order.begin(), order.end());
    order.erase(std::unique(order.begin(), order.end()), order.end());
  }
  if (settings.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (settings.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Makes the next cluster resident, if there is one and the device has room.
bool Grid::start_next() {
  if (started_ == order_.size() || resident_.size() == max_resident_) return false;
  const std::int64_t index = order_[started_++];
  const Dim3& block = configuration.block;
  const int threads = (blocks_of(block) + kLanes - 1) / kLanes * kLanes;
  std::unique_ptr<Cluster> cluster;
  if (unused_.empty()) {
    cluster = std::make_unique<Cluster>();
    for (int rank = 0; rank < cluster_size; ++rank) {
      cluster->blocks.push_back(std::make_unique<Execution>(*this, *cluster, rank));
    }
  } else {
    cluster = std::move(unused_.back());
    unused_.pop_back();
  }
  cluster->reset(index, threads);
  for (int rank = 0; rank < cluster_size; ++rank) {
    Execution& started = *cluster->blocks[rank];
    started.start(position_of(index, rank));
    running_.push_back(&started);
  }
  resident_.push_back(std::move(cluster));
  ++activity;
  idle_polls = idle_rounds_ = 0;
  return true;
}

void Grid::retire() {
  const auto finished = [](const Execution* block) { return !block->alive(); };
  for (Execution* block : running_) {
    if (finished(block)) block->finish();
  }
  const std::size_t before = running_.size();
  running_.erase(std::remove_if(running_.begin(), running_.end(), finished), running_.end());
  if (running_.size() == before) return;
  idle_polls = idle_rounds_ = 0;
  const auto done = std::stable_partition(resident_.begin(), resident_.end(), [](const auto& cluster) {
    return std::any_of(cluster->blocks.begin(), cluster->blocks.end(), [](const auto& b) { return b->alive(); });
  });
  std::move(done, resident_.end(), std::back_inserter(unused_));
  resident_.erase(done, resident_.end());
}

// Returns whether the warp did more than to poll a word that stays the same.
bool Grid::take_turn(Execution& block, std::size_t index_of_warp) {
  block.take_turn(block.warps[index_of_warp]);
  return !block.warps[index_of_warp].poll.idle;
}

// Gives every warp that can run one turn, or, under the random schedule, one of them. Returns whether anything but
// polling happened.
bool Grid::take_turns() {
  if (settings.schedule == Schedule::kRandom) return take_random_turn();
  bool progress = false;
  for (Execution* block : running_) {
    for (std::size_t step = 0; step < block->warps.size() && !fatal; ++step) {
      const std::size_t index = settings.schedule == Schedule::kReverse ? block->warps.size() - 1 - step : step;
      if (Execution::anything_runs(block->warps[index])) progress |= take_turn(*block, index);
    }
  }
  return progress;
}

bool Grid::take_random_turn() {
  const std::size_t blocks = running_.size(), first_block = blocks == 1 ? 0 : random() % blocks;
  for (std::size_t b = 0; b < blocks; ++b) {
    Execution& block = *running_[(first_block + b) % blocks];
    const std::size_t warps = block.warps.size(), first_warp = random() % warps;
    for (std::size_t w = 0; w < warps; ++w) {
      const std::size_t index = (first_warp + w) % warps;
      if (!Execution::anything_runs(block.warps[index])) continue;
      idle_turns_ = take_turn(block, index) ? 0 : idle_turns_ + 1;
      auto& in_flight = block.in_flight;
      if (!in_flight.empty() && random() % 8 == 0) block.move(in_flight[random() % in_flight.size()]);
      if (idle_turns_ < kTurnsOfARound * blocks * warps) return true;
      idle_turns_ = 0;
      return false;
    }
  }
  return false;
}

bool Grid::move_a_copy() {
  const std::size_t first = settings.schedule == Schedule::kRandom ? random() % running_.size() : 0;
  for (std::size_t b = 0; b < running_.size(); ++b) {
    Execution& block = *running_[(first + b) % running_.size()];
    auto& in_flight = block.in_flight;
    if (in_flight.empty()) continue;
    block.move(in_flight[settings.schedule == Schedule::kFifo ? 0 : random() % in_flight.size()]);
    return true;
  }
  return false;
}

// Wakes what may wake at any time. Returns false if all threads would only wait again.
bool Grid::wake() {
  constexpr int kPatience = 3;
  for (Execution* block : running_) {
    if (block->force_waiting()) return true;
  }
  // A wait for a phase may return false after a while.
  idle_time_outs_ = activity == activity_at_time_out_ ? idle_time_outs_ + 1 : 0;
  activity_at_time_out_ = activity;
  if (idle_time_outs_ >= kPatience) return false;
  bool any = false;
  for (Execution* block : running_) any |= block->time_out();
  return any;
}

bool Grid::polls() const {
  return std::any_of(running_.begin(), running_.end(), [](const Execution* block) { return block->polls(); });
}

Dim3 Grid::position_of(std::int64_t cluster, int rank) const {
  const Dim3 clusters = clusters_of(configuration), &size = configuration.cluster;
  const unsigned r = rank;
  return {static_cast<unsigned>(cluster % clusters.x * size.x + r % size.x),
          static_cast<unsigned>(cluster / clusters.x % clusters.y * size.y + r / size.x % size.y),
          static_cast<unsigned>(cluster / clusters.x / clusters.y * size.z + r / size.x / size.y)};
}

void Grid::report_deadlock(const char* what) {
  std::string text = what;
  Site first{0, nullptr};
  for (const Execution* block : running_) {
    const bool reporting = first.statement == nullptr;
    if (reporting) reporter.enter_block(block->position, block->first_thread);
    const std::string waits = block->describe_waits(&first);
    if (running_.size() > 1) text += "; block " + describe(block->position);
    text += waits;
  }
  if (started_ < order_.size() && polls()) {
    text += "; block " + describe(position_of(order_[started_], 0)) + " is the next of " +
            std::to_string((order_.size() - started_) * cluster_size) + " that have not started: the device holds " +
            std::to_string(resident_.size() * cluster_size);
  }
  reporter.add("deadlock", first, text);
  fatal = true;
}

std::vector<Report> Grid::run() {
  const std::size_t together = code.may_poll ? (kInterleaved + cluster_size - 1) / cluster_size : 1;
  while (!fatal) {
    while (resident_.size() < together && start_next()) {
    }
    if (running_.empty()) break;
    const bool progress = take_turns();
    retire();
    if (fatal || running_.empty()) continue;
    if (progress) idle_rounds_ = 0;
    if (progress && idle_polls <= kPollsBeforeNextBlock) continue;
    const bool waits = polls();
    const bool unblocked = move_a_copy() || (!progress && wake()) || (waits && start_next());
    if (unblocked || progress) {
      if (idle_polls > kIdlePolls * running_.size()) report_deadlock("no block changes what others wait for");
    } else if (!waits || ++idle_rounds_ == kIdleRounds) {
      report_deadlock("nothing can run");
    }
  }
  return std::move(reporter.reports());
}

}  // namespace emulator
