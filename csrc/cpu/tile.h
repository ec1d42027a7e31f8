// The two register-blocked micro-kernels that all kernels here are built from.
//
//   dot:      S[n][m] += sum_i X[m][i] * A[n][i]          both operands contiguous along i; horizontal sums at the end
//   combine:  Y[m][c]  = sum_n C[n][m] * B[n][c]          a column panel of B stays in L1, C is broadcast
//
// Tile sizes fill the registers with accumulators and operands, so that FMAs, not loads, are the bottleneck.
#pragma once

#include <algorithm>

#include "vec.h"

namespace slm_fast::SLM_ISA {

// float64 is for gradient checks: one-row tiles, which keep compile time short.
template <class P>
constexpr bool kTiled = !std::is_same_v<typename P::Accumulator, double>;
template <class P>
constexpr int kDotM = kTiled<P> ? 4 : 1;
template <class P>
constexpr int kDotN = !kTiled<P> ? 1 : kRegisters == 32 ? 6 : 2;
template <class P>
constexpr int kCombineM = kRegisters == 16 ? 4 : P::kPair == 2 ? 6 : 8;
template <class P>
constexpr int kCombineV = P::kPair == 2 ? 4 : 3;
template <class P>
constexpr int64_t kPanelColumns = kCombineV<P> * kLanes<typename P::Accumulator>;

// How numbers are multiplied. Element: type of X, A and panels. Coefficient: of C. Accumulator: of sums.
template <class A>
struct Plain {
  using Element = A;
  using Coefficient = A;
  using Accumulator = A;
  static constexpr int kStep = kLanes<A>;  // elements of i per FMA
  static constexpr int kPair = 1;          // rows of B per FMA
  using Operand = Vec<A>;
  static Operand load_operand(const A* from) { return load<A>(from); }
  static Operand load_operand_first(const A* from, int64_t count) { return load_first<A>(from, count); }
  static Operand spread(A coefficient) { return broadcast(coefficient); }
  static Vec<A> multiply_add(Operand a, Operand b, Vec<A> sum) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
// bfloat16 pairs with float32 accumulation: twice the multiply-adds per instruction.
struct Bf16Pairs {
  using Element = BFloat16;
  typedef uint32_t Coefficient __attribute__((may_alias, aligned(2)));  // two bfloat16: rows 2n and 2n + 1
  using Accumulator = float;
  static constexpr int kStep = 32;
  static constexpr int kPair = 2;
  using Operand = __m512bh;
  static Operand load_operand(const void* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Operand load_operand_first(const BFloat16* from, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), from);
  }
  static Operand spread(uint32_t pair) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(pair)); }
  static Vec<float> multiply_add(Operand a, Operand b, Vec<float> sum) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, a, b);
  }
};
#endif

// ---- dot ----

// sums[n * ld + m] += x[m] . a[n] over `length` elements, for M <= 4 rows of x and N rows of a.
template <class P, int M, int N>
inline void dot_tile(
    const typename P::Element* const* x, const typename P::Element* const* a, int64_t length,
    typename P::Accumulator* sums, int64_t ld) {
  using A = typename P::Accumulator;
  Vec<A> acc[N][4] = {};
  auto step = [&](auto load_one) {
    typename P::Operand x_i[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x_i[m] = load_one(x[m]);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const typename P::Operand a_i = load_one(a[n]);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[n][m] = P::multiply_add(x_i[m], a_i, acc[n][m]);
    }
  };
  int64_t i = 0;
  for (; i + P::kStep <= length; i += P::kStep) step([&](const auto* row) { return P::load_operand(row + i); });
  if (i < length) step([&](const auto* row) { return P::load_operand_first(row + i, length - i); });
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    A sum[4];
    sum_each_of_4<A>(acc[n], sum);
    for (int m = 0; m < M; ++m) sums[n * ld + m] += sum[m];
  }
}

