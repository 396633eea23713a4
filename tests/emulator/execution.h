// A kernel while it runs: decoded instructions, the warps of one block, and the memory that they share.
//
// Blocks run one after the other. Within a block one warp runs at a time, until it has to wait. A warp always runs the
// lanes with the lowest program counter, so that lanes which took different branches meet again. An instruction that
// needs lanes which have not arrived waits for them; if they can no longer arrive, it reports a divergence.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "parser.h"
#include "report.h"
#include "shadow.h"
#include "sync.h"
#include "wgmma.h"

namespace emulator {

constexpr int kLanes = 32;
constexpr std::uint32_t kAllLanes = 0xffffffff;
constexpr std::size_t kMaxShared = 256 * 1024;

class Execution;
struct Instruction;

// The next step of a warp after an instruction.
enum class Step {
  kNext,
  kStay,   // wait, as the handler has recorded, and execute the instruction again
  kLeave,  // wait, and continue after the instruction
};

using Handler = Step (*)(Execution&, const Instruction&);

enum class Space : std::uint8_t { kGeneric, kGlobal, kShared, kLocal, kConst, kParam };
enum class Kind : std::uint8_t { kRead, kWrite, kAtomic };

struct Instruction {
  enum class Flow : std::uint8_t { kNormal, kBranch, kExit };
  Handler handler = nullptr;
  Flow flow = Flow::kNormal;
  bool guarded = false;
  bool guard_negated = false;
  std::uint32_t guard = 0;
  std::uint32_t target = 0;       // of a branch
  std::vector<Operand> operands;  // constants have a place here
  const Statement* statement = nullptr;
  // Details of an instruction besides its operands; each handler says which it uses.
  Space space = Space::kGeneric;
  Type type = Type::kNone;
  std::array<int, 6> option = {};
  // Registers by place, for the rules about registers of a wgmma in flight.
  std::vector<std::uint32_t> reads, writes;
};

// A body that is ready to run. The register file of a warp is [registers | special registers | constants].
struct Code {
  Entry entry;
  Body body;
  std::vector<Instruction> instructions;
  std::vector<std::uint8_t> register_file;  // at the start of a warp
  std::uint32_t dynamic_shared = 0;         // where it starts
  bool uses_wgmma = false;
};

std::unique_ptr<Code> decode(const Entry& entry);

struct Warp {
  int index = 0;
  std::vector<std::uint8_t> storage;
  std::uint8_t* registers = nullptr;  // within storage, aligned for vector loads
  std::uint32_t pc[kLanes] = {};
  std::uint32_t launched = 0;  // fewer than 32 in the last warp of an odd block
  std::uint32_t alive = 0;
  std::uint32_t waiting = 0;   // for other lanes of the warp, at their program counter
  std::uint32_t sleeping = 0;  // for the phase of an mbarrier, at their program counter
  bool parked = false;         // in a barrier of the block
  bool forced = false;         // the lanes that it waits for cannot arrive
  bool timed_out = false;      // the next wait for a phase returns false
  PhaseWait phase_wait[kLanes];
  WgmmaState wgmma;
};

// An access of a lane to shared memory.
struct BankUse {
  int lane;
  std::uint32_t offset;
  int bytes;
};

class Execution {
 public:
  Execution(const Code& code, Dim3 grid, Dim3 block, std::size_t dynamic_shared, std::size_t parameter_bytes,
            const Settings& settings);
  std::vector<Report> run();

  // ---- the running instruction
  Warp* warp = nullptr;
  std::uint32_t mask = 0;  // lanes that execute it

