// The pieces that multi_lora's forward and backward share: a sample's rows, and the two products.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "kernels.h"
#include "tile.h"

namespace slm_fast::SLM_ISA {

template <class T>
constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // elements of a cache line
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

// Waking the other threads costs some microseconds; below this many flops one thread is sooner done.
inline bool worth_threads(const MultiLora& op) {
  const double flops = 2.0 * op.samples * op.tokens * op.picks * op.rank * (op.features_in + op.features_out);
  return flops > 3e5;
}

// Tokens of a sample in equal tiles that fit L2, whatever the number of threads. Item i is tile i % tiles of sample
// i / tiles.
struct Tiling {
  int64_t tiles, tile;
  Tiling(int64_t tokens, int64_t token_bytes) {
    const int64_t fits = std::clamp<int64_t>(kTileBytes / std::max<int64_t>(1, token_bytes), 16, kTileTokens);
    tiles = std::max<int64_t>(1, (tokens + fits - 1) / fits);
    tile = std::max<int64_t>(16, ((tokens + tiles - 1) / tiles + 15) / 16 * 16);  // whole vectors and pairs
    tiles = std::max<int64_t>(1, (tokens + tile - 1) / tile);
  }
  // The item's rows of x or another [B, T, F], to be asked for ahead of their use; `columns` of them from `first` on.
  template <class T>
  Ahead ahead(const MultiLora& op, const Rows& rows, int64_t item, int64_t first, int64_t columns) const {
    if (item >= op.samples * tiles) return {};
    const int64_t token = item % tiles * tile;
    return Ahead::of(
        at<T>(rows, item / tiles, token) + first, rows.token_stride, columns, std::min(tile, op.tokens - token));
  }
};

// The R rows that act on a sample, in the order of its route; slots -1 left out.
template <class T>
struct SlotRows {
  Buffer<const T*> a, b;
  Buffer<double> weight;
  Buffer<int64_t> pick;  // which k a row belongs to
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

// Rows of storage type T as the tile wants them: where they lie if the types agree, else converted into a buffer.
template <class T, class P>
struct Convert {
  using E = typename P::Element;
  Buffer<E> space;
  int64_t used = 0;

  void reserve(int64_t count) {
    used = 0;
    if constexpr (!std::is_same_v<T, E>) space.at_least(count);
  }
  const E* operator()(const T* row, int64_t length) {
    if constexpr (std::is_same_v<T, E>) {
      return row;
    } else {
      E* to = space.data() + used;
      used += length;
      widen_all(row, to, length);
      return to;
    }
  }
};

// sums[n * tile + t] = x[t] . a[n]
template <class T, class P>
struct Shrink {
  using A = typename P::Accumulator;
  int64_t tile;
  Buffer<A> sums;
  Convert<T, P> convert;
  Buffer<const typename P::Element*> x_rows, a_rows;

  Shrink(const MultiLora& op, int64_t tile)
      : tile(tile), sums(op.picks * op.rank * tile), x_rows(tile), a_rows(op.picks * op.rank) {}
  A* operator()(const T* x, int64_t stride, int64_t tokens, const T* const* a, int64_t count, int64_t length) {
    convert.reserve((tokens + count) * length);
    for (int64_t t = 0; t < tokens; ++t) x_rows[t] = convert(x + t * stride, length);
    for (int64_t n = 0; n < count; ++n) a_rows[n] = convert(a[n], length);
    dot<P>(x_rows.data(), tokens, a_rows.data(), count, length, sums.data(), tile);
    return sums.data();
  }
};

// A column panel of `count` rows, as combine reads it: [n][kCombineV vectors], zeros beyond `columns`.
template <class T, class P, class RowAt>
inline void pack_panel(
    typename P::Element* panel, const RowAt& row_at, [[maybe_unused]] int64_t count, int64_t columns) {
  using A = typename P::Accumulator;
  constexpr int L = kLanes<A>;
  if constexpr (P::kPair == 1) {
    for (int64_t n = 0; n < count; ++n, panel += kCombineV * L) {
      const T* row = row_at(n);
      if (columns == kCombineV * L) {
#pragma GCC unroll 4
        for (int v = 0; v < kCombineV; ++v) store(panel + v * L, load<A>(row + v * L));
      } else {
        for (int64_t c = 0; c < columns; c += L) store(panel + c, load_first<A>(row + c, columns - c));
      }
    }
#if defined(__AVX512BF16__)
  } else {
    const auto full = static_cast<uint64_t>(0xffff);
    for (int64_t n = 0; n < count; n += 2, panel += kCombineV * 2 * L) {
      const T *even = row_at(n), *odd = n + 1 < count ? row_at(n + 1) : nullptr;
      for (int64_t c = 0; c < columns; c += L) {
        const auto lanes = static_cast<__mmask16>(columns - c >= L ? full : (1u << (columns - c)) - 1);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, even + c));
        const __m512i high =
            odd ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, odd + c)) : _mm512_setzero_si512();
        _mm512_store_si512(panel + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
#endif
  }
}

// Where combine puts a sum: y = base + sum.
template <class T>
struct OntoBase {
  T* y;
  int64_t y_stride;
  const T* base;  // or null
  int64_t base_stride;
  const char* next;  // what is needed later, or null; where in it this tile is, and the bytes of it a step asks for
  int64_t next_offset, next_step;

