// adapted_linear:  y[b, t] = x[b, t] . weight^T + bias + sum_k w[b, k] (x[b, t] . A[s]^T) . B[s],  s = slot_ids[b, k]
//
// For bfloat16, in tiles of AMX. The rows of all samples stand in one sequence, cut into blocks of 32. The weight is
// put into tiles once, as panels of 32 columns; a block's rows are once for all panels. The slots of a block extend the
// sums over features: by a row's coefficients w (x . A), zero for slots of other samples, times the slots' columns of B.
// So y is written once and never read. 2 N I (O + R) + 2 N R O flops for N = B T rows and R rows of rank in a block.
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

// Transposes 16 rows of 16 words; to[word][row], `next` words from one word to the next. Two thirds of the work are
// done by loads: lane j of a vector comes from row r + 4 j.
template <class RowAt>
[[gnu::always_inline]] inline void turn_tile(const RowAt& row_at, uint32_t* to, int64_t next) {
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    __m512i rows[4];
#pragma GCC unroll 4
    for (int64_t r = 0; r < 4; ++r) {
      auto part = [&](int64_t row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row_at(row)) + quarter);
      };
      rows[r] = _mm512_castsi128_si512(part(r));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x00f0, part(r + 4));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0x0f00, part(r + 8));
      rows[r] = _mm512_mask_broadcast_i32x4(rows[r], 0xf000, part(r + 12));
    }
    const __m512i low = _mm512_unpacklo_epi32(rows[0], rows[1]), high = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i low2 = _mm512_unpacklo_epi32(rows[2], rows[3]), high2 = _mm512_unpackhi_epi32(rows[2], rows[3]);
    uint32_t* first = to + 4 * quarter * next;
    _mm512_storeu_si512(first, _mm512_unpacklo_epi64(low, low2));
    _mm512_storeu_si512(first + next, _mm512_unpackhi_epi64(low, low2));
    _mm512_storeu_si512(first + 2 * next, _mm512_unpacklo_epi64(high, high2));
    _mm512_storeu_si512(first + 3 * next, _mm512_unpackhi_epi64(high, high2));
  }
}

// The weight as panels [O / kBlock][steps][kStepNumbers].
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
    // What a sample has several times counts once, with the sum of the weights.
    for (int64_t n = op.rank; n < rows.count; ++n)
      for (int64_t same = n % op.rank; same < n; same += op.rank)
        if (rows.b[same] == rows.b[n]) {
          rows.weight[same] += rows.weight[n];
          break;
        }
    for (int64_t first = 0; first < rows.count; first += kRows) {
      const BFloat16* tile[kRows];
      for (int64_t n = 0; n < kRows; ++n) tile[n] = first + n < rows.count ? rows.a[first + n] : zeros.data();
      uint32_t* to = panel.data() + first;
      for (int64_t step = 0; step < op.features_in / kStep; ++step, to += kRows * width)
        turn_tile([&](int64_t row) { return tile[row] + step * kStep; }, to, width);
    }
  }
};

// 32 rows of x, and what their slots add to them.
struct Block {
  int64_t first = 0, rows = 0;           // of all samples' rows; those past the last are zero
  amx::Tiled x{};
  int64_t count = 0, slot_steps = 0;     // of slots that its samples have
  bool mixed = false;                    // not every row has all of them
  Buffer<uint16_t> copied, coefficients;  // [steps][kStepNumbers]
  Buffer<int64_t> slots;
  Buffer<int64_t> places;  // [sample][K], of a slot among them; -1 for none and for what a sample had before
  Buffer<float> sums;

  explicit Block(const MultiLora& op)
      : slots(kBlock * op.picks), places(kBlock * op.picks), sums(kBlock * (op.picks * op.rank + kRows)) {}

  bool in_place() const { return x.step_bytes == 2 * kStep; }

