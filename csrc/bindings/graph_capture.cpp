// graph_capture.h for Python: streams are numbers, as torch passes them.
#include "andromeda/graph_capture.h"

#include "bindings.h"

namespace andromeda::bindings {

void bind_graph_capture(pybind11::module_& m) {
  using pybind11::arg;
  m.def(
      "capture_id", [](std::uintptr_t stream, int device) { return cuda::capture_id(as_stream(stream), device); },
      "csrc/include/andromeda/graph_capture.h. The capture that a stream is part of, or 0.", arg("stream"),
      arg("device"));
  m.def("permit_work_beside_captures", &cuda::permit_work_beside_captures,
        "csrc/include/andromeda/graph_capture.h. For this thread; returns the setting from before.", arg("permitted"));
}

}  // namespace andromeda::bindings