  void ahead(int64_t n) const { ask_for(next, next_offset + n * next_step); }
  template <class V>
  void add(int64_t row, int64_t column, V sum) const {
    if (base) sum = load<LaneOf<V>>(base + row * base_stride + column) + sum;
    store(y + row * y_stride + column, sum);
  }
  template <class V>
  void add_first(int64_t row, int64_t column, V sum, int64_t lanes) const {
    if (base) sum = load_first<LaneOf<V>>(base + row * base_stride + column, lanes) + sum;
    store_first(y + row * y_stride + column, sum, lanes);
  }
};

// y[t] = base[t] + sum_n sums[n * tile + t] * b[n]
template <class T, class P>
struct Expand {
  using A = typename P::Accumulator;
  int64_t tile;
  Buffer<typename P::Element> panels;
  Buffer<typename P::Coefficient> pairs;

  Expand(const MultiLora& op, int64_t tile) : tile(tile) {
    if (P::kPair == 2) pairs.at_least((op.picks * op.rank + 1) / 2 * tile);
  }

  const typename P::Coefficient* coefficients(const A* sums, [[maybe_unused]] int64_t count) {
    if constexpr (P::kPair == 1) {
      return sums;
#if defined(__AVX512BF16__)
    } else {
      const __m512 zero = _mm512_setzero_ps();
      for (int64_t n = 0; n < count; n += 2)
        for (int64_t t = 0; t < tile; t += 8) {
          const __m256 even = _mm256_loadu_ps(sums + n * tile + t);
          const __m256 odd = n + 1 < count ? _mm256_loadu_ps(sums + (n + 1) * tile + t) : _mm512_castps512_ps256(zero);
          const __m256i low = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(even));
          const __m256i high = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(odd));
          _mm256_storeu_si256(
              reinterpret_cast<__m256i*>(pairs.data() + n / 2 * tile + t),
              _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
        }
      return pairs.data();
#endif
    }
  }

  void operator()(
      const A* sums, const T* const* b, int64_t count, int64_t tokens, int64_t length, const T* base,
      int64_t base_stride, T* y, int64_t y_stride, Ahead ahead) {
    constexpr int64_t kColumns = kCombineV * kLanes<A>;
    const int64_t steps = (count + P::kPair - 1) / P::kPair, panel_size = steps * P::kPair * kColumns;
    const auto* c = coefficients(sums, count);
    // As many packed panels as fit L2 beside the rows of y, which then are passed over as streams.
    const int64_t most = std::clamp<int64_t>(
        kTileBytes / std::max<int64_t>(1, panel_size * static_cast<int64_t>(sizeof(typename P::Element))), 1,
        (length + kColumns - 1) / kColumns);
    panels.at_least(most * panel_size);
    const int64_t turns = (length + most * kColumns - 1) / (most * kColumns) * ((tokens + kCombineM - 1) / kCombineM);
    // The next tile's rows are asked for a little at each step: in one go they would be more than can be on their way.
    const int64_t next_step = ahead.bytes() / std::max<int64_t>(1, turns * most * steps) + 1;
    int64_t next_offset = 0;

    for (int64_t first = 0; first < length; first += most * kColumns) {
      const int64_t last = std::min(first + most * kColumns, length);
      for (int64_t column = first; column < last; column += kColumns)
        pack_panel<T, P>(
            panels.data() + (column - first) / kColumns * panel_size, [&](int64_t n) { return b[n] + column; }, count,
            std::min(kColumns, last - column));
      for (int64_t t = 0; t < tokens; t += kCombineM)
        for (int64_t column = first; column < last; column += kColumns) {
          for (int64_t m = t + kCombineM; m < std::min(t + 2 * kCombineM, tokens); ++m)  // the rows that come next
            for (int64_t part = column; part < std::min(column + kColumns, last); part += kLine<T>) {
              __builtin_prefetch(y + m * y_stride + part, 1);
              if (base && base != y) __builtin_prefetch(base + m * base_stride + part);
            }
          combine<P>(
              c, tile, 1, panels.data() + (column - first) / kColumns * panel_size, steps, t,
              std::min<int64_t>(t + kCombineM, tokens), std::min(kColumns, last - column),
              OntoBase<T>{
                  y + column, y_stride, base ? base + column : nullptr, base_stride, ahead.rows, next_offset, next_step});
          next_offset += steps * next_step;
        }
    }
  }
};

