// A block: its warps and lanes, and the checks that every memory access passes.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <stdexcept>

#include "decode.h"

namespace emulator {

// A kernel as callers hold it: its entry and, from the first run on, its code.
class Kernel {
 public:
  explicit Kernel(Entry head) : entry(std::move(head)) {
    for (const Entry::Parameter& parameter : entry.parameters)
      parameters.push_back({parameter.offset, parameter.bytes});
  }
  const Code& code() const {
    if (code_ == nullptr) code_ = decode(entry);
    return *code_;
  }
  const Entry entry;
  std::vector<Parameter> parameters;

 private:
  mutable std::unique_ptr<Code> code_;
};

namespace {

// A warp that never waits is interrupted after so many instructions: it may wait for others in a loop of its own.
constexpr int kQuantum = 100000;
constexpr int kRandomQuantum = 200;
// A block that runs longer than this is taken to be in an endless loop.
constexpr std::uint64_t kMaxInstructionsPerBlock = 100000000;

// The clocks for which one instruction occupies shared memory. In a clock each of 32 banks reads or writes one word of
// four bytes, for all lanes that use it. Lanes are served together up to 128 bytes: 32 with 4 bytes or fewer, 16 with
// 8, 8 with 16, or the 8 rows of a matrix.
int clocks_of(const std::vector<BankUse>& uses) {
  constexpr int kBanks = 32, kWordBytes = 4;
  std::uint32_t words[kBanks][kLanes];
  int counts[kBanks], clocks = 0;
  for (auto use = uses.begin(); use != uses.end();) {
    const int together = std::min(kLanes, kBanks * kWordBytes / use->bytes), group = use->lane / together;
    std::fill(std::begin(counts), std::end(counts), 0);
    for (; use != uses.end() && use->lane / together == group; ++use) {
      for (std::uint32_t word = use->offset / kWordBytes; word * kWordBytes < use->offset + use->bytes; ++word) {
        std::uint32_t* of_bank = words[word % kBanks];
        int& count = counts[word % kBanks];
        if (std::find(of_bank, of_bank + count, word) == of_bank + count) of_bank[count++] = word;
      }
    }
    clocks += *std::max_element(std::begin(counts), std::end(counts));
  }
  return clocks;
}

constexpr std::size_t kCacheLine = 64;

Counters g_last_counters = {};

// Addresses that are reserved and no memory: each block has its shared memory elsewhere.
std::uint64_t reserve_shared_window() {
  static const std::uint64_t window = [] {
    void* pages =
        mmap(nullptr, (kMaxCluster + 2) * kMaxShared, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    const auto address = reinterpret_cast<std::uint64_t>(pages);
    return (address + kMaxShared - 1) / kMaxShared * kMaxShared;
  }();
  return window;
}

std::uint8_t* aligned_to_cache_line(std::vector<std::uint8_t>& storage, std::size_t bytes) {
  storage.resize(bytes + kCacheLine);
  const auto address = reinterpret_cast<std::size_t>(storage.data());
  return storage.data() + (kCacheLine - address % kCacheLine) % kCacheLine;
}

std::string exited_text(int id) {
  return "barrier " + std::to_string(id) + " of the whole block: this warp exits without it";
}

std::string size_of(const Buffer& buffer) { return buffer.name + " (" + std::to_string(buffer.bytes) + " bytes)"; }

}  // namespace

Execution::Execution(Grid& grid, Cluster& cluster, int rank)
    : grid(grid),
      cluster(cluster),
      rank(rank),
      code(grid.code),
      block(grid.configuration.block),
      settings(grid.settings),
      check(grid.settings.check),
      starts_early(check && grid.configuration.programmatic),
      num_threads(static_cast<int>(block.x * block.y * block.z)),
      num_warps((num_threads + kLanes - 1) / kLanes),
      first_thread(rank * num_warps * kLanes),
      shared_bytes(code.dynamic_shared - kSharedStart + grid.configuration.dynamic_shared),
      counters(grid.counters),
      reporter(grid.reporter),
      random(grid.random),
      clocks(cluster.clocks),
      fatal(grid.fatal),
      activity(grid.activity),
      shared_shadow(clocks, reporter),
      shared_window(reserve_shared_window()) {
  if (kSharedStart + shared_bytes > kMaxShared) {
    throw std::runtime_error("emulator: " + code.entry.name + " asks for " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
}

// ---- memory

const Buffer* Execution::find_buffer(const std::uint8_t* address) {
  if (last_buffer_ != nullptr && static_cast<std::size_t>(address - last_buffer_->begin) < last_buffer_->bytes) {
    return last_buffer_;
  }
  const Buffer* buffer = global_memory().find(address);
  if (buffer == nullptr) {
    for (const ModuleVariable& variable : code.entry.module->variables) {
      if (static_cast<std::size_t>(address - variable.buffer.begin) < variable.buffer.bytes) buffer = &variable.buffer;
    }
  }
  if (buffer != nullptr) last_buffer_ = buffer;
  return buffer;
}

std::string Execution::outside(const std::uint8_t* address, int bytes) const {
  const Buffer* below = global_memory().closest(address);
  if (below == nullptr) return " is below every buffer";
  const auto past = static_cast<std::int64_t>(address + bytes - (below->begin + below->bytes));
  return " ends " + std::to_string(past) + " bytes past the end of " + size_of(*below);
}

std::uint8_t* Execution::access(const Site& site, Space space, std::uint64_t address, int bytes, Kind kind,
                                const void* value) {
  const bool strong = kind == Kind::kStrongRead;
  if (strong) kind = Kind::kRead;
  const char* verb = kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic operation";
  const auto describe = [&] { return std::string(verb) + " of " + std::to_string(bytes) + " bytes"; };
  if (space == Space::kGeneric && is_shared(address)) {
    space = Space::kCluster;
    address -= shared_window;
  }
  if (space == Space::kShared || space == Space::kCluster) {
    std::uint32_t offset = 0;
    Execution* const owner = block_of(site, space, address, &offset);
    if (owner == nullptr) return nullptr;
    ++counters.shared_accesses;
    if (owner == this) occupy_banks(site, offset, bytes);
    if (!shared_shadow.contains(offset, bytes)) {
      reporter.add("out-of-bounds", site,
                   describe() + " at byte " + std::to_string(std::int64_t{offset} - kSharedStart) + " of the block's " +
                       std::to_string(shared_bytes) + " bytes of shared memory");
      return nullptr;
    }
    if (offset % bytes != 0) {
      reporter.add("misaligned", site,
                   describe() + " at byte " + std::to_string(offset - kSharedStart) + " of shared memory");
      return nullptr;
    }
    if (check) {
      SharedShadow& shadow = owner->shared_shadow;
      if (kind == Kind::kRead) shadow.read(site, offset, bytes);
      if (kind == Kind::kWrite) shadow.write(site, offset, bytes, value);
      if (kind == Kind::kAtomic) shadow.atomic(site, offset, bytes);
      if (owner != this) owner->add_user(shared_shadow.access_of(site));
    }
    return owner->shared + offset;
  }
  if (space == Space::kLocal) {
    address +=
        reinterpret_cast<std::uint64_t>(local.data()) + std::uint64_t{code.body.local_bytes} * in_block(site.thread);
    space = Space::kGeneric;
  }
  auto* pointer = reinterpret_cast<std::uint8_t*>(address);
  if (address % bytes != 0) {
    reporter.add("misaligned", site,
                 describe() + " at an address that is " + std::to_string(address % bytes) + " bytes off");
    return nullptr;
  }
  const auto in_local = static_cast<std::size_t>(pointer - local.data());
  if (space == Space::kGeneric && in_local < local.size()) {
    const std::size_t owner = in_local / code.body.local_bytes, last = (in_local + bytes - 1) / code.body.local_bytes;
    if (owner == static_cast<std::size_t>(in_block(site.thread)) && last == owner) return pointer;
    reporter.add(
        "out-of-bounds", site,
        describe() + " outside the thread's " + std::to_string(code.body.local_bytes) + " bytes of local memory");
    return nullptr;
  }
  const auto in_parameters = static_cast<std::size_t>(pointer - parameter_block());
  if ((space == Space::kParam || space == Space::kGeneric || space == Space::kConst) && kind == Kind::kRead &&
      in_parameters + bytes <= grid.parameter_bytes) {
    return pointer;
  }
  ++counters.global_accesses;
  if (starts_early && space != Space::kConst) check_earlier_grids(site);
  const Buffer* buffer = find_buffer(pointer);
  if (buffer == nullptr || pointer + bytes > buffer->begin + buffer->bytes) {
    reporter.add("out-of-bounds", site, describe() + outside(pointer, bytes));
    return nullptr;
  }
  if (kind != Kind::kRead && !buffer->writable) {
    reporter.add("read-only", site,
                 describe() + " to " + size_of(*buffer) + " at byte " + std::to_string(pointer - buffer->begin) +
                     ", which must not be written");
    return nullptr;
  }
  if (kind == Kind::kWrite) grid.idle_polls = 0;
  if (check) {
    if (kind == Kind::kRead) {
      foreign_bytes_ += grid.global_shadow.read(cluster.knowledge, site, pointer, bytes, *buffer, strong);
    } else {
      grid.global_shadow.write(cluster.knowledge, site, pointer, bytes, *buffer, kind == Kind::kAtomic);
    }
  }
  return pointer;
}

bool Execution::access_range(const Site& site, std::uint8_t* address, int bytes, Kind kind, bool in_flight) {
  ++counters.global_accesses;
  if (starts_early) check_earlier_grids(site);
  const std::string what = "copy of " + std::to_string(bytes) + " bytes";
  const Buffer* buffer = find_buffer(address);
  if (buffer == nullptr || address + bytes > buffer->begin + buffer->bytes) {
    reporter.add("out-of-bounds", site, what + outside(address, bytes));
    return false;
  }
  if (kind != Kind::kRead && !buffer->writable) {
    reporter.add("read-only", site, what + " into " + size_of(*buffer) + ", which must not be written");
    return false;
  }
  if (kind != Kind::kRead) grid.idle_polls = 0;
  if (!check) return true;
  if (kind == Kind::kRead) {
    foreign_bytes_ += grid.global_shadow.read(cluster.knowledge, site, address, bytes, *buffer);
  } else {
    grid.global_shadow.write(cluster.knowledge, site, address, bytes, *buffer, kind == Kind::kAtomic, in_flight);
  }
  return true;
}

Execution* Execution::block_of(const Site& site, Space space, std::uint64_t address, std::uint32_t* offset) {
  *offset = static_cast<std::uint32_t>(address % kMaxShared);
  const std::uint64_t slot = address / kMaxShared;
  if (slot == 0) return this;
  const std::string block = "block " + std::to_string(slot - 1) + " of the cluster";
  if (space == Space::kShared) {
    reporter.add("out-of-bounds", site, "an address of " + block + " where .shared::cta is needed");
    return nullptr;
  }
  if (slot > cluster.blocks.size()) {
    reporter.add("out-of-bounds", site,
                 "shared memory of " + block + ", which has " + std::to_string(cluster.blocks.size()) + " blocks");
    return nullptr;
  }
  Execution& peer = *cluster.blocks[slot - 1];
  return &peer == this || check_peer(site, peer) ? &peer : nullptr;
}

// A kernel that may start early finds in global memory what earlier kernels wrote only after griddepcontrol.wait, by the
// thread itself or by one that it is ordered after; and it must not overwrite what they read.
void Execution::check_earlier_grids(const Site& site) {
  if (after_grid_wait_[in_block(site.thread)]) return;
  for (const Access& wait : grid_waits_) {
    if (!clocks.happened_before(wait, site.thread)) continue;
    after_grid_wait_[in_block(site.thread)] = true;
    return;
  }
  reporter.add("grid-dependency", site,
               "access to global memory before griddepcontrol.wait: earlier kernels of the stream may still run");
}

void Execution::wait_for_earlier_grids(int thread) {
  if (!starts_early) return;
  clocks.advance(thread);
  grid_waits_.push_back({clocks.now(thread), static_cast<std::uint32_t>(thread), 0});
}

// The shared memory of another block exists from its start to its exit.
bool Execution::check_peer(const Site& site, Execution& peer) {
  const auto name = [&] { return "shared memory of block " + std::to_string(peer.rank) + " of the cluster"; };
  if (!peer.alive()) {
    reporter.add("cluster", site, name() + ": the block has exited");
    return false;
  }
  const std::uint32_t* row = clocks.row(site.thread) + peer.first_thread;
  const bool has_waited = warp->cluster_waits[site.thread % kLanes] > 0;
  if (check && !has_waited &&
      std::all_of(row, row + peer.num_threads, [](std::uint32_t clock) { return clock == 0; })) {
    reporter.add("cluster", site, name() + ": nothing orders this access after the start of the block");
  }
  return true;
}

// The block may exit when it knows that all accesses of other blocks to its shared memory are done.
void Execution::check_users(const Statement* last) {
  if (incoming > 0) {
    reporter.add("leak", {first_thread, last},
                 "the block exits while " + std::to_string(incoming) + " copies of other blocks into it are in flight");
  }
  for (const auto& [thread, access] : users_) {
    bool known = false;
    for (int own = first_thread; own < first_thread + num_threads && !known; ++own) {
      known = clocks.happened_before(access, own);
    }
    if (known) continue;
    const std::string place = reporter.place_of(code.body.statements[access.statement]);
    reporter.add("cluster", {first_thread, last},
                 "the block exits, and nothing orders this after an access to its shared memory by " +
                     clocks.describe(access, first_thread, place));
  }
}

std::uint32_t Execution::shared_offset(const Instruction& instruction, const Operand& address, int lane) {
  const std::uint64_t value = address_of(address, lane);
  return static_cast<std::uint32_t>(instruction.space == Space::kGeneric ? value - shared_window : value);
}

// ---- waiting

bool Execution::gather(const Instruction& instruction, std::uint32_t needed, const char* kind) {
  const std::uint32_t missing = needed & warp->alive & ~mask;
  if (missing == 0) return true;
  if (warp->forced) {
    char lanes[64];
    std::snprintf(lanes, sizeof lanes, "lanes %08x are here, %08x are not and cannot come", mask, missing);
    report(kind, instruction, std::string("executed by part of a warp: ") + lanes);
    warp->forced = false;
    return true;
  }
  warp->waiting |= mask;
  return false;
}

bool Execution::gather_warp(const Instruction& instruction) {
  if (!gather(instruction, kAllLanes, "divergence")) return false;
  if ((warp->launched & ~mask & ~warp->alive) != 0) {
    report("divergence", instruction, "executed by part of a warp: some of its lanes have exited");
  }
  return true;
}

void Execution::synchronise(int thread, const std::uint8_t* address, Acquire acquire, Release release) {
  if (check) grid.global_shadow.synchronise(cluster.knowledge, thread, address, acquire, release);
}

void Execution::fence_for_device(int thread) {
  if (!check) return;
  clocks.fence_for_device(thread);
  grid.global_shadow.fence(cluster.knowledge, thread);
}

void Execution::poll(const Instruction& instruction, const std::uint8_t* address, std::uint64_t value) {
  Poll& poll = warp->poll;
  poll.unchanged = poll.instruction == &instruction && poll.address == address && poll.value == value;
  if (poll.unchanged) {
    ++grid.idle_polls;
    poll.idle = true;
    budget_ = 0;
  }
  poll.instruction = &instruction;
  poll.address = address;
  poll.value = value;
}

void Execution::complete_barrier(int id) {
  Barrier& barrier = barriers[id];
  for (const Barrier::Waiter& waiter : barrier.waiting) {
    Warp& other = warps[waiter.warp];
    other.parked = false;
    for (std::uint32_t rest = waiter.mask; check && rest != 0; rest &= rest - 1) {
      const int thread = other.number * kLanes + __builtin_ctz(rest);
      clocks.join(clocks.row(thread), barrier.row.data());
      clocks.advance(thread);
    }
    const int reduction = waiter.instruction->option[4];
    if (reduction == 0) continue;
    Warp* const running = warp;
    const std::uint32_t running_mask = mask;
    warp = &other;
    mask = waiter.mask;
    const Operand& result = waiter.instruction->operands[0];
    if (reduction == 1) {
      for_each_lane([&](int lane) { set_lane_bits(result, lane, barrier.true_predicates); });
    } else {
      const bool all = barrier.true_predicates == barrier.predicates, any = barrier.true_predicates > 0;
      set_predicate(result, (reduction == 2 ? all : any) ? kAllLanes : 0);
    }
    warp = running;
    mask = running_mask;
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
}

void Execution::wake_phase_waiters() {
  for (Warp& other : warps) {
    for (std::uint32_t rest = other.sleeping; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      const auto found = mbarriers.find(other.phase_wait[lane].mbarrier);
      if (other.phase_wait[lane].mbarrier == PhaseWait::kCluster) continue;
      if (found == mbarriers.end() || found->second.phase != other.phase_wait[lane].parity)
        other.sleeping &= ~(1u << lane);
    }
  }
}

// ---- a warp

void Execution::run_warp(Warp& running) {
  warp = &running;
  budget_ = settings.schedule == Schedule::kRandom ? 1 + static_cast<int>(random() % kRandomQuantum) : kQuantum;
  running.poll.idle = false;
  const Instruction* const instructions = code.instructions.data();
  std::uint64_t& num_instructions = counters.instructions;
  while (!fatal) {
    const std::uint32_t awake = running.alive & ~running.sleeping;
    const std::uint32_t runnable = awake & ~running.waiting;
    if (runnable == 0 || running.parked || budget_ <= 0) return;
    // The lanes with the lowest program counter, and those that wait for them there.
    std::uint32_t pc = ~0u, next_pc = ~0u, group = 0;
    for (std::uint32_t rest = runnable; rest != 0; rest &= rest - 1) pc = std::min(pc, running.pc[__builtin_ctz(rest)]);
    for (std::uint32_t rest = awake; rest != 0; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      if (running.pc[lane] == pc) {
        group |= 1u << lane;
      } else if (running.pc[lane] > pc) {
        next_pc = std::min(next_pc, running.pc[lane]);
      }
    }
    running.waiting &= ~group;
    const auto set_pc = [&running](std::uint32_t lanes, std::uint32_t value) {
      for (std::uint32_t rest = lanes; rest != 0; rest &= rest - 1) running.pc[__builtin_ctz(rest)] = value;
    };
    // Until the group meets other lanes, splits, or has to wait.
    for (bool together = true; together;) {
      const Instruction& instruction = instructions[pc];
      ++num_instructions;
      --budget_;
      mask = group;
      if (instruction.guarded) {
        const std::uint32_t word = *reinterpret_cast<const std::uint32_t*>(running.registers + instruction.guard);
        mask &= instruction.guard_negated ? ~word : word;
      }
      const std::uint32_t executing = mask;
      if (executing == 0) {
        ++pc;
      } else if (instruction.flow == Instruction::Flow::kBranch) {
        set_pc(group & ~executing, pc + 1);
        pc = instruction.target;
        if (executing != group) {
          set_pc(executing, pc);
          break;
        }
      } else if (instruction.flow == Instruction::Flow::kExit) {
        running.alive &= ~executing;
        ++activity;
        if (cluster.blocks.size() > 1) cluster.complete_phase_if_done();
        running.waiting = 0;  // lanes that waited for these ones try again
        set_pc(group, pc + 1);
        break;
      } else {
        if (code.uses_wgmma) track_registers(instruction);
        const Step step = instruction.handler(*this, instruction);
        if (!bank_uses_.empty()) {
          counters.shared_clocks += clocks_of(bank_uses_);
          bank_uses_.clear();
        }
        ++pc;
        if (step == Step::kStay) {
          set_pc(group & ~executing, pc);
          set_pc(executing, pc - 1);
          break;
        }
        if (step == Step::kLeave) together = false;
      }
      if (pc >= next_pc || running.waiting != 0 || budget_ <= 0 || fatal) together = false;
      if (!together) set_pc(group, pc);
    }
  }
}

bool Execution::force_waiting() {
  for (Warp& each : warps) {
    if (each.parked || each.waiting == 0 || (each.alive & ~each.sleeping & ~each.waiting) != 0) continue;
    each.waiting = 0;
    each.forced = true;
    return true;
  }
  return false;
}

bool Execution::time_out() {
  bool any = false;
  for (Warp& each : warps) {
    if (each.sleeping == 0) continue;
    each.sleeping = 0;
    each.timed_out = true;
    any = true;
  }
  return any;
}

void Execution::take_turn(Warp& running) {
  reporter.enter_block(position, first_thread);
  const std::uint64_t before = counters.instructions;
  run_warp(running);
  instructions_ += counters.instructions - before;
  if (instructions_ > kMaxInstructionsPerBlock) {
    reporter.add("deadlock", {first_thread, nullptr},
                 "the block runs on and on: " + std::to_string(kMaxInstructionsPerBlock) + " instructions");
    fatal = true;
  }
  if (running.alive != 0) return;
  // A barrier of the whole block waits only for warps that have not exited.
  const auto live = std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.alive != 0; });
  for (int id = 0; id < static_cast<int>(barriers.size()); ++id) {
    Barrier& barrier = barriers[id];
    if (!barrier.whole_block || barrier.arrived == 0) continue;
    reporter.add("barrier", {running.number * kLanes, barrier.statement}, exited_text(id));
    barrier.expected = kLanes * static_cast<int>(live);
    if (barrier.arrived >= barrier.expected) complete_barrier(id);
  }
}

// ---- its beginning and its end

// The value of a special register for a thread.
std::uint64_t Execution::special_value(const std::string& name, int thread) const {
  const auto begins = [&name](const char* prefix) { return name.rfind(prefix, 0) == 0; };
  const auto component = [&name](const Dim3& d) { return name.back() == 'x' ? d.x : name.back() == 'y' ? d.y : d.z; };
  const unsigned t = thread;
  const std::uint32_t bit = 1u << thread % kLanes;
  const Dim3 &blocks = grid.configuration.grid, &size = grid.configuration.cluster;
  if (begins("%tid.")) return component({t % block.x, t / block.x % block.y, t / block.x / block.y});
  if (begins("%ntid.")) return component(block);
  if (begins("%ctaid.")) return component(position);
  if (begins("%nctaid.")) return component(blocks);
  if (begins("%clusterid.")) return component(position) / component(size);
  if (begins("%nclusterid.")) return component(blocks) / component(size);
  if (begins("%cluster_ctaid.")) return component(position) % component(size);
  if (begins("%cluster_nctaid.")) return component(size);
  if (name == "%cluster_ctarank") return rank;
  if (name == "%cluster_nctarank") return grid.cluster_size;
  if (name == "%nsmid") return 1;
  if (name == "%laneid") return thread % kLanes;
  if (name == "%warpid") return thread / kLanes;
  if (name == "%nwarpid") return num_warps;
  if (name == "%lanemask_eq") return bit;
  if (name == "%lanemask_lt") return bit - 1;
  if (name == "%lanemask_le") return bit | (bit - 1);
  if (name == "%lanemask_gt") return ~(bit | (bit - 1));
  if (name == "%lanemask_ge") return ~(bit - 1);
  if (name == "%dynamic_smem_size") return kSharedStart + shared_bytes - code.dynamic_shared;
  if (name == "%total_smem_size") return shared_bytes;
  return 0;  // clocks, the number of the multiprocessor
}

void Execution::start_warp(Warp& each, int index) {
  const int lanes = std::min(kLanes, num_threads - index * kLanes);
  std::vector<std::uint8_t> storage = std::move(each.storage);
  each = Warp();
  each.index = index;
  each.number = first_thread / kLanes + index;
  each.launched = each.alive = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
  each.storage = std::move(storage);
  each.registers = aligned_to_cache_line(each.storage, code.register_file.size());
  std::copy(code.register_file.begin(), code.register_file.end(), each.registers);
  for (const auto& [name, place] : code.body.special) {
    const int bytes = special_bytes(name);
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint64_t value = special_value(name, index * kLanes + lane);
      std::memcpy(each.registers + place + lane * bytes, &value, bytes);
    }
  }
}

void Execution::start(const Dim3& position_in_grid) {
  position = position_in_grid;
  foreign_bytes_ = instructions_ = 0;
  shared = aligned_to_cache_line(shared_storage, kSharedStart + shared_bytes);
  std::memset(shared, 0xff, kSharedStart + shared_bytes);
  const std::string owner = grid.cluster_size == 1 ? "" : " of block " + std::to_string(rank) + " of the cluster";
  shared_shadow.reset(shared, shared_bytes, &code.body.statements, "shared memory" + owner);
  users_.clear();
  grid_waits_.clear();
  after_grid_wait_.assign(num_threads, false);
  incoming = 0;
  local.assign(std::size_t{code.body.local_bytes} * num_threads, 0xff);
  barriers.fill(Barrier());
  mbarriers.clear();
  num_mbarriers = 0;
  copies.assign(num_threads, CopyGroups());
  bulk.assign(num_threads, BulkGroups());
  in_flight.clear();
  warpgroups.assign((num_warps + 3) / 4, WarpgroupTrace());
  warps.resize(num_warps);
  for (int w = 0; w < num_warps; ++w) start_warp(warps[w], w);
}

bool Execution::polls() const {
  return std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.poll.idle && anything_runs(w); });
}