  void read(const MultiLora& op, SampleRows& of_sample, int64_t from) {
    first = from, rows = std::min(kBlock, op.samples * op.tokens - first);
    find_rows(op, of_sample.zeros.data());
    const int64_t begin = first / op.tokens, end = (first + rows - 1) / op.tokens + 1;
    find_slots(op, begin, end);
    for (int64_t sample = begin; sample < end && count; ++sample) {
      of_sample.read(op, sample);
      if (of_sample.rows.count == 0) continue;
      amx::shrink(
          {x, 2, of_sample.panel.data(), (of_sample.rows.count + kRows - 1) / kRows, op.features_in / kStep,
           of_sample.width, sums.data(), of_sample.width});
      find_parts(op, of_sample, places.data() + (sample - begin) * op.picks);
      const int64_t last = std::min(first + rows, (sample + 1) * op.tokens);
      for (int64_t row = std::max(first, sample * op.tokens); row < last; ++row) keep(of_sample.width, row - first);
    }
  }

 private:
  // Rows are read in place, if all are there and their distances do not put them into the same few lines of L1.
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

  void find_slots(const MultiLora& op, int64_t begin, int64_t end) {
    count = 0, mixed = end - begin > 1;
    for (int64_t pick = 0; pick < (end - begin) * op.picks; ++pick) {
      const int64_t *slot = op.slot_ids + begin * op.picks + pick, *own = slot - pick % op.picks;
      const int64_t place = std::find(slots.data(), slots.data() + count, *slot) - slots.data();
      places[pick] = *slot < 0 || std::find(own, slot, *slot) < slot ? -1 : place;
      if (*slot >= 0 && place == count) slots[count++] = *slot;
    }
    slot_steps = (count * op.rank + kStep - 1) / kStep;
    coefficients.at_least(slot_steps * kStepNumbers);
    std::fill_n(coefficients.data(), slot_steps * kStepNumbers, uint16_t{0});
  }

  struct Part {
    int64_t from, to, count;  // of a sample's rows of rank, and of the block's
    __m512 weight;
  };
  std::vector<Part> parts;

  // The sample's coefficients, in parts that lie in one step and one vector.
  void find_parts(const MultiLora& op, const SampleRows& of_sample, const int64_t* place) {
    parts.clear();
    for (int64_t n = 0; n < of_sample.rows.count; ++n) {
      const int64_t slot = place[of_sample.rows.pick[n]], to = slot * op.rank + n % op.rank;
      if (slot < 0) continue;
      Part* last = parts.empty() ? nullptr : &parts.back();
      const bool follows = last && last->from + last->count == n && last->to + last->count == to;
      if (!follows || last->count == kRows || to % kStep == 0)
        parts.push_back({n, to, 0, _mm512_setzero_ps()}), last = &parts.back();
      last->weight[last->count++] = static_cast<float>(of_sample.rows.weight[n]);
    }
  }

  void keep(int64_t width, int64_t row) {
    for (const Part& part : parts) {
      const auto used = static_cast<__mmask16>(first_lanes(part.count));
      const __m512 sum = _mm512_maskz_loadu_ps(used, sums.data() + row * width + part.from);
      _mm256_mask_storeu_epi16(
          coefficients.data() + part.to / kStep * kStepNumbers + row * kStep + part.to % kStep, used,
          (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sum, part.weight)));
    }
  }
};

// The columns of B of a block's slots, for a group of panels.
struct SlotPanels {
  Buffer<uint16_t> panels;  // [panel][slot_steps][kStepNumbers]
  Buffer<bool> finite;      // [panel]
  Buffer<int64_t> slots;
  Buffer<const BFloat16*> rows;
  int64_t first = -1, count = -1, size = 0;  // the first panel; of slots; numbers per panel

  SlotPanels(const MultiLora& op, int64_t group)
      : finite(group), slots(kBlock * op.picks), rows(kBlock * op.picks * op.rank) {}

  void read(const MultiLora& op, const Block& block, int64_t begin, int64_t end) {
    const int64_t* needed = block.slots.data();
    if (first == begin && count == block.count && std::equal(needed, needed + count, slots.data())) return;
    first = begin, count = block.count, size = block.slot_steps * kStepNumbers;
    std::copy_n(needed, count, slots.data());
    for (int64_t n = 0; n < count * op.rank; ++n)
      rows[n] =
          static_cast<const BFloat16*>(op.lora_b) + (slots[n / op.rank] * op.rank + n % op.rank) * op.features_out;
    panels.at_least((end - begin) * size);
    for (int64_t panel = begin; panel < end; ++panel)
      finite[panel - begin] = pair_up(panel * kBlock, count * op.rank, panels.data() + (panel - begin) * size);
  }

