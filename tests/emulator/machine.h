// The interface of the emulator: PTX text in, kernels out; a kernel runs a grid on the CPU and returns reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace emulator {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// The order of blocks, of their warps, and of the completion of copies. Results must not depend on it.
enum class Schedule { kFifo, kReverse, kRandom };

struct Settings {
  Schedule schedule = Schedule::kFifo;
  std::uint64_t seed = 1;            // of kRandom
  bool check = true;                 // shadow memory and synchronisation; off: results only, faster
  bool execute = true;               // off: a launch returns at once, to time what comes before it
  int max_reports = 20;              // one per kind and instruction
  std::vector<std::int64_t> blocks;  // linear indices of the blocks to run; empty: all
};

struct Report {
  std::string kind;  // race-raw, out-of-bounds, deadlock ...: the list is in report.h
  std::string text;  // block, thread, address, source line and the other party
  int line;          // of the .cu source (from .loc), 0: unknown
};

struct Parameter {
  std::size_t offset, bytes;  // within the kernel's parameter block
};

class Kernel;
const std::string& name_of(const Kernel& kernel);
const std::vector<Parameter>& parameters_of(const Kernel& kernel);
std::size_t static_shared_of(const Kernel& kernel);
std::size_t max_threads_of(const Kernel& kernel);  // .maxntid or .reqntid, or else 1024
Dim3 required_cluster_of(const Kernel& kernel);    // .reqnctapercluster; 0 x 0 x 0: a launch may choose

// Every .entry of the text. Throws std::runtime_error with the line and text that it does not understand. Bodies are
// decoded when a kernel is first run, so one unsupported kernel does not make a file useless.
std::vector<std::shared_ptr<const Kernel>> parse_ptx(const std::string& text);

struct Configuration {
  Dim3 grid, block;
  std::size_t dynamic_shared = 0;
  Dim3 cluster;                   // blocks that start together and reach each other's shared memory
  bool programmatic = false;      // it may start while earlier kernels of its stream run, until it waits for them
  std::int64_t max_resident = 1;  // blocks that the device holds at once
};

// Runs a grid to its end and returns the reports. Throws std::runtime_error for an instruction that the
// emulator does not know, with its text and line.
std::vector<Report> run(const Kernel& kernel, const Configuration& configuration,
                        const std::vector<std::uint8_t>& parameters, const Settings& settings);

struct Counters {
  std::uint64_t shared_clocks;  // of the banks, for accesses of warps, all copies and operands of wgmma
  std::uint64_t instructions, mma, wgmma, barriers, shared_accesses, global_accesses;  // per warp
  // Bytes that one block read and other blocks of the launch had written: the most of any block. With checks alone.
  std::uint64_t foreign_bytes;
};
Counters last_counters();  // of the last run

}  // namespace emulator
