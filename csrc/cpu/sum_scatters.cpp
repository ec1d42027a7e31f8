// sum_scatters, as specified in slm_fast/ops/sum_scatters.py. Products of eight-bit factors are summed in integers, two
// or four directions per step. Everything is exact, so any order gives the same bits.
#include "../calls.h"
#include "buffer.h"
#include "threads.h"
#include "vec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace slm_fast::SLM_ISA {

constexpr int kWide = 64;                         // columns of a panel
constexpr int kTall = 4;                          // rows of a tile
constexpr int kSteps = kRegisters == 32 ? 4 : 2;  // vectors of a tile's row, at once
constexpr int kPanelsDown = 4;                    // panels of rows of a work item: its planes, 256 KB, stay in L2
constexpr int64_t kTasksAtOnce = 8;               // added to an item's planes in one go
static_assert(kWide % (kSteps * kLanes<int32_t>) == 0);
constexpr double kCoarse = 0x1p10, kFine = 0x1p46;
constexpr double kMostProduct = 0x1p22;  // sums of products are below: 256 127^2

// Some directions of a column, as many as an instruction multiplies and adds up.
#if defined(__AVX512VNNI__)
using Number = int8_t;
#else
using Number = int16_t;
#endif
constexpr int kParts = 4 / sizeof(Number);
struct Word {
  Number part[kParts];
};
// VNNI multiplies unsigned by signed numbers. The first are 128 too large, so the sum is 128 times the second's sum.
constexpr bool kRaised = sizeof(Number) == 1;