  template <typename T>
  T* row(const Operand& operand) {
    return reinterpret_cast<T*>(warp->registers + operand.place);
  }
  std::uint32_t predicate(const Operand& operand) {
    const std::uint32_t word = *row<std::uint32_t>(operand);
    return operand.negated ? ~word : word;
  }
  void set_predicate(const Operand& operand, std::uint32_t value) {
    if (operand.kind == Operand::Kind::kNone) return;
    std::uint32_t& word = *row<std::uint32_t>(operand);
    word = (word & ~mask) | (value & mask);
  }
  // The results of the lanes that execute.
  template <typename T>
  void store(const Operand& operand, const T* values) {
    if (operand.kind == Operand::Kind::kNone) return;
    T* target = row<T>(operand);
    if (mask == kAllLanes) {
      std::memcpy(target, values, kLanes * sizeof(T));
      return;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) target[lane] = values[lane];
    }
  }
  // One lane of a register of any width, as its low bytes, the rest zero.
  std::uint64_t lane_bits(const Operand& operand, int lane) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, warp->registers + operand.place + lane * operand.width, operand.width);
    return bits;
  }
  void set_lane_bits(const Operand& operand, int lane, std::uint64_t bits) {
    if (operand.kind == Operand::Kind::kNone) return;
    std::memcpy(warp->registers + operand.place + lane * operand.width, &bits, operand.width);
  }
  template <typename F>
  void for_each_lane(F&& f) {
    for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) f(__builtin_ctz(rest));
  }
  int thread_of(int lane) const { return warp->index * kLanes + lane; }
  Site site(const Instruction& instruction, int lane) const { return {thread_of(lane), instruction.statement}; }
  int first_lane() const { return __builtin_ctz(mask); }
  void report(const char* kind, const Instruction& instruction, const std::string& message) {
    reporter.add(kind, site(instruction, first_lane()), message);
  }
  // Whether all living lanes of `needed` are here. If not, the others wait for them (and the handler returns kStay), or
  // a report names them as missing.
  bool gather(const Instruction& instruction, std::uint32_t needed, const char* kind);
  // The same for an instruction that a whole warp must execute: lanes that have exited are reported too.
  bool gather_warp(const Instruction& instruction);

  // ---- memory
  std::uint64_t address_of(const Operand& address, int lane) {
    return lane_bits(address.elements[0], lane) + address.value;
  }
  // Checks an access and returns its address, or nullptr if it may not happen. `value`: the value that a write writes.
  std::uint8_t* access(const Site& site, Space space, std::uint64_t address, int bytes, Kind kind,
                       const void* value = nullptr);
  // Counts an access to shared memory of a lane of the running instruction.
  void occupy_banks(const Site& site, std::uint32_t offset, int bytes) {
    bank_uses_.push_back({site.thread % kLanes, offset, bytes});
  }
  // The same for bytes of global memory that a copy engine touches: any number, no alignment. A write that is in flight
  // is not published by a fence.
  bool access_range(const Site& site, std::uint8_t* address, int bytes, Kind kind, bool in_flight = false);
  const Buffer* find_buffer(const std::uint8_t* address);
  bool is_shared(std::uint64_t generic) const { return generic - shared_window < kMaxShared; }
  bool in_shared_space(const Instruction& instruction, std::uint64_t address) const {
    return instruction.space == Space::kShared || (instruction.space == Space::kGeneric && is_shared(address));
  }
  // Shared address (an offset) of an operand in .shared or generic space.
  std::uint32_t shared_offset(const Instruction& instruction, const Operand& address, int lane);

  // ---- synchronisation
  // Between blocks: an operation on this word, unless it is in shared memory. It acquires the writes that others have
  // published, at once or with the thread's next fence, and publishes the writes that the thread has fenced or, if it
  // releases, all earlier ones.
  void synchronise(int thread, const std::uint8_t* address, Acquire acquire, Release release);
  void fence_for_device(int thread);
  void complete_barrier(int id);
  void wake_phase_waiters();
  void move(std::shared_ptr<BulkCopy> copy);  // once

  const Code& code;
  const Dim3 grid, block;
  const Settings& settings;
  const bool check;
  const int num_threads, num_warps;
  const std::size_t shared_bytes, parameter_bytes;
  Counters counters = {};

  Clocks clocks;
  Reporter reporter;
  SharedShadow shared_shadow;
  GlobalShadow global_shadow;
  std::uint8_t* shared;               // shared[offset]
  const std::uint64_t shared_window;  // generic address of offset 0
  std::vector<std::uint8_t> local;    // body.local_bytes for every thread
  std::array<Barrier, 16> barriers;
  std::map<std::uint32_t, Mbarrier> mbarriers;  // by offset
  int num_mbarriers = 0;
  std::vector<CopyGroups> copies;  // of every thread
  std::vector<BulkGroups> bulk;    // of every thread
  std::vector<std::shared_ptr<BulkCopy>> in_flight;
  std::vector<Warp> warps;
  std::vector<WarpgroupTrace> warpgroups;
  std::mt19937_64 random;
  bool fatal = false;          // the block cannot continue
  std::uint64_t activity = 0;  // counts arrivals, copies and exits, which other threads may wait for

 private:
  void start_block(std::int64_t index);
  void start_warp(Warp& warp, int index, const Dim3& position);
  std::uint64_t special_value(const std::string& name, const Dim3& position, int thread) const;
  void run_block();
  void run_warp(Warp& warp);
  void finish_block();
  // wgmma.cpp: the rules about registers of a wgmma in flight, and about operations in flight when a block ends.
  void track_registers(const Instruction& instruction);
  void finish_asynchronous(const Statement* last);
  static bool anything_runs(const Warp& warp) {
    return !warp.parked && (warp.alive & ~warp.waiting & ~warp.sleeping) != 0;
  }
  bool force_waiting();
  bool time_out();
  void report_deadlock();
  std::string outside(const std::uint8_t* address, int bytes) const;

  std::vector<BankUse> bank_uses_;  // of the running instruction
  const Buffer* last_buffer_ = nullptr;
  std::uint64_t activity_at_time_out_ = 0;
  int idle_time_outs_ = 0;
};

}  // namespace emulator