template <class P, int M>
inline void dot_rows(
    const typename P::Element* const* x, const typename P::Element* const* a, int n, int64_t length,
    typename P::Accumulator* sums, int64_t ld) {
  if (n == 1) return dot_tile<P, M, 1>(x, a, length, sums, ld);
  if constexpr (kDotN<P> >= 2)
    if (n == 2) return dot_tile<P, M, 2>(x, a, length, sums, ld);
  if constexpr (kDotN<P> >= 6) {
    if (n == 3) return dot_tile<P, M, 3>(x, a, length, sums, ld);
    if (n == 4) return dot_tile<P, M, 4>(x, a, length, sums, ld);
    if (n == 5) return dot_tile<P, M, 5>(x, a, length, sums, ld);
    if (n == 6) return dot_tile<P, M, 6>(x, a, length, sums, ld);
  }
}

template <class P>
constexpr int64_t kDotPiece = 4096 / sizeof(typename P::Element);  // elements of a row

// S[n * ld + m] = x[m] . a[n] for any number of rows. Long rows are split so that some rows of a stay in L1.
template <class P>
inline void dot(
    const typename P::Element* const* x, int64_t rows_x, const typename P::Element* const* a, int64_t rows_a,
    int64_t length, typename P::Accumulator* sums, int64_t ld) {
  for (int64_t n = 0; n < rows_a; ++n)
    for (int64_t m = 0; m < rows_x; ++m) sums[n * ld + m] = 0;
  const int64_t blocks = (rows_a + kDotN<P> - 1) / kDotN<P>;
  for (int64_t begin = 0; begin < length; begin += kDotPiece<P>) {
    const int64_t piece = std::min(length - begin, kDotPiece<P>);
    for (int64_t block = 0, n = 0; block < blocks; ++block) {
      const int wide = static_cast<int>((rows_a - n + blocks - block - 1) / (blocks - block));  // 16 = 6 + 5 + 5
      const typename P::Element* a_piece[kDotN<P>];
      for (int j = 0; j < wide; ++j) a_piece[j] = a[n + j] + begin;
      int64_t m = 0;
      for (; m + kDotM<P> <= rows_x; m += kDotM<P>) {
        const typename P::Element* x_piece[kDotM<P>];
        for (int j = 0; j < kDotM<P>; ++j) x_piece[j] = x[m + j] + begin;
        dot_rows<P, kDotM<P>>(x_piece, a_piece, wide, piece, sums + n * ld + m, ld);
      }
      for (; kTiled<P> && m < rows_x; ++m) {
        const typename P::Element* x_piece[1] = {x[m] + begin};
        dot_rows<P, 1>(x_piece, a_piece, wide, piece, sums + n * ld + m, ld);
      }
      n += wide;
    }
  }
}

// ---- combine ----

// Passes the M x V tile of sum_n C[n * step + m * stride] * panel[n][v] to out.add(row, column, vector) or, in the last
// columns, out.add_first(row, column, vector, lanes). If a panel's vectors alternate between even and odd columns,
// `out` has a type Interleaved and takes add_pair(row, column, even, odd, lanes) instead. At each step out.ahead(n), if
// it exists, prefetches memory needed later.
template <class Out>
constexpr bool kInterleaved = requires { typename Out::Interleaved; };

