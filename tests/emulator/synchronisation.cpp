// Barriers, fences, and exchanges between the lanes of a warp.
#include <algorithm>
#include <stdexcept>

#include "decode.h"
#include "numbers.h"

namespace emulator {
namespace {

// ---- barriers of the block

enum class Reduction { kNone, kPopulation, kAnd, kOr };

// option: operand of the id, of the count (-1: none), of the predicate (-1), arrive only, Reduction
Step barrier(Execution& x, const Instruction& i) {
  if (!x.gather_warp(i)) return Step::kStay;
  Warp& warp = *x.warp;
  const int lane = x.first_lane();
  const auto id = static_cast<std::uint32_t>(x.lane_bits(i.operands[i.option[0]], lane));
  const bool whole_block = i.option[1] < 0;
  int live_warps = 0;
  for (const Warp& other : x.warps) live_warps += other.alive != 0;
  const int expected = whole_block ? kLanes * live_warps : static_cast<int>(x.lane_bits(i.operands[i.option[1]], lane));
  if (id > 15) {
    x.report("barrier", i, "barrier " + std::to_string(id) + " does not exist: there are 16");
    return Step::kNext;
  }
  if (expected <= 0 || expected % kLanes != 0 || expected > kLanes * x.num_warps) {
    x.report("barrier", i,
             "barrier " + std::to_string(id) + " for " + std::to_string(expected) + " threads of a block of " +
                 std::to_string(x.num_threads));
  }
  if (whole_block && live_warps < x.num_warps) {
    x.report("barrier", i, "barrier " + std::to_string(id) + " of the whole block: some warps have exited before it");
  }
  Barrier& barrier = x.barriers[id];
  ++x.counters.barriers;
  ++x.activity;
  if (barrier.arrived == 0) {
    barrier = Barrier();
    barrier.expected = expected;
    barrier.whole_block = whole_block;
    barrier.row.assign(x.clocks.row_size(), 0);
    barrier.statement = i.statement;
  } else if (barrier.expected != expected) {
    x.report("barrier", i,
             "barrier " + std::to_string(id) + ": " + std::to_string(expected) + " threads here, but " +
                 std::to_string(barrier.expected) + " at " + x.reporter.place_of(*barrier.statement));
  }
  const bool arrive_only = i.option[3];
  const std::uint32_t predicates = i.option[2] < 0 ? 0 : x.predicate(i.operands[i.option[2]]) & x.mask;
  barrier.true_predicates += __builtin_popcount(predicates);
  barrier.predicates += __builtin_popcount(x.mask);
  if (x.check) {
    x.for_each_lane([&](int each) {
      const int thread = x.thread_of(each);
      x.clocks.join(barrier.row.data(), x.clocks.row(thread));
      if (arrive_only) x.clocks.advance(thread);
    });
  }
  barrier.arrived += kLanes;
  if (!arrive_only) barrier.waiting.push_back({warp.index, &i, x.mask});
  const bool complete = barrier.arrived >= barrier.expected;
  if (!arrive_only) warp.parked = true;
  if (complete) x.complete_barrier(static_cast<int>(id));
  return warp.parked ? Step::kLeave : Step::kNext;
}

void decode_barrier(Decoder& d) {
  d.take("cta");
  const int action = d.take_one_of({"sync", "arrive", "red"});
  d.take("aligned");
  const int reduction = d.take_one_of({"popc", "and", "or"});
  d.take_type();
  if (action < 0 || (action == 2) != (reduction >= 0)) d.fail("this form is not supported");
  std::array<int, 6>& option = d.instruction.option;
  const int first = action == 2 ? 1 : 0;
  const int count = static_cast<int>(d.num_operands()) - first - (action == 2 ? 1 : 0);
  if (count < 1 || count > 2) d.fail("the number of operands does not fit");
  option = {first, count == 2 ? first + 1 : -1, action == 2 ? first + count : -1, action == 1, reduction + 1};
  if (action == 2) d.source(0, reduction == 0 ? 4 : 0);
  d.source(first, 4);
  if (count == 2) d.source(first + 1, 4);
  if (action == 2) d.source(first + count, 0);
  d.instruction.handler = &barrier;
}

// bar.warp.sync mask
Step warp_barrier(Execution& x, const Instruction& i) {
  const auto members = static_cast<std::uint32_t>(x.lane_bits(i.operands[0], x.first_lane()));
  if (!x.gather(i, members, "divergence")) return Step::kStay;
  if (!x.check) return Step::kNext;
  std::vector<std::uint32_t> joined(x.clocks.row_size(), 0);
  x.for_each_lane([&](int lane) { x.clocks.join(joined.data(), x.clocks.row(x.thread_of(lane))); });
  x.for_each_lane([&](int lane) {
    std::copy(joined.begin(), joined.end(), x.clocks.row(x.thread_of(lane)));
    x.clocks.advance(x.thread_of(lane));
  });
  return Step::kNext;
}

// ---- the barrier of the cluster

// option: all lanes of the warp must take part, what they did before is released
Step arrive_in_cluster(Execution& x, const Instruction& i) {
  if (i.option[0] && !x.gather_warp(i)) return Step::kStay;
  Warp& warp = *x.warp;
  if ((x.mask & (warp.cluster_arrived | warp.cluster_passes)) != 0) {
    x.report("barrier", i, "a second arrival at the barrier of the cluster without a wait in between");
  }
  x.for_each_lane([&](int lane) {
    const int thread = x.thread_of(lane);
    for (auto& [offset, mbarrier] : x.mbarriers) {
      const bool fenced = mbarrier.fence.clock != 0 && static_cast<int>(mbarrier.fence.thread) == thread;
      if (fenced) mbarrier.known_after_phase = std::min(mbarrier.known_after_phase, x.cluster.phase);
    }
    if (!x.check) return;
    if (i.option[1]) x.clocks.join(x.cluster.arrived.data(), x.clocks.row(thread));
    x.clocks.advance(thread);
  });
  warp.cluster_passes &= ~x.mask;
  warp.cluster_arrived |= x.mask;
  ++x.activity;
  x.cluster.complete_phase_if_done();
  return Step::kNext;
}

// option: all lanes of the warp must take part
Step wait_in_cluster(Execution& x, const Instruction& i) {
  if (i.option[0] && !x.gather_warp(i)) return Step::kStay;
  Warp& warp = *x.warp;
  const std::uint32_t waits = x.mask & warp.cluster_arrived;
  if (waits != 0) {
    for (std::uint32_t rest = waits; rest != 0; rest &= rest - 1) {
      warp.phase_wait[__builtin_ctz(rest)].mbarrier = PhaseWait::kCluster;
    }
    warp.sleeping |= waits;
    return Step::kStay;
  }
  if ((x.mask & ~warp.cluster_passes) != 0) {
    x.report("barrier", i, "a wait at the barrier of the cluster without an arrival before it");
  }
  warp.cluster_passes &= ~x.mask;
  x.for_each_lane([&](int lane) {
    ++warp.cluster_waits[lane];
    if (x.check) x.clocks.join(x.clocks.row(x.thread_of(lane)), x.cluster.released.data());
  });
  return Step::kNext;
}

void decode_cluster_barrier(Decoder& d) {
  d.take("cluster");
  const int action = d.take_one_of({"arrive", "wait"});
  const int order = d.take_one_of({"release", "relaxed", "acquire"});
  d.instruction.option = {d.take("aligned"), order != 1};
  if (action < 0 || (action == 0 ? order == 2 : order == 0 || order == 1)) d.fail("this form is not supported");
  d.instruction.handler = action == 0 ? &arrive_in_cluster : &wait_in_cluster;
}

// ---- fences

// Makes the initialisations by this thread known to copies and, with the barrier of the cluster, to other blocks.
Step fence_mbarrier_init(Execution& x, const Instruction&) {
  x.for_each_lane([&](int lane) {
    const int thread = x.thread_of(lane);
    for (auto& [offset, mbarrier] : x.mbarriers) {
      Access& fence = mbarrier.fence;
      if (static_cast<int>(fence.thread) == thread && fence.clock == 0) fence.clock = x.clocks.now(thread);
    }
  });
  return Step::kNext;
}

Step fence_device(Execution& x, const Instruction&) {
  x.for_each_lane([&](int lane) { x.fence_for_device(x.thread_of(lane)); });
  return Step::kNext;
}
Step fence_copies(Execution& x, const Instruction&) {
  if (x.check) x.for_each_lane([&](int lane) { x.clocks.fence_for_copies(x.thread_of(lane)); });
  return Step::kNext;
}
// griddepcontrol.wait. Grids run one after the other here, so it need not wait.
Step wait_for_earlier_grids(Execution& x, const Instruction&) {
  x.for_each_lane([&](int lane) { x.wait_for_earlier_grids(x.thread_of(lane)); });
  return Step::kNext;
}
Step do_nothing(Execution&, const Instruction&) { return Step::kNext; }

void decode_fence(Decoder& d) {
  if (d.is("membar")) {
    const int scope = d.take_one_of({"cta", "gl", "sys"});
    if (scope < 0) d.fail("this scope is not supported");
    d.instruction.handler = scope == 0 ? &do_nothing : &fence_device;
    return;
  }
  if (d.take("proxy")) {
    if (d.take("alias")) {
      d.instruction.handler = &do_nothing;  // for memory with two addresses, which does not exist here
      return;
    }
    if (!d.take("async")) d.fail("this proxy is not supported");
    // Without a space, or for shared memory: before reads of wgmma and bulk copies. For global memory: before reads of
    // bulk copies, which are not checked.
    const bool global_only = d.take("global");
    d.take_one_of({"shared::cta", "shared::cluster", "shared"});
    d.instruction.handler = global_only ? &do_nothing : &fence_copies;
    return;
  }
  if (d.take("mbarrier_init")) {
    d.take("release");
    d.take("cluster");
    d.instruction.handler = &fence_mbarrier_init;
    return;
  }
  d.take_one_of({"sc", "acq_rel", "acquire", "release"});
  const int scope = d.take_one_of({"cta", "cluster", "gpu", "sys"});
  if (scope < 0) d.fail("this scope is not supported");
  d.instruction.handler = scope < 2 ? &do_nothing : &fence_device;
}

// ---- exchange within a warp; orders nothing

// All members must execute it, and only they.
bool gather_members(Execution& x, const Instruction& i, const Operand& mask_operand, std::uint32_t* members) {
  *members = static_cast<std::uint32_t>(x.lane_bits(mask_operand, x.first_lane()));
  if (!x.gather(i, *members, "shuffle")) return false;
  if (x.mask & ~*members) x.report("shuffle", i, "executed by a lane that its member mask does not name");
  return true;
}

enum Shuffle { kUp, kDown, kButterfly, kIndex };

// shfl d|p, a, b, c, members. The segment of a lane is given by the upper half of c, the clamp by the lower.
Step shuffle(Execution& x, const Instruction& i) {
  std::uint32_t members = 0;
  if (!gather_members(x, i, i.operands[4], &members)) return Step::kStay;
  const std::uint32_t* a = x.row<std::uint32_t>(i.operands[1]);
  alignas(64) std::uint32_t result[kLanes];
  std::uint32_t in_range = 0;
  x.for_each_lane([&](int lane) {
    const int b = static_cast<int>(x.lane_bits(i.operands[2], lane) & 31);
    const std::uint64_t c = x.lane_bits(i.operands[3], lane);
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int source = lane;
    bool valid = false;
    switch (i.option[0]) {
      case kUp:
        source = lane - b;
        valid = source >= last;
        break;
      case kDown:
        source = lane + b;
        valid = source <= last;
        break;
      case kButterfly:
        source = lane ^ b;
        valid = source <= last;
        break;
      default:
        source = first | (b & ~segment);
        valid = source <= last;
    }
    if (!valid) source = lane;
    in_range |= static_cast<std::uint32_t>(valid) << lane;
    result[lane] = a[source];
    if (!(x.mask >> source & 1)) {
      result[lane] = kAllLanes;
      x.reporter.add("shuffle", x.site(i, lane), "reads lane " + std::to_string(source) + ", which does not take part");
    }
  });
  if (i.operands[0].kind == Operand::Kind::kVector) {
    x.store(i.operands[0].elements[0], result);
    x.set_predicate(i.operands[0].elements[1], in_range);
  } else {
    x.store(i.operands[0], result);
  }
  return Step::kNext;
}

void decode_shuffle(Decoder& d) {
  d.take("sync");
  d.instruction.option[0] = d.take_one_of({"up", "down", "bfly", "idx"});
  if (d.instruction.option[0] < 0 || d.take_type() != Type::kB32) d.fail("this form is not supported");
  if (d.operand(0).kind == Operand::Kind::kVector) {
    d.place(d.operand(0).elements[0], 4);
    d.place(d.operand(0).elements[1], 0);
  } else {
    d.source(0, 4);
  }
  for (const std::size_t index : {1, 2, 3, 4}) d.source(index, 4);
  d.instruction.handler = &shuffle;
}

// vote d, p, members; option: all, any, uni, ballot
Step vote(Execution& x, const Instruction& i) {
  std::uint32_t members = 0;
  if (!gather_members(x, i, i.operands[2], &members)) return Step::kStay;
  const std::uint32_t votes = x.predicate(i.operands[1]) & x.mask;
  if (i.option[0] == 3) {
    alignas(64) std::uint32_t result[kLanes];
    std::fill(std::begin(result), std::end(result), votes);
    x.store(i.operands[0], result);
    return Step::kNext;
  }
  const bool all = votes == x.mask, any = votes != 0;
  const bool result = i.option[0] == 0 ? all : i.option[0] == 1 ? any : all || !any;
  x.set_predicate(i.operands[0], result ? kAllLanes : 0);
  return Step::kNext;
}

// redux d, a, members
Step reduce_warp(Execution& x, const Instruction& i) {
  std::uint32_t members = 0;
  if (!gather_members(x, i, i.operands[2], &members)) return Step::kStay;
  const std::uint32_t* a = x.row<std::uint32_t>(i.operands[1]);
  std::uint32_t total = a[x.first_lane()];
  const bool is_signed = i.type == Type::kS32;
  for (std::uint32_t rest = x.mask & (x.mask - 1); rest != 0; rest &= rest - 1) {
    const std::uint32_t value = a[__builtin_ctz(rest)];
    const bool less = is_signed ? static_cast<std::int32_t>(value) < static_cast<std::int32_t>(total) : value < total;
    switch (i.option[0]) {
      case 0:
        total += value;
        break;
      case 1:
        total = less ? value : total;
        break;
      case 2:
        total = less ? total : value;
        break;
      case 3:
        total &= value;
        break;
      case 4:
        total |= value;
        break;
      default:
        total ^= value;
    }
  }
  alignas(64) std::uint32_t result[kLanes];
  std::fill(std::begin(result), std::end(result), total);
  x.store(i.operands[0], result);
  return Step::kNext;
}

// match.any d, a, members: the lanes with the same value
template <typename T>
Step match_any(Execution& x, const Instruction& i) {
  std::uint32_t members = 0;
  if (!gather_members(x, i, i.operands[2], &members)) return Step::kStay;
  const T* a = x.row<T>(i.operands[1]);
  alignas(64) std::uint32_t result[kLanes] = {};
  x.for_each_lane([&](int lane) {
    x.for_each_lane([&](int other) { result[lane] |= static_cast<std::uint32_t>(a[lane] == a[other]) << other; });
  });
  x.store(i.operands[0], result);
  return Step::kNext;
}

Step active_mask(Execution& x, const Instruction& i) {
  alignas(64) std::uint32_t result[kLanes];
  std::fill(std::begin(result), std::end(result), x.mask);
  x.store(i.operands[0], result);
  return Step::kNext;
}

// elect d|p, members: one of them, here the first
Step elect(Execution& x, const Instruction& i) {
  std::uint32_t members = 0;
  if (!gather_members(x, i, i.operands[1], &members)) return Step::kStay;
  const int leader = x.first_lane();
  alignas(64) std::uint32_t result[kLanes];
  std::fill(std::begin(result), std::end(result), leader);
  x.store(i.operands[0].elements[0], result);
  x.set_predicate(i.operands[0].elements[1], 1u << leader);
  return Step::kNext;
}

Step trap(Execution& x, const Instruction& i) {
  x.report("trap", i, "the kernel gives up");
  x.fatal = true;
  return Step::kNext;
}

[[noreturn]] Step refuse_call(Execution& x, const Instruction& i) {
  throw std::runtime_error("emulator: " + x.code.entry.name + ", " + x.reporter.place_of(*i.statement) +
                           ": calls of functions are not supported: " + i.statement->text);
}

}  // namespace

bool decode_synchronisation(Decoder& d) {
  const std::vector<std::string>& modifiers = d.statement().modifiers;
  const bool warp = !modifiers.empty() && modifiers[0] == "warp";
  if (d.is("barrier") && modifiers[0] == "cluster") {
    decode_cluster_barrier(d);
  } else if (d.is("bar") && warp) {
    d.take("warp");
    d.take("sync");
    d.source(0, 4);
    d.instruction.handler = &warp_barrier;
  } else if (d.is("bar") || d.is("barrier")) {
    decode_barrier(d);
  } else if (d.is("membar") || d.is("fence")) {
    decode_fence(d);
  } else if (d.is("shfl")) {
    decode_shuffle(d);
  } else if (d.is("vote")) {
    d.take("sync");
    d.instruction.option[0] = d.take_one_of({"all", "any", "uni", "ballot"});
    d.take_type();
    if (d.instruction.option[0] < 0) d.fail("this form is not supported");
    d.source(0, d.instruction.option[0] == 3 ? 4 : 0);
    d.source(1, 0);
    d.source(2, 4);
    d.instruction.handler = &vote;
  } else if (d.is("redux")) {
    d.take("sync");
    d.instruction.option[0] = d.take_one_of({"add", "min", "max", "and", "or", "xor"});
    d.instruction.type = d.take_type();
    if (d.instruction.option[0] < 0 || d.instruction.type == Type::kF32) d.fail("this form is not supported");
    for (const std::size_t index : {0, 1, 2}) d.source(index, 4);
    d.instruction.handler = &reduce_warp;
  } else if (d.is("match")) {
    d.take("sync");
    if (!d.take("any")) d.fail("only .any is supported");
    const int bytes = bytes_of(d.take_type());
    d.source(0, 4);
    d.source(1, bytes);
    d.source(2, 4);
    d.instruction.handler = bytes == 8 ? &match_any<std::uint64_t> : &match_any<std::uint32_t>;
  } else if (d.is("activemask")) {
    d.take_type();
    d.source(0, 4);
    d.instruction.handler = &active_mask;
  } else if (d.is("elect")) {
    d.take("sync");
    if (d.operand(0).kind != Operand::Kind::kVector) d.fail("the result must be a register and a predicate");
    if (d.operand(0).elements[0].kind != Operand::Kind::kNone) d.place(d.operand(0).elements[0], 4);
    d.place(d.operand(0).elements[1], 0);
    d.source(1, 4);
    d.instruction.handler = &elect;
  } else if (d.is("trap") || d.is("brkpt")) {
    d.instruction.handler = &trap;
  } else if (d.is("griddepcontrol")) {
    const int action = d.take_one_of({"wait", "launch_dependents"});
    d.instruction.handler = action == 0 ? &wait_for_earlier_grids : &do_nothing;
  } else if (d.is("nanosleep") || d.is("pmevent")) {
    // They affect only the timing.
    d.take_type();
    d.instruction.operands.clear();
    d.instruction.handler = &do_nothing;
  } else if (d.is("call")) {
    d.instruction.operands.clear();
    d.take("uni");
    d.instruction.handler = &refuse_call;
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
