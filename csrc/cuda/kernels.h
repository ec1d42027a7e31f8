// Interface of the launchers to the CUDA operators: device pointers, sizes and a stream. No torch here.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "calls.h"
#include "launch.h"

namespace slm_fast::cuda {

// y[b] = base[b] + sum_k weights[b, k] * (x[b] . lora_a[s]^T) . lora_b[s], s = slot_ids[b, k]: one row per route.
// All contiguous and 16-byte aligned; out-of-range slot ids add nothing.
struct Decode {
  Type type;  // float32, bfloat16 or float16
  int64_t rows, picks, slots, rank, features_in, features_out;
  const void *x, *lora_a, *lora_b, *base;  // base is null for zeros
  const int64_t* slot_ids;
  const float* weights;
  void* y;
  float* partial;  // [rows, blocks, picks * rank] scratch for GPUs without clusters
  int blocks;      // per row
};
cudaError_t decode(const Decode&, bool clusters, cudaStream_t stream);

// The same for any number of rows per route: x [samples, tokens, features_in], y, base [samples, tokens, features_out].
struct Adapt {
  Type type;  // bfloat16 or float16
  int64_t samples, tokens, picks, slots, rank, features_in, features_out;
  const void *x, *lora_a, *lora_b, *base;  // base is null for zeros
  const int64_t* slot_ids;
  const float* weights;
  void* y;         // may alias base
  float* partial;  // scratch for GPUs without clusters: token_sums() numbers per block
  int tile, blocks;
};
cudaError_t adapt(const Adapt&, bool clusters, cudaStream_t stream);

// A tensor [matrices, rows, columns] of 16-bit numbers whose boxes of 64 columns are copied to shared memory.
using Boxes = CUtensorMap;

// y = x . weight^T + bias and the increments, in bfloat16: x [samples, tokens, features_in]. All contiguous and 16-byte
// aligned, features in eights; out-of-range slot ids add nothing.
struct AdaptedLinear {
  int64_t samples, tokens, picks, slots, rank, features_in, features_out;
  const void *x, *weight, *bias, *lora_a, *lora_b;  // bias may be null
  const int64_t* slot_ids;
  const float* weights;
  void* y;
};
struct FusedOnDevice {
  AdaptedLinear call;
  Boxes x, weight, a, b;
  FusedCut cut;
  int spans;  // samples that a tile's tokens can be of
};
cudaError_t adapted_linear(const FusedOnDevice&, cudaStream_t stream);

// call.key_slot: any slots in any order; keys of slots that are masked or not in [0, call.mask_slots) are ignored.
struct RetrieveOnDevice {
  slm_fast::Retrieve call;
  RetrieveCut cut;
  bool whole;    // rows can be read four elements at a time
  bool early;    // the GPU has programmatic dependent launch
  void* scratch; // scores [slab, P] float32 for few keys, else the best [B, parts, K] int64
};
cudaError_t retrieve(const RetrieveOnDevice&, cudaStream_t stream);

}  // namespace slm_fast::cuda
