// Host code of the tests, compiled by nvcc: test_host.py calls the runtime through it.
#pragma once

#include <cuda_runtime_api.h>

namespace emulator {

struct SubjectCall {
  float* out;       // (count,): factor * in
  const float* in;  // (count,)
  int count;
  float factor;
  dim3 grid, block;
  int shared_bytes;          // dynamic
  int allowed_shared_bytes;  // for cudaFuncSetAttribute, which is not called if negative
  cudaStream_t stream;
  int cluster;  // 0: <<<>>>; otherwise cudaLaunchKernelEx with clusters of so many blocks
};

constexpr int kSubjectThreads = 256;                       // its __launch_bounds__
constexpr int kSubjectStaticShared = 4 * kSubjectThreads;  // bytes

// Returns the error of the first call that failed.
cudaError_t launch_subject(const SubjectCall& call);
const void* subject_function();

}  // namespace emulator
