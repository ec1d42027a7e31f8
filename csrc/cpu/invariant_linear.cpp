// invariant_linear, as specified in slm_fast/ops/invariant_linear.py. Every output is one chain of multiply-adds along
// its row, in order, in whatever tile it is computed: its bits depend on nothing but its row and its weights.
#include "../calls.h"
#include "buffer.h"
#include "threads.h"
#include "vec.h"

#include <algorithm>

namespace slm_fast::SLM_ISA {

constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
constexpr int kTileVectors = 3;
constexpr int64_t kTileColumns = kTileVectors * kLanes<double>;
constexpr int64_t kPieceLength = 128;  // of a row: a panel of weights, 24 KB, stays in L1
constexpr int64_t kRowsAtOnce = 512;   // whose pieces, 512 KB, stay in L2 while all panels pass

// y[m][c] += sum_i x[i][m] * panel[i][c] for the first `rows` rows and `columns` columns of a tile.
// x: [length, kTileRows], panel: [length, kTileColumns]. y is overwritten if `first`.
inline void tile(
    const double* x, const double* panel, int64_t length, double* y, int64_t features, int64_t rows, int64_t columns,
    bool first) {
  constexpr int L = kLanes<double>;
  Vec<double> sum[kTileRows][kTileVectors] = {};
  const auto each = [&](auto visit) {
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v)
        if (m < rows && v * L < columns) visit(sum[m][v], y + m * features + v * L, columns - v * L);
  };
  for (int64_t m = kTileRows; m < std::min<int64_t>(rows, 2 * kTileRows); ++m)  // the next tile's
    for (int64_t v = 0; v < kTileVectors; ++v) __builtin_prefetch(y + m * features + std::min(v * L, columns - 1), 1);
  if (!first) each([](Vec<double>& own, double* at, int64_t count) { own = load_first<double>(at, count); });
  for (int64_t i = 0; i < length; ++i) {
    Vec<double> weights[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) weights[v] = load<double>(panel + i * kTileColumns + v * L);
#pragma GCC unroll 8
    for (int m = 0; m < kTileRows; ++m) {
      const Vec<double> x_m = broadcast(x[i * kTileRows + m]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[m][v] = x_m * weights[v] + sum[m][v];
    }
  }
  each([](Vec<double>& own, double* at, int64_t count) { store_first(at, own, count); });
}

// to[i][c] = from[c][i] for the first `count` of `columns` columns, and zeros in the others.
inline void transpose(const double* from, int64_t width, int64_t length, int64_t count, int64_t columns, double* to) {
  for (int64_t i = 0; i < length; ++i) {
    for (int64_t c = 0; c < count; ++c) to[i * columns + c] = from[c * width + i];
    for (int64_t c = count; c < columns; ++c) to[i * columns + c] = 0;
  }
}

void invariant_linear(const InvariantLinear& op, const Threads& threads) {
  if (op.width == 0) std::fill_n(op.y, op.rows * op.features, 0.0);
  const int64_t panels = (op.features + kTileColumns - 1) / kTileColumns;
  Buffer<double> x((std::min(kRowsAtOnce, op.rows) + kTileRows) * kPieceLength);
  for (int64_t begin = 0; begin < op.rows; begin += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, op.rows - begin);
    for (int64_t at = 0; at < op.width; at += kPieceLength) {
      const int64_t length = std::min(kPieceLength, op.width - at);
      for (int64_t row = 0; row < rows; row += kTileRows)
        transpose(
            op.x + (begin + row) * op.width + at, op.width, length, std::min<int64_t>(kTileRows, rows - row), kTileRows,
            x.data() + row * length);
      threads.for_each(panels, rows * length * op.features > 100'000, [&] {
        return [&, panel = Buffer<double>(kPieceLength * kTileColumns)](int64_t item) mutable {
          const int64_t column = item * kTileColumns, columns = std::min(kTileColumns, op.features - column);
          transpose(op.weight + column * op.width + at, op.width, length, columns, kTileColumns, panel.data());
          for (int64_t row = 0; row < rows; row += kTileRows)
            tile(
                x.data() + row * length, panel.data(), length, op.y + (begin + row) * op.features + column, op.features,
                rows - row, columns, at == 0);
        };
      });
    }
  }
}

}  // namespace slm_fast::SLM_ISA
