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
  cudaFuncSetAttribute(scale_subject_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, call.large_cluster);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(call.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = call.programmatic;
  cudaLaunchConfig_t config{};
  config.gridDim = call.grid;
  config.blockDim = call.block;
  config.dynamicSmemBytes = call.shared_bytes;
  config.stream = call.stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, scale_subject_kernel, call.out, call.in, call.count, call.factor, has_dynamic);
}

cudaError_t count_clusters(int blocks, int* clusters) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kSubjectThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, scale_subject_kernel, &config);
}

const void* subject_function() { return reinterpret_cast<const void*>(&scale_subject_kernel); }

}  // namespace emulator
