// mbarriers, and the copies of the bulk engine (TMA) that complete on them or in groups.
//
// The data of a bulk copy move when the scheduler picks it: in any order, at the latest when nothing else can run.
// Into shared memory, its target is poisoned from the issue on; it then counts as written by an agent of its own, which
// the phase of the mbarrier releases. Out of shared memory, its source may not be written until the issuing thread has
// waited: wait_group.read ends the reading, and wait_group alone makes the result known to the thread.
#include <algorithm>

#include "atomic.h"
#include "decode.h"
#include "matrix.h"
#include "numbers.h"
#include "tma.h"

namespace emulator {
namespace {

std::string byte_of(std::uint32_t offset) { return std::to_string(static_cast<std::int64_t>(offset) - kSharedStart); }

// ---- mbarriers

// An mbarrier and its place.
struct Found {
  Execution* block = nullptr;
  std::uint32_t offset = 0;
  Mbarrier* mbarrier = nullptr;  // nullptr: none is here, which has been reported
};

Found find_mbarrier(Execution& x, const Site& site, Space space, std::uint64_t address, bool used_by_copy) {
  Found found;
  found.block = x.block_of(site, space, address, &found.offset);
  if (found.block == nullptr) return found;
  const auto entry = found.block->mbarriers.find(found.offset);
  if (entry == found.block->mbarriers.end()) {
    x.reporter.add("mbarrier", site, "no mbarrier is initialised in shared memory, byte " + byte_of(found.offset));
    return found;
  }
  found.mbarrier = &entry->second;
  if (!x.check) return found;
  const bool known = x.warp->cluster_waits[site.thread % kLanes] > found.mbarrier->known_after_phase;
  SharedShadow& shadow = found.block->shared_shadow;
  shadow.check_mbarrier(site, found.offset, used_by_copy, known, found.mbarrier->fence);
  return found;
}

// Operands in .shared or generic space.
Found find_mbarrier(Execution& x, const Instruction& i, const Operand& operand, int lane, bool used_by_copy) {
  const Space space = i.space == Space::kGeneric ? Space::kCluster : i.space;
  return find_mbarrier(x, x.site(i, lane), space, x.shared_offset(i, operand, lane), used_by_copy);
}

void complete_phase(const Found& found) {
  const std::uint32_t phase = found.mbarrier->phase;
  found.mbarrier->complete_if_done();
  if (found.mbarrier->phase != phase) found.block->wake_phase_waiters();
}

// A copy has brought `bytes` to this mbarrier. Returns the agent that counts as having written them.
Access complete_bytes(const Found& found, std::uint32_t bytes, bool asynchronous_proxy) {
  Execution& at = *found.block;
  Mbarrier& mbarrier = *found.mbarrier;
  const Access agent = at.clocks.next_of_mbarrier(at.rank, mbarrier.number);
  if (at.check) at.clocks.join_agent(mbarrier.arrived.data(), agent, asynchronous_proxy);
  mbarrier.pending_bytes -= bytes;
  complete_phase(found);
  return agent;
}

// option: of arrive_on_mbarrier
void arrive(Execution& x, const Instruction& i, const Site& site, const Found& found, std::uint32_t count) {
  ++x.activity;
  Mbarrier& mbarrier = *found.mbarrier;
  if (mbarrier.pending < count) {
    x.reporter.add("mbarrier", site,
                   "mbarrier in byte " + byte_of(found.offset) + ": more arrivals in one phase than its count of " +
                       std::to_string(mbarrier.count));
    return;
  }
  if (x.check) {
    const bool releases = i.option[3], cluster = i.option[4] && x.grid.cluster_size > 1;
    if (releases && found.block == &x) x.clocks.join(mbarrier.arrived.data(), x.clocks.row(site.thread));
    if (releases && cluster) x.clocks.join(mbarrier.arrived_cluster.data(), x.clocks.row(site.thread));
    x.clocks.advance(site.thread);
  }
  mbarrier.pending -= count;
  complete_phase(found);
}

// init [a], count
Step init_mbarrier(Execution& x, const Instruction& i) {
  x.for_each_lane([&](int lane) {
    const Site site = x.site(i, lane);
    const std::uint32_t offset = x.shared_offset(i, i.operands[0], lane);
    const std::uint64_t ones = ~std::uint64_t{0};
    if (x.mbarriers.count(offset) != 0) {
      x.reporter.add("mbarrier", site, "initialised again in byte " + byte_of(offset) + " without mbarrier.inval");
    }
    if (x.access(site, Space::kShared, offset, 8, Kind::kWrite, &ones) == nullptr) return;
    Mbarrier& mbarrier = x.mbarriers[offset] = Mbarrier();
    mbarrier.count = mbarrier.pending = static_cast<std::uint32_t>(x.lane_bits(i.operands[1], lane));
    mbarrier.number = x.num_mbarriers++;
    mbarrier.fence.thread = site.thread;
    const std::size_t of_cluster = x.grid.cluster_size > 1 ? x.clocks.row_size() : 0;
    for (auto* row : {&mbarrier.arrived, &mbarrier.released}) row->assign(x.clocks.row_size(), 0);
    for (auto* row : {&mbarrier.arrived_cluster, &mbarrier.released_cluster}) row->assign(of_cluster, 0);
    if (mbarrier.count == 0) x.reporter.add("mbarrier", site, "initialised with a count of 0");
    if (x.check) x.shared_shadow.mark_mbarrier(offset, true);
  });
  return Step::kNext;
}

Step invalidate_mbarrier(Execution& x, const Instruction& i) {
  x.for_each_lane([&](int lane) {
    const std::uint32_t offset = x.shared_offset(i, i.operands[0], lane);
    if (find_mbarrier(x, x.site(i, lane), Space::kShared, offset, false).mbarrier == nullptr) return;
    if (x.check) x.shared_shadow.mark_mbarrier(offset, false);
    x.mbarriers.erase(offset);
  });
  return Step::kNext;
}

// arrive state, [a], count; arrive.expect_tx state, [a], bytes; expect_tx [a], bytes.
// option: first operand, it arrives, it expects bytes, it releases, to the whole cluster. The state of a phase is its
// number.
Step arrive_on_mbarrier(Execution& x, const Instruction& i) {
  const std::size_t first = i.option[0];
  const bool arrives = i.option[1], expects = i.option[2];
  x.for_each_lane([&](int lane) {
    const Site site = x.site(i, lane);
    const Found found = find_mbarrier(x, i, i.operands[first], lane, false);
    if (found.mbarrier == nullptr) return;
    if (x.check && found.block != &x) found.block->add_user(x.shared_shadow.access_of(site));
    const bool given = i.operands.size() > first + 1;
    const auto number = given ? static_cast<std::uint32_t>(x.lane_bits(i.operands[first + 1], lane)) : 1u;
    if (first == 1) {
      if (found.block != &x && i.operands[0].kind != Operand::Kind::kNone) {
        x.reporter.add("mbarrier", site, "an arrival at an mbarrier of another block returns no state");
      }
      x.set_lane_bits(i.operands[0], lane, found.mbarrier->phase);
    }
    if (expects) found.mbarrier->pending_bytes += number;
    if (arrives) arrive(x, i, site, found, expects ? 1 : number);
  });
  return Step::kNext;
}

// try_wait p, [a], parity or state. A thread whose phase has not completed sleeps; it returns false when nothing else
// in the block can run, and at random under the random schedule: a device does both when its time limit expires.
// option: as above, acquires instead of releases
Step wait_for_phase(Execution& x, const Instruction& i) {
  std::uint32_t done = 0, sleeping = 0;
  const bool give_up = x.warp->timed_out || (x.settings.schedule == Schedule::kRandom && x.random() % 4 == 0);
  x.for_each_lane([&](int lane) {
    const Site site = x.site(i, lane);
    const std::uint32_t offset = x.shared_offset(i, i.operands[1], lane);
    const Mbarrier* mbarrier = find_mbarrier(x, site, Space::kShared, offset, false).mbarrier;
    if (mbarrier == nullptr) {
      x.fatal = true;
      return;
    }
    const auto parity = static_cast<std::uint32_t>(x.lane_bits(i.operands[2], lane) & 1);
    if (mbarrier->phase != parity) {
      done |= 1u << lane;
      const bool acquires = x.check && i.option[3], cluster = i.option[4] && x.grid.cluster_size > 1;
      if (acquires) x.clocks.join(x.clocks.row(site.thread), mbarrier->released.data());
      if (acquires && cluster) x.clocks.join(x.clocks.row(site.thread), mbarrier->released_cluster.data());
    } else if (!give_up) {
      sleeping |= 1u << lane;
      x.warp->phase_wait[lane] = {offset, parity};
    }
  });
  x.warp->timed_out = false;
  if (sleeping != 0 && done == 0) {  // lanes that are done do not sleep: the others try again with them
    x.warp->sleeping |= sleeping;
    return Step::kStay;
  }
  x.set_predicate(i.operands[0], done);
  return Step::kNext;
}

void decode_mbarrier(Decoder& d) {
  const int action = d.take_one_of({"init", "inval", "arrive", "expect_tx", "try_wait", "test_wait"});
  const bool expects = action == 3 || d.take("expect_tx"), parity = d.take("parity");
  const bool ordered = d.take_one_of({"acquire", "release", "relaxed"}) != 2;
  const bool cluster = d.take_one_of({"cta", "cluster"}) == 1;
  d.instruction.space = d.take_space();
  d.instruction.option = {0, 0, 0, ordered, cluster};
  if (d.take_type() != Type::kB64) d.fail("only .b64 is supported");
  switch (action) {
    case 0:
      d.address(0);
      d.source(1, 4);
      d.instruction.handler = &init_mbarrier;
      return;
    case 1:
      d.address(0);
      d.instruction.handler = &invalidate_mbarrier;
      return;
    case 2:
    case 3: {
      const std::size_t first = action == 2 && d.operand(0).kind != Operand::Kind::kAddress ? 1 : 0;
      if (first == 1) d.source(0, 8);
      d.address(first);
      if (d.num_operands() > first + 1) d.source(first + 1, 4);
      d.instruction.option = {static_cast<int>(first), action == 2, expects, ordered, cluster};
      d.instruction.handler = &arrive_on_mbarrier;
      return;
    }
    case 4:
    case 5:
      d.source(0, 0);
      d.address(1);
      d.source(2, parity ? 4 : 8);
      if (d.num_operands() > 3) d.source(3, 4);  // a time limit
      d.instruction.handler = &wait_for_phase;
      return;
    default:
      d.fail("this form is not supported");
  }
}

// ---- bulk copies

// The bytes of one copy: rows of a tensor, or one run.
struct Transfer {
  TensorMap map;
  std::int32_t coordinates[TensorMap::kMaxRank];
  std::uint8_t* global;  // of a run
  Execution* block;      // whose shared memory it is
  std::uint32_t shared, bytes;
  bool tensor;

