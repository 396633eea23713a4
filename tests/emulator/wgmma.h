// wgmma in flight: accumulators that must not be read, operands that are still being read, and the rules for fences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

namespace emulator {

struct Statement;

// Of one warp. Registers are numbered by their row. The registers of an accumulator show NaN until the wait; their real
// values are kept here. A wgmma needs a fence after the last access to its registers by any other instruction. A mov
// is no access: compilers rename registers between iterations, so the copy of an accumulator in flight is in flight
// too. But a mov that sets an accumulator behind the fence is reported as slow: where ptxas cannot rename it away, it
// adds a fence or a wait. A mov of a constant is not, because ptxas places it anew.
struct WgmmaState {
  struct Values {
    float lanes[32];
  };
  struct Register {
    std::shared_ptr<Values> hidden;               // of an accumulator in flight
    int operand_of = 0;                           // number of wgmmas in flight that read it as A
    std::uint64_t last_read = 0, last_write = 0;  // steps of the warp
    std::uint64_t copied = 0;                     // step of the mov that set it; 0: by another instruction
    bool constant = false;                        // set by a mov of a constant, or of such a register
  };
  struct Group {
    std::vector<std::uint32_t> accumulators, operands;        // registers
    std::vector<std::pair<std::uint32_t, int>> shared_reads;  // offset, bytes
  };
  std::vector<Register> registers;
  int in_flight = 0;  // registers that are accumulators or operands
  Group open;
  std::deque<Group> groups;
  std::uint64_t step = 1, fence = 0;
  std::size_t issued = 0;  // position in the trace of the warpgroup
  int max_registers = 0;   // setmaxnreg; 0: as launched
};

// The four warps of a warpgroup must issue the same wgmmas with the same descriptors.
struct WarpgroupTrace {
  struct Issue {
    const Statement* statement;
    std::uint64_t a, b;  // descriptors
  };
  std::vector<Issue> issues;
};

}  // namespace emulator
