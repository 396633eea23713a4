#include "decode.h"

namespace emulator {
void Execution::track_registers(const Instruction&) {}
void Execution::finish_hopper(const Statement*) {}
bool decode_hopper(Decoder&) { return false; }
}  // namespace emulator
