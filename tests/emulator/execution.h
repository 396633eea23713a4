// A block of a kernel while it runs: decoded instructions, the warps, and the memory that they share.
//
// One warp runs at a time, until it has to wait (grid.h says which). A warp always runs the lanes with the lowest
// program counter, so that lanes which took different branches meet again. An instruction that needs lanes which have
// not arrived waits for them; if they can no longer arrive, it reports a divergence.
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
#include <vector>

#include "grid.h"
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
// Addresses in .shared::cluster: the first kMaxShared are the block's own shared memory, the next those of rank 0, then
// rank 1 and so on. In generic addresses they follow the start of a window.
constexpr std::size_t kMaxShared = 256 * 1024;
constexpr int kMaxCluster = 16;

class Execution;
struct Instruction;

// The next step of a warp after an instruction.
enum class Step {
  kNext,
  kStay,   // wait, as the handler has recorded, and execute the instruction again
  kLeave,  // wait, and continue after the instruction
};

using Handler = Step (*)(Execution&, const Instruction&);

enum class Space : std::uint8_t { kGeneric, kGlobal, kShared, kCluster, kLocal, kConst, kParam };
enum class Kind : std::uint8_t { kRead, kStrongRead, kWrite, kAtomic };  // strong: relaxed or acquire, for the device

struct Instruction {
  enum class Flow : std::uint8_t { kNormal, kBranch, kExit };
  Handler handler = nullptr;
  Flow flow = Flow::kNormal;
  bool guarded = false;
  bool guard_negated = false;
  bool may_poll = false;  // it reads a word of global memory that other blocks may change meanwhile
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
  bool may_poll = false;  // an instruction does
};

std::unique_ptr<Code> decode(const Entry& entry);

struct Warp {
  int index = 0;   // in the block
  int number = 0;  // in the cluster
  std::vector<std::uint8_t> storage;
  std::uint8_t* registers = nullptr;  // within storage, aligned for vector loads
  std::uint32_t pc[kLanes] = {};
  std::uint32_t launched = 0;  // fewer than 32 in the last warp of an odd block
  std::uint32_t alive = 0;
  std::uint32_t waiting = 0;   // for other lanes of the warp, at their program counter
  std::uint32_t sleeping = 0;  // for the phase of an mbarrier, at their program counter
  bool parked = false;         // in a barrier of the block
  // Of the barrier of the cluster: lanes that have arrived, and lanes that may pass their wait.
  std::uint32_t cluster_arrived = 0, cluster_passes = 0;
  std::uint32_t cluster_waits[kLanes] = {};  // phases that each lane has waited for
  bool forced = false;                       // the lanes that it waits for cannot arrive
  bool timed_out = false;                    // the next wait for a phase returns false
  PhaseWait phase_wait[kLanes];
  Poll poll;
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
  Execution(Grid& grid, Cluster& cluster, int rank);

  // ---- its life, for the scheduler
  void start(const Dim3& position);
  void take_turn(Warp& warp);
  void finish();
  bool alive() const;
  bool polls() const;  // a warp reads a word again and again that does not change
  static bool anything_runs(const Warp& warp) {
    return !warp.parked && (warp.alive & ~warp.waiting & ~warp.sleeping) != 0;
  }
  bool force_waiting();  // wakes lanes whose partners can no longer arrive, which then report it
  bool time_out();       // ends waits for phases
  // "; warp 1 waits at ...", for a deadlock.
  std::string describe_waits(Site* first) const;

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
  int thread_of(int lane) const { return warp->number * kLanes + lane; }
  int in_block(int thread) const { return thread - first_thread; }
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
  bool is_shared(std::uint64_t generic) const { return generic - shared_window < (kMaxCluster + 1) * kMaxShared; }
  bool in_shared_space(const Instruction& instruction, std::uint64_t address) const {
    return instruction.space == Space::kShared || instruction.space == Space::kCluster ||
           (instruction.space == Space::kGeneric && is_shared(address));
  }
  // Address in .shared::cluster of an operand in .shared or generic space; an offset in the block's own shared memory,
  // or else beyond it.
  std::uint32_t shared_offset(const Instruction& instruction, const Operand& address, int lane);
  // The block whose shared memory this is, and the offset there; an address of another block must be in the space
  // .shared::cluster. Reports blocks that do not exist, may not have started or have exited, and returns nullptr then.
  Execution* block_of(const Site& site, Space space, std::uint64_t address, std::uint32_t* offset);

