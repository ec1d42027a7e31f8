// Operator calls as plain pointers and sizes, without torch or CUDA: shared by csrc/cpu and csrc/cuda.
#pragma once

#include <cstdint>

namespace slm_fast {

enum class Type : int32_t { float32, bfloat16, float16, float64 };

// [B, T, F] with a contiguous last axis.
struct Rows {
  void* data;
  int64_t sample_stride, token_stride;  // in elements
};

// y[b, t] = base[b, t] + sum_k weights[b, k] * (x[b, t] . lora_a[s]^T) . lora_b[s], s = slot_ids[b, k]
struct MultiLora {
  Type type;
  int64_t samples, tokens, picks, slots, rank, features_in, features_out;  // B, T, K, P, r, I, O
  Rows x;                                                                  // [B, T, I]
  const void* lora_a;                                                      // [P, r, I]
  const void* lora_b;                                                      // [P, r, O]
  const int64_t* slot_ids;                                                 // [B, K], -1 = none
  const void* weights;                                                     // [B, K], float or double
  bool weights_are_double;
  Rows base;  // [B, T, O]; data is null for zeros
  Rows y;     // [B, T, O], may alias base
};

// y[b, t] = x[b, t] . weight^T + bias + increments. bfloat16, features in multiples of 32; y is contiguous.
struct AdaptedLinear {
  MultiLora increments;  // without a base
  const void* weight;    // [O, I]
  const void* bias;      // [O] or null
};

// Gradients; null pointers for those not wanted. The kernel zeroes grad_a and grad_b.
struct MultiLoraBackward {
  MultiLora forward;  // base and y unused
  Rows grad;          // [B, T, O]
  void* grad_x;       // [B, T, I] contiguous
  void* grad_a;       // [P, r, I]
  void* grad_b;       // [P, r, O]
  void* grad_weights; // [B, K], same type as weights
};

struct Retrieve {
  Type type;                               // of query and keys
  int64_t queries, slots, width, groups, k;  // B, P, D, G, K
  const void* query;                       // [B, D]
  const void* keys;                        // [P, D]
  const void* prepared;                    // output of prepare_keys, or null
  const float* bias;                       // [P] or null
  const bool* mask;                        // [P] or [B, P] or null
  bool mask_per_query, cosine, vote, softmax;
  double temperature;
  int64_t* slot_ids;  // [B, K]
  float* weights;     // [B, K]
  // For slots with several keys (`slots` above then counts keys):
  const int64_t* key_slot;  // [N] slot of each key, ascending; or null
  int64_t mask_slots;       // P of the mask
};

struct PrepareKeys {
  Type type;
  bool cosine;
  int64_t slots, width, groups;
  const void* keys;  // [P, D]
};

struct KeyLoss {
  Type type;
  int64_t queries, slots, width, groups, k;
  const void* query;
  const void* keys;
  double mask_prob;
  uint64_t seed;
  int64_t* selected;  // [B, G, min(K, P)], padded with -1 where the mask leaves fewer
  double loss;        // output
};

struct KeyLossBackward {
  Type type;
  int64_t queries, slots, width, groups, k;
  const void* query;
  const void* keys;
  const int64_t* selected;
  double grad;
  void* grad_keys;  // [P, D]
};

// y = x weight^T
struct InvariantLinear {
  int64_t rows, width, features;  // M, D, N
  const double* x;                // [M, D]
  const double* weight;           // [N, D]
  double* y;                      // [M, N]
};

// The sum of the scatters of several tasks, in two planes of integers.
struct SumScatters {
  int64_t tasks, width;    // T, D
  const int64_t* rows;     // [T], directions of each task
  const int8_t* factor;    // [sum of rows, D]
  const int8_t* exponent;  // [T, D]
  const float* diagonal;   // [T, D]
  int64_t *coarse, *fine;  // [D (D + 1) / 2] each
};

}  // namespace slm_fast