// sum + a[0] * b[0] + a[1] * b[1] ...
inline Vec<int32_t> add_products(Vec<int32_t> sum, Vec<int32_t> a, Vec<int32_t> b) {
#if defined(__AVX512VNNI__)
  return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (Vec<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (Vec<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (Vec<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// products[m][c] = sum of rows[w][m] . columns[w][c] over words w. rows: from a panel, columns: a panel, whose columns
// have these sums.
inline void multiply(
    const Word* rows, const Word* columns, const int32_t* sums, int64_t words, int32_t (*products)[kWide]) {
  constexpr int L = kLanes<int32_t>;
  for (int begin = 0; begin < kWide; begin += kSteps * L) {
    Vec<int32_t> sum[kTall][kSteps] = {};
    for (int64_t w = 0; w < words; ++w) {
      Vec<int32_t> own[kSteps];
#pragma GCC unroll 4
      for (int v = 0; v < kSteps; ++v) std::memcpy(&own[v], columns + w * kWide + begin + v * L, sizeof own[v]);
#pragma GCC unroll 4
      for (int m = 0; m < kTall; ++m) {
        int32_t one;
        std::memcpy(&one, rows + w * kWide + m, sizeof one);
        const Vec<int32_t> all = broadcast(kRaised ? one ^ static_cast<int32_t>(0x80808080) : one);
#pragma GCC unroll 4
        for (int v = 0; v < kSteps; ++v) sum[m][v] = add_products(sum[m][v], all, own[v]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kTall; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kSteps; ++v) {
        if (kRaised) sum[m][v] -= 128 * load<int32_t>(sums + begin + v * L);
        store(&products[m][begin + v * L], sum[m][v]);
      }
  }
}

// A double and an integer with the same value, rounded to the nearest, ties to even. The sum with kMagic, whose last bit
// is worth one, is rounded so and has the integer in its lower bits. This needs no instruction that some sets lack.
struct Whole {
  double value;
  int64_t number;
};
constexpr double kMagic = 0x1.8p52, kMostRounded = 0x1p51;
inline Whole rounded(double value) {  // of less than kMostRounded
  const double sum = value + kMagic;
  return {sum - kMagic, std::bit_cast<int64_t>(sum) - std::bit_cast<int64_t>(kMagic)};
}
inline Whole rounded_large(double value) {
  const double whole = std::nearbyint(value);
  return {whole, static_cast<int64_t>(whole)};
}

// Adds one number, already scaled to units of the coarse plane. The callers' limits leave no room for overflow.
template <auto kRounded>
inline void add(double scaled, int64_t& coarse, int64_t& fine) {
  const Whole units = kRounded(scaled);
  coarse += units.number;
  fine += rounded((scaled - units.value) * kFine).number;
}

// Adds products[c] * scale * unit[c] for the columns [begin, end).
template <auto kRounded>
inline void add_columns(
    const int32_t* products, double scale, const double* unit, int64_t begin, int64_t end, int64_t* coarse,
    int64_t* fine) {
  for (int64_t c = begin; c < end; ++c) add<kRounded>(products[c] * scale * unit[c], coarse[c], fine[c]);
}

// A task, ready to be multiplied with itself.
struct Task {
  int64_t rows, words;
  const int8_t* factor;   // [rows, D]
  const float* diagonal;  // [D]
  Buffer<Word> panels;    // [panels, words, kWide]
  Buffer<int32_t> sums;   // [panels, kWide], of each column
  Buffer<double> unit;    // [D], the power of two of each column
  double most;            // bound of a sum of products times one unit
};

// Columns past the last, and directions that fill up the last word, are zeros.
inline void pack_panel(Task& task, int64_t width, int64_t panel) {
  const int64_t begin = panel * kWide, columns = std::min<int64_t>(kWide, width - begin);
  int32_t* sums = task.sums.data() + begin;
  std::fill_n(sums, kWide, 0);
  for (int64_t w = 0; w < task.words; ++w) {
    Word* word = task.panels.data() + (panel * task.words + w) * kWide;
    std::fill_n(word, kWide, Word{});
    for (int64_t part = 0; part < std::min<int64_t>(kParts, task.rows - kParts * w); ++part) {
      const int8_t* row = task.factor + (kParts * w + part) * width + begin;
      for (int64_t c = 0; c < columns; ++c) word[c].part[part] = row[c], sums[c] += row[c];
    }
  }
}

// Adds a task's elements in the rows of one panel and the columns of another, `right`.
inline void add_panels(const SumScatters& op, const Task& task, int64_t down, int64_t right) {
  const int64_t D = op.width, top = down * kWide, left = right * kWide, end = std::min(D, left + kWide);
  const Word* rows = task.panels.data() + down * task.words * kWide;
  const Word* columns = task.panels.data() + right * task.words * kWide;
  const double* unit = task.unit.data();
  alignas(64) int32_t products[kTall][kWide];
  for (int64_t i = top; i < std::min(top + kWide, end); ++i) {
    const int64_t m = (i - top) % kTall;
    if (m == 0) multiply(rows + (i - top), columns, task.sums.data() + left, task.words, products);
    int64_t* const coarse = op.coarse + i * D - i * (i - 1) / 2 - i;  // [i, j] is at j
    int64_t* const fine = op.fine + i * D - i * (i - 1) / 2 - i;
    if (i >= left)
      add<rounded_large>(
          (products[m][i - left] * unit[i] * unit[i] + task.diagonal[i]) * kCoarse, coarse[i], fine[i]);
    const double scale = unit[i] * kCoarse;
    const auto add_row = scale * task.most < kMostRounded ? add_columns<rounded> : add_columns<rounded_large>;
    add_row(products[m], scale, unit + left, std::max<int64_t>(0, i + 1 - left), end - left, coarse + left, fine + left);
  }
}

void sum_scatters(const SumScatters& op, const Threads& threads) {
  const int64_t D = op.width, panels = (D + kWide - 1) / kWide, downs = (panels + kPanelsDown - 1) / kPanelsDown;
  std::fill_n(op.coarse, D * (D + 1) / 2, 0);
  std::fill_n(op.fine, D * (D + 1) / 2, 0);
  Task some[kTasksAtOnce];
  const int8_t* factor = op.factor;
  for (int64_t first = 0; first < op.tasks; first += kTasksAtOnce) {
    const int64_t tasks = std::min(kTasksAtOnce, op.tasks - first);
    for (int64_t t = 0; t < tasks; ++t) {
      Task& task = some[t];
      task.rows = op.rows[first + t], task.words = (task.rows + kParts - 1) / kParts, task.most = 0;
      task.factor = factor, task.diagonal = op.diagonal + (first + t) * D;
      task.panels.at_least(panels * task.words * kWide), task.sums.at_least(panels * kWide), task.unit.at_least(D);
      for (int64_t c = 0; c < D; ++c) {
        task.unit[c] = std::ldexp(1.0, op.exponent[(first + t) * D + c]);
        task.most = std::max(task.most, kMostProduct * task.unit[c]);
      }
      factor += task.rows * D;
    }
    const bool worth_threads = D * D * tasks > 100'000;
    threads.for_each(tasks * panels, worth_threads, [&] {
      return [&](int64_t item) { pack_panel(some[item / panels], D, item % panels); };
    });
    threads.for_each(panels * downs, worth_threads, [&] {
      return [&](int64_t item) {
        const int64_t right = panels - 1 - item / downs, top = item % downs * kPanelsDown;
        for (int64_t t = 0; t < tasks; ++t)
          for (int64_t down = top; down < std::min(top + kPanelsDown, right + 1); ++down)
            add_panels(op, some[t], down, right);
      };
    });
  }
}

}  // namespace slm_fast::SLM_ISA
