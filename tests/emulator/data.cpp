// Loads, stores, atomic operations, and cp.async.
#include <algorithm>

#include "atomic.h"
#include "decode.h"
#include "numbers.h"

namespace emulator {
namespace {

const std::vector<Operand>& elements_of(const Operand& operand, std::vector<Operand>* single) {
  if (operand.kind == Operand::Kind::kVector) return operand.elements;
  *single = {operand};
  return *single;
}

// What the lanes of a warp read from words that other blocks may change.
struct Polled {
  const std::uint8_t* address = nullptr;  // the last one
  std::uint64_t values = 0;               // of all lanes

  void add(const std::uint8_t* from, std::uint64_t value) {
    address = from;
    values = values * 0x9e3779b97f4a7c15 + value + reinterpret_cast<std::uint64_t>(from);
  }
};

// ld d, [a]; option: bytes of an element, number of them, sign extension, relaxed or acquire at device scope, acquire
Step load(Execution& x, const Instruction& i) {
  const int bytes = i.option[0], count = i.option[1];
  const bool vector = i.operands[0].kind == Operand::Kind::kVector;
  Polled polled;
  x.for_each_lane([&](int lane) {
    const std::uint64_t address = x.address_of(i.operands[1], lane);
    const Site site = x.site(i, lane);
    const bool strong = i.option[3] && !x.in_shared_space(i, address);
    if (strong) {
      const Acquire acquire = i.option[4] ? Acquire::kAtOnce : Acquire::kWithNextFence;
      x.synchronise(site.thread, reinterpret_cast<std::uint8_t*>(address), acquire, Release::kNothing);
    }
    const Kind kind = strong ? Kind::kStrongRead : Kind::kRead;
    const std::uint8_t* source = x.access(site, i.space, address, bytes * count, kind);
    if (source == nullptr) return;
    for (int index = 0; index < count; ++index) {
      std::uint64_t bits = 0;
      std::memcpy(&bits, source + index * bytes, bytes);
      if (i.may_poll && !x.in_shared_space(i, address)) polled.add(source, bits);
      if (i.option[2]) {
        const int spare = 64 - 8 * bytes;
        bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(bits << spare) >> spare);
      }
      x.set_lane_bits(vector ? i.operands[0].elements[index] : i.operands[0], lane, bits);
    }
  });
  if (polled.address != nullptr) x.poll(i, polled.address, polled.values);
  return Step::kNext;
}

// st [a], b; option: as above, release at device scope, no data race with other such accesses
Step store(Execution& x, const Instruction& i) {
  const int bytes = i.option[0], count = i.option[1];
  const bool vector = i.operands[1].kind == Operand::Kind::kVector;
  x.for_each_lane([&](int lane) {
    alignas(16) std::uint8_t value[64];
    for (int index = 0; index < count; ++index) {
      const std::uint64_t bits = x.lane_bits(vector ? i.operands[1].elements[index] : i.operands[1], lane);
      std::memcpy(value + index * bytes, &bits, bytes);
    }
    const std::uint64_t address = x.address_of(i.operands[0], lane);
    const Site site = x.site(i, lane);
    const bool strong = i.option[4] && !x.in_shared_space(i, address);
    const Kind kind = strong ? Kind::kAtomic : Kind::kWrite;
    std::uint8_t* target = x.access(site, i.space, address, bytes * count, kind, value);
    if (target == nullptr) return;
    std::memcpy(target, value, bytes * count);
    if (strong) {
      x.grid.idle_polls = 0;
      const Release release = i.option[3] ? Release::kEverything : Release::kWhatWasFenced;
      x.synchronise(site.thread, target, Acquire::kNothing, release);
    }
  });
  return Step::kNext;
}

void decode_load_store(Decoder& d) {
  const bool is_load = d.is("ld") || d.is("ldu");
  const int order = d.take_one_of({"weak", "volatile", "relaxed", "acquire", "release"});
  const int scope = d.take_one_of({"cta", "cluster", "gpu", "sys"});
  d.instruction.space = d.take_space();
  d.take_cache_hints();
  const int vector = d.take_one_of({"v2", "v4", "v8"});
  const Type type = d.take_type();
  const int bytes = bytes_of(type), count = vector < 0 ? 1 : 2 << vector;
  if (bytes == 0 || bytes > 8 || bytes * count > 32) d.fail("this width is not supported here");
  const std::size_t value = is_load ? 0 : 1;
  Operand& registers = d.operand(value);
  const std::size_t given = registers.kind == Operand::Kind::kVector ? registers.elements.size() : 1;
  if (static_cast<int>(given) != count) d.fail("the number of registers does not fit the vector");
  if (registers.kind == Operand::Kind::kVector) {
    for (Operand& element : registers.elements) d.place_any_width(element, bytes);
  } else {
    d.place_any_width(registers, bytes);
  }
  d.address(1 - value);
  const bool device = scope >= 2, strong = order >= 2 && device;
  d.instruction.type = type;
  d.instruction.may_poll =
      is_load && order >= 1 && (d.instruction.space == Space::kGlobal || d.instruction.space == Space::kGeneric);
  if (is_load) {
    // A relaxed load that polls a flag is followed by a fence: both together are an acquire.
    d.instruction.option = {bytes, count, is_signed(type), strong, strong && order == 3};
  } else {
    d.instruction.option = {bytes, count, 0, order == 4 && device, strong};
  }
  d.instruction.handler = is_load ? &load : &store;
}

// ---- atom and red

template <typename T>
T apply_integer(int operation, T old, T b, T c) {
  switch (operation) {
    case kAdd:
      return old + b;
    case kMin:
      return std::min(old, b);
    case kMax:
      return std::max(old, b);
    case kAnd:
      return old & b;
    case kOr:
      return old | b;
    case kXor:
      return old ^ b;
    case kExchange:
      return b;
    case kCompareAndSwap:
      return old == b ? c : old;
    case kIncrement:
      return old >= b ? 0 : old + 1;
    default:
      return old == 0 || old > b ? b : old - 1;
  }
}

}  // namespace

