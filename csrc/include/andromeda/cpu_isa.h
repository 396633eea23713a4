// The instruction sets that the CPU kernels are compiled for, and the one that they use.
#pragma once

#include <vector>

namespace andromeda::cpu {

// Those that this machine can run, lowest first. The strings live as long as the process.
std::vector<const char*> cpu_isas();

// The one in use: the highest, or the one that the environment variable ANDROMEDA_CPU_ISA named at the first call.
// std::runtime_error if it names one that cpu_isas() lacks.
const char* cpu_isa();

}  // namespace andromeda::cpu
