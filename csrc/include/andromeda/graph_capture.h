// The state of graph capture, which decides where memory that calls share is made (andromeda/ops/_persistent.py).
#pragma once

struct CUstream_st;  // cudaStream_t points to it; declared here, so that this header includes none of CUDA's

namespace andromeda::cuda {

// The number of the capture that a stream of a device is part of, different for every capture; 0 when there is none.
unsigned long long capture_id(CUstream_st* stream, int device);

// Permits or forbids this thread to allocate and wait while other threads capture. CUDA forbids it by default: a graph
// whose parts depended on such calls would be wrong. Returns the previous setting. Where the driver is too old for this
// library, nothing changes and there is no error: models that run on plain torch keep such memory, too.
bool permit_work_beside_captures(bool permitted);

}  // namespace andromeda::cuda