std::uint64_t apply_atomic(Type type, int operation, std::uint64_t old, std::uint64_t b, std::uint64_t c) {
  const auto add_halves = [&](auto example, int shift) {
    using T = decltype(example);
    const T sum(float(bits_as<T>(std::uint16_t(old >> shift))) + float(bits_as<T>(std::uint16_t(b >> shift))));
    return std::uint64_t{bits_as<std::uint16_t>(sum)} << shift;
  };
  switch (type) {
    case Type::kF32:
      return bits_as<std::uint32_t>(bits_as<float>(std::uint32_t(old)) + bits_as<float>(std::uint32_t(b)));
    case Type::kF64:
      return bits_as<std::uint64_t>(bits_as<double>(old) + bits_as<double>(b));
    case Type::kF16:
      return add_halves(Half(), 0);
    case Type::kBF16:
      return add_halves(BFloat(), 0);
    case Type::kF16x2:
      return add_halves(Half(), 0) | add_halves(Half(), 16);
    case Type::kBF16x2:
      return add_halves(BFloat(), 0) | add_halves(BFloat(), 16);
    case Type::kS32:
      return std::uint32_t(apply_integer<std::int32_t>(operation, std::int32_t(old), std::int32_t(b), std::int32_t(c)));
    case Type::kS64:
      return apply_integer<std::int64_t>(operation, std::int64_t(old), std::int64_t(b), std::int64_t(c));
    case Type::kU64:
    case Type::kB64:
      return apply_integer<std::uint64_t>(operation, old, b, c);
    default:
      return apply_integer<std::uint32_t>(operation, std::uint32_t(old), std::uint32_t(b), std::uint32_t(c));
  }
}

