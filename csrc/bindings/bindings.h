// The parts of the module: one bind_<operation> per file of this folder. module.cpp calls them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

struct CUstream_st;  // cudaStream_t points to it

namespace andromeda::bindings {

// A stream from the number by which torch passes it.
inline CUstream_st* as_stream(std::uintptr_t stream) { return reinterpret_cast<CUstream_st*>(stream); }

void bind_attention(pybind11::module_& m);
void bind_cuda_status(pybind11::module_& m);
void bind_graph_capture(pybind11::module_& m);
void bind_qk_norm_rotary(pybind11::module_& m);
void bind_token_shift_norm(pybind11::module_& m);

pybind11::dict build_info();  // build_info.cpp.in

}  // namespace andromeda::bindings
