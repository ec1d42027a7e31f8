// The two products of multi_lora's forward and backward: Shrink, from features to a sample's R rows, and Expand, from
// those rows to features.
#pragma once

#include "amx.h"
#include "multi_lora.h"

namespace slm_fast::SLM_ISA {

// Rows of type T as the tile's element type: in place if the types match, else converted into a buffer.
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

// combine's coefficients: C[n][t] = at[n * step + t * stride], n counting rows or pairs of rows.
template <class P>
struct Coefficients {
  const typename P::Coefficient* at;
  int64_t step, stride;
};

// Not available for these types.
template <class P>
struct ShrinkAcross {
  ShrinkAcross(const MultiLora&, int64_t) {}
};

#if defined(__AVX512BF16__)
// The same product with the sample's rows across lanes, so no horizontal sums: for many tokens, which amortise the
// transposition. The result is ready for use as Expand's coefficients.
template <>
struct ShrinkAcross<Bf16Pairs> {
  using P = Bf16Pairs;
  static constexpr int64_t kWide = kPanelColumns<P>;  // rows per panel
  Buffer<BFloat16> panels, padded;  // [panel][pair of features][kWide] pairs; x if its rows cannot be read as pairs
  Buffer<float> sums, weights;      // [tokens][width], [width]
  Buffer<uint32_t> pairs;           // [tokens][width / 2]
  int64_t width, packed = -1;

  explicit ShrinkAcross(const MultiLora& op, int64_t tile)
      : width((op.picks * op.rank + 31) / 32 * 32) {
    sums.at_least(tile * width), weights.at_least(width), pairs.at_least(tile * width / 2);
  }

  // Whether the transposition pays off: with many tokens and well-filled lanes, or in tiles.
  static bool serves(int64_t tokens, int64_t count, int64_t length) {
    return tokens >= 16 && (count >= 20 || (count > 0 && in_tiles(length)));
  }
  static bool in_tiles(int64_t length) { return amx::chosen() && length % amx::kStep == 0; }

  void pack(int64_t sample, const BFloat16* const* a, const double* weight, int64_t count, int64_t length) {
    if (packed == sample) return;
    packed = sample;
    const int64_t words = (length + 1) / 2;
    panels.at_least((count + kWide - 1) / kWide * words * kWide * 2);
    for (int64_t n = 0; n < width; ++n) weights[n] = n < count ? static_cast<float>(weight[n]) : 0;
    for (int64_t row = 0; row < count; row += kWide)
      turn_rows<P>(
          panels.data() + row * words * 2, [&](int64_t n) { return a[row + n]; }, std::min(kWide, count - row), length);
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
    if (in_tiles(length)) {
      shrink_in_tiles(x, stride, tokens, count, length);
      return weighted(tokens, count);
    }
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
    const int64_t pieces = std::max<int64_t>(1, (words + 95) / 96);  // of a panel, kept in L1 while all tokens pass
    for (int64_t row = 0; row < count; row += kWide)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = words * piece / pieces, last = words * (piece + 1) / pieces;
        const auto* panel = panels.data() + (row * words + first * kWide) * 2;
        const OntoSums out{sums.data() + row, width, piece > 0};
        const int64_t lanes = std::min(kWide, (count - row + 15) / 16 * 16);
        if (lanes < kWide) combine<P, 8>(c + first, 1, stride / 2, panel, last - first, 0, tokens, lanes, out);
        else combine<P, 6>(c + first, 1, stride / 2, panel, last - first, 0, tokens, lanes, out);
      }
    return weighted(tokens, count);
  }

 private:
  // Whole tiles of x are read in place, the tokens that are left from a padded copy.
  void shrink_in_tiles(const BFloat16* x, int64_t stride, int64_t tokens, int64_t count, int64_t length) {
    const int64_t whole = tokens / amx::kRows, left = tokens % amx::kRows, words = length / 2;
    if (left) {
      padded.at_least(amx::kRows * length);
      for (int64_t t = 0; t < amx::kRows; ++t)
        if (t < left) std::copy_n(x + (whole * amx::kRows + t) * stride, length, padded.data() + t * length);
        else std::fill_n(padded.data() + t * length, length, BFloat16{0});
    }
    const amx::Tiles tiles(true);
    for (int64_t row = 0; row < count; row += kWide) {
      const auto* panel = reinterpret_cast<const uint32_t*>(panels.data() + row * words * 2);
      const int64_t row_tiles = (std::min(kWide, count - row) + amx::kRows - 1) / amx::kRows;
      const amx::Tiled rows{reinterpret_cast<const char*>(x), 2 * stride, 2 * amx::kStep, 2 * amx::kRows * stride};
      amx::Shrunk of{rows, whole, panel, row_tiles, words / amx::kRows, kWide, sums.data() + row, width};
      amx::shrink(of);
      if (left) {
        of.x.rows = reinterpret_cast<const char*>(padded.data()), of.x.row_bytes = 2 * length, of.token_tiles = 1;
        of.sums += whole * amx::kRows * width;
        amx::shrink(of);
      }
    }
  }

  // The sums times their weights, as pairs; those past `count` are zero.
  Coefficients<P> weighted(int64_t tokens, int64_t count) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t n = 0; n < width; n += 32) {
        __m512 half[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t at = n + 16 * i;
          half[i] = _mm512_maskz_mul_ps(
              static_cast<__mmask16>(first_lanes(count - at)), (__m512)load<float>(sums.data() + t * width + at),
              (__m512)load<float>(weights.data() + at));
        }
        _mm512_storeu_si512(
            pairs.data() + t * (width / 2) + n / 2, (__m512i)_mm512_cvtne2ps_pbh(half[1], half[0]));
      }
    return {pairs.data(), 1, width / 2};
  }
};
#endif