bool Execution::alive() const {
  return std::any_of(warps.begin(), warps.end(), [](const Warp& each) { return each.alive != 0; });
}

void Execution::move(std::shared_ptr<BulkCopy> copy) {
  if (copy->moved) return;
  reporter.enter_block(position, first_thread);
  copy->moved = true;
  in_flight.erase(std::find(in_flight.begin(), in_flight.end(), copy));
  ++activity;
  copy->move(*this);
}

std::string Execution::describe_waits(Site* first) const {
  std::string text;
  for (const Warp& each : warps) {
    if (each.alive == 0) continue;
    const int lane = __builtin_ctz(each.alive);
    // The program counter of a parked warp is after its barrier.
    const std::size_t pc = each.pc[lane] - (each.parked ? 1 : 0);
    const Statement& statement = each.poll.unchanged ? *each.poll.instruction->statement : code.body.statements[pc];
    if (first->statement == nullptr) *first = {each.number * kLanes + lane, &statement};
    text += "; warp " + std::to_string(each.index) + " waits at " + reporter.place_of(statement);
    if (each.poll.unchanged) {
      const Buffer* buffer = const_cast<Execution*>(this)->find_buffer(each.poll.address);
      text += " for a change of ";
      text += buffer == nullptr ? "a word" : buffer->name + " + " + std::to_string(each.poll.address - buffer->begin);
    }
    if (each.sleeping == 0) continue;
    const PhaseWait& wait = each.phase_wait[__builtin_ctz(each.sleeping)];
    if (wait.mbarrier == PhaseWait::kCluster) {
      text += " for the barrier of the cluster";
    } else {
      text += " for the end of phase " + std::to_string(wait.parity) + " of mbarrier " +
              std::to_string(wait.mbarrier - kSharedStart);
    }
  }
  for (int id = 0; id < static_cast<int>(barriers.size()); ++id) {
    const Barrier& barrier = barriers[id];
    if (barrier.arrived == 0) continue;
    text += "; barrier " + std::to_string(id) + ": " + std::to_string(barrier.arrived) + " of " +
            std::to_string(barrier.expected) + " threads";
  }
  for (const auto& [offset, mbarrier] : mbarriers) {
    text += "; mbarrier " + std::to_string(offset - kSharedStart) + ": phase " + std::to_string(mbarrier.phase) + ", " +
            std::to_string(mbarrier.pending) + " of " + std::to_string(mbarrier.count) + " arrivals and " +
            std::to_string(mbarrier.pending_bytes) + " bytes missing";
  }
  return text;
}