namespace {

// [a], b, c follow the result, which red does not have.
// option: operation, number of elements, first operand, releases, synchronises (an integer may be a semaphore),
// acquires
Step atomic(Execution& x, const Instruction& i) {
  const std::size_t first = i.option[2];
  const int bytes = bytes_of(i.type), count = i.option[1];
  std::vector<Operand> single_result, single_value;
  const std::vector<Operand>& values = elements_of(i.operands[first + 1], &single_value);
  const std::vector<Operand>* results = first == 0 ? nullptr : &elements_of(i.operands[0], &single_result);
  Polled polled;
  bool changed = false;
  x.for_each_lane([&](int lane) {
    const Site site = x.site(i, lane);
    const std::uint64_t address = x.address_of(i.operands[first], lane);
    std::uint8_t* target = x.access(site, i.space, address, bytes * count, Kind::kAtomic);
    if (target == nullptr) return;
    const bool global = !x.in_shared_space(i, address);
    for (int index = 0; index < count; ++index) {
      std::uint64_t old = 0;
      std::memcpy(&old, target + index * bytes, bytes);
      const std::uint64_t c = i.option[0] == kCompareAndSwap ? x.lane_bits(i.operands[first + 2], lane) : 0;
      const std::uint64_t result = apply_atomic(i.type, i.option[0], old, x.lane_bits(values[index], lane), c);
      std::memcpy(target + index * bytes, &result, bytes);
      changed |= global && std::memcmp(&result, &old, bytes) != 0;
      if (i.may_poll && global) polled.add(target, old);
      if (results != nullptr) x.set_lane_bits((*results)[index], lane, old);
    }
    if (i.option[4] && global) {
      x.synchronise(site.thread, target, i.option[5] ? Acquire::kAtOnce : Acquire::kWithNextFence,
                    i.option[3] ? Release::kEverything : Release::kWhatWasFenced);
    }
  });
  if (changed) {
    x.grid.idle_polls = 0;
  } else if (polled.address != nullptr) {
    x.poll(i, polled.address, polled.values);
  }
  return Step::kNext;
}

void decode_atomic(Decoder& d) {
  const int order = d.take_one_of({"relaxed", "acquire", "release", "acq_rel"});
  const int scope = d.take_one_of({"cta", "cluster", "gpu", "sys"});
  d.instruction.space = d.take_space();
  const int operation = d.take_one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  d.take("noftz");
  d.take_cache_hints();
  const int vector = d.take_one_of({"v2", "v4", "v8"});
  const Type type = d.take_type();
  const bool floating = is_float(type);
  if (operation < 0 || (floating && operation != kAdd) || (vector >= 0 && !floating))
    d.fail("this form is not supported");
  const std::size_t first = d.is("atom") ? 1 : 0;
  const int bytes = bytes_of(type), count = vector < 0 ? 1 : 2 << vector;
  if (bytes < 2) d.fail("this width is not supported here");
  if (first == 1) d.source(0, bytes);
  d.address(first);
  d.source(first + 1, bytes);
  if (operation == kCompareAndSwap) d.source(first + 2, bytes);
  const Operand& value = d.operand(first + 1);
  if (static_cast<int>(value.kind == Operand::Kind::kVector ? value.elements.size() : 1) != count) {
    d.fail("the number of registers does not fit the vector");
  }
  d.instruction.type = type;
  const bool device = scope < 0 || scope >= 2;  // without a scope: the device
  const bool acquires = device && (order == 1 || order == 3), releases = device && order >= 2;
  d.instruction.option = {operation, count, static_cast<int>(first), releases, !floating && device, acquires};
  d.instruction.may_poll =
      first == 1 && (d.instruction.space == Space::kGlobal || d.instruction.space == Space::kGeneric);
  d.instruction.handler = &atomic;
}

// ---- addresses

// cvta.space d, a: to a generic address; cvta.to.space: back. option: bytes, to
Step convert_address(Execution& x, const Instruction& i) {
  x.for_each_lane([&](int lane) {
    std::uint64_t address = x.lane_bits(i.operands[1], lane), shift = 0;
    if (i.space == Space::kShared || i.space == Space::kCluster) shift = x.shared_window;
    if (i.space == Space::kLocal) {
      shift = reinterpret_cast<std::uint64_t>(x.local.data()) +
              std::uint64_t{x.code.body.local_bytes} * x.in_block(x.thread_of(lane));
    }
    x.set_lane_bits(i.operands[0], lane, i.option[1] ? address - shift : address + shift);
  });
  return Step::kNext;
}

// isspacep.space p, a
Step is_in_space(Execution& x, const Instruction& i) {
  std::uint32_t bits = 0;
  x.for_each_lane([&](int lane) {
    const std::uint64_t address = x.lane_bits(i.operands[1], lane);
    const std::uint64_t local = address - reinterpret_cast<std::uint64_t>(x.local.data());
    const bool shared = x.is_shared(address), in_local = local < x.local.size();
    const bool own = address - x.shared_window < kMaxShared;
    const bool inside = i.space == Space::kShared    ? own
                        : i.space == Space::kCluster ? shared
                        : i.space == Space::kLocal   ? in_local
                                                     : !shared && !in_local;
    bits |= static_cast<std::uint32_t>(inside) << lane;
  });
  x.set_predicate(i.operands[0], bits);
  return Step::kNext;
}

Step do_nothing(Execution&, const Instruction&) { return Step::kNext; }

// createpolicy: its result only goes into cache hints
Step create_policy(Execution& x, const Instruction& i) {
  x.for_each_lane([&](int lane) { x.set_lane_bits(i.operands[0], lane, 0); });
  return Step::kNext;
}

// ---- cp.async

// [target], [source], bytes; option: bytes, operand that has the bytes to read (-1: all), it is "ignore"
Step copy_async(Execution& x, const Instruction& i) {
  const int bytes = i.option[0];
  x.for_each_lane([&](int lane) {
    const Site site = x.site(i, lane);
    int source_bytes = bytes;
    if (i.option[1] >= 0) {
      const Operand& operand = i.operands[i.option[1]];
      if (i.option[2]) {
        source_bytes = x.predicate(operand) >> lane & 1 ? 0 : bytes;
      } else {
        source_bytes = static_cast<int>(x.lane_bits(operand, lane));
      }
    }
    if (source_bytes < 0 || source_bytes > bytes) {
      x.reporter.add("out-of-bounds", site,
                     "cp.async of " + std::to_string(bytes) + " bytes asks for " + std::to_string(source_bytes) +
                         " bytes of the source");
      return;
    }
    const std::uint64_t address = x.address_of(i.operands[1], lane);
    const std::uint8_t* source = nullptr;
    if (source_bytes > 0) {
      if (address % bytes != 0) {
        x.reporter.add("misaligned", site,
                       "cp.async of " + std::to_string(bytes) + " bytes from an address that is " +
                           std::to_string(address % bytes) + " bytes off");
        return;
      }
      auto* global = reinterpret_cast<std::uint8_t*>(address);
      if (!x.access_range(site, global, source_bytes, Kind::kRead)) return;
      source = global;
    }
    const std::uint32_t target = x.shared_offset(i, i.operands[0], lane);
    if (target % bytes != 0) {
      x.reporter.add("misaligned", site,
                     "cp.async of " + std::to_string(bytes) + " bytes to byte " +
                         std::to_string(target - kSharedStart) + " of shared memory");
      return;
    }
    if (!x.shared_shadow.contains(target, bytes)) {
      x.access(site, Space::kShared, target, bytes, Kind::kRead);  // reports an access outside
      return;
    }
    x.occupy_banks(site, target, bytes);
    if (x.check) x.shared_shadow.begin_copy(site, target, bytes, Proxy::kGeneric);
    std::memset(x.shared + target, 0xff, bytes);
    x.copies[x.in_block(site.thread)].open.push_back({target, source, bytes, source_bytes});
  });
  return Step::kNext;
}

Step commit_copies(Execution& x, const Instruction&) {
  x.for_each_lane([&](int lane) {
    CopyGroups& copies = x.copies[x.in_block(x.thread_of(lane))];
    copies.groups.push_back(std::move(copies.open));
    copies.open.clear();
  });
  return Step::kNext;
}

// option: groups that may stay in flight; -1: none, and it waits for uncommitted copies too
Step wait_for_copies(Execution& x, const Instruction& i) {
  x.for_each_lane([&](int lane) {
    CopyGroups& copies = x.copies[x.in_block(x.thread_of(lane))];
    if (i.option[0] < 0) {
      copies.groups.push_back(std::move(copies.open));
      copies.open.clear();
    }
    const std::size_t keep = std::max(i.option[0], 0);
    const Access by = x.shared_shadow.access_of(x.site(i, lane));
    while (copies.groups.size() > keep) {
      for (const CopyGroups::Copy& copy : copies.groups.front()) {
        std::uint8_t* target = x.shared + copy.target;
        if (copy.source_bytes > 0) std::memcpy(target, copy.source, copy.source_bytes);
        std::memset(target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
        if (x.check) x.shared_shadow.finish_copy(by, copy.target, copy.bytes, Proxy::kGeneric);
      }
      copies.groups.pop_front();
    }
  });
  return Step::kNext;
}

void decode_copy_async(Decoder& d) {
  d.take("async");
  Instruction& instruction = d.instruction;
  if (d.take("commit_group")) {
    instruction.handler = &commit_copies;
  } else if (d.take("wait_all")) {
    instruction.option[0] = -1;
    instruction.handler = &wait_for_copies;
  } else if (d.take("wait_group")) {
    if (d.operand(0).kind != Operand::Kind::kConstant) d.fail("the number of groups must be a constant");
    instruction.option[0] = static_cast<int>(d.operand(0).value);
    instruction.handler = &wait_for_copies;
  } else {
    const bool bypass = d.take_one_of({"ca", "cg"}) == 1;
    instruction.space = d.take_space();
    if (!d.take("global")) d.fail("the source must be .global");
    const bool hint = d.take("L2::cache_hint");
    d.take_cache_hints();
    d.address(0);
    d.address(1);
    if (d.operand(2).kind != Operand::Kind::kConstant) d.fail("the number of bytes must be a constant");
    const int bytes = static_cast<int>(d.operand(2).value);
    if (bytes != 16 && (bypass || (bytes != 4 && bytes != 8))) d.fail("this number of bytes is not possible");
    instruction.option = {bytes, -1, 0};
    const std::size_t further = d.num_operands() - 3 - (hint ? 1 : 0);
    if (further == 1) {
      const bool ignore = d.operand(3).kind == Operand::Kind::kRegister && d.operand(3).width == 0;
      d.source(3, ignore ? 0 : 4);
      instruction.option = {bytes, 3, ignore};
    }
    instruction.handler = &copy_async;
  }
}

}  // namespace

bool decode_data_movement(Decoder& d) {
  if (!d.is("cp") && d.has("async")) return false;
  if (d.is("ld") || d.is("ldu") || d.is("st")) return decode_load_store(d), true;
  if (d.is("atom") || d.is("red")) return decode_atomic(d), true;
  if (d.is("cp") && std::find(d.statement().modifiers.begin(), d.statement().modifiers.end(), "bulk") ==
                        d.statement().modifiers.end()) {
    return decode_copy_async(d), true;
  }
  if (d.is("cvta") || d.is("isspacep")) {
    const bool to = d.take("to");
    d.instruction.space = d.take_space();
    d.instruction.option[1] = to;
    if (d.is("cvta")) {
      const int bytes = bytes_of(d.take_type());
      d.source(0, bytes);
      d.source(1, bytes);
      d.instruction.handler = &convert_address;
    } else {
      d.source(0, 0);
      d.source(1, 8);
      d.instruction.handler = &is_in_space;
    }
    return true;
  }
  // Hints that no kernel can observe.
  if (d.is("prefetch") || d.is("prefetchu")) {
    d.take_space();
    d.take_one_of({"L1", "L2"});
    d.take("tensormap");
    d.take_cache_hints();
    d.instruction.operands.clear();
    d.instruction.handler = &do_nothing;
    return true;
  }
  if (d.is("createpolicy")) {
    d.take("fractional");
    d.take_cache_hints();
    d.take_type();
    d.source(0, 8);
    d.instruction.operands.resize(1);
    d.instruction.handler = &create_policy;
    return true;
  }
  return false;
}

}  // namespace emulator
