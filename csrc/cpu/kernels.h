// What the operators ask of the kernels: plain pointers and sizes. No torch here.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace slm_fast {

enum class Type : int32_t { float32, bfloat16, float16, float64 };

// The host's threads. `run` calls body(context, 0 .. workers-1), possibly at the same time.
struct Pool {
  int workers;
  void (*run)(int workers, void (*body)(void* context, int worker), void* context);

  // work(item) for each item, handed out in runs of neighbours that get shorter towards the end, so that uneven items and
  // a busy core cost little. Which thread gets an item never changes a result: no item's arithmetic depends on another's.
  template <class MakeWork>
  void for_each(int64_t items, bool worth_threads, const MakeWork& make_work) const {
    const int wanted = worth_threads && items > 1 ? static_cast<int>(items < workers ? items : workers) : 1;
    if (wanted == 1) {
      auto work = make_work();
      for (int64_t item = 0; item < items; ++item) work(item);
      return;
    }
    struct Shared {
      const MakeWork& make_work;
      const int64_t items, share;
      std::atomic<int64_t> next{0};
      // The next run's first item; `end` is one past its last.
      int64_t take(int64_t& end) {
        int64_t begin = next.load(std::memory_order_relaxed);
        do end = begin + (items - begin + share - 1) / share;
        while (begin < items && !next.compare_exchange_weak(begin, end));
        return begin;
      }
    } shared{make_work, items, 4 * wanted};
    run(
        wanted,
        [](void* context, int) {
          Shared& s = *static_cast<Shared*>(context);
          int64_t end, begin = s.take(end);
          if (begin >= s.items) return;
          auto work = s.make_work();
          for (; begin < s.items; begin = s.take(end))
            for (int64_t item = begin; item < end; ++item) work(item);
        },
        &shared);
  }
};

// [B, T, F] with the last axis dense.
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
  const void* weights;                                                     // [B, K] float, or double
  bool weights_are_double;
  Rows base;  // [B, T, O], or data null for zeros
  Rows y;     // [B, T, O], may be base itself
};

// Gradients; a null pointer where none is wanted. grad_a, grad_b are zeroed by the kernel.
struct MultiLoraBackward {
  MultiLora forward;  // base and y unused
  Rows grad;          // [B, T, O]
  void* grad_x;       // [B, T, I] dense
  void* grad_a;       // [P, r, I]
  void* grad_b;       // [P, r, O]
  void* grad_weights; // [B, K], the type of weights
};

struct Retrieve {
  Type type;                               // of query and keys
  int64_t queries, slots, width, groups, k;  // B, P, D, G, K
  const void* query;                       // [B, D]
  const void* keys;                        // [P, D]
  const void* prepared;                    // what prepare_keys made of them, or null
  const float* bias;                       // [P] or null
  const bool* mask;                        // [P] or [B, P] or null
  bool mask_per_query, cosine, vote, softmax;
  double temperature;
  int64_t* slot_ids;  // [B, K]
  float* weights;     // [B, K]
};

struct PrepareKeys {
  Type type;
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
  int64_t* selected;  // [B, G, min(K, P)], -1 where the mask left fewer
  double loss;        // out
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

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*multi_lora)(const MultiLora&, const Pool&);
  void (*multi_lora_backward)(const MultiLoraBackward&, const Pool&);
  int64_t (*retrieve)(const Retrieve&, const Pool&);  // the first query that is not finite, or -1
  int64_t (*prepared_bytes)(const PrepareKeys&);
  void (*prepare_keys)(const PrepareKeys&, void* prepared, const Pool&);
  void (*key_loss)(KeyLoss&, const Pool&);
  void (*key_loss_backward)(const KeyLossBackward&, const Pool&);
};

// The best set compiled in that this processor has, or the one that the environment variable SLM_FAST_CPU names (for
// tests and comparisons; one that is unknown or that the processor lacks gives the portable set).
const Kernels& kernels();
std::vector<std::string> instruction_sets();  // compiled in, the best first

}  // namespace slm_fast