void Execution::check_end() {
  reporter.enter_block(position, first_thread);
  counters.foreign_bytes = std::max(counters.foreign_bytes, foreign_bytes_);
  const Statement* last = &code.body.statements.back();
  for (int thread = 0; thread < num_threads; ++thread) {
    const CopyGroups& of_thread = copies[thread];
    const bool pending = !of_thread.open.empty() || std::any_of(of_thread.groups.begin(), of_thread.groups.end(),
                                                                [](const auto& g) { return !g.empty(); });
    if (pending) reporter.add("leak", {first_thread + thread, last}, "the thread exits with cp.async in flight");
  }
  finish_asynchronous(last);
  check_users(last);
  if (starts_early && grid_waits_.empty()) {
    reporter.add("grid-dependency", {first_thread, last},
                 "the block exits without griddepcontrol.wait: the next kernel of the stream may start while those "
                 "before this one still run");
  }
}

void Execution::finish() {
  if (check && !fatal) check_end();
  while (!fatal && !in_flight.empty()) move(in_flight[0]);  // those that no thread of this block waits for
}

// ---- the interface

const std::string& name_of(const Kernel& kernel) { return kernel.entry.name; }
const std::vector<Parameter>& parameters_of(const Kernel& kernel) { return kernel.parameters; }
std::size_t static_shared_of(const Kernel& kernel) { return kernel.code().body.shared_bytes; }
std::size_t max_threads_of(const Kernel& kernel) { return kernel.entry.max_threads; }
Dim3 required_cluster_of(const Kernel& kernel) { return kernel.entry.required_cluster; }

