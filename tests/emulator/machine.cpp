// The scheduler: blocks, warps, lanes; and the checks that every memory access passes.
#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <numeric>
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

std::uint8_t* shared_window_memory() {
  static std::uint8_t* const memory = [] {
    void* pages = mmap(nullptr, 2 * kMaxShared, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const auto address = reinterpret_cast<std::uint64_t>(pages);
    return reinterpret_cast<std::uint8_t*>((address + kMaxShared - 1) / kMaxShared * kMaxShared);
  }();
  return memory;
}

std::string exited_text(int id) {
  return "barrier " + std::to_string(id) + " of the whole block: this warp exits without it";
}

std::string size_of(const Buffer& buffer) { return buffer.name + " (" + std::to_string(buffer.bytes) + " bytes)"; }

}  // namespace

Execution::Execution(const Code& code, Dim3 grid, Dim3 block, std::size_t dynamic_shared, std::size_t parameter_bytes,
                     const Settings& settings)
    : code(code),
      grid(grid),
      block(block),
      settings(settings),
      check(settings.check),
      num_threads(static_cast<int>(block.x * block.y * block.z)),
      num_warps((num_threads + kLanes - 1) / kLanes),
      shared_bytes(code.dynamic_shared - kSharedStart + dynamic_shared),
      parameter_bytes(parameter_bytes),
      reporter(*code.entry.module, settings.max_reports),
      shared_shadow(clocks, reporter),
      global_shadow(clocks, reporter),
      shared(shared_window_memory()),
      shared_window(reinterpret_cast<std::uint64_t>(shared)),
      random(settings.seed) {
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
  const char* verb = kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic operation";
  const auto describe = [&] { return std::string(verb) + " of " + std::to_string(bytes) + " bytes"; };
  if (space == Space::kGeneric && is_shared(address)) {
    space = Space::kShared;
    address -= shared_window;
  }
  if (space == Space::kShared) {
    const auto offset = static_cast<std::uint32_t>(address);
    ++counters.shared_accesses;
    occupy_banks(site, offset, bytes);
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
      if (kind == Kind::kRead) shared_shadow.read(site, offset, bytes);
      if (kind == Kind::kWrite) shared_shadow.write(site, offset, bytes, value);
      if (kind == Kind::kAtomic) shared_shadow.atomic(site, offset, bytes);
    }
    return shared + offset;
  }
  if (space == Space::kLocal) {
    address += reinterpret_cast<std::uint64_t>(local.data()) + std::uint64_t{code.body.local_bytes} * site.thread;
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
    if (owner == static_cast<std::size_t>(site.thread) && last == owner) return pointer;
    reporter.add(
        "out-of-bounds", site,
        describe() + " outside the thread's " + std::to_string(code.body.local_bytes) + " bytes of local memory");
    return nullptr;
  }
  const auto in_parameters = static_cast<std::size_t>(pointer - parameter_block());
  if ((space == Space::kParam || space == Space::kGeneric || space == Space::kConst) && kind == Kind::kRead &&
      in_parameters + bytes <= parameter_bytes) {
    return pointer;
  }
  ++counters.global_accesses;
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
  if (check) {
    if (kind == Kind::kRead) {
      global_shadow.read(site, pointer, bytes, *buffer);
    } else {
      global_shadow.write(site, pointer, bytes, *buffer, kind == Kind::kAtomic);
    }
  }
  return pointer;
}

bool Execution::access_range(const Site& site, std::uint8_t* address, int bytes, Kind kind, bool in_flight) {
  ++counters.global_accesses;
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
  if (!check) return true;
  if (kind == Kind::kRead) {
    global_shadow.read(site, address, bytes, *buffer);
  } else {
    global_shadow.write(site, address, bytes, *buffer, kind == Kind::kAtomic, in_flight);
  }
  return true;
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
  if (!check || is_shared(reinterpret_cast<std::uint64_t>(address))) return;
  global_shadow.synchronise(thread, address, acquire, release);
}

