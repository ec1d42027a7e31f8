// adapted_linear:  y[b, t] = x[b, t] . weight^T + bias + sum_k w[b, k] (x[b, t] . A[s]^T) . B[s],  s = slot_ids[b, k]
//
// For bfloat16, in tiles of AMX. The rows of all samples stand in one sequence, cut into blocks of 32. The weight is
// rearranged into tiles in every call, as panels of 32 output features. The increments of a block's samples extend the
// sums over features: a row's coefficients w (x . A) times its sample's rows of B, and zeros times those of others. So y
// is written once and never read. Each sample has steps of its own, so that its bits do not depend on the others.
// 2 N (I + S) O + 2 N I S flops for N = B T rows, and S the rows of rank of a block's samples, K r each, rounded up.
#include <vector>

#include "../calls.h"
#include "products.h"

namespace slm_fast::SLM_ISA {

#if defined(__AVX512BF16__)
namespace {

using amx::kBlock, amx::kRows, amx::kStep, amx::kStepNumbers;
constexpr int64_t kChunk = 4, kLargeChunk = 16;  // blocks that pass over the same panels: a few, or many
constexpr int64_t kChunkBytes = 768 << 10;       // of the rows of many blocks
constexpr int64_t kGroupBytes = 512 << 10;       // of panels that stay in L2 meanwhile
constexpr int64_t kLargeWeight = 1 << 20;        // bytes of a weight that is reread less if chunks are large

// Transposes 16 rows of 16 words; to[word][row], `next` words from one word to the next.
template <class RowAt>
[[gnu::always_inline]] inline void turn_tile(const RowAt& row_at, uint32_t* to, int64_t next) {
  __m512i words[16];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kRows; ++i) words[i] = _mm512_loadu_si512(row_at(i));
  transpose_16(words);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kRows; ++i) _mm512_storeu_si512(to + i * next, words[i]);
}

// The weight as panels of kBlock output features, [O / kBlock][steps][kStepNumbers].
Buffer<uint16_t> panels_of(const AdaptedLinear& op, const Threads& threads) {
  const int64_t I = op.increments.features_in, O = op.increments.features_out, steps = I / kStep;
  Buffer<uint16_t> panels(O * I);
  threads.for_each(O / kBlock, O * I > 1 << 15, [&] {
    return [&](int64_t panel) {
      const auto* rows = static_cast<const BFloat16*>(op.weight) + panel * kBlock * I;
      auto* to = reinterpret_cast<uint32_t*>(panels.data() + panel * kBlock * I);
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t tile = 0; tile < 2; ++tile, to += kRows * kRows)
          turn_tile([&](int64_t row) { return rows + (tile * kRows + row) * I + step * kStep; }, to, kRows);
    };
  });
  return panels;
}

// A sample's rows of A, turned for products with x, and their weights.
struct SampleRows {
  SlotRows<BFloat16> rows;
  Buffer<uint32_t> panel;  // [I / 2][width]
  Buffer<BFloat16> zeros;
  int64_t width, sample = -1;

  explicit SampleRows(const MultiLora& op)
      : rows(op), zeros(op.features_in), width((op.picks * op.rank + kRows - 1) / kRows * kRows) {
    panel.at_least(op.features_in / 2 * width);
    std::fill_n(zeros.data(), op.features_in, BFloat16{0});
  }

  void read(const MultiLora& op, int64_t of_sample) {
    if (sample == of_sample) return;
    rows.of_sample(op, sample = of_sample);
    for (int64_t first = 0; first < rows.count; first += kRows) {
      const BFloat16* tile[kRows];
      for (int64_t n = 0; n < kRows; ++n) tile[n] = first + n < rows.count ? rows.a[first + n] : zeros.data();
      uint32_t* to = panel.data() + first;
      for (int64_t step = 0; step < op.features_in / kStep; ++step, to += kRows * width)
        turn_tile([&](int64_t row) { return tile[row] + step * kStep; }, to, width);
    }
  }
};

// 32 rows of x, and the increments of their samples.
struct Block {
  int64_t first = 0, rows = 0;  // the first of all samples' rows; how many there are, the rest being zero
  amx::Tiled x{};
  int64_t samples = 0, sample_steps = 0;  // that the rows are of; steps for the increments of each
  Buffer<const BFloat16*> b;              // [samples][sample_steps][kStep], their rows of B; null past the last
  Buffer<uint16_t> coefficients;          // [samples][sample_steps][kStepNumbers]
  Buffer<uint16_t> copied;                // of x, [steps][kStepNumbers]
  Buffer<float> sums;

