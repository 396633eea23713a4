// andromeda._C. To add an operation: one bind_<operation>(m) line.
#include "andromeda/cpu_isa.h"
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of andromeda. Use andromeda.ops: it checks, allocates and differentiates.";
  andromeda::cpu::cpu_isa();  // a wrong ANDROMEDA_CPU_ISA fails here, at import, not in the first call
  m.def("build_info", &andromeda::bindings::build_info,
        "How this library was built, and the limits of its CUDA kernels.");
  m.def("cpu_isa", &andromeda::cpu::cpu_isa, "The instruction set in use.");
  m.def("cpu_isas", &andromeda::cpu::cpu_isas, "Instruction sets this machine can run, lowest first.");
  andromeda::bindings::bind_cuda_status(m);
  andromeda::bindings::bind_attention(m);
  andromeda::bindings::bind_graph_capture(m);
  andromeda::bindings::bind_qk_norm_rotary(m);
  andromeda::bindings::bind_token_shift_norm(m);
}