void Execution::fence_for_device(int thread) {
  if (!check) return;
  clocks.fence_for_device(thread);
  global_shadow.fence(thread);
}

void Execution::complete_barrier(int id) {
  Barrier& barrier = barriers[id];
  for (const Barrier::Waiter& waiter : barrier.waiting) {
    Warp& other = warps[waiter.warp];
    other.parked = false;
    for (std::uint32_t rest = waiter.mask; check && rest != 0; rest &= rest - 1) {
      const int thread = other.index * kLanes + __builtin_ctz(rest);
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
      if (found == mbarriers.end() || found->second.phase != other.phase_wait[lane].parity)
        other.sleeping &= ~(1u << lane);
    }
  }
}

// ---- a warp

void Execution::run_warp(Warp& running) {
  warp = &running;
  int budget = settings.schedule == Schedule::kRandom ? 1 + static_cast<int>(random() % kRandomQuantum) : kQuantum;
  const Instruction* const instructions = code.instructions.data();
  while (!fatal) {
    const std::uint32_t awake = running.alive & ~running.sleeping;
    const std::uint32_t runnable = awake & ~running.waiting;
    if (runnable == 0 || running.parked || budget <= 0) return;
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
      ++counters.instructions;
      --budget;
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
      if (pc >= next_pc || running.waiting != 0 || budget <= 0 || fatal) together = false;
      if (!together) set_pc(group, pc);
    }
  }
}

// Wakes lanes whose partners can no longer arrive; they report it.
bool Execution::force_waiting() {
  for (Warp& each : warps) {
    if (each.parked || each.waiting == 0 || (each.alive & ~each.sleeping & ~each.waiting) != 0) continue;
    each.waiting = 0;
    each.forced = true;
    return true;
  }
  return false;
}

// ---- a block

// The value of a special register for a thread.
std::uint64_t Execution::special_value(const std::string& name, const Dim3& position, int thread) const {
  const auto begins = [&name](const char* prefix) { return name.rfind(prefix, 0) == 0; };
  const auto component = [&name](const Dim3& d) { return name.back() == 'x' ? d.x : name.back() == 'y' ? d.y : d.z; };
  const unsigned t = thread;
  const std::uint32_t bit = 1u << thread % kLanes;
  if (begins("%tid.")) return component({t % block.x, t / block.x % block.y, t / block.x / block.y});
  if (begins("%ntid.")) return component(block);
  if (begins("%ctaid.") || begins("%clusterid.")) return component(position);
  if (begins("%nctaid.") || begins("%nclusterid.")) return component(grid);
  if (begins("%cluster_nctaid.") || name == "%cluster_nctarank" || name == "%nsmid") return 1;
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
  return 0;  // clocks, the rank in a cluster of one block, the number of the multiprocessor
}

void Execution::start_warp(Warp& each, int index, const Dim3& position) {
  const int lanes = std::min(kLanes, num_threads - index * kLanes);
  std::vector<std::uint8_t> storage = std::move(each.storage);
  each = Warp();
  each.index = index;
  each.launched = each.alive = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
  each.storage = std::move(storage);
  each.storage.resize(code.register_file.size() + kCacheLine);
  const auto address = reinterpret_cast<std::size_t>(each.storage.data());
  each.registers = each.storage.data() + (kCacheLine - address % kCacheLine) % kCacheLine;
  std::copy(code.register_file.begin(), code.register_file.end(), each.registers);
  for (const auto& [name, place] : code.body.special) {
    const int bytes = special_bytes(name);
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint64_t value = special_value(name, position, index * kLanes + lane);
      std::memcpy(each.registers + place + lane * bytes, &value, bytes);
    }
  }
}