// Packs `count` rows into combine's column panel, [n][kCombineV vectors], zero-padded past `columns`. With pairs,
// vectors alternate between even and odd columns.
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

// Tags combine's outputs for those P whose panels separate even and odd columns.
template <class P, bool = P::kPair == 2>
struct Layout {};
template <class P>
struct Layout<P, true> {
  using Interleaved = P;
};

// Epilogue of combine: y = base + sum.
template <class T, class P>
struct OntoBase : Layout<P> {
  T* y;
  int64_t y_stride;
  const T* base;  // or null
  int64_t base_stride;
  const char* next;  // what to prefetch, or null; this tile's offset in it, and bytes per step
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
  int64_t packed = -1;  // sample whose rows the panels hold, if they hold all columns

  Expand(const MultiLora& op, int64_t tile) : tile(tile) {
    if (P::kPair == 2) pairs.at_least((op.picks * op.rank + 1) / 2 * tile);
  }

  // From sums[n * tile + t].
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

  // `sample` identifies the rows b: consecutive tiles of a sample reuse its panels.
  void operator()(
      Coefficients<P> c, const T* const* b, int64_t sample, int64_t count, int64_t tokens, int64_t length,
      const T* base, int64_t base_stride, T* y, int64_t y_stride, Ahead ahead) {
    constexpr int64_t kColumns = kPanelColumns<P>;
#if defined(__AVX512BF16__)
    if constexpr (P::kPair == 2)
      if (c.step == 1 && amx::chosen())  // as ShrinkAcross makes them
        return in_tiles(c, b, sample, count, tokens, length, base, base_stride, y, y_stride, ahead);
#endif
    const int64_t steps = (count + P::kPair - 1) / P::kPair, panel_size = steps * P::kPair * kColumns;
    // As many packed panels as fit L2 beside the rows of y, which are then streamed.
    const int64_t most = std::clamp<int64_t>(
        kTileBytes / std::max<int64_t>(1, panel_size * static_cast<int64_t>(sizeof(typename P::Element))), 1,
        (length + kColumns - 1) / kColumns);
    panels.at_least(most * panel_size);
    const int64_t turns =
        (length + most * kColumns - 1) / (most * kColumns) * ((tokens + kCombineM<P> - 1) / kCombineM<P>);
    // The next tile's rows are prefetched a little per step: all at once would be more than can be in flight.
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
          // prefetch the next rows
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

#if defined(__AVX512BF16__)
 private:
  Buffer<float> found;  // [tokens][32]

  // The same for coefficients of whole tiles, which are zero past `count`.
  void in_tiles(
      Coefficients<P> c, const T* const* b, int64_t sample, int64_t count, int64_t tokens, int64_t length,
      const T* base, int64_t base_stride, T* y, int64_t y_stride, Ahead ahead) {
    constexpr int64_t kColumns = kPanelColumns<P>, kStrip = 2 * amx::kRows;  // columns in two tiles
    constexpr int64_t kSoon = 2 * kStrip;  // columns from here to those to prefetch
    const int64_t tile_pairs = std::min((count + 1) / 2, amx::kRows);
    const int64_t steps = ((count + 1) / 2 + tile_pairs - 1) / tile_pairs;
    const int64_t panel_size = steps * 2 * tile_pairs * kColumns, token_tiles = (tokens + amx::kRows - 1) / amx::kRows;
    const int64_t blocks = (length + kColumns - 1) / kColumns;
    panels.at_least(blocks * panel_size);
    found.at_least(token_tiles * amx::kRows * kStrip);
    if (packed != sample)
      for (int64_t block = 0; block < blocks; ++block) {
        auto* panel = panels.data() + block * panel_size;
        std::fill_n(panel, panel_size, BFloat16{0});
        pack_panel<T, P>(
            panel, [&](int64_t n) { return b[n] + block * kColumns; }, count,
            std::min(kColumns, length - block * kColumns));
      }
    packed = sample;
    const int64_t lines = ahead.lines() / std::max<int64_t>(1, length / kStrip * token_tiles) + 1;
    const amx::Tiles tiles(true, tile_pairs);
    for (int64_t column = 0; column < length; column += kStrip) {
      const auto* panel = reinterpret_cast<const uint32_t*>(panels.data() + column / kColumns * panel_size);
      amx::expand({c.at, c.stride, token_tiles, panel + column % kColumns, steps, tile_pairs, kColumns, found.data()});
      const OntoBase<T, P> out{y + column, y_stride, base ? base + column : nullptr, base_stride, nullptr, 0, 0};
      for (int64_t t = 0; t < tokens; ++t) {
        const float* sums = found.data() + t * kStrip;
        __builtin_prefetch(y + t * y_stride + column + kSoon, 1);
        if (base && base != y) __builtin_prefetch(base + t * base_stride + column + kSoon);
        out.add_pair(t, 0, load<float>(sums), load<float>(sums + amx::kRows), length - column);
        if (t % amx::kRows == 0) ahead.ask(lines);
      }
    }
  }
#endif
};

}  // namespace slm_fast::SLM_ISA
