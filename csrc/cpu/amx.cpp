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

Tiles::Tiles(bool wanted) : wanted(wanted) {
  if (!wanted) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = kRows;
  asm volatile("" : : "r"(&config) : "memory");  // GCC's intrinsic claims to read the first eight bytes alone
  _tile_loadconfig(&config);
}
Tiles::~Tiles() {
  if (wanted) _tile_release();
}

namespace {

// N tiles of queries. Tiles 0 to 3: sums; 4: keys; 5 to 7: queries. The products with low parts come first: what
// rounding adds to their small sums does not count.
template <int N>
void score_piece(const Scores& of, const char* keys, int64_t first, int64_t last, float* scores) {
  const int64_t stride = of.columns * 4;
  auto add = [&](int64_t step, int64_t low_key, int64_t low_query) {
    const uint32_t* panel = of.panel + low_query + step * kRows * of.columns;
    _tile_loadd(4, keys + step * of.step_bytes + low_key, of.row_bytes);
    _tile_loadd(5, panel, stride);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) _tile_loadd(6, panel + 16, stride);
    if constexpr (N > 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (N > 2) _tile_loadd(7, panel + 32, stride);
    if constexpr (N > 2) _tile_dpbf16ps(2, 4, 7);
    if constexpr (N > 3) _tile_loadd(5, panel + 48, stride);
    if constexpr (N > 3) _tile_dpbf16ps(3, 4, 5);
  };
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  if (of.low_bytes)
    for (int64_t step = first; step < last; ++step) add(step, of.low_bytes, 0), add(step, 0, of.low_words);
  for (int64_t step = first; step < last; ++step) add(step, 0, 0);
  alignas(64) float sums[N][kRows][16];
  _tile_stored(0, sums[0], 64);
  if constexpr (N > 1) _tile_stored(1, sums[1], 64);
  if constexpr (N > 2) _tile_stored(2, sums[2], 64);
  if constexpr (N > 3) _tile_stored(3, sums[3], 64);
  for (int64_t key = 0; key < kRows; ++key)
    for (int tile = 0; tile < N; ++tile) {
      float* to = scores + key * of.columns + 16 * tile;
      const __m512 sum = _mm512_load_ps(sums[tile][key]);
      _mm512_storeu_ps(to, first == 0 ? sum : _mm512_add_ps(sum, _mm512_loadu_ps(to)));
    }
}

}  // namespace

void score(const Scores& of) {
  constexpr auto kSteps = kPiece / kStep;
  // A piece of the panel stays in L1 while all keys pass over it.
  for (int64_t first = 0; first < of.steps; first += kSteps)
    for (int64_t tile = 0; tile < of.key_tiles; ++tile) {
      const int64_t last = std::min(first + kSteps, of.steps);
      const char* keys = of.keys + tile * of.tile_bytes;
      float* scores = of.scores + tile * kRows * of.columns;
      if (of.query_tiles == 1) score_piece<1>(of, keys, first, last, scores);
      else if (of.query_tiles == 2) score_piece<2>(of, keys, first, last, scores);
      else if (of.query_tiles == 3) score_piece<3>(of, keys, first, last, scores);
      else score_piece<4>(of, keys, first, last, scores);
    }
}

#else

bool usable() { return false; }
Tiles::Tiles(bool) : wanted(false) {}
Tiles::~Tiles() {}
void score(const Scores&) {}

#endif

}  // namespace slm_fast::amx
