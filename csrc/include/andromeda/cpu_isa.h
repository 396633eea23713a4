// Which of the compiled instruction sets the CPU kernels run on.
#pragma once

#include <vector>

namespace andromeda::cpu {

// Those this machine can run, lowest first. The strings live as long as the process.
std::vector<const char*> cpu_isas();

// The one in use: the highest, or what the environment variable ANDROMEDA_CPU_ISA named at the first call.
// std::runtime_error if it names one that cpu_isas() lacks.
const char* cpu_isa();

}  // namespace andromeda::cpu