  explicit Block(const MultiLora& op)
      : sample_steps((op.picks * op.rank + kStep - 1) / kStep), b(kBlock * sample_steps * kStep),
        sums(kBlock * (op.picks * op.rank + kRows)) {}

  bool in_place() const { return x.step_bytes == 2 * kStep; }
  int64_t columns() const { return samples * sample_steps * kStep; }

  void read(const MultiLora& op, SampleRows& of_sample, int64_t from) {
    first = from, rows = std::min(kBlock, op.samples * op.tokens - first);
    find_rows(op, of_sample.zeros.data());
    const int64_t begin = first / op.tokens, width = sample_steps * kStep;
    samples = (first + rows - 1) / op.tokens + 1 - begin;
    coefficients.at_least(samples * sample_steps * kStepNumbers);
    std::fill_n(coefficients.data(), samples * sample_steps * kStepNumbers, uint16_t{0});
    for (int64_t i = 0; i < samples && width; ++i) {
      of_sample.read(op, begin + i);
      const int64_t count = of_sample.rows.count;
      std::copy_n(of_sample.rows.b.data(), count, b.data() + i * width);
      std::fill_n(b.data() + i * width + count, width - count, nullptr);
      if (count == 0) continue;
      amx::shrink(
          {x, 2, of_sample.panel.data(), (count + kRows - 1) / kRows, op.features_in / kStep, of_sample.width,
           sums.data(), of_sample.width});
      const int64_t last = std::min(first + rows, (begin + i + 1) * op.tokens);
      for (int64_t row = std::max(first, (begin + i) * op.tokens) - first; row < last - first; ++row)
        keep(of_sample, row, coefficients.data() + i * sample_steps * kStepNumbers + row * kStep);
    }
  }

 private:
  // Rows are read in place if none is missing, those of all samples are contiguous, and their distance does not put them
  // into the same few lines of L1.
  void find_rows(const MultiLora& op, const BFloat16* zeros) {
    constexpr int64_t kSame = 4096;
    const int64_t bytes = 2 * op.features_in, steps = op.features_in / kStep;
    if (rows == kBlock && bytes % kSame && op.x.token_stride == op.features_in &&
        (op.samples == 1 || op.x.sample_stride == op.tokens * op.features_in)) {
      x = {static_cast<const char*>(op.x.data) + first * bytes, bytes, 2 * kStep, kRows * bytes};
      return;
    }
    copied.at_least(kBlock * op.features_in);
    x = {reinterpret_cast<const char*>(copied.data()), 2 * kStep, 2 * kStepNumbers, kStepNumbers};
    for (int64_t row = 0; row < kBlock; ++row) {
      const int64_t at_row = first + row;
      const auto* numbers = row < rows ? at<BFloat16>(op.x, at_row / op.tokens, at_row % op.tokens) : zeros;
      for (int64_t step = 0; step < steps; ++step)
        _mm512_store_si512(
            copied.data() + step * kStepNumbers + row * kStep, _mm512_loadu_si512(numbers + step * kStep));
    }
  }

  // A row's coefficients, from its sums and the weights.
  void keep(const SampleRows& of_sample, int64_t row, uint16_t* to) const {
    const float* found = sums.data() + row * of_sample.width;
    for (int64_t n = 0; n < of_sample.rows.count; n += kRows) {
      const auto used = static_cast<__mmask16>(first_lanes(of_sample.rows.count - n));
      const __m512 product = _mm512_mul_ps(_mm512_maskz_loadu_ps(used, found + n), weights_from(of_sample, n, used));
      _mm256_mask_storeu_epi16(
          to + n / kStep * kStepNumbers + n % kStep, used, (__m256i)_mm512_cvtneps_pbh(product));
    }
  }

  static __m512 weights_from(const SampleRows& of_sample, int64_t n, __mmask16 used) {
    const double* weight = of_sample.rows.weight.data() + n;
    const __m256 low = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(used), weight));
    const __m256 high = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(used >> 8), weight + 8));
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }
};