std::vector<std::shared_ptr<const Kernel>> parse_ptx(const std::string& text) {
  std::vector<std::shared_ptr<const Kernel>> kernels;
  for (Entry& entry : parse_entries(text)) kernels.push_back(std::make_shared<Kernel>(std::move(entry)));
  return kernels;
}

std::vector<Report> run(const Kernel& kernel, const Configuration& configuration,
                        const std::vector<std::uint8_t>& parameters, const Settings& settings) {
  const Entry& entry = kernel.entry;
  if (parameters.size() != entry.parameter_bytes) {
    throw std::runtime_error("emulator: " + entry.name + " takes " + std::to_string(entry.parameter_bytes) +
                             " bytes of parameters, got " + std::to_string(parameters.size()));
  }
  const Dim3 &grid = configuration.grid, &block = configuration.block;
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error("emulator: " + entry.name + " cannot run with " + std::to_string(threads) +
                             " threads in a block and a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
  const Dim3 &cluster = configuration.cluster, &required = entry.required_cluster;
  if (required.x != 0 && (cluster.x != required.x || cluster.y != required.y || cluster.z != required.z)) {
    throw std::runtime_error("emulator: " + entry.name + " runs in clusters of " + describe(required) +
                             " blocks, not of " + describe(cluster));
  }
  const auto fits = [](unsigned blocks, unsigned of_cluster) { return of_cluster > 0 && blocks % of_cluster == 0; };
  if (!fits(grid.x, cluster.x) || !fits(grid.y, cluster.y) || !fits(grid.z, cluster.z) ||
      std::uint64_t{cluster.x} * cluster.y * cluster.z > kMaxCluster) {
    throw std::runtime_error("emulator: " + entry.name + " cannot run with clusters of " + describe(cluster) +
                             " blocks in a grid of " + describe(grid));
  }
  std::memset(parameter_block(), 0xff, kParameterBytes);
  std::copy(parameters.begin(), parameters.end(), parameter_block());
  Grid launch(kernel.code(), configuration, parameters.size(), settings);
  std::vector<Report> reports = launch.run();
  g_last_counters = launch.counters;
  return reports;
}

Counters last_counters() { return g_last_counters; }

}  // namespace emulator