void Execution::start_block(std::int64_t index) {
  const Dim3 position{static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                      static_cast<unsigned>(index / grid.x / grid.y)};
  reporter.enter_block(position);
  clocks.reset(num_threads);
  std::memset(shared, 0xff, kSharedStart + shared_bytes);
  shared_shadow.reset(shared, shared_bytes, &code.body.statements);
  global_shadow.enter_block(static_cast<std::uint32_t>(index));
  local.assign(std::size_t{code.body.local_bytes} * num_threads, 0xff);
  barriers.fill(Barrier());
  mbarriers.clear();
  num_mbarriers = 0;
  copies.assign(num_threads, CopyGroups());
  bulk.assign(num_threads, BulkGroups());
  in_flight.clear();
  warpgroups.assign((num_warps + 3) / 4, WarpgroupTrace());
  warps.resize(num_warps);
  for (int w = 0; w < num_warps; ++w) start_warp(warps[w], w, position);
}

void Execution::run_block() {
  const std::uint64_t limit = counters.instructions + kMaxInstructionsPerBlock;
  const auto alive = [this] {
    return std::any_of(warps.begin(), warps.end(), [](const Warp& each) { return each.alive != 0; });
  };
  while (alive() && !fatal) {
    bool progress = false;
    const int start = settings.schedule == Schedule::kRandom ? static_cast<int>(random() % num_warps) : 0;
    for (int step = 0; step < num_warps && !fatal; ++step) {
      const int index = settings.schedule == Schedule::kReverse ? num_warps - 1 - step : (start + step) % num_warps;
      Warp& each = warps[index];
      if (!anything_runs(each)) continue;
      progress = true;
      run_warp(each);
      if (each.alive == 0) {
        // A barrier of the whole block waits only for warps that have not exited.
        const auto live = std::count_if(warps.begin(), warps.end(), [](const Warp& w) { return w.alive != 0; });
        for (int id = 0; id < static_cast<int>(barriers.size()); ++id) {
          Barrier& barrier = barriers[id];
          if (!barrier.whole_block || barrier.arrived == 0) continue;
          reporter.add("barrier", {each.index * kLanes, barrier.statement}, exited_text(id));
          barrier.expected = kLanes * static_cast<int>(live);
          if (barrier.arrived >= barrier.expected) complete_barrier(id);
        }
      }
      if (settings.schedule == Schedule::kRandom) {
        if (!in_flight.empty() && random() % 8 == 0) move(in_flight[random() % in_flight.size()]);
        break;
      }
    }
    if (counters.instructions > limit) {
      reporter.add("deadlock", {0, nullptr},
                   "the block runs on and on: " + std::to_string(kMaxInstructionsPerBlock) + " instructions");
      fatal = true;
    }
    if (progress) continue;
    if (!in_flight.empty()) {
      move(in_flight[settings.schedule == Schedule::kFifo ? 0 : random() % in_flight.size()]);
    } else if (!force_waiting() && !time_out()) {
      if (alive()) report_deadlock();
      return;
    }
  }
}

void Execution::move(std::shared_ptr<BulkCopy> copy) {
  if (copy->moved) return;
  copy->moved = true;
  in_flight.erase(std::find(in_flight.begin(), in_flight.end(), copy));
  ++activity;
  copy->move(*this);
}

// A wait for a phase may return false after a while. A block in which all threads only wait again is stuck.
bool Execution::time_out() {
  constexpr int kPatience = 3;
  idle_time_outs_ = activity == activity_at_time_out_ ? idle_time_outs_ + 1 : 0;
  activity_at_time_out_ = activity;
  if (idle_time_outs_ >= kPatience) return false;
  bool any = false;
  for (Warp& each : warps) {
    if (each.sleeping == 0) continue;
    each.sleeping = 0;
    each.timed_out = true;
    any = true;
  }
  return any;
}