// A block's rows of B as panels of kBlock output features, for a group of panels.
struct SlotPanels {
  Buffer<uint16_t> panels;  // [panel][samples][sample_steps][kStepNumbers]
  Buffer<bool> finite;      // [panel][samples]; the numbers of one that is not are left out
  Buffer<const BFloat16*> rows;
  int64_t first = -1, columns = -1, samples = 0;  // the first panel

  SlotPanels(const Block& block, int64_t group)
      : finite(group * kBlock), rows(kBlock * block.sample_steps * kStep) {}

  int64_t size() const { return columns / kStep * kStepNumbers; }

  void read(const Block& block, int64_t begin, int64_t end) {
    const BFloat16* const* needed = block.b.data();
    if (first == begin && columns == block.columns() && std::equal(needed, needed + columns, rows.data())) return;
    first = begin, columns = block.columns(), samples = block.samples;
    std::copy_n(needed, columns, rows.data());
    panels.at_least((end - begin) * size());
    const int64_t width = columns / samples;
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t i = 0; i < samples; ++i) {
        uint16_t* to = panels.data() + (panel - begin) * size() + i * width * kBlock;
        const bool good = pair_up(rows.data() + i * width, width, panel * kBlock, to) || samples == 1;
        if (!good) std::fill_n(to, width * kBlock, uint16_t{0});
        finite[(panel - begin) * samples + i] = good;
      }
  }

 private:
  // Pairs of rows, kBlock features from `feature` on. Returns whether all numbers are finite.
  static bool pair_up(const BFloat16* const* rows, int64_t count, int64_t feature, uint16_t* to) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80), none = _mm512_setzero_si512();
    __mmask32 infinite = 0;
    auto widen = [](__m256i half) { return _mm512_cvtepu16_epi32(half); };
    for (int64_t n = 0; n < count; n += 2) {
      const __m512i even = rows[n] ? _mm512_loadu_si512(rows[n] + feature) : none;
      const __m512i odd = rows[n + 1] ? _mm512_loadu_si512(rows[n + 1] + feature) : none;
      infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
      infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
      uint16_t* pair = to + n / kStep * kStepNumbers + n % kStep * kRows;
      const __m512i low = widen(_mm512_castsi512_si256(odd)), high = widen(_mm512_extracti64x4_epi64(odd, 1));
      _mm512_store_si512(pair, _mm512_or_si512(widen(_mm512_castsi512_si256(even)), _mm512_slli_epi32(low, 16)));
      _mm512_store_si512(
          pair + kStepNumbers / 2,
          _mm512_or_si512(widen(_mm512_extracti64x4_epi64(even, 1)), _mm512_slli_epi32(high, 16)));
    }
    return infinite == 0;
  }
};

// How the work is divided: into chunks of blocks times groups of panels.
struct Division {
  int64_t chunk, chunks, group, groups;

  Division(const MultiLora& op, int64_t workers) {
    const int64_t blocks = (op.samples * op.tokens + kBlock - 1) / kBlock, panels = op.features_out / kBlock;
    const int64_t panel_bytes = kBlock * 2 * op.features_in;  // also of a block's rows
    chunk = kChunk;
    if (panels * panel_bytes > kLargeWeight) chunk = std::clamp(kChunkBytes / panel_bytes, kChunk, kLargeChunk);
    for (; chunk > 1 && blocks < chunk * workers; chunk /= 2) {}
    chunks = (blocks + chunk - 1) / chunk;
    group = std::clamp<int64_t>(kGroupBytes / panel_bytes, 1, panels);
    if (chunks < 4 * workers) group = std::clamp<int64_t>(chunks * panels / (4 * workers), 1, group);
    groups = (panels + group - 1) / group;
  }
  int64_t items() const { return chunks * groups; }
};

class Multiply {
 public:
  Multiply(const AdaptedLinear& op, const Division& division, const uint16_t* weight)
      : op(op), division(division), weight(weight), of_sample(op.increments),
        slots(Block(op.increments), division.group), sums(2 * kBlock * kBlock) {
    for (int64_t i = 0; i < division.chunk; ++i) blocks.emplace_back(op.increments);
  }

