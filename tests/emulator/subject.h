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
  int cluster;         // 0: <<<>>>; otherwise cudaLaunchKernelEx with clusters of so many blocks
  bool large_cluster;  // cudaFuncAttributeNonPortableClusterSizeAllowed
  bool programmatic;   // with a cluster: cudaLaunchAttributeProgrammaticStreamSerialization
};

constexpr int kSubjectThreads = 256;                       // its __launch_bounds__
constexpr int kSubjectStaticShared = 4 * kSubjectThreads;  // bytes

// Returns the error of the first call that failed.
cudaError_t launch_subject(const SubjectCall& call);
// The number of clusters of so many blocks, of kSubjectThreads each, that the device holds at once.
cudaError_t count_clusters(int blocks, int* clusters);
const void* subject_function();

}  // namespace emulator
