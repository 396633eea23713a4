#include "shadow.h"

#include <algorithm>
#include <cstring>

namespace emulator {

// ---- reports

std::string describe(const Dim3& position) {
  return "(" + std::to_string(position.x) + ", " + std::to_string(position.y) + ", " + std::to_string(position.z) + ")";
}

std::string Reporter::place_of(const Statement& statement) const {
  const auto file = module_.files.find(statement.file);
  if (statement.line == 0 || file == module_.files.end()) return "PTX line " + std::to_string(statement.ptx_line);
  return file->second + ":" + std::to_string(statement.line);
}

void Reporter::add(const char* kind, const Site& site, const std::string& message) {
  if (reports_.size() >= limit_ || !seen_.insert({kind, site.statement}).second) return;
  std::string text =
      "block " + describe(block_) + " thread " + std::to_string(site.thread - first_thread_) + ": " + message;
  if (site.statement != nullptr) {
    text += "; " + place_of(*site.statement) + ": " + site.statement->text.substr(0, 120);
  }
  reports_.push_back({kind, text, site.statement == nullptr ? 0 : site.statement->line});
}

// ---- clocks

void Clocks::reset(int blocks, int threads_per_block) {
  blocks_ = blocks;
  threads_ = blocks * threads_per_block;
  columns_ = (threads_ + blocks * kMbarriers + (threads_ + 31) / 32 + 15) / 16 * 16;
  rows_.assign(threads_ * row_size(), 0);
  fenced_for_device_.assign(threads_ * columns_, 0);
  for (int thread = 0; thread < threads_; ++thread) row(thread)[thread] = 1;
  agent_clocks_.assign(columns_, 0);
}

std::string Clocks::describe(const Access& access, int observer, const std::string& place) const {
  const int thread = access.thread, in_block = threads_per_block();
  const auto of_block = [&](int block) {
    return observer / in_block == block ? "" : " of block " + std::to_string(block) + " of the cluster";
  };
  int agent = thread - threads_;
  if (agent < 0) return "thread " + std::to_string(thread % in_block) + of_block(thread / in_block) + " at " + place;
  if (agent < blocks_ * kMbarriers) return "a bulk copy";
  agent -= blocks_ * kMbarriers;
  const int warps = in_block / 32;
  return "a wgmma of warp " + std::to_string(agent % warps) + of_block(agent / warps);
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

void Clocks::join_agent(std::uint32_t* row, const Access& agent, bool asynchronous_proxy) const {
  for (std::size_t section = 0; section < (asynchronous_proxy ? 2 : 1); ++section) {
    std::uint32_t& column = row[section * columns_ + agent.thread];
    column = std::max(column, agent.clock);
  }
}

// ---- shared memory

std::vector<std::vector<SharedShadow::Cell>>& SharedShadow::spare_cells() {
  static std::vector<std::vector<Cell>> spare;
  return spare;
}

SharedShadow::SharedShadow(Clocks& clocks, Reporter& reporter) : clocks_(clocks), reporter_(reporter) {
  if (spare_cells().empty()) return;
  cells_ = std::move(spare_cells().back());
  spare_cells().pop_back();
}

SharedShadow::~SharedShadow() {
  constexpr std::size_t kMostSpare = 8;
  if (spare_cells().size() < kMostSpare) spare_cells().push_back(std::move(cells_));
}

void SharedShadow::reset(const std::uint8_t* memory, std::size_t bytes, const std::vector<Statement>* code,
                         const std::string& name) {
  memory_ = memory;
  name_ = name;
  code_ = code;
  end_ = kSharedStart + bytes;
  static std::uint32_t blocks = 0;
  if (cells_.size() < (bytes + 1) / 2) cells_.resize((bytes + 1) / 2);
  block_ = ++blocks;
  more_reads_.clear();
}

Access SharedShadow::access_of(const Site& site) {
  const std::size_t number = site.statement == nullptr ? 0 : site.statement - code_->data();
  return {clocks_.now(site.thread), static_cast<std::uint32_t>(site.thread), static_cast<std::uint32_t>(number)};
}

std::string SharedShadow::describe(const Access& access, const Site& observer) const {
  return clocks_.describe(access, observer.thread, reporter_.place_of((*code_)[access.statement]));
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
        return at(byte) + ": read while a copy into it, issued by " + describe(cell.write, site) + ", is in flight";
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
      reporter_.add("race-raw", site, [&] {
        return at(byte) + ": read that is not ordered after the write by " + describe(cell.write, site);
      });
    } else if (proxy == Proxy::kAsync && !(cell.state & kByCopy) &&
               !clocks_.fenced_for_copies(cell.write, site.thread)) {
      reporter_.add("proxy", site, [&] {
        return at(byte) + ": asynchronous read of an ordinary write by " + describe(cell.write, site) +
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
                  [&] { return at(offset) + ": write that is not ordered after the read by " + describe(read, site); });
  };
  for (int i = 0; i < cell.num_reads; ++i) check(cell.reads[i]);
  if (!cell.more_reads) return;
  for (const Access& read : more_reads_[&cell]) check(read);
}

void SharedShadow::check_write(const Site& site, std::uint32_t offset, const Cell& cell, bool same_value) {
  if (cell.state & kInFlight) {
    reporter_.add("async-race", site, [&] {
      return at(offset) + ": written while a copy into it, issued by " + describe(cell.write, site) + ", is in flight";
    });
  } else if ((cell.state & kWritten) && !same_value && !clocks_.happened_before(cell.write, site.thread)) {
    reporter_.add("race-waw", site, [&] {
      return at(offset) + ": write that is not ordered after the write by " + describe(cell.write, site);
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
        return at(byte) + ": bulk copy over an ordinary write by " + describe(cell.write, site) +
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

void SharedShadow::begin_reduction(const Site& site, std::uint32_t offset, int bytes) {
  const Access access = access_of(site);
  for (std::uint32_t byte = offset; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    if (!(cell.state & kWritten)) {
      reporter_.add("uninitialised", site,
                    [&] { return at(byte) + ": atomic operation before anything was written there"; });
    }
    if (!(cell.state & kReduced)) check_write(site, byte, cell, false);
    forget_reads(cell);
    cell.write = access;
    cell.state = kWritten | kInFlight | kReduced;
    ++cell.reductions_in_flight;
  }
}

void SharedShadow::finish_reduction(const Access& by, std::uint32_t offset, int bytes) {
  for (std::uint32_t byte = offset; byte < offset + bytes; byte += 2) {
    Cell& cell = this->cell(byte);
    cell.write = by;
    if (--cell.reductions_in_flight == 0) cell.state = kWritten | kReduced;
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

void SharedShadow::check_mbarrier(const Site& site, std::uint32_t offset, bool used_by_copy, bool known,
                                  const Access& fence) {
  const Cell& cell = this->cell(offset);
  if (known) return;
  const bool fenced = fence.clock != 0 && clocks_.happened_before(fence, site.thread);
  if (!clocks_.happened_before(cell.write, site.thread)) {
    reporter_.add("race-raw", site, [&] {
      return "mbarrier in " + at(offset) + ": its initialisation by " + describe(cell.write, site) +
             " is not ordered before this use";
    });
  } else if (used_by_copy && !fenced && !clocks_.fenced_for_copies(cell.write, site.thread)) {
    reporter_.add("proxy", site, [&] {
      return "mbarrier in " + at(offset) + ": no fence.mbarrier_init or fence.proxy.async between " +
             "its initialisation by " + describe(cell.write, site) + " and a copy that uses it";
    });
  }
}

// ---- global memory

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

std::string GlobalShadow::describe(const Use& use, const Knowledge& here) const {
  const int in_block = here.clocks.threads_per_block();
  const std::string cluster = std::to_string(use.cluster_plus_one - 1);
  const std::string thread = " thread " + std::to_string(use.thread % in_block);
  if (here.clocks.blocks() == 1) return "block " + cluster + thread;
  return "block " + std::to_string(use.thread / in_block) + " of cluster " + cluster + thread;
}

bool GlobalShadow::is_foreign(const Use& use, const Knowledge& here, int thread) {
  if (use.cluster_plus_one != here.cluster + 1) return use.cluster_plus_one != 0;
  if (here.clocks.blocks() == 1) return false;
  const int in_block = here.clocks.threads_per_block();
  return use.thread / in_block != thread / in_block;
}

namespace {

// Whether one of these publications releases the access.
bool released(const Covered& covered, std::uint32_t cluster, int thread, std::uint32_t clock) {
  for (std::size_t index = covered.count; index-- > 0;) {
    const Publication& publication = covered.word->made[index];
    if (publication.cluster == cluster && clock <= publication.clocks[thread]) return true;
  }
  return false;
}

// The same for these publications and all others that they build on.
bool released_before(std::vector<Covered> open, std::uint32_t cluster, int thread, std::uint32_t clock) {
  std::unordered_map<const Publications*, std::size_t> seen;
  while (!open.empty()) {
    const Covered next = open.back();
    open.pop_back();
    if (released(next, cluster, thread, clock)) return true;
    std::size_t& done = seen[next.word];
    for (std::size_t index = done; index < next.count; ++index) {
      const Publication& publication = next.word->made[index];
      open.insert(open.end(), publication.acquired.begin(), publication.acquired.end());
    }
    done = std::max(done, next.count);
  }
  return false;
}

}  // namespace

bool GlobalShadow::happened_before(const Use& use, const Knowledge& here, int thread, const std::uint8_t* address) {
  const std::uint32_t* row = here.clocks.row(thread);
  const std::uint32_t cluster = use.cluster_plus_one - 1;
  if (cluster == here.cluster && use.clock <= row[use.thread]) return true;
  std::vector<Covered> acquired;
  for (const Knowledge::Acquisition& acquisition : here.acquisitions_) {
    const std::uint32_t reached = row[acquisition.thread];
    if (acquisition.clock > reached) continue;
    // All atomic operations on one word are ordered: an access after one of them is after the earlier ones.
    if (use.atomic && address >= acquisition.address && address < acquisition.address + 4) return true;
    if (!acquisition.complete || acquisition.end > reached) continue;
    if (released(acquisition.covered, cluster, use.thread, use.clock)) return true;
    acquired.push_back(acquisition.covered);
  }
  return !acquired.empty() && released_before(std::move(acquired), cluster, use.thread, use.clock);
}

// Of each block the last read, of sixteen blocks at most.
void GlobalShadow::remember_read(Cell& cell, const Use& use, const Knowledge& here) {
  constexpr std::size_t kMostReads = 16;
  const auto replaces = [&](const Use& earlier) {
    return earlier.cluster_plus_one == 0 || !is_foreign(earlier, here, use.thread);
  };
  if (replaces(cell.read)) {
    cell.read = use;
    return;
  }
  cell.more_reads = true;
  std::vector<Use>& more = more_reads_[&cell];
  const auto found = std::find_if(more.begin(), more.end(), replaces);
  if (found != more.end()) {
    *found = use;
  } else if (more.size() < kMostReads) {
    more.push_back(use);
  }
}

void GlobalShadow::check_no_reader(const Cell& cell, const Knowledge& writer, const Site& site,
                                   const std::uint8_t* address, const Buffer& buffer) {
  const auto check = [&](const Use& read) {
    if (!is_foreign(read, writer, site.thread) || happened_before(read, writer, site.thread, address)) return;
    reporter_.add("block-race", site, [&] {
      return describe(address, buffer) + ": overwrites what " + describe(read, writer) +
             " read, and nothing orders the write after that";
    });
  };
  check(cell.read);
  if (!cell.more_reads) return;
  for (const Use& read : more_reads_[&cell]) check(read);
}

int GlobalShadow::read(Knowledge& reader, const Site& site, const std::uint8_t* address, int bytes,
                       const Buffer& buffer, bool strong) {
  int foreign_bytes = 0;
  const bool remembered = buffer.writable && !strong && bytes > 1;
  for (const std::uint8_t* byte = address; byte < address + bytes; byte += 2) {
    Page* page = page_at(byte, remembered);
    if (page == nullptr) continue;
    Cell& cell = page->cells[reinterpret_cast<std::size_t>(byte) % kPageBytes / 2];
    if (is_foreign(cell.write, reader, site.thread)) {
      foreign_bytes += 2;
      if (!happened_before(cell.write, reader, site.thread, byte)) {
        reporter_.add("block-race", site, [&] {
          return describe(byte, buffer) + ": read of what " + describe(cell.write, reader) +
                 " wrote without a fence and an atomic between";
        });
      }
    }
    if (!remembered) continue;
    const auto thread = static_cast<std::uint16_t>(site.thread);
    remember_read(cell, {reader.cluster + 1, reader.clocks.now(site.thread), thread, false}, reader);
  }
  return foreign_bytes;
}

void GlobalShadow::write(Knowledge& writer, const Site& site, const std::uint8_t* address, int bytes,
                         const Buffer& buffer, bool atomic, bool in_flight) {
  if (bytes == 1) return;  // a cell is two bytes: neighbours may belong to different blocks
  for (const std::uint8_t* byte = address; byte < address + bytes; byte += 2) {
    Cell& cell = page_at(byte, true)->cells[reinterpret_cast<std::size_t>(byte) % kPageBytes / 2];
    if (is_foreign(cell.write, writer, site.thread) && !(atomic && cell.write.atomic) &&
        !happened_before(cell.write, writer, site.thread, byte)) {
      reporter_.add("block-race", site, [&] {
        return describe(byte, buffer) + ": also written by " + describe(cell.write, writer) +
               " without a fence and an atomic between";
      });
    }
    if (cell.read.cluster_plus_one != 0) check_no_reader(cell, writer, site, byte, buffer);
    if (cell.more_reads) more_reads_.erase(&cell);
    const std::uint32_t clock = in_flight ? ~0u : writer.clocks.now(site.thread);
    cell = {{writer.cluster + 1, clock, static_cast<std::uint16_t>(site.thread), atomic}, {}, false};
  }
}

void GlobalShadow::fence(Knowledge& cluster, int thread) {
  for (Knowledge::Acquisition& acquisition : cluster.acquisitions_) {
    if (acquisition.thread != thread || acquisition.complete) continue;
    acquisition.complete = true;
    acquisition.end = cluster.clocks.now(thread);  // only accesses ordered after the fence have reached this clock
  }
}

void GlobalShadow::synchronise(Knowledge& cluster, int thread, const std::uint8_t* address, Acquire acquire,
                               Release release) {
  Publications& word = publications_[address];
  if (acquire != Acquire::kNothing) {
    word.acquired = word.made.size();
    const bool at_once = acquire == Acquire::kAtOnce;
    // A thread that polls the word learns nothing new.
    const auto covers = [&](const Knowledge::Acquisition& earlier) {
      return earlier.address == address && earlier.thread == thread && earlier.covered.count == word.made.size() &&
             (earlier.complete || !at_once);
    };
    std::vector<Knowledge::Acquisition>& acquisitions = cluster.acquisitions_;
    if (std::none_of(acquisitions.begin(), acquisitions.end(), covers)) {
      const std::uint32_t clock = cluster.clocks.now(thread);
      acquisitions.push_back({address, {&word, word.made.size()}, thread, clock, clock, at_once});
    }
  }
  if (release != Release::kNothing) publish(cluster, thread, word, release);
  cluster.clocks.advance(thread);  // later accesses are not covered
}

void GlobalShadow::publish(const Knowledge& cluster, int thread, Publications& word, Release release) {
  Clocks& clocks = cluster.clocks;
  std::vector<Publication>& made = word.made;
  if (made.empty() || made.back().cluster != cluster.cluster || word.acquired == made.size()) {
    made.push_back({cluster.cluster, std::vector<std::uint32_t>(clocks.columns(), 0), {}});
  }
  Publication& publication = made.back();
  const std::uint32_t* covered =
      release == Release::kEverything ? clocks.row(thread) : clocks.fenced_for_device(thread);
  for (std::size_t i = 0; i < publication.clocks.size(); ++i) {
    publication.clocks[i] = std::max(publication.clocks[i], covered[i]);
  }
  for (const Knowledge::Acquisition& acquisition : cluster.acquisitions_) {
    if (!acquisition.complete || acquisition.end > covered[acquisition.thread]) continue;
    const Covered& added = acquisition.covered;
    const bool known = std::any_of(publication.acquired.begin(), publication.acquired.end(), [&](const Covered& each) {
      return each.word == added.word && each.count >= added.count;
    });
    if (!known) publication.acquired.push_back(added);
  }
}

}  // namespace emulator