  void operator()(int64_t item) {
    const MultiLora& lora = op.increments;
    const int64_t first = item / division.groups * division.chunk * kBlock, all = lora.samples * lora.tokens;
    const int64_t count = std::min(division.chunk, (all - first + kBlock - 1) / kBlock);
    const int64_t begin = item % division.groups * division.group;
    const int64_t end = std::min(begin + division.group, lora.features_out / kBlock);
    const bool again = first == read;  // the item before was of the same rows
    read = first;
    const amx::Tiles tiles(true);
    for (int64_t i = 0; i < count; ++i) {
      Block& block = blocks[i];
      if (!again) block.read(lora, of_sample, first + i * kBlock);
      slots.read(block, begin, end);
      // Meanwhile the rows of the next block, which follow, are prefetched.
      const int64_t bytes = kBlock * block.x.row_bytes;
      const bool more = !again && block.in_place() && block.first + 2 * kBlock <= all;
      next_rows = reinterpret_cast<uintptr_t>(block.x.rows) + static_cast<uintptr_t>(bytes);
      panel_share = more ? (bytes + end - begin - 1) / (end - begin) : 0;
      for (int64_t panel = begin; panel < end; ++panel) multiply(block, panel);
    }
    amx::round(before);
    before.rows = 0;
  }

 private:
  void multiply(const Block& block, int64_t panel) {
    const MultiLora& lora = op.increments;
    const int64_t feature = panel * kBlock, in_group = panel - slots.first;
    float* to = sums.data() + half * kBlock * kBlock;
    half = 1 - half;
    amx::multiply(
        {block.x, weight + feature * lora.features_in, lora.features_in / kStep, block.coefficients.data(),
         slots.panels.data() + in_group * slots.size(), block.samples * block.sample_steps, to, next_rows, panel_share},
        before);
    next_rows += static_cast<uintptr_t>(panel_share);
    for (int64_t i = 0; i < block.samples && block.sample_steps; ++i)
      if (!slots.finite[in_group * block.samples + i]) add_apart(block, i, feature, to);
    const auto* bias = static_cast<const uint16_t*>(op.bias);
    auto* y = static_cast<uint16_t*>(lora.y.data) + block.first * lora.features_out + feature;
    before = {to, bias ? bias + feature : nullptr, y, lora.features_out, block.rows};
  }

  // Adds the increments of a sample to its rows alone: zeros times numbers that are not finite would reach the others.
  void add_apart(const Block& block, int64_t sample, int64_t feature, float* to) const {
    const int64_t tokens = op.increments.tokens, start = (block.first / tokens + sample) * tokens - block.first;
    const int64_t width = block.sample_steps * kStep;
    const uint16_t* coefficients = block.coefficients.data() + sample * width * kBlock;
    for (int64_t row = std::max<int64_t>(0, start); row < std::min(block.rows, start + tokens); ++row)
      for (int64_t n = 0; n < width && block.b[sample * width + n]; ++n) {
        const BFloat16 coefficient{coefficients[n / kStep * kStepNumbers + row * kStep + n % kStep]};
        for (int64_t c = 0; c < kBlock; ++c)
          to[((row / kRows * 2 + c / kRows) * kRows + row % kRows) * kRows + c % kRows] +=
              widen<float>(coefficient) * widen<float>(block.b[sample * width + n][feature + c]);
      }
  }

  const AdaptedLinear& op;
  const Division& division;
  const uint16_t* weight;
  SampleRows of_sample;
  std::vector<Block> blocks;
  SlotPanels slots;
  Buffer<float> sums;         // of a product, and of the one before
  int64_t half = 0;           // that the next product is written to
  amx::Rounded before{};
  int64_t read = -1;          // the first row of the blocks
  uintptr_t next_rows = 0;    // what to prefetch
  int64_t panel_share = 0;    // bytes of it per panel
};

}  // namespace
#endif

void adapted_linear([[maybe_unused]] const AdaptedLinear& op, [[maybe_unused]] const Threads& threads) {
#if defined(__AVX512BF16__)
  if (op.increments.samples * op.increments.tokens * op.increments.features_out == 0) return;
  const Buffer<uint16_t> weight = panels_of(op, threads);
  const Division division(op.increments, threads.workers);
  threads.for_each(division.items(), true, [&] { return Multiply(op, division, weight.data()); });
#endif
}

}  // namespace slm_fast::SLM_ISA
