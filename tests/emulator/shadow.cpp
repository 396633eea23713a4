#include "shadow.h"

#include <algorithm>
#include <cstring>

namespace emulator {

// ---- reports

std::string Reporter::place_of(const Statement& statement) const {
  const auto file = module_.files.find(statement.file);
  if (statement.line == 0 || file == module_.files.end()) return "PTX line " + std::to_string(statement.ptx_line);
  return file->second + ":" + std::to_string(statement.line);
}

void Reporter::add(const char* kind, const Site& site, const std::string& message) {
  if (reports_.size() >= limit_ || !seen_.insert({kind, site.statement}).second) return;
  std::string text = "block (" + std::to_string(block_.x) + ", " + std::to_string(block_.y) + ", " +
                     std::to_string(block_.z) + ") thread " + std::to_string(site.thread) + ": " + message;
  if (site.statement != nullptr) {
    text += "; " + place_of(*site.statement) + ": " + site.statement->text.substr(0, 120);
  }
  reports_.push_back({kind, text, site.statement == nullptr ? 0 : site.statement->line});
}

// ---- clocks

void Clocks::reset(int threads) {
  threads_ = threads;
  columns_ = (threads + kMbarriers + (threads + 31) / 32 + 15) / 16 * 16;
  rows_.assign(threads * row_size(), 0);
  fenced_for_device_.assign(threads * columns_, 0);
  for (int thread = 0; thread < threads; ++thread) row(thread)[thread] = 1;
  agent_clocks_.assign(columns_, 0);
}

void Clocks::join(std::uint32_t* row, const std::uint32_t* other) const {
  const std::size_t size = row_size();
  for (std::size_t i = 0; i < size; ++i) row[i] = std::max(row[i], other[i]);
}

void Clocks::fence_for_copies(int thread) {
  std::uint32_t* ordered = row(thread);
  std::uint32_t* fenced = ordered + columns_;
  for (std::size_t i = 0; i < columns_; ++i) fenced[i] = std::max(fenced[i], ordered[i]);
  advance(thread);  // the fence does not cover later accesses
}

void Clocks::fence_for_device(int thread) {
  std::copy_n(row(thread), columns_, &fenced_for_device_[thread * columns_]);
  advance(thread);
}

Access Clocks::next_of_agent(int column) { return {++agent_clocks_[column], static_cast<std::uint32_t>(column), 0}; }

void Clocks::join_agent(std::uint32_t* row, const Access& agent) const {
  for (std::size_t section = 0; section < 2; ++section) {
    std::uint32_t& column = row[section * columns_ + agent.thread];
    column = std::max(column, agent.clock);
  }
}

// ---- shared memory

void SharedShadow::reset(const std::uint8_t* memory, std::size_t bytes, const std::vector<Statement>* code) {
  memory_ = memory;
  code_ = code;
  end_ = kSharedStart + bytes;
  cells_.resize((bytes + 1) / 2);
  ++block_;
  more_reads_.clear();
}

Access SharedShadow::access_of(const Site& site) {
  const std::size_t number = site.statement == nullptr ? 0 : site.statement - code_->data();
  return {clocks_.now(site.thread), static_cast<std::uint32_t>(site.thread), static_cast<std::uint32_t>(number)};
}

std::string SharedShadow::describe(const Access& access) const {
  const int agent = static_cast<int>(access.thread) - clocks_.threads();
  if (agent >= Clocks::kMbarriers) return "a wgmma of warp " + std::to_string(agent - Clocks::kMbarriers);
  if (agent >= 0) return "a bulk copy";
  return "thread " + std::to_string(access.thread) + " at " + reporter_.place_of((*code_)[access.statement]);
}

void SharedShadow::remember_read(Cell& cell, const Access& access) {
  // A write ordered after this read is also ordered after every read before it. Agents have no order of their own; a
  // later read by the same one replaces the earlier.
  const auto replaces = [&](const Access& read) {
    if (static_cast<int>(access.thread) >= clocks_.threads()) return read.thread == access.thread;
    return clocks_.happened_before(read, access.thread);
  };
  for (int i = 0; i < cell.num_reads; ++i) {
    if (!replaces(cell.reads[i])) continue;
    cell.reads[i] = access;
    return;
  }
  if (cell.num_reads < kReaders) {
    cell.reads[cell.num_reads++] = access;
    return;
  }
  cell.more_reads = true;
  std::vector<Access>& more = more_reads_[&cell];
  for (Access& read : more) {
    if (!replaces(read)) continue;
    read = access;
    return;
  }
  more.push_back(access);
}

void SharedShadow::forget_reads(Cell& cell) {
  cell.num_reads = 0;
  if (!cell.more_reads) return;
  more_reads_.erase(&cell);
  cell.more_reads = false;
}

void SharedShadow::read(const Site& site, std::uint32_t offset, int bytes, Proxy proxy) {
  const Access access = access_of(site);
  for (std::uint32_t byte = offset & ~1u; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    if (cell.state & kInFlight) {
      reporter_.add("async-race", site, [&] {
        return at(byte) + ": read while a copy into it, issued by " + describe(cell.write) + ", is in flight";
      });
      continue;
    }
    if (!(cell.state & kWritten)) {
      reporter_.add("uninitialised", site, [&] { return at(byte) + ": read before anything was written there"; });
      continue;
    }
    if ((cell.state & kMbarrier) && proxy == Proxy::kGeneric) {
      reporter_.add("mbarrier", site, [&] { return at(byte) + ": ordinary read of a live mbarrier"; });
    }
    if (!clocks_.happened_before(cell.write, site.thread)) {
      reporter_.add("race-raw", site,
                    [&] { return at(byte) + ": read that is not ordered after the write by " + describe(cell.write); });
    } else if (proxy == Proxy::kAsync && !(cell.state & kByCopy) &&
               !clocks_.fenced_for_copies(cell.write, site.thread)) {
      reporter_.add("proxy", site, [&] {
        return at(byte) + ": asynchronous read of an ordinary write by " + describe(cell.write) +
               " with no fence.proxy.async in between";
      });
    }
    if (proxy == Proxy::kGeneric) remember_read(cell, access);  // an asynchronous read is remembered when it ends
  }
}

void SharedShadow::check_no_reader(const Site& site, std::uint32_t offset, const Cell& cell) {
  if (cell.reads_in_flight != 0) {
    reporter_.add("async-race", site,
                  [&] { return at(offset) + ": written while a wgmma or a bulk store may still read it"; });
  }
  const auto check = [&](const Access& read) {
    if (clocks_.happened_before(read, site.thread)) return;
    reporter_.add("race-war", site,
                  [&] { return at(offset) + ": write that is not ordered after the read by " + describe(read); });
  };
  for (int i = 0; i < cell.num_reads; ++i) check(cell.reads[i]);
  if (!cell.more_reads) return;
  for (const Access& read : more_reads_[&cell]) check(read);
}

void SharedShadow::check_write(const Site& site, std::uint32_t offset, const Cell& cell, bool same_value) {
  if (cell.state & kInFlight) {
    reporter_.add("async-race", site, [&] {
      return at(offset) + ": written while a copy into it, issued by " + describe(cell.write) + ", is in flight";
    });
  } else if ((cell.state & kWritten) && !same_value && !clocks_.happened_before(cell.write, site.thread)) {
    reporter_.add("race-waw", site, [&] {
      return at(offset) + ": write that is not ordered after the write by " + describe(cell.write);
    });
  }
  if (cell.state & kMbarrier)
    reporter_.add("mbarrier", site, [&] { return at(offset) + ": ordinary write over a live mbarrier"; });
  check_no_reader(site, offset, cell);
}

void SharedShadow::write(const Site& site, std::uint32_t offset, int bytes, const void* value) {
  const Access access = access_of(site);
  const auto* source = static_cast<const std::uint8_t*>(value);
  for (std::uint32_t byte = offset & ~1u; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    const std::uint32_t first = std::max(byte, offset), count = std::min(byte + 2, offset + bytes) - first;
    check_write(site, byte, cell, std::memcmp(memory_ + first, source + (first - offset), count) == 0);
    forget_reads(cell);
    cell.write = access;
    cell.state = kWritten;
  }
}

void SharedShadow::atomic(const Site& site, std::uint32_t offset, int bytes) {
  const Access access = access_of(site);
  for (std::uint32_t byte = offset; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    if (!(cell.state & (kWritten | kInFlight))) {
      reporter_.add("uninitialised", site,
                    [&] { return at(byte) + ": atomic operation before anything was written there"; });
    }
    check_write(site, byte, cell, cell.state & kAtomic);
    forget_reads(cell);
    cell.write = access;
    cell.state = kWritten | kAtomic;
  }
}

void SharedShadow::begin_copy(const Site& site, std::uint32_t offset, int bytes, Proxy proxy) {
  const Access access = access_of(site);
  for (std::uint32_t byte = offset & ~1u; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    check_write(site, byte, cell, false);
    if (proxy == Proxy::kAsync && (cell.state & kWritten) && !(cell.state & (kByCopy | kInFlight)) &&
        !clocks_.fenced_for_copies(cell.write, site.thread)) {
      reporter_.add("proxy", site, [&] {
        return at(byte) + ": bulk copy over an ordinary write by " + describe(cell.write) +
               " with no fence.proxy.async in between";
      });
    }
    forget_reads(cell);
    cell.write = access;
    cell.state = kWritten | kInFlight;
  }
}

void SharedShadow::finish_copy(const Access& by, std::uint32_t offset, int bytes, Proxy proxy) {
  for (std::uint32_t byte = offset & ~1u; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    cell.write = by;
    cell.state = proxy == Proxy::kAsync ? kWritten | kByCopy : kWritten;
  }
}

void SharedShadow::begin_read(const Site& site, std::uint32_t offset, int bytes) {
  read(site, offset, bytes, Proxy::kAsync);
  for (std::uint32_t byte = offset & ~1u; byte < offset + bytes; byte += 2) ++cell(byte).reads_in_flight;
}

void SharedShadow::finish_read(const Access& by, std::uint32_t offset, int bytes) {
  for (std::uint32_t byte = offset & ~1u; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    if (cell.reads_in_flight != 0) --cell.reads_in_flight;
    remember_read(cell, by);
  }
}

void SharedShadow::mark_mbarrier(std::uint32_t offset, bool live) {
  for (std::uint32_t byte = offset; byte < offset + 8; byte += 2) {
    std::uint8_t& state = cell(byte).state;
    state = live ? state | kMbarrier : state & ~kMbarrier;
  }
}

void SharedShadow::check_mbarrier(const Site& site, std::uint32_t offset, bool used_by_copy) {
  const Cell& cell = this->cell(offset);
  if (!clocks_.happened_before(cell.write, site.thread)) {
    reporter_.add("race-raw", site, [&] {
      return "mbarrier in " + at(offset) + ": its initialisation by " + describe(cell.write) +
             " is not ordered before this use";
    });
  } else if (used_by_copy && !clocks_.fenced_for_copies(cell.write, site.thread)) {
    reporter_.add("proxy", site, [&] {
      return "mbarrier in " + at(offset) + ": no fence.mbarrier_init or fence.proxy.async between " +
             "its initialisation by " + describe(cell.write) + " and a copy that uses it";
    });
  }
}

// ---- global memory

void GlobalShadow::enter_block(std::uint32_t block) {
  block_ = block;
  foreign_bytes_ = 0;
  acquisitions_.clear();
}

GlobalShadow::Page* GlobalShadow::page_at(const std::uint8_t* address, bool create) {
  const std::size_t number = reinterpret_cast<std::size_t>(address) / kPageBytes;
  if (number == last_page_number_ && (last_page_ != nullptr || !create)) return last_page_;
  const auto found = pages_.find(number);
  last_page_number_ = number;
  last_page_ = found == pages_.end() ? nullptr : found->second.get();
  if (last_page_ == nullptr && create) last_page_ = (pages_[number] = std::make_unique<Page>()).get();
  return last_page_;
}

std::string GlobalShadow::describe(const std::uint8_t* address, const Buffer& buffer) const {
  return buffer.name + " + " + std::to_string(address - buffer.begin);
}

bool GlobalShadow::published(const Cell& cell, int reader, const std::uint8_t* address) {
  for (const Acquisition& acquisition : acquisitions_) {
    const std::uint32_t reached = clocks_.row(reader)[acquisition.thread];
    if (acquisition.clock > reached) continue;
    // All atomic operations on one word are ordered: an access after one of them is after the earlier ones.
    if (cell.atomic && address >= acquisition.address && address < acquisition.address + 4) return true;
    if (!acquisition.complete || acquisition.end > reached) continue;
    for (const Publication& publication : publications_[acquisition.address]) {
      if (publication.block == cell.block_plus_one - 1 && cell.clock <= publication.clocks[cell.thread]) return true;
    }
  }
  return false;
}

void GlobalShadow::read(const Site& site, const std::uint8_t* address, int bytes, const Buffer& buffer) {
  for (const std::uint8_t* byte = address; byte < address + bytes; byte += 2) {
    const Page* page = page_at(byte, false);
    if (page == nullptr) continue;
    const Cell& cell = page->cells[reinterpret_cast<std::size_t>(byte) % kPageBytes / 2];
    if (cell.block_plus_one == 0 || cell.block_plus_one == block_ + 1) continue;
    foreign_bytes_ += 2;
    if (published(cell, site.thread, byte)) continue;
    reporter_.add("block-race", site, [&] {
      return describe(byte, buffer) + ": read of what block " + std::to_string(cell.block_plus_one - 1) + " thread " +
             std::to_string(cell.thread) + " wrote without a fence and an atomic between";
    });
  }
}

void GlobalShadow::write(const Site& site, const std::uint8_t* address, int bytes, const Buffer& buffer, bool atomic,
                         bool in_flight) {
  if (bytes == 1) return;  // a cell is two bytes: neighbours may belong to different blocks
  for (const std::uint8_t* byte = address; byte < address + bytes; byte += 2) {
    Cell& cell = page_at(byte, true)->cells[reinterpret_cast<std::size_t>(byte) % kPageBytes / 2];
    const bool foreign = cell.block_plus_one != 0 && cell.block_plus_one != block_ + 1;
    if (foreign && !(atomic && cell.atomic) && !published(cell, site.thread, byte)) {
      reporter_.add("block-race", site, [&] {
        return describe(byte, buffer) + ": also written by block " + std::to_string(cell.block_plus_one - 1) +
               " thread " + std::to_string(cell.thread) + " without a fence and an atomic between";
      });
    }
    const std::uint32_t clock = in_flight ? ~0u : clocks_.now(site.thread);
    cell = {block_ + 1, clock, static_cast<std::uint16_t>(site.thread), atomic};
  }
}

void GlobalShadow::fence(int thread) {
  for (Acquisition& acquisition : acquisitions_) {
    if (acquisition.thread != thread || acquisition.complete) continue;
    acquisition.complete = true;
    acquisition.end = clocks_.now(thread);  // only accesses ordered after the fence have reached this clock
  }
}

void GlobalShadow::synchronise(int thread, const std::uint8_t* address, Acquire acquire, Release release) {
  if (acquire != Acquire::kNothing) {
    const std::uint32_t clock = clocks_.now(thread);
    acquisitions_.push_back({address, thread, clock, clock, acquire == Acquire::kAtOnce});
  }
  if (release != Release::kNothing) publish(thread, address, release);
  clocks_.advance(thread);  // later accesses are not covered
}

void GlobalShadow::publish(int thread, const std::uint8_t* address, Release release) {
  std::vector<Publication>& publications = publications_[address];
  if (publications.empty() || publications.back().block != block_) {
    publications.push_back({block_, std::vector<std::uint32_t>(clocks_.columns(), 0)});
  }
  std::vector<std::uint32_t>& published = publications.back().clocks;
  const std::uint32_t* covered =
      release == Release::kEverything ? clocks_.row(thread) : clocks_.fenced_for_device(thread);
  for (std::size_t i = 0; i < published.size(); ++i) published[i] = std::max(published[i], covered[i]);
}

}  // namespace emulator
