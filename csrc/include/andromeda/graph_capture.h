// What CUDA says about the capture of graphs; memory that calls share (andromeda/ops/_persistent.py) depends on it.
#pragma once

struct CUstream_st;  // what cudaStream_t names: declaring it keeps CUDA headers out of this one

namespace andromeda::cuda {

// The number of the capture that a stream is part of, unlike that of every other capture; 0 when there is none.
unsigned long long capture_id(CUstream_st* stream);

// Whether this thread may allocate and wait while other threads capture, which it forbids by default: a graph whose
// parts depended on such calls would be wrong. Returns what was in force before. Where the driver is too old for this
// library nothing changes: memory is kept there, too, for models that run on plain torch.
bool permit_work_beside_captures(bool permitted);

}  // namespace andromeda::cuda
