// Shared by multi_lora's forward and backward: token tiling, a sample's rows, the slots in use.
#pragma once

#include <algorithm>

#include "../calls.h"
#include "across.h"
#include "buffer.h"
#include "threads.h"

namespace slm_fast::SLM_ISA {

template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // elements per cache line
constexpr int64_t kTileTokens = 64, kTileBytes = 256 << 10;

template <class T>
inline T* at(const Rows& rows, int64_t b, int64_t t) {
  return static_cast<T*>(rows.data) + b * rows.sample_stride + t * rows.token_stride;
}

template <class A>
inline A weight_at(const MultiLora& op, int64_t pair) {
  return op.weights_are_double ? static_cast<A>(static_cast<const double*>(op.weights)[pair])
                               : static_cast<A>(static_cast<const float*>(op.weights)[pair]);
}

// Waking the other threads takes microseconds; below this many flops one thread is faster.
inline bool worth_threads(const MultiLora& op) {
  const double flops = 2.0 * op.samples * op.tokens * op.picks * op.rank * (op.features_in + op.features_out);
  return flops > 3e5;
}

// Splits a sample's tokens into equal tiles that fit L2. Item i is tile i % tiles of sample i / tiles.
struct Tiling {
  int64_t tiles, tile;
  Tiling(int64_t tokens, int64_t token_bytes, int64_t most_tokens = kTileTokens, int64_t most_bytes = kTileBytes) {
    const int64_t fits = std::clamp<int64_t>(most_bytes / std::max<int64_t>(1, token_bytes), 16, most_tokens);
    tiles = std::max<int64_t>(1, (tokens + fits - 1) / fits);
    tile = std::max<int64_t>(16, ((tokens + tiles - 1) / tiles + 15) / 16 * 16);  // whole vectors and pairs
    tiles = std::max<int64_t>(1, (tokens + tile - 1) / tile);
  }
  // Prefetch of an item's rows of x or another [B, T, F]: `columns` columns from `first` on.
  template <class T>
  Ahead ahead(const MultiLora& op, const Rows& rows, int64_t item, int64_t first, int64_t columns) const {
    if (item >= op.samples * tiles) return {};
    const int64_t token = item % tiles * tile;
    return Ahead::of(
        at<T>(rows, item / tiles, token) + first, rows.token_stride, columns, std::min(tile, op.tokens - token));
  }
};

// The R rows that apply to a sample, in route order; slot -1 is skipped.
template <class T>
struct SlotRows {
  Buffer<const T*> a, b;
  Buffer<double> weight;
  Buffer<int64_t> pick;  // the k of each row
  int64_t count = 0;

  explicit SlotRows(const MultiLora& op)
      : a(op.picks * op.rank), b(op.picks * op.rank), weight(op.picks * op.rank), pick(op.picks * op.rank) {}
  void of_sample(const MultiLora& op, int64_t sample) {
    count = 0;
    for (int64_t k = 0; k < op.picks; ++k) {
      const int64_t slot = op.slot_ids[sample * op.picks + k];
      if (slot < 0) continue;
      for (int64_t j = 0; j < op.rank; ++j, ++count) {
        a[count] = static_cast<const T*>(op.lora_a) + (slot * op.rank + j) * op.features_in;
        b[count] = static_cast<const T*>(op.lora_b) + (slot * op.rank + j) * op.features_out;
        weight[count] = weight_at<double>(op, sample * op.picks + k);
        pick[count] = k;
      }
    }
  }
};

// The slots that a batch uses.
struct UsedSlots {
  int64_t count = 0, distinct = 0;
  Buffer<int64_t> pairs;  // [count] b * K + k of pairs that have a slot, sorted by slot
  Buffer<int64_t> slots;  // [distinct], ascending
  Buffer<int64_t> index;  // [B * K] index of the pair's slot in `slots`, -1 for slot -1

  explicit UsedSlots(const MultiLora& op)
      : pairs(op.samples * op.picks), slots(op.samples * op.picks), index(op.samples * op.picks) {
    const int64_t* slot = op.slot_ids;
    for (int64_t pair = 0; pair < op.samples * op.picks; ++pair) {
      index[pair] = -1;
      if (slot[pair] >= 0) pairs[count++] = pair;
    }
    std::sort(pairs.data(), pairs.data() + count, [slot](int64_t p, int64_t q) {
      return slot[p] != slot[q] ? slot[p] < slot[q] : p < q;
    });
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || slot[pairs[i]] != slots[distinct - 1]) slots[distinct++] = slot[pairs[i]];
      index[pairs[i]] = distinct - 1;
    }
  }
  bool has(int64_t slot) const { return std::binary_search(slots.data(), slots.data() + distinct, slot); }
};

}  // namespace slm_fast::SLM_ISA
