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

// Tokens of a sample in equal tiles that fit L2. Item i is tile i % tiles of sample i / tiles.
struct Tiling {
  int64_t tiles, tile;
  Tiling(int64_t tokens, int64_t token_bytes, int64_t most_tokens = kTileTokens, int64_t most_bytes = kTileBytes) {
    const int64_t fits = std::clamp<int64_t>(most_bytes / std::max<int64_t>(1, token_bytes), 16, most_tokens);
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

// What combine multiplies rows by: C[n][t] is at[n * step + t * stride], n counting rows or pairs of rows.
template <class P>
struct Coefficients {
  const typename P::Coefficient* at;
  int64_t step, stride;
};

// Not for these numbers.
template <class P>
struct ShrinkAcross {
  ShrinkAcross(const MultiLora&, int64_t) {}
};

#if defined(__AVX512BF16__)
// Sixteen rows of 32-bit words become sixteen columns.
inline void transpose_16(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    t[i] = _mm512_shuffle_i32x4(low, low2, 0x88), t[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    t[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88), t[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// The same products with the sample's rows across lanes, so that nothing is summed across lanes: for many tokens, which
// pay for turning the rows. Its results are ready to be Expand's coefficients.
template <>
struct ShrinkAcross<Bf16Pairs> {
  using P = Bf16Pairs;
  static constexpr int64_t kWide = kPanelColumns<P>;  // rows of a panel
  Buffer<BFloat16> panels, padded;  // [panel][pair of features][kWide] pairs; x where its rows cannot be read as pairs
  Buffer<float> sums, weights;      // [tokens][width], [width]
  Buffer<uint32_t> pairs;           // [tokens][width / 2]
  int64_t width, packed = -1;

  explicit ShrinkAcross(const MultiLora& op, int64_t tile)
      : width((op.picks * op.rank + 31) / 32 * 32) {
    sums.at_least(tile * width), weights.at_least(width), pairs.at_least(tile * width / 2);
  }

  // Turning the rows pays for itself over many tokens, and with lanes that are well filled.
  static bool serves(int64_t tokens, int64_t count) { return tokens >= 16 && count >= 20; }

  void pack(int64_t sample, const BFloat16* const* a, const double* weight, int64_t count, int64_t length) {
    if (packed == sample) return;
    packed = sample;
    const int64_t words = (length + 1) / 2;
    panels.at_least((count + kWide - 1) / kWide * words * kWide * 2);
    for (int64_t n = 0; n < width; ++n) weights[n] = n < count ? static_cast<float>(weight[n]) : 0;
    for (int64_t row = 0; row < count; row += 16) {
      BFloat16* panel = panels.data() + (row / kWide * words * kWide + row % kWide) * 2;
      for (int64_t word = 0; word < words; word += 16) {
        __m512i block[16];
        const __mmask32 lanes = first_lanes(length - 2 * word);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          block[i] = row + i < count ? _mm512_maskz_loadu_epi16(lanes, a[row + i] + 2 * word) : _mm512_setzero_si512();
        transpose_16(block);
        BFloat16* to = panel + word * kWide * 2;
        if (words - word >= 16) {
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * kWide * 2, block[i]);
        } else {
          for (int i = 0; i < words - word; ++i) _mm512_store_si512(to + i * kWide * 2, block[i]);
        }
      }
    }
  }

  struct OntoSums {
    float* sums;
    int64_t width;
    bool more;
    void add(int64_t row, int64_t column, Vec<float> sum) const {
      float* to = sums + row * width + column;
      store(to, more ? load<float>(to) + sum : sum);
    }
    void add_first(int64_t row, int64_t column, Vec<float> sum, int64_t) const { add(row, column, sum); }
  };

  Coefficients<P> operator()(const BFloat16* x, int64_t stride, int64_t tokens, int64_t count, int64_t length) {
    const int64_t words = (length + 1) / 2;
    if (stride % 2 || length % 2) {
      padded.at_least(tokens * words * 2);
      for (int64_t t = 0; t < tokens; ++t) {
        std::copy_n(x + t * stride, length, padded.data() + t * words * 2);
        padded[t * words * 2 + words * 2 - 1] = length % 2 ? BFloat16{0} : x[t * stride + length - 1];
      }
      x = padded.data(), stride = 2 * words;
    }
    const auto* c = reinterpret_cast<const P::Coefficient*>(x);
    const int64_t pieces = (words + 95) / 96;  // of a panel, which stay in L1 while all tokens pass
    for (int64_t row = 0; row < count; row += kWide)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = words * piece / pieces, last = words * (piece + 1) / pieces;
        const auto* panel = panels.data() + (row * words + first * kWide) * 2;
        const OntoSums out{sums.data() + row, width, piece > 0};
        const int64_t lanes = std::min(kWide, (count - row + 15) / 16 * 16);
        if (lanes < kWide) combine<P, 8>(c + first, 1, stride / 2, panel, last - first, 0, tokens, lanes, out);
        else combine<P, 6>(c + first, 1, stride / 2, panel, last - first, 0, tokens, lanes, out);
      }
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t n = 0; n < width; n += 32) {
        __m512 half[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const auto lanes = static_cast<__mmask16>(first_lanes(count - n - 16 * i));
          half[i] = _mm512_maskz_mul_ps(
              n + 16 * i < count ? lanes : 0, (__m512)load<float>(sums.data() + t * width + n + 16 * i),
              (__m512)load<float>(weights.data() + n + 16 * i));
        }
        _mm512_storeu_si512(
            pairs.data() + t * (width / 2) + n / 2, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
      }
    return {pairs.data(), 1, width / 2};
  }
};
#endif

// A column panel of `count` rows, as combine reads it: [n][kCombineV vectors], zeros beyond `columns`. Of pairs, vectors
// hold the even and the odd columns in turn.
template <class T, class P, class RowAt>
inline void pack_panel(
    typename P::Element* panel, const RowAt& row_at, [[maybe_unused]] int64_t count, int64_t columns) {
  using A = typename P::Accumulator;
  constexpr int L = kLanes<A>;
  if constexpr (P::kPair == 1) {
    for (int64_t n = 0; n < count; ++n, panel += kPanelColumns<P>) {
      const T* row = row_at(n);
      if (columns == kPanelColumns<P>) {
#pragma GCC unroll 4
        for (int v = 0; v < kCombineV<P>; ++v) store(panel + v * L, load<A>(row + v * L));
      } else {
        for (int64_t c = 0; c < columns; c += L) store(panel + c, load_first<A>(row + c, columns - c));
      }
    }
#if defined(__AVX512BF16__)
  } else {
    constexpr __mmask32 kSecond = 0xaaaaaaaa;
    for (int64_t n = 0; n < count; n += 2, panel += 2 * kPanelColumns<P>) {
      const T *first = row_at(n), *second = n + 1 < count ? row_at(n + 1) : nullptr;
      for (int64_t c = 0; c < columns; c += 2 * L) {
        const __mmask32 lanes = first_lanes(columns - c);
        const __m512i one = _mm512_maskz_loadu_epi16(lanes, first + c);
        const __m512i other = second ? _mm512_maskz_loadu_epi16(lanes, second + c) : _mm512_setzero_si512();
        _mm512_store_si512(panel + 2 * c, _mm512_mask_blend_epi16(kSecond, one, _mm512_slli_epi32(other, 16)));
        _mm512_store_si512(panel + 2 * (c + L), _mm512_mask_blend_epi16(kSecond, _mm512_srli_epi32(one, 16), other));
      }
    }
#endif
  }
}

// A mark of combine's outputs for P whose panels have even and odd columns apart.
template <class P, bool = P::kPair == 2>
struct Layout {};
template <class P>
struct Layout<P, true> {
  using Interleaved = P;
};

// Where combine puts a sum: y = base + sum.
template <class T, class P>
struct OntoBase : Layout<P> {
  T* y;
  int64_t y_stride;
  const T* base;  // or null
  int64_t base_stride;
  const char* next;  // what is needed later, or null; where in it this tile is, and the bytes of it a step asks for
  int64_t next_offset, next_step;

  OntoBase(T* y, int64_t y_stride, const T* base, int64_t base_stride, const char* next, int64_t offset, int64_t step)
      : y(y), y_stride(y_stride), base(base), base_stride(base_stride), next(next), next_offset(offset),
        next_step(step) {}
  void ahead(int64_t n) const { ask_for(next, next_offset + n * next_step); }
#if defined(__AVX512BF16__)
  void add_pair(int64_t row, int64_t column, Vec<float> even, Vec<float> odd, int64_t lanes) const {
    if (base) {
      const EvenOdd old = load_even_odd(base + row * base_stride + column, lanes);
      even = old.even + even, odd = old.odd + odd;
    }
    store_even_odd(y + row * y_stride + column, {even, odd}, lanes);
  }
#endif
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

// y[t] = base[t] + sum_n C[n][t] * b[n]
template <class T, class P>
struct Expand {
  using A = typename P::Accumulator;
  int64_t tile;
  Buffer<typename P::Element> panels;
  Buffer<uint32_t> pairs;
  int64_t packed = -1;  // whose rows the panels hold, when they hold all columns

  Expand(const MultiLora& op, int64_t tile) : tile(tile) {
    if (P::kPair == 2) pairs.at_least((op.picks * op.rank + 1) / 2 * tile);
  }

  // Of sums[n * tile + t].
  Coefficients<P> coefficients(const A* sums, [[maybe_unused]] int64_t count) {
    if constexpr (P::kPair == 1) {
      return {sums, tile, 1};
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
      return {pairs.data(), tile, 1};
#endif
    }
  }

  // `sample` names the rows b: neighbouring tiles of one sample share their panels.
  void operator()(
      Coefficients<P> c, const T* const* b, int64_t sample, int64_t count, int64_t tokens, int64_t length,
      const T* base, int64_t base_stride, T* y, int64_t y_stride, Ahead ahead) {
    constexpr int64_t kColumns = kPanelColumns<P>;
    const int64_t steps = (count + P::kPair - 1) / P::kPair, panel_size = steps * P::kPair * kColumns;
    // As many packed panels as fit L2 beside the rows of y, which then are passed over as streams.
    const int64_t most = std::clamp<int64_t>(
        kTileBytes / std::max<int64_t>(1, panel_size * static_cast<int64_t>(sizeof(typename P::Element))), 1,
        (length + kColumns - 1) / kColumns);
    panels.at_least(most * panel_size);
    const int64_t turns =
        (length + most * kColumns - 1) / (most * kColumns) * ((tokens + kCombineM<P> - 1) / kCombineM<P>);
    // The next tile's rows are asked for a little at each step: in one go they would be more than can be on their way.
    const int64_t next_step = ahead.bytes() / std::max<int64_t>(1, turns * most * steps) + 1;
    int64_t next_offset = 0;

    for (int64_t first = 0; first < length; first += most * kColumns) {
      const int64_t last = std::min(first + most * kColumns, length);
      if (packed != sample || last - first < length)
        for (int64_t column = first; column < last; column += kColumns)
          pack_panel<T, P>(
              panels.data() + (column - first) / kColumns * panel_size, [&](int64_t n) { return b[n] + column; }, count,
              std::min(kColumns, last - column));
      for (int64_t t = 0; t < tokens; t += kCombineM<P>)
        for (int64_t column = first; column < last; column += kColumns) {
          // the rows that come next
          for (int64_t m = t + kCombineM<P>; m < std::min(t + 2 * kCombineM<P>, tokens); ++m)
            for (int64_t part = column; part < std::min(column + kColumns, last); part += kLine<T>) {
              __builtin_prefetch(y + m * y_stride + part, 1);
              if (base && base != y) __builtin_prefetch(base + m * base_stride + part);
            }
          combine<P>(
              c.at, c.step, c.stride, panels.data() + (column - first) / kColumns * panel_size, steps, t,
              std::min<int64_t>(t + kCombineM<P>, tokens), std::min(kColumns, last - column),
              OntoBase<T, P>{
                  y + column, y_stride, base ? base + column : nullptr, base_stride, ahead.rows, next_offset, next_step});
          next_offset += steps * next_step;
        }
    }
    packed = sample;
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