 private:
  // Pairs of rows, 32 columns from `column` on. Returns whether all numbers are finite.
  bool pair_up(int64_t column, int64_t all, uint16_t* to) const {
    const __m512i exponent = _mm512_set1_epi16(0x7f80), none = _mm512_setzero_si512();
    __mmask32 infinite = 0;
    auto widen = [](__m256i half) { return _mm512_cvtepu16_epi32(half); };
    for (int64_t n = 0; n < size / kBlock; n += 2) {
      const __m512i even = n < all ? _mm512_loadu_si512(rows[n] + column) : none;
      const __m512i odd = n + 1 < all ? _mm512_loadu_si512(rows[n + 1] + column) : none;
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
      : op(op), division(division), weight(weight), of_sample(op.increments), slots(op.increments, division.group),
        sums(2 * kBlock * kBlock) {
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
      slots.read(lora, block, begin, end);
      // Meanwhile the rows of the next block, which follow.
      const int64_t bytes = kBlock * block.x.row_bytes;
      const bool more = !again && block.in_place() && block.first + 2 * kBlock <= all;
      ahead = {block.x.rows + bytes, more ? (bytes + end - begin - 1) / (end - begin) : 0};
      for (int64_t panel = begin; panel < end; ++panel) multiply(block, panel);
    }
    amx::round(before);
    before.rows = 0;
  }

 private:
  void multiply(const Block& block, int64_t panel) {
    const MultiLora& lora = op.increments;
    const int64_t column = panel * kBlock, in_group = panel - slots.first;
    const bool apart = block.mixed && !slots.finite[in_group];
    float* to = sums.data() + (turn = !turn) * kBlock * kBlock;
    amx::multiply(
        {block.x, weight + column * lora.features_in, lora.features_in / kStep, block.coefficients.data(),
         slots.panels.data() + in_group * slots.size, apart ? 0 : block.slot_steps, to, ahead.at, ahead.bytes},
        before);
    ahead.at += ahead.bytes;
    if (apart) add_apart(block, column, to);
    const auto* bias = static_cast<const uint16_t*>(op.bias);
    auto* y = static_cast<uint16_t*>(lora.y.data) + block.first * lora.features_out + column;
    before = {to, bias ? bias + column : nullptr, y, lora.features_out, block.rows};
  }

  // Adds each row's own slots alone: zero times a number that is not finite would reach rows without the slot.
  void add_apart(const Block& block, int64_t column, float* to) const {
    const MultiLora& lora = op.increments;
    for (int64_t row = 0; row < block.rows; ++row) {
      const int64_t sample = (block.first + row) / lora.tokens - block.first / lora.tokens;
      const int64_t* place = block.places.data() + sample * lora.picks;
      for (int64_t k = 0; k < lora.picks; ++k)
        for (int64_t j = 0; place[k] >= 0 && j < lora.rank; ++j) {
          const int64_t n = place[k] * lora.rank + j;
          const BFloat16 coefficient{block.coefficients[n / kStep * kStepNumbers + row * kStep + n % kStep]};
          for (int64_t c = 0; c < kBlock; ++c)
            to[((row / kRows * 2 + c / kRows) * kRows + row % kRows) * kRows + c % kRows] +=
                widen<float>(coefficient) * widen<float>(slots.rows[n][column + c]);
        }
    }
  }

  const AdaptedLinear& op;
  const Division& division;
  const uint16_t* weight;
  SampleRows of_sample;
  std::vector<Block> blocks;
  SlotPanels slots;
  Buffer<float> sums;  // of a product, and of the one before
  int64_t read = -1;   // the first row of the blocks
  bool turn = false;
  amx::Rounded before{};
  struct {
    const char* at;
    int64_t bytes;  // per panel
  } ahead{};
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
