// Reports: one per kind and instruction, with the place in the source and both parties.
//
// Kinds: race-raw, race-war, race-waw (shared memory), async-race (a copy or wgmma in flight), uninitialised,
// out-of-bounds, misaligned, read-only, divergence (part of a warp), barrier, deadlock, mbarrier, proxy (a fence
// between ordinary and asynchronous accesses), wgmma, tma, block-race (global memory), leak (exit with copies in
// flight), cluster (a block that another one reaches too early or too late), grid-dependency (a kernel that starts early
// and does not wait for those before it), shuffle, trap; slow (correct, but the
// assembler adds waits).
#pragma once

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"
#include "parser.h"

namespace emulator {

std::string describe(const Dim3& position);  // "(0, 1, 2)"

// A thread (numbered through its cluster) and the statement that it executes.
struct Site {
  int thread;
  const Statement* statement;
};

class Reporter {
 public:
  Reporter(const Module& module, int limit) : module_(module), limit_(limit) {}

  // Reports are about threads of this block, numbered from `first_thread` on.
  void enter_block(Dim3 block, int first_thread) {
    block_ = block;
    first_thread_ = first_thread;
  }
  void add(const char* kind, const Site& site, const std::string& message);
  // The message is made only when the report is new: a defect in a loop would otherwise make thousands of them.
  template <typename F, typename = decltype(std::declval<F>()())>
  void add(const char* kind, const Site& site, F&& message) {
    if (is_new(kind, site)) add(kind, site, std::string(message()));
  }
  // "attention.cu:120", or the line of the PTX where there is no line information.
  std::string place_of(const Statement& statement) const;
  std::vector<Report>& reports() { return reports_; }

 private:
  bool is_new(const char* kind, const Site& site) const {
    return reports_.size() < limit_ && seen_.count({kind, site.statement}) == 0;
  }

  const Module& module_;
  const std::size_t limit_;
  Dim3 block_;
  int first_thread_ = 0;
  std::set<std::pair<std::string, const Statement*>> seen_;
  std::vector<Report> reports_;
};

}  // namespace emulator
