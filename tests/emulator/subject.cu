// A kernel that passes its values through static and dynamic shared memory, and its launcher.
#include <cuda_runtime.h>

#include "subject.h"

namespace emulator {

__global__ void __launch_bounds__(kSubjectThreads)
    scale_subject_kernel(float* out, const float* in, int count, float factor, int has_dynamic) {
  __shared__ float fixed[kSubjectThreads];
  extern __shared__ float dynamic[];
  float* values = has_dynamic ? dynamic : fixed;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  values[threadIdx.x] = index < count ? in[index] : 0.0f;
  __syncthreads();  // a neighbour's value is read below
  const unsigned neighbour = threadIdx.x ^ 1;
  const unsigned its_index = blockIdx.x * blockDim.x + neighbour;
  if (neighbour < blockDim.x && its_index < count) out[its_index] = factor * values[neighbour];
}

cudaError_t launch_subject(const SubjectCall& call) {
  if (call.allowed_shared_bytes >= 0) {
    const cudaError_t error = cudaFuncSetAttribute(scale_subject_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   call.allowed_shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const int has_dynamic = call.shared_bytes >= static_cast<int>(call.block.x * sizeof(float));
  if (call.cluster == 0) {
    scale_subject_kernel<<<call.grid, call.block, call.shared_bytes, call.stream>>>(call.out, call.in, call.count,
                                                                                    call.factor, has_dynamic);
    return cudaGetLastError();
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(call.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = call.grid;
  config.blockDim = call.block;
  config.dynamicSmemBytes = call.shared_bytes;
  config.stream = call.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, scale_subject_kernel, call.out, call.in, call.count, call.factor, has_dynamic);
}

const void* subject_function() { return reinterpret_cast<const void*>(&scale_subject_kernel); }

}  // namespace emulator