template <class P, int M, int V, bool kWhole, class Out>
inline void combine_tile(
    const typename P::Coefficient* c, int64_t step, int64_t stride, const typename P::Element* panel, int64_t n_count,
    int64_t row, int64_t columns, Out out) {
  constexpr int L = kLanes<typename P::Accumulator>;
  Vec<typename P::Accumulator> acc[M][V] = {};
  for (int64_t n = 0; n < n_count; ++n) {
    if constexpr (requires { out.ahead(n); }) out.ahead(n);
    typename P::Operand b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = P::load_operand(panel + (n * kCombineV<P> + v) * L * P::kPair);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const typename P::Operand c_m = P::spread(c[n * step + m * stride]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = P::multiply_add(c_m, b[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < V; v += kInterleaved<Out> ? 2 : 1) {
      if constexpr (kInterleaved<Out>) {
        out.add_pair(row + m, v * L, acc[m][v], acc[m][v + 1], kWhole ? 2 * L : columns - v * L);
      } else if constexpr (kWhole) {
        out.add(row + m, v * L, acc[m][v]);
      } else {
        out.add_first(row + m, v * L, acc[m][v], columns - v * L);
      }
    }
}

template <class P, int M, class Out>
inline void combine_rows(
    const typename P::Coefficient* c, int64_t step, int64_t stride, const typename P::Element* panel, int64_t n_count,
    int64_t row, int64_t columns, Out out) {
  constexpr int L = kLanes<typename P::Accumulator>, V = kCombineV<P>;
  // Tiles of more rows than kCombineM leave registers for fewer columns; their callers have no more.
  constexpr int kMost = M > kCombineM<P> ? (kRegisters - 2) / (M + 1) : V;
  if constexpr (kMost == V)
    if (columns == V * L) return combine_tile<P, M, V, true>(c, step, stride, panel, n_count, row, columns, out);
  if constexpr (kInterleaved<Out>) {
    static_assert(V == 4 && kMost == V);
    if (columns > 2 * L) return combine_tile<P, M, 4, false>(c, step, stride, panel, n_count, row, columns, out);
    return combine_tile<P, M, 2, false>(c, step, stride, panel, n_count, row, columns, out);
  } else {
    if constexpr (kMost > 3)
      if (columns > 3 * L) return combine_tile<P, M, V, false>(c, step, stride, panel, n_count, row, columns, out);
    if constexpr (kMost > 2)
      if (columns > 2 * L) return combine_tile<P, M, 3, false>(c, step, stride, panel, n_count, row, columns, out);
    if (columns > L) return combine_tile<P, M, 2, false>(c, step, stride, panel, n_count, row, columns, out);
    return combine_tile<P, M, 1, false>(c, step, stride, panel, n_count, row, columns, out);
  }
}

// Output rows [first, last) against one panel of at most kPanelColumns columns (fewer if M > kCombineM).
template <class P, int M = kCombineM<P>, class Out>
inline void combine(
    const typename P::Coefficient* c, int64_t step, int64_t stride, const typename P::Element* panel, int64_t n_count,
    int64_t first, int64_t last, int64_t columns, Out out) {
  int64_t row = first;
  if constexpr (kTiled<P>) {
    for (; row + M <= last; row += M)
      combine_rows<P, M>(c + row * stride, step, stride, panel, n_count, row, columns, out);
    if constexpr (M > 4)
      if (row + 4 <= last) {
        combine_rows<P, 4>(c + row * stride, step, stride, panel, n_count, row, columns, out);
        row += 4;
      }
  }
  for (; row < last; ++row) combine_rows<P, 1>(c + row * stride, step, stride, panel, n_count, row, columns, out);
}

// Prefetches the line at an offset from an address that may be null or past its array's end: only a hint.
inline void ask_for(const void* from, int64_t offset) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(offset);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// Prefetches the rows needed next, a few lines at a time, overlapped with arithmetic.
struct Ahead {
  const char* rows = nullptr;
  int64_t stride = 0, row_bytes = 0, count = 0;  // bytes, bytes, rows

  template <class T>
  static Ahead of(const T* rows, int64_t stride, int64_t length, int64_t count) {
    constexpr auto size = static_cast<int64_t>(sizeof(T));
    return {reinterpret_cast<const char*>(rows), stride * size, length * size, count};
  }
  int64_t bytes() const { return stride == row_bytes ? count * row_bytes : 0; }  // of contiguous rows
  int64_t lines() const { return count * ((row_bytes + 63) / 64); }
  void ask(int64_t lines) {
    for (; lines > 0 && count > 0; --lines) {
      __builtin_prefetch(rows + done, 0, 2);
      if ((done += 64) >= row_bytes) done = 0, rows += stride, --count;
    }
  }
  int64_t done = 0;
};

}  // namespace slm_fast::SLM_ISA
