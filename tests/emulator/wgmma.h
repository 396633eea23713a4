// wgmma while it is in flight: hidden accumulators, operands that are still being read, and the fence rules.
#pragma once

#include <cstdint>
#include <deque>
#include <unordered_map>
#include <vector>

namespace emulator {

struct Statement;

// Of one warp. The registers of an accumulator show NaN until the wait; their real values are kept here.
struct WgmmaState {
  struct Group {
    std::vector<std::uint32_t> accumulators;           // places
    std::vector<std::pair<std::uint32_t, int>> reads;  // runs of shared memory: offset, bytes
  };
  struct Hidden {
    float values[32];
  };
  std::unordered_map<std::uint32_t, Hidden> hidden;  // by place of the register
  Group open;
  std::deque<Group> groups;
  // A step count of the warp, and when registers were last read or written by anything but a wgmma: a wgmma needs a
  // fence after the last such access.
  std::uint64_t step = 1, fence = 0;
  std::unordered_map<std::uint32_t, std::uint64_t> last_read, last_write;
  std::size_t issued = 0;  // position in the trace of the warpgroup
};

// The four warps of a warpgroup must issue the same wgmmas.
struct WarpgroupTrace {
  struct Issue {
    const Statement* statement;
    std::uint64_t a, b;  // descriptors
  };
  std::deque<Issue> issues;  // not yet issued by all four
  std::size_t dropped = 0;
};

}  // namespace emulator