  // visit(offset in shared memory, global address, bytes), in pieces that swizzling leaves together.
  template <typename F>
  void for_each_piece(F&& visit) const {
    if (!tensor) return visit(shared, global, bytes);
    for_each_row(map, coordinates, [&](const BoxRow& row) {
      for (std::uint32_t done = 0; done < row.bytes;) {
        const std::uint32_t at = row.offset + done, count = std::min(16 - at % 16, row.bytes - done);
        visit(swizzled(shared + at, map.swizzle), row.global + done, count);
        done += count;
      }
    });
  }
};

// Operands of every form: [shared], [map, {c}] or [global], [mbarrier] or bytes.
// option: rank (0: a run), operand of shared memory, of global memory, of the mbarrier, of the bytes or (in a load of a
// tensor) of the mask of blocks, or -1, add or (in the load of a run) the operand of the mask
enum BulkOption { kRank, kShared, kGlobal, kMbarrierOperand, kBytes, kAdd };

// Reads the operands of the one lane that issues; false if the copy cannot be made.
bool prepare(Execution& x, const Instruction& i, int lane, Kind kind, Transfer* transfer) {
  const Site site = x.site(i, lane);
  const Operand& global = i.operands[i.option[kGlobal]];
  transfer->block =
      x.block_of(site, i.space, x.shared_offset(i, i.operands[i.option[kShared]], lane), &transfer->shared);
  if (transfer->block == nullptr) return false;
  transfer->tensor = i.option[kRank] != 0;
  std::uint32_t alignment = 16;
  if (transfer->tensor) {
    const std::uint64_t address = x.address_of(global, lane);
    if (address % 64 != 0) {
      x.reporter.add("tma", site, "the tensor map lies at an address that is not a multiple of 64");
      return false;
    }
    const std::uint8_t* map = x.access(site, Space::kGeneric, address, 16, Kind::kRead);
    if (map == nullptr) return false;
    std::memcpy(&transfer->map, map, sizeof transfer->map);
    if (!transfer->map.valid() || transfer->map.rank != i.option[kRank]) {
      x.reporter.add("tma", site, "the address does not hold a tensor map of this rank");
      return false;
    }
    const std::vector<Operand>& coordinates = global.elements[1].elements;
    for (std::size_t c = 0; c < coordinates.size(); ++c) {
      transfer->coordinates[c] = static_cast<std::int32_t>(x.lane_bits(coordinates[c], lane));
    }
    transfer->bytes = transfer->map.box_bytes();
    alignment = transfer->map.shared_alignment();
  } else {
    transfer->global = reinterpret_cast<std::uint8_t*>(x.address_of(global, lane));
    transfer->bytes = static_cast<std::uint32_t>(x.lane_bits(i.operands[i.option[kBytes]], lane));
    if (transfer->bytes % 16 != 0 || reinterpret_cast<std::uint64_t>(transfer->global) % 16 != 0) {
      x.reporter.add(
          "misaligned", site,
          "a bulk copy of " + std::to_string(transfer->bytes) + " bytes: size and address must be multiples of 16");
      return false;
    }
    if (transfer->bytes == 0) return false;
  }
  if (transfer->shared % alignment != 0) {
    x.reporter.add("misaligned", site,
                   "a bulk copy at byte " + byte_of(transfer->shared) + " of shared memory, must be a multiple of " +
                       std::to_string(alignment));
    return false;
  }
  if (!x.shared_shadow.contains(transfer->shared, transfer->bytes)) {
    x.reporter.add("out-of-bounds", site,
                   "a bulk copy of " + std::to_string(transfer->bytes) + " bytes at byte " + byte_of(transfer->shared) +
                       " of the block's " + std::to_string(x.shared_bytes) + " bytes of shared memory");
    return false;
  }
  // Extents of the buffers that hold the tensor; a bulk copy has no alignment beyond its own.
  bool inside = true;
  transfer->for_each_piece([&](std::uint32_t, std::uint8_t* address, std::uint32_t bytes) {
    inside = inside && x.access_range(site, address, static_cast<int>(bytes), kind, true);
  });
  return inside;
}

// One lane issues a bulk copy; more would issue it again.
int issuing_lane(Execution& x, const Instruction& i) {
  if ((x.mask & (x.mask - 1)) != 0) {
    char lanes[16];
    std::snprintf(lanes, sizeof lanes, "%08x", x.mask);
    x.report("tma", i, std::string("a bulk copy is issued by more than one lane: ") + lanes);
  }
  return x.first_lane();
}

// Marks the target of a copy into a block and queues the copy. `fill` writes the bytes, at a moment that the scheduler
// picks, in `found.block`.
void issue_copy(Execution& x, const Site& site, const Found& found, std::uint32_t offset, std::uint32_t bytes,
                bool uses_issuer, std::function<void(Execution& issuer, Access agent)> fill) {
  Execution* const target = found.block;
  target->counters.shared_clocks += (bytes + 127) / 128;
  if (x.check) target->shared_shadow.begin_copy(site, offset, static_cast<int>(bytes), Proxy::kAsync);
  std::memset(target->shared + offset, 0xff, bytes);
  if (target != &x) ++target->incoming;
  auto copy = std::make_shared<BulkCopy>();
  copy->uses_issuer = uses_issuer || target == &x;
  const std::uint32_t mbarrier = found.offset;
  copy->move = [target, mbarrier, offset, bytes, fill](Execution& issuer) {
    if (target != &issuer) --target->incoming;
    const auto entry = target->mbarriers.find(mbarrier);
    if (entry == target->mbarriers.end()) return;  // invalidated in the meantime; the copy counts as lost
    const Access agent = complete_bytes({target, mbarrier, &entry->second}, bytes, /*asynchronous_proxy=*/true);
    fill(issuer, agent);
    if (!target->check) return;
    target->shared_shadow.finish_copy(agent, offset, static_cast<int>(bytes), Proxy::kAsync);
    if (target != &issuer) target->add_user(agent);
  };
  x.in_flight.push_back(std::move(copy));
  ++x.activity;
}

Step bulk_load(Execution& x, const Instruction& i) {
  const int lane = issuing_lane(x, i), mask_operand = i.option[i.option[kRank] != 0 ? kBytes : kAdd];
  const Site site = x.site(i, lane);
  const Operand& operand = i.operands[i.option[kMbarrierOperand]];
  std::uint32_t offset = 0;
  Execution* const home = x.block_of(site, i.space, x.shared_offset(i, operand, lane), &offset);
  Transfer transfer{};
  if (home == nullptr || !prepare(x, i, lane, Kind::kRead, &transfer)) return Step::kNext;
  if (home != transfer.block) {
    x.report("tma", i, "the mbarrier is in another block than the target");
    return Step::kNext;
  }
  // With a mask: the same offsets in these blocks.
  const auto mask = mask_operand < 0 ? 1u << home->rank
                                     : static_cast<std::uint32_t>(x.lane_bits(i.operands[mask_operand], lane) & 0xffff);
  if (mask == 0) x.report("tma", i, "a copy to no block");
  for (std::uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const std::uint64_t rank = __builtin_ctz(rest);
    const std::uint64_t block = static_cast<int>(rank) == x.rank ? 0 : (rank + 1) * kMaxShared;
    const Found found = find_mbarrier(x, site, Space::kCluster, block + offset, true);
    if (found.mbarrier == nullptr) continue;
    issue_copy(x, site, found, transfer.shared, transfer.bytes, false, [transfer, found](Execution&, Access) {
      std::uint8_t* const shared = found.block->shared;
      std::memset(shared + transfer.shared, 0, transfer.bytes);  // elements outside of the tensor
      transfer.for_each_piece([&](std::uint32_t target, const std::uint8_t* source, std::uint32_t bytes) {
        std::memcpy(shared + target, source, bytes);
      });
    });
  }
  return Step::kNext;
}

// [target in a block of the cluster], [source in this block], bytes, [mbarrier]
Step bulk_copy_to_block(Execution& x, const Instruction& i) {
  const int lane = issuing_lane(x, i);
  const Site site = x.site(i, lane);
  const Found found = find_mbarrier(x, i, i.operands[3], lane, true);
  std::uint32_t target = 0, source = 0;
  Execution* const block = x.block_of(site, Space::kCluster, x.shared_offset(i, i.operands[0], lane), &target);
  if (found.mbarrier == nullptr || block == nullptr ||
      x.block_of(site, Space::kShared, x.shared_offset(i, i.operands[1], lane), &source) == nullptr) {
    return Step::kNext;
  }
  const auto bytes = static_cast<std::uint32_t>(x.lane_bits(i.operands[2], lane));
  if (bytes % 16 != 0 || target % 16 != 0 || source % 16 != 0) {
    x.report("misaligned", i,
             "a bulk copy of " + std::to_string(bytes) + " bytes from byte " + byte_of(source) + " to byte " +
                 byte_of(target) + " of shared memory: all must be multiples of 16");
  } else if (block != found.block) {
    x.report("tma", i, "the mbarrier is in another block than the target");
  } else if (!x.shared_shadow.contains(target, bytes) || !x.shared_shadow.contains(source, bytes)) {
    x.report("out-of-bounds", i,
             "a bulk copy of " + std::to_string(bytes) + " bytes from byte " + byte_of(source) + " to byte " +
                 byte_of(target) + " of " + std::to_string(x.shared_bytes) + " bytes of shared memory");
  } else if (bytes > 0) {
    if (x.check) x.shared_shadow.begin_read(site, source, static_cast<int>(bytes));
    issue_copy(x, site, found, target, bytes, true, [=](Execution& issuer, Access agent) {
      std::memcpy(block->shared + target, issuer.shared + source, bytes);
      if (!issuer.check) return;
      issuer.shared_shadow.finish_read(agent, source, static_cast<int>(bytes));
      if (block != &issuer) issuer.add_user(agent);
    });
  }
  return Step::kNext;
}

// st.async [a], b, [mbarrier]; red.async [a], b, [mbarrier]: per lane, in a block of the cluster.
// option: bytes of an element, number of them, operation of red or -1
Step store_async(Execution& x, const Instruction& i) {
  const int bytes = i.option[0], count = i.option[1], operation = i.option[2], total = bytes * count;
  const Type type = i.type;
  x.for_each_lane([&](int lane) {
    const Site site = x.site(i, lane);
    const Found found = find_mbarrier(x, i, i.operands[2], lane, false);
    std::uint32_t offset = 0;
    Execution* const block = x.block_of(site, Space::kCluster, x.shared_offset(i, i.operands[0], lane), &offset);
    if (found.mbarrier == nullptr || block == nullptr) return;
    if (block != found.block) {
      x.reporter.add("mbarrier", site, "the mbarrier is in another block than the target");
      return;
    }
    if (!x.shared_shadow.contains(offset, total)) {
      x.reporter.add("out-of-bounds", site,
                     "write of " + std::to_string(total) + " bytes at byte " + byte_of(offset) + " of the block's " +
                         std::to_string(x.shared_bytes) + " bytes of shared memory");
      return;
    }
    if (offset % total != 0) {
      x.reporter.add("misaligned", site,
                     "write of " + std::to_string(total) + " bytes at byte " + byte_of(offset) + " of shared memory");
      return;
    }
    std::array<std::uint64_t, 4> values{};
    const Operand& value = i.operands[1];
    for (int index = 0; index < count; ++index) {
      values[index] = x.lane_bits(value.kind == Operand::Kind::kVector ? value.elements[index] : value, lane);
    }
    if (x.check && operation < 0) block->shared_shadow.begin_copy(site, offset, total, Proxy::kGeneric);
    if (x.check && operation >= 0) block->shared_shadow.begin_reduction(site, offset, total);
    if (block != &x) ++block->incoming;
    auto copy = std::make_shared<BulkCopy>();
    copy->uses_issuer = block == &x;
    copy->move = [=](Execution& issuer) {
      if (block != &issuer) --block->incoming;
      std::uint8_t* target = block->shared + offset;
      for (int index = 0; index < count; ++index, target += bytes) {
        std::uint64_t old = 0;
        std::memcpy(&old, target, bytes);
        const std::uint64_t result =
            operation < 0 ? values[index] : apply_atomic(type, operation, old, values[index], 0);
        std::memcpy(target, &result, bytes);
      }
      const auto entry = block->mbarriers.find(found.offset);
      if (entry == block->mbarriers.end()) return;  // invalidated in the meantime
      const Access agent = complete_bytes({block, found.offset, &entry->second}, total, /*asynchronous_proxy=*/false);
      if (!block->check) return;
      if (operation < 0) {
        block->shared_shadow.finish_copy(agent, offset, total, Proxy::kGeneric);
      } else {
        block->shared_shadow.finish_reduction(agent, offset, total);
      }
      if (block != &issuer) block->add_user(agent);
    };
    x.in_flight.push_back(std::move(copy));
    ++x.activity;
  });
  return Step::kNext;
}

void decode_store_async(Decoder& d) {
  d.take("async");
  d.take_one_of({"weak", "relaxed"});
  d.take("cluster");
  Instruction& instruction = d.instruction;
  instruction.space = d.take_space();
  if (instruction.space != Space::kCluster || !d.take("mbarrier::complete_tx::bytes"))
    d.fail("only .shared::cluster with .mbarrier::complete_tx::bytes is supported");
  const int vector = d.is("st") ? d.take_one_of({"v2", "v4"}) : -1;
  const int operation =
      d.is("st") ? -1 : d.take_one_of({"add", "min", "max", "and", "or", "xor", "", "", "inc", "dec"});
  const Type type = d.take_type();
  const int bytes = bytes_of(type), count = vector < 0 ? 1 : 2 << vector;
  if ((bytes != 4 && bytes != 8) || (d.is("red") && (operation < 0 || is_float(type))))
    d.fail("this form is not supported");
  const Operand& value = d.operand(1);
  if (static_cast<int>(value.kind == Operand::Kind::kVector ? value.elements.size() : 1) != count)
    d.fail("the number of registers does not fit the vector");
  d.address(0);
  d.source(1, bytes);
  d.address(2);
  instruction.type = type;
  instruction.option = {bytes, count, operation};
  instruction.handler = &store_async;
}

template <typename T>
void add_elements(std::uint8_t* target, const std::uint8_t* source, std::uint32_t bytes) {
  for (std::uint32_t at = 0; at < bytes; at += sizeof(T)) {
    T a, b;
    std::memcpy(static_cast<void*>(&a), target + at, sizeof(T));
    std::memcpy(static_cast<void*>(&b), source + at, sizeof(T));
    const T sum = T(a + b);
    std::memcpy(target + at, static_cast<const void*>(&sum), sizeof(T));
  }
}

void add_typed(Type type, std::uint8_t* target, const std::uint8_t* source, std::uint32_t bytes) {
  switch (type) {
    case Type::kF16:
      return add_elements<Half>(target, source, bytes);
    case Type::kBF16:
      return add_elements<BFloat>(target, source, bytes);
    case Type::kF32:
      return add_elements<float>(target, source, bytes);
    default:
      return add_elements<std::uint32_t>(target, source, bytes);
  }
}

Step bulk_store(Execution& x, const Instruction& i) {
  const int lane = issuing_lane(x, i);
  const Site site = x.site(i, lane);
  const bool add = i.option[kAdd];
  const Type type = i.type;
  Transfer transfer{};
  if (!prepare(x, i, lane, add ? Kind::kAtomic : Kind::kWrite, &transfer)) return Step::kNext;
  if (add && transfer.tensor && transfer.map.element_bytes != 4) {
    x.reporter.add("tma", site,
                   "a tensor map does not say here of which type its elements are: only float32 can be added");
    return Step::kNext;
  }
  x.counters.shared_clocks += (transfer.bytes + 127) / 128;
  if (x.check) x.shared_shadow.begin_read(site, transfer.shared, static_cast<int>(transfer.bytes));
  auto copy = std::make_shared<BulkCopy>();
  copy->move = [transfer, add, type](Execution& at) {
    transfer.for_each_piece([&](std::uint32_t source, std::uint8_t* target, std::uint32_t bytes) {
      if (add) {
        add_typed(type, target, at.shared + source, bytes);
      } else {
        std::memcpy(target, at.shared + source, bytes);
      }
    });
  };
  const auto publish = [transfer, add, site](Execution& at) {
    transfer.for_each_piece([&](std::uint32_t, std::uint8_t* address, std::uint32_t bytes) {
      at.access_range(site, address, static_cast<int>(bytes), add ? Kind::kAtomic : Kind::kWrite);
    });
  };
  x.in_flight.push_back(copy);
  x.bulk[x.in_block(site.thread)].open.push_back(
      {copy, site, transfer.shared, static_cast<int>(transfer.bytes), publish});
  ++x.activity;
  return Step::kNext;
}

Step commit_bulk(Execution& x, const Instruction&) {
  x.for_each_lane([&](int lane) {
    BulkGroups& bulk = x.bulk[x.in_block(x.thread_of(lane))];
    BulkGroups::Group group;
    group.stores = std::move(bulk.open);
    bulk.open.clear();
    bulk.groups.push_back(std::move(group));
  });
  return Step::kNext;
}

// option: groups that may stay in flight, only reading is waited for
Step wait_for_bulk(Execution& x, const Instruction& i) {
  x.for_each_lane([&](int lane) {
    std::deque<BulkGroups::Group>& groups = x.bulk[x.in_block(x.thread_of(lane))].groups;
    const std::size_t keep = i.option[0];
    for (std::size_t index = 0; index + keep < groups.size(); ++index) {
      BulkGroups::Group& group = groups[index];
      for (const BulkStore& store : group.stores) {
        x.move(store.copy);
        if (x.check && !group.read)
          x.shared_shadow.finish_read(x.shared_shadow.access_of(store.site), store.offset, store.bytes);
        if (x.check && !i.option[1]) store.publish(x);
      }
      group.read = true;
    }
    while (!i.option[1] && groups.size() > keep) groups.pop_front();
  });
  return Step::kNext;
}

Step do_nothing(Execution&, const Instruction&) { return Step::kNext; }

void decode_bulk(Decoder& d) {
  const bool reduce = d.take("reduce");
  d.take("async");
  d.take("bulk");
  Instruction& instruction = d.instruction;
  if (d.take("commit_group")) {
    instruction.handler = &commit_bulk;
    return;
  }
  if (d.take("wait_group")) {
    if (d.operand(0).kind != Operand::Kind::kConstant) d.fail("the number of groups must be a constant");
    instruction.option = {static_cast<int>(d.operand(0).value), d.take("read")};
    instruction.handler = &wait_for_bulk;
    return;
  }
  const bool prefetch = d.take("prefetch"), tensor = d.take("tensor");
  const std::string rank = tensor ? d.take_prefixed("1d") + d.take_prefixed("2d") + d.take_prefixed("3d") +
                                        d.take_prefixed("4d") + d.take_prefixed("5d")
                                  : "";
  if (tensor && rank.empty()) d.fail("a rank of 1 to 5 is needed");
  if (!d.take_prefixed("im2col").empty()) d.fail("this form is not supported");
  const bool multicast = d.take("multicast::cluster");
  d.take("tile");
  const bool hint = d.take("L2::cache_hint");
  d.take_cache_hints();
  if (prefetch) {
    d.take("global");
    instruction.operands.clear();
    instruction.handler = &do_nothing;
    return;
  }
  const std::vector<std::string>& modifiers = d.statement().modifiers;
  const auto global = std::find(modifiers.begin(), modifiers.end(), "global");
  const auto shared =
      std::find_if(modifiers.begin(), modifiers.end(), [](const std::string& m) { return m.rfind("shared", 0) == 0; });
  if (global == modifiers.end() && !reduce && !tensor && !multicast && d.has("shared::cluster") &&
      d.has("shared::cta")) {
    d.take("shared::cluster");
    d.take("shared::cta");
    instruction.space = Space::kCluster;
    if (!d.take("mbarrier::complete_tx::bytes")) d.fail("this way to complete is not supported");
    for (const std::size_t index : {0, 1, 3}) d.address(index);
    d.source(2, 4);
    instruction.handler = &bulk_copy_to_block;
    return;
  }
  if (global == modifiers.end() || shared == modifiers.end())
    d.fail("only copies between .global and .shared, and from .shared::cta to .shared::cluster, are supported");
  const bool load = shared < global;
  instruction.space = d.take_space();
  d.take("global");
  if (load ? !d.take("mbarrier::complete_tx::bytes") : !d.take("bulk_group"))
    d.fail("this way to complete is not supported");
  if (reduce && !d.take("add")) d.fail("only .add is supported");
  d.take("noftz");
  instruction.type = reduce && !tensor ? d.take_type() : Type::kF32;
  const bool known_type = instruction.type == Type::kF32 || instruction.type == Type::kF16 ||
                          instruction.type == Type::kBF16 || instruction.type == Type::kU32 ||
                          instruction.type == Type::kS32;
  if (!known_type) d.fail("this type is not supported");
  const int target = 0, source = 1;
  instruction.option[kRank] = tensor ? rank[0] - '0' : 0;
  instruction.option[kShared] = load ? target : source;
  instruction.option[kGlobal] = load ? source : target;
  instruction.option[kBytes] = 2;
  instruction.option[kMbarrierOperand] = tensor ? 2 : 3;
  instruction.option[kAdd] = reduce;
  d.address(0);
  d.address(1);
  if (tensor) {
    std::vector<Operand>& parts = d.operand(instruction.option[kGlobal]).elements;
    if (parts.size() != 2 || static_cast<int>(parts[1].elements.size()) != instruction.option[kRank]) {
      d.fail("the number of coordinates does not fit the rank");
    }
    d.place(parts[1], 4);
  } else {
    d.source(2, 4);
  }
  if (load) {
    const int mask = instruction.option[kMbarrierOperand] + 1;
    d.address(mask - 1);
    if (multicast) d.source(mask, 2);
    instruction.option[tensor ? kBytes : kAdd] = multicast ? mask : -1;
  } else if (multicast) {
    d.fail("only loads go to several blocks");
  }
  if (hint) instruction.operands.pop_back();
  instruction.handler = load ? &bulk_load : &bulk_store;
}

// mapa d, a, rank: the address of the same place in another block of the cluster
Step map_to_block(Execution& x, const Instruction& i) {
  const std::uint64_t window = i.space == Space::kGeneric ? x.shared_window : 0;
  x.for_each_lane([&](int lane) {
    const std::uint64_t offset = (x.lane_bits(i.operands[1], lane) - window) % kMaxShared;
    const std::uint64_t rank = x.lane_bits(i.operands[2], lane);
    if (rank >= x.cluster.blocks.size()) {
      x.reporter.add("out-of-bounds", x.site(i, lane),
                     "block " + std::to_string(rank) + " of a cluster of " + std::to_string(x.cluster.blocks.size()));
    }
    x.set_lane_bits(i.operands[0], lane, window + (rank + 1) * kMaxShared + offset);
  });
  return Step::kNext;
}

// getctarank d, a: the rank of the block whose shared memory this is
Step rank_of_address(Execution& x, const Instruction& i) {
  const std::uint64_t window = i.space == Space::kGeneric ? x.shared_window : 0;
  x.for_each_lane([&](int lane) {
    const std::uint64_t slot = (x.lane_bits(i.operands[1], lane) - window) / kMaxShared;
    x.set_lane_bits(i.operands[0], lane, slot == 0 ? x.rank : slot - 1);
  });
  return Step::kNext;
}

}  // namespace

bool decode_bulk_copy(Decoder& d) {
  if (d.is("mbarrier")) return decode_mbarrier(d), true;
  if (d.is("cp")) return decode_bulk(d), true;
  if (d.is("st") || d.is("red")) return decode_store_async(d), true;
  if (d.is("getctarank")) {
    d.instruction.space = d.take_space();
    d.source(0, 4);
    d.source(1, bytes_of(d.take_type()));
    d.instruction.handler = &rank_of_address;
    return true;
  }
  if (d.is("mapa")) {
    d.instruction.space = d.take_space();
    const int bytes = bytes_of(d.take_type());
    d.source(0, bytes);
    d.source(1, bytes);
    d.source(2, 4);
    d.instruction.handler = &map_to_block;
    return true;
  }
  return false;
}

}  // namespace emulator
