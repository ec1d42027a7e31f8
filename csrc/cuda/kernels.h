// What the CUDA operators ask of the launchers: device pointers, sizes and a stream. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "calls.h"
#include "launch.h"

namespace slm_fast::cuda {

// y[b] = base[b] + sum_k weights[b, k] * (x[b] . lora_a[s]^T) . lora_b[s], s = slot_ids[b, k]: one row a route.
// All dense and on 16-byte addresses; a slot id that is no slot's adds nothing.
struct Decode {
  Type type;  // float32, bfloat16 or float16
  int64_t rows, picks, slots, rank, features_in, features_out;
  const void *x, *lora_a, *lora_b, *base;  // base null for zeros
  const int64_t* slot_ids;
  const float* weights;
  void* y;
  float* partial;  // [rows, blocks, picks * rank] scratch, used where the card has no clusters
  int blocks;      // a row
};
cudaError_t decode(const Decode&, bool clusters, cudaStream_t stream);

// The same for any number of rows a route: x [samples, tokens, features_in], y and base [samples, tokens, features_out].
struct Adapt {
  Type type;  // bfloat16 or float16
  int64_t samples, tokens, picks, slots, rank, features_in, features_out;
  const void *x, *lora_a, *lora_b, *base;  // base null for zeros
  const int64_t* slot_ids;
  const float* weights;
  void* y;         // may be base itself
  float* partial;  // scratch where the card has no clusters: token_sums() numbers a block
  int tile, blocks;
};
cudaError_t adapt(const Adapt&, bool clusters, cudaStream_t stream);

// call.key_slot: any slots in any order; one that is not below call.mask_slots, or that the mask leaves out, is nobody's.
struct RetrieveOnDevice {
  slm_fast::Retrieve call;
  RetrieveCut cut;
  bool whole;    // rows can be read four numbers at a time
  bool early;    // the card can begin a launch before the one it follows has ended
  void* scratch; // scores [slab, P] float32 for few keys, else the best [B, parts, K] int64
};
cudaError_t retrieve(const RetrieveOnDevice&, cudaStream_t stream);

}  // namespace slm_fast::cuda
