#include "amx.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#define SLM_FAST_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>

namespace slm_fast::amx {
namespace {
bool is_chosen = false;
}

void choose(bool use) { is_chosen = use; }
bool chosen() { return is_chosen; }

#if defined(SLM_FAST_AMX)

bool usable() {
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Tiles::Tiles(bool wanted, int64_t pairs) : wanted(wanted) {
  if (!wanted) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = kRows;
  config.row_bytes[4] = static_cast<uint16_t>(4 * pairs);
  for (int tile = 5; tile < 8; ++tile) config.rows[tile] = static_cast<uint8_t>(pairs);
  asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic claims to read the first eight bytes alone
  _tile_loadconfig(&config);
}
Tiles::~Tiles() {
  if (wanted) _tile_release();
}

namespace {

// K tiles of keys against N of queries, at most 2 each. Tiles 0 to 3: sums; 4, 5: keys; 6, 7: queries. The products with
// low parts come first: what rounding adds to their small sums does not count.
template <int K, int N>
void score_piece(const Scores& of, const char* keys, const uint32_t* panel, int64_t first, int64_t last, float* scores) {
  const int64_t stride = of.columns * 4;
  auto add = [&](int64_t step, int64_t low_key, int64_t low_query) {
    const char* key = keys + step * of.step_bytes + low_key;
    const uint32_t* query = panel + low_query + step * kRows * of.columns;
    _tile_loadd(4, key, of.row_bytes);
    _tile_loadd(6, query, stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) _tile_loadd(7, query + 16, stride);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (K > 1) _tile_loadd(5, key + of.tile_bytes, of.row_bytes);
    if constexpr (K > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (K > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  };
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (K > 1) _tile_zero(2);
  if constexpr (K > 1 && N > 1) _tile_zero(3);
  for (int64_t step = first; step < last && of.low_words; ++step) {
    if (of.low_bytes) add(step, of.low_bytes, 0);
    add(step, 0, of.low_words);
  }
  for (int64_t step = first; step < last; ++step) add(step, 0, 0);
  alignas(64) float sums[K][N][kRows][16];
  _tile_stored(0, sums[0][0], 64);
  if constexpr (N > 1) _tile_stored(1, sums[0][1], 64);
  if constexpr (K > 1) _tile_stored(2, sums[1][0], 64);
  if constexpr (K > 1 && N > 1) _tile_stored(3, sums[1][1], 64);
  for (int64_t key = 0; key < K * kRows; ++key)
    for (int tile = 0; tile < N; ++tile) {
      float* to = scores + key * of.columns + 16 * tile;
      const __m512 sum = _mm512_load_ps(sums[key / kRows][tile][key % kRows]);
      _mm512_storeu_ps(to, first == 0 ? sum : _mm512_add_ps(sum, _mm512_loadu_ps(to)));
    }
}

}  // namespace

void score(const Scores& of) {
  constexpr auto kSteps = kPiece / kStep;
  // A piece of the panel stays in L1 while all keys pass over it.
  for (int64_t first = 0; first < of.steps; first += kSteps)
    for (int64_t column = 0; column < of.query_tiles; column += 2)
      for (int64_t tile = 0; tile < of.key_tiles; tile += 2) {
        const int64_t last = std::min(first + kSteps, of.steps);
        const bool one_key = tile + 1 == of.key_tiles, one_query = column + 1 == of.query_tiles;
        const auto run = one_key ? (one_query ? score_piece<1, 1> : score_piece<1, 2>)
                                 : (one_query ? score_piece<2, 1> : score_piece<2, 2>);
        run(of, of.keys + tile * of.tile_bytes, of.panel + 16 * column, first, last,
            of.scores + tile * kRows * of.columns + 16 * column);
      }
}

namespace {

constexpr int64_t kTileBytes = 1024, kTileNumbers = kRows * kRows;

// K tiles of keys against N of queries, at most 2 each or 1 against 3. Tiles 0 to 3: sums; 4, 5: keys; 6, 7, 5: queries.
// ahead: bytes to keys to prefetch; 0: none.
template <int K, int N>
void screen_tiles(const Screened& of, const char* keys, const char* queries, float* sums, int64_t ahead) {
  static_assert(K * N < 5);
  const int64_t next_key = of.steps * kTileBytes;
  auto prefetch = [&](const char* key) {
    for (int64_t row = ahead ? 0 : kRows; row < kRows; ++row)
      __builtin_prefetch(key + ahead + row * (kTileBytes / kRows), 0, 2);
  };
  if (of.more) {
    _tile_loadd(0, sums, 64);
    if constexpr (N > 1) _tile_loadd(1, sums + of.sum_numbers, 64);
    if constexpr (K > 1) _tile_loadd(2, sums + kTileNumbers, 64);
    if constexpr (K > 1 && N > 1) _tile_loadd(3, sums + of.sum_numbers + kTileNumbers, 64);
    if constexpr (N > 2) _tile_loadd(2, sums + 2 * of.sum_numbers, 64);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (K > 1 || N > 2) _tile_zero(2);
    if constexpr (K > 1 && N > 1) _tile_zero(3);
  }
  for (int64_t step = 0; step < of.steps; ++step, keys += kTileBytes, queries += kTileBytes) {
    _tile_loadd(4, keys, 64);
    prefetch(keys);
    _tile_loadd(6, queries, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) _tile_loadd(7, queries + of.query_bytes, 64);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (K > 1) _tile_loadd(5, keys + next_key, 64);
    if constexpr (K > 1) prefetch(keys + next_key);
    if constexpr (K > 1) _tile_dpbf16ps(2, 5, 6);
    if constexpr (K > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
    if constexpr (N > 2) _tile_loadd(5, queries + 2 * of.query_bytes, 64);
    if constexpr (N > 2) _tile_dpbf16ps(2, 4, 5);
  }
  _tile_stored(0, sums, 64);
  if constexpr (N > 1) _tile_stored(1, sums + of.sum_numbers, 64);
  if constexpr (K > 1) _tile_stored(2, sums + kTileNumbers, 64);
  if constexpr (K > 1 && N > 1) _tile_stored(3, sums + of.sum_numbers + kTileNumbers, 64);
  if constexpr (N > 2) _tile_stored(2, sums + 2 * of.sum_numbers, 64);
}

}  // namespace

// The queries' tiles stay in L1 while all keys pass over them. Three tiles go together: the last one
// alone would wait for its own sums.
void screen(const Screened& of) {
  for (int64_t query = 0, queries; query < of.query_tiles; query += queries) {
    queries = of.query_tiles - query;
    if (queries > 3) queries = 2;
    for (int64_t key = 0, tiles; key < of.key_tiles; key += tiles) {
      tiles = queries > 2 ? 1 : std::min<int64_t>(2, of.key_tiles - key);
      const auto run = queries > 2   ? screen_tiles<1, 3>
                       : queries > 1 ? (tiles > 1 ? screen_tiles<2, 2> : screen_tiles<1, 2>)
                                     : (tiles > 1 ? screen_tiles<2, 1> : screen_tiles<1, 1>);
      run(of, of.keys + key * of.steps * kTileBytes, of.queries + query * of.query_bytes,
          of.sums + query * of.sum_numbers + key * kTileNumbers, query == 0 ? of.ahead_bytes : 0);
    }
  }
}

namespace {

// M tiles of tokens against one tile of rows. Tiles 0 to 3: sums, with two token tiles of even and of odd steps, so that
// no sum waits for itself; 4, 6: tokens; 5, 7: rows.
template <int M>
void shrink_tiles(const Shrunk& of, const char* x, const uint32_t* panel, float* sums) {
  const int64_t next = of.x.tile_bytes, stride = of.columns * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t step = 0;
  for (; M <= 2 && step + 1 < of.steps; step += 2, x += 2 * of.x.step_bytes, panel += 2 * kRows * of.columns) {
    _tile_loadd(5, panel, stride);
    _tile_loadd(4, x, of.x.row_bytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(7, panel + kRows * of.columns, stride);
    _tile_loadd(6, x + of.x.step_bytes, of.x.row_bytes);
    _tile_dpbf16ps(2, 6, 7);
    if constexpr (M == 2) {
      _tile_loadd(4, x + next, of.x.row_bytes);
      _tile_dpbf16ps(1, 4, 5);
      _tile_loadd(6, x + next + of.x.step_bytes, of.x.row_bytes);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  for (; step < of.steps; ++step, x += of.x.step_bytes, panel += kRows * of.columns) {
    _tile_loadd(5, panel, stride);
    _tile_loadd(4, x, of.x.row_bytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (M > 1) _tile_loadd(6, x + next, of.x.row_bytes);
    if constexpr (M > 1) _tile_dpbf16ps(1, 6, 5);
    if constexpr (M > 2) _tile_loadd(7, x + 2 * next, of.x.row_bytes);
    if constexpr (M > 2) _tile_dpbf16ps(2, 7, 5);
    if constexpr (M > 3) _tile_loadd(4, x + 3 * next, of.x.row_bytes);
    if constexpr (M > 3) _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, of.width * 4);
  if constexpr (M > 1) _tile_stored(1, sums + kRows * of.width, of.width * 4);
  if constexpr (M > 2) _tile_stored(2, sums + 2 * kRows * of.width, of.width * 4);
  if constexpr (M > 3) _tile_stored(3, sums + 3 * kRows * of.width, of.width * 4);
  if constexpr (M <= 2) {
    alignas(64) float odd[M][kRows][16];
    _tile_stored(2, odd[0][0], 64);
    if constexpr (M > 1) _tile_stored(3, odd[1][0], 64);
    for (int64_t token = 0; token < M * kRows; ++token) {
      float* to = sums + token * of.width;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_load_ps(odd[token / kRows][token % kRows])));
    }
  }
}

}  // namespace

void shrink(const Shrunk& of) {
  for (int64_t token = 0; token < of.token_tiles; token += 4)
    for (int64_t row = 0; row < of.row_tiles; ++row) {
      const char* x = of.x.rows + token * of.x.tile_bytes;
      const uint32_t* panel = of.panel + row * kRows;
      float* sums = of.sums + token * kRows * of.width + row * kRows;
      const int64_t left = of.token_tiles - token;
      if (left == 1) shrink_tiles<1>(of, x, panel, sums);
      else if (left == 2) shrink_tiles<2>(of, x, panel, sums);
      else if (left == 3) shrink_tiles<3>(of, x, panel, sums);
      else shrink_tiles<4>(of, x, panel, sums);
    }
}

void expand(const Expanded& of) {
  constexpr int64_t kWidth = 2 * kRows;
  const int64_t stride = of.columns * 4;
  _tile_loadd(6, of.panel, stride);
  _tile_loadd(7, of.panel + kRows, stride);
  for (int64_t token = 0; token < of.token_tiles; ++token) {
    const uint32_t* coefficients = of.coefficients + token * kRows * of.stride;
    float* sums = of.sums + token * kRows * kWidth;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < of.steps; ++step) {
      if (of.steps > 1) {
        _tile_loadd(6, of.panel + step * of.pairs * of.columns, stride);
        _tile_loadd(7, of.panel + step * of.pairs * of.columns + kRows, stride);
      }
      _tile_loadd(4, coefficients + step * of.pairs, of.stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, kWidth * 4);
    _tile_stored(1, sums + kRows, kWidth * 4);
  }
}

namespace {

void round_rows(const Rounded& of, int64_t first, int64_t last) {
  __m512 bias[2] = {};
  if (of.bias)
    for (int i = 0; i < 2; ++i) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of.bias + i * kRows));
      bias[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
  for (int64_t row = first; row < std::min(last, of.rows); ++row) {
    const float* sums = of.sums + (row / kRows * 2 * kRows + row % kRows) * kRows;
    const __m512 low = _mm512_add_ps(_mm512_load_ps(sums), bias[0]);
    const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + kRows * kRows), bias[1]);
    _mm512_storeu_si512(of.y + row * of.stride, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

}  // namespace

void round(const Rounded& of) { round_rows(of, 0, kBlock); }

// Tiles 0 to 3: sums; 4, 5: rows; 6, 7: columns. Columns are not kept in L1, where the rows are to stay.
void multiply(const Product& of, const Rounded& before) {
  const int64_t share = (kBlock + of.steps - 1) / of.steps;  // rows to round per step
  const auto ahead_share = static_cast<uintptr_t>((of.ahead_bytes / of.steps + 63) / 64 * 64);
  uintptr_t ahead = of.ahead;
  const uintptr_t last = ahead + static_cast<uintptr_t>(of.ahead_bytes);
  auto add = [](const char* rows, int64_t stride, int64_t next, const uint16_t* columns) {
    _tile_loadd(4, rows, stride);
    _tile_stream_loadd(6, columns, 2 * kStep);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(7, columns + kStepNumbers / 2, 2 * kStep);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + next, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  constexpr int64_t kTile = kRows * kRows;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < of.steps; ++step) {
    add(of.x.rows + step * of.x.step_bytes, of.x.row_bytes, of.x.tile_bytes, of.weight + step * kStepNumbers);
    round_rows(before, step * share, (step + 1) * share);
    for (const uintptr_t end = std::min(ahead + ahead_share, last); ahead < end; ahead += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(ahead));
  }
  for (int64_t step = 0; step < of.slot_steps; ++step)
    add(reinterpret_cast<const char*>(of.coefficients + step * kStepNumbers), 2 * kStep, kStepNumbers,
        of.slots + step * kStepNumbers);
  _tile_stored(0, of.sums, 64);
  _tile_stored(1, of.sums + kTile, 64);
  _tile_stored(2, of.sums + 2 * kTile, 64);
  _tile_stored(3, of.sums + 3 * kTile, 64);
}

#else

bool usable() { return false; }
Tiles::Tiles(bool, int64_t) : wanted(false) {}
Tiles::~Tiles() {}
void score(const Scores&) {}
void screen(const Screened&) {}
void shrink(const Shrunk&) {}
void expand(const Expanded&) {}
void multiply(const Product&, const Rounded&) {}
void round(const Rounded&) {}

#endif

}  // namespace slm_fast::amx