void Execution::report_deadlock() {
  std::string text = "nothing can run";
  Site first{0, nullptr};
  for (const Warp& each : warps) {
    if (each.alive == 0) continue;
    const int lane = __builtin_ctz(each.alive);
    // The program counter of a parked warp is after its barrier.
    const std::size_t pc = each.pc[lane] - (each.parked ? 1 : 0);
    const Statement& statement = code.body.statements[pc];
    if (first.statement == nullptr) first = {each.index * kLanes + lane, &statement};
    text += "; warp " + std::to_string(each.index) + " waits at " + reporter.place_of(statement);
    if (each.sleeping != 0) {
      const PhaseWait& wait = each.phase_wait[__builtin_ctz(each.sleeping)];
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
  reporter.add("deadlock", first, text);
  fatal = true;
}

void Execution::finish_block() {
  if (fatal || !check) return;
  counters.foreign_bytes = std::max(counters.foreign_bytes, global_shadow.foreign_bytes());
  const Statement* last = &code.body.statements.back();
  for (int thread = 0; thread < num_threads; ++thread) {
    const CopyGroups& of_thread = copies[thread];
    const bool pending = !of_thread.open.empty() || std::any_of(of_thread.groups.begin(), of_thread.groups.end(),
                                                                [](const auto& g) { return !g.empty(); });
    if (pending) reporter.add("leak", {thread, last}, "the thread exits with cp.async in flight");
  }
  finish_asynchronous(last);
  while (!in_flight.empty()) move(in_flight[0]);  // stores that no thread waited for
}

std::vector<Report> Execution::run() {
  const std::int64_t num_blocks = std::int64_t{grid.x} * grid.y * grid.z;
  std::vector<std::int64_t> order = settings.blocks;
  if (order.empty()) {
    order.resize(num_blocks);
    std::iota(order.begin(), order.end(), 0);
  }
  if (settings.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (settings.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), random);
  for (const std::int64_t index : order) {
    if (index < 0 || index >= num_blocks) {
      throw std::runtime_error("emulator: block " + std::to_string(index) + " of a grid of " +
                               std::to_string(num_blocks));
    }
    start_block(index);
    run_block();
    finish_block();
    if (fatal) break;
  }
  return std::move(reporter.reports());
}

// ---- the interface

const std::string& name_of(const Kernel& kernel) { return kernel.entry.name; }
const std::vector<Parameter>& parameters_of(const Kernel& kernel) { return kernel.parameters; }
std::size_t static_shared_of(const Kernel& kernel) { return kernel.code().body.shared_bytes; }
std::size_t max_threads_of(const Kernel& kernel) { return kernel.entry.max_threads; }

std::vector<std::shared_ptr<const Kernel>> parse_ptx(const std::string& text) {
  std::vector<std::shared_ptr<const Kernel>> kernels;
  for (Entry& entry : parse_entries(text)) kernels.push_back(std::make_shared<Kernel>(std::move(entry)));
  return kernels;
}

std::vector<Report> run(const Kernel& kernel, Dim3 grid, Dim3 block, std::size_t dynamic_shared,
                        const std::vector<std::uint8_t>& parameters, const Settings& settings) {
  const Entry& entry = kernel.entry;
  if (parameters.size() != entry.parameter_bytes) {
    throw std::runtime_error("emulator: " + entry.name + " takes " + std::to_string(entry.parameter_bytes) +
                             " bytes of parameters, got " + std::to_string(parameters.size()));
  }
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0) {
    throw std::runtime_error("emulator: " + entry.name + " cannot run with " + std::to_string(threads) +
                             " threads in a block and a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z));
  }
  std::memset(parameter_block(), 0xff, kParameterBytes);
  std::copy(parameters.begin(), parameters.end(), parameter_block());
  Execution execution(kernel.code(), grid, block, dynamic_shared, parameters.size(), settings);
  std::vector<Report> reports = execution.run();
  g_last_counters = execution.counters;
  return reports;
}

Counters last_counters() { return g_last_counters; }

}  // namespace emulator