// The slots that a batch uses.
struct UsedSlots {
  int64_t count = 0, distinct = 0;
  Buffer<int64_t> pairs;  // [count] b * K + k where there is a slot, sorted by slot
  Buffer<int64_t> slots;  // [distinct], rising
  Buffer<int64_t> index;  // [B * K] of the pair's slot in `slots`, -1 for slot -1

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

// ---- few tokens a sample ----

constexpr int64_t kRunPairs = 16;

// The (sample, pick) pairs sorted by slot, cut into runs of one slot and at most kRunPairs pairs.
struct SharedSlots : UsedSlots {
  int64_t runs = 0;
  Buffer<int64_t> place;      // [B * K] of each pair in `pairs`, -1 for slot -1
  Buffer<int64_t> run_begin;  // [runs + 1]

  explicit SharedSlots(const MultiLora& op)
      : UsedSlots(op), place(op.samples * op.picks), run_begin(op.samples * op.picks + 1) {
    std::fill_n(place.data(), op.samples * op.picks, -1);
    for (int64_t i = 0; i < count; ++i) {
      place[pairs[i]] = i;
      const bool other = i == 0 || index[pairs[i]] != index[pairs[i - 1]];
      if (other || i - run_begin[runs - 1] == kRunPairs) run_begin[runs++] = i;
    }
    run_begin[runs] = count;
  }

  // Columns of y that one thread passes over at a time.
  int64_t column_piece(const MultiLora& op, int workers, int64_t element) const {
    const int64_t even = (op.features_out + 2 * workers - 1) / (2 * workers);
    const int64_t fits = (512 << 10) / std::max<int64_t>(1, distinct * op.rank * element);  // half an L2
    const bool reused = distinct * 2 <= count;
    const int64_t piece = reused ? std::min(even, fits) : even;
    return std::max<int64_t>(256, (piece + 127) / 128 * 128);
  }
};

// One row of output, V vectors wide from `column`: y = base + sum over the sample's slots of sums * b.
template <class T, int V, class A>
inline void add_rows(
    const MultiLora& op, const SharedSlots& shared, const A* sums, int64_t b, int64_t t, int64_t column, int64_t lanes,
    const T* base, T* y) {
  constexpr int L = kLanes<A>;
  const bool whole = lanes == V * L;
  Vec<A> acc[V] = {};
  for (int64_t k = 0; k < op.picks; ++k) {
    const int64_t place = shared.place[b * op.picks + k];
    if (place < 0) continue;
    const int64_t slot = op.slot_ids[b * op.picks + k];
    for (int64_t j = 0; j < op.rank; ++j) {
      const Vec<A> c = broadcast(sums[(place * op.rank + j) * op.tokens + t]);
      const T* row = static_cast<const T*>(op.lora_b) + (slot * op.rank + j) * op.features_out + column;
      if (whole) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[v] = c * load<A>(row + v * L) + acc[v];
      } else {
        acc[0] = c * load_first<A>(row, lanes) + acc[0];
      }
    }
  }
  if (whole) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      store(y + column + v * L, base ? load<A>(base + column + v * L) + acc[v] : acc[v]);
  } else {
    store_first(y + column, base ? load_first<A>(base + column, lanes) + acc[0] : acc[0], lanes);
  }
}

}  // namespace slm_fast::SLM_ISA
