// Launches kernels whose blocks form clusters, on sm_90.
#pragma once

#include <cuda_runtime_api.h>

namespace slm_fast::cuda {

// `blocks` of the grid's first dimension form a cluster. The kernel calls wait_for_previous() before it accesses memory
// that others write: its blocks may start before the kernel in front of it has ended.
template <class Call>
cudaError_t launch_clusters(
    void (*kernel)(Call), const Call& call, dim3 grid, int threads, int blocks, int shared_bytes, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = attributes, config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, call);
}

}  // namespace slm_fast::cuda