  // ---- synchronisation
  // Between blocks: an operation on this word of global memory. It acquires the writes that others have published, at
  // once or with the thread's next fence, and publishes the writes that the thread has fenced or, if it releases, all
  // earlier ones.
  void synchronise(int thread, const std::uint8_t* address, Acquire acquire, Release release);
  void fence_for_device(int thread);
  // The running instruction has read this from a word that others may change, and has not changed it. A warp that polls
  // a word lets others run while the word stays the same.
  void poll(const Instruction& instruction, const std::uint8_t* address, std::uint64_t value);
  void complete_barrier(int id);
  void wake_phase_waiters();
  // An operation of this agent or thread on the block's shared memory that its exit must come after.
  void add_user(const Access& access) { users_[access.thread] = access; }
  void wait_for_earlier_grids(int thread);
  void move(std::shared_ptr<BulkCopy> copy);  // once

  Grid& grid;
  Cluster& cluster;
  const int rank;  // in the cluster
  Dim3 position;   // in the grid

  const Code& code;
  const Dim3 block;
  const Settings& settings;
  const bool check;
  const bool starts_early;  // before the kernels ahead of it in the stream have ended
  const int num_threads, num_warps;
  const int first_thread;  // its number in the cluster
  const std::size_t shared_bytes;
  Counters& counters;
  Reporter& reporter;
  std::mt19937_64& random;
  Clocks& clocks;
  bool& fatal;              // the launch cannot continue
  std::uint64_t& activity;  // counts arrivals, copies and exits, which other threads may wait for

  SharedShadow shared_shadow;
  std::vector<std::uint8_t> shared_storage;
  const std::uint64_t shared_window;  // generic address of offset 0: no memory is there
  std::uint8_t* shared = nullptr;     // shared[offset]
  std::vector<std::uint8_t> local;    // body.local_bytes for every thread
  std::array<Barrier, 16> barriers;
  std::map<std::uint32_t, Mbarrier> mbarriers;  // by offset
  int num_mbarriers = 0;
  std::vector<CopyGroups> copies;  // of every thread
  std::vector<BulkGroups> bulk;    // of every thread
  std::vector<std::shared_ptr<BulkCopy>> in_flight;
  int incoming = 0;  // copies in flight that other blocks have issued into this one
  std::vector<Warp> warps;
  std::vector<WarpgroupTrace> warpgroups;

 private:
  void start_warp(Warp& warp, int index);
  std::uint64_t special_value(const std::string& name, int thread) const;
  void run_warp(Warp& warp);
  // wgmma.cpp: the rules about registers of a wgmma in flight, and about operations in flight when a block ends.
  void track_registers(const Instruction& instruction);
  void finish_asynchronous(const Statement* last);
  std::string outside(const std::uint8_t* address, int bytes) const;
  bool check_peer(const Site& site, Execution& peer);
  void check_earlier_grids(const Site& site);  // of a kernel that starts early
  void check_users(const Statement* last);
  void check_end();

  std::vector<BankUse> bank_uses_;         // of the running instruction
  std::map<std::uint32_t, Access> users_;  // threads and agents of other blocks, with their last access
  std::vector<Access> grid_waits_;         // of a kernel that may start early
  std::vector<bool> after_grid_wait_;      // threads that are known to be ordered after one of them
  const Buffer* last_buffer_ = nullptr;
  std::uint64_t foreign_bytes_ = 0;  // that the block has read
  std::uint64_t instructions_ = 0;
  int budget_ = 0;  // instructions that the running warp may execute before others get a turn
};

}  // namespace emulator
