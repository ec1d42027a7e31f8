// multi_lora backward, for g = d loss / d y and the R rows A, B of a sample's slots:
//
//   S = x . A^T    Q = g . B^T                       [tokens, R]
//   d weights[k] = sum over k's rows of S Q          d x = (w Q) . A
//   d A[s] += (w Q)^T . x                            d B[s] += (w S)^T . g
//
// Two passes. The first runs over token tiles and keeps w Q and w S, R numbers per token. The second runs over column
// blocks: one thread owns a block of d A (or d B) for all slots and adds the samples in order, so no atomics are needed
// and results do not depend on the number of threads.
//
// With AMX, bfloat16 products take place in tiles (`tiled`). The first pass then has a token's R numbers side by side, as
// tiles give them, and turns w Q and w S for the second, where a sample's tokens follow each other.
#include "in_tiles.h"
#include "products.h"

namespace slm_fast::SLM_ISA {

// Epilogue of combine: accumulates into the slots' own rows of a column block.
template <class P, class A = typename P::Accumulator>
struct OntoSlots : Layout<P> {
  A* block;
  const int64_t* row_of;  // [R] row of the block for each of the sample's rows
  int64_t width;

  OntoSlots(A* block, const int64_t* row_of, int64_t width) : block(block), row_of(row_of), width(width) {}
  void add_pair(int64_t row, int64_t column, Vec<A> even, Vec<A> odd, int64_t) const {
    add(row, column, even);
    add(row, column + kLanes<A>, odd);
  }
  void add(int64_t row, int64_t column, Vec<A> sum) const {
    A* to = block + row_of[row] * width + column;
    store(to, load<A>(to) + sum);
  }
  void add_first(int64_t row, int64_t column, Vec<A> sum, int64_t) const { add(row, column, sum); }  // padded
};

template <class T, class P>
class Backward {
  using A = typename P::Accumulator;
  using E = typename P::Element;  // storage type of w Q and w S

 public:
  Backward(const MultiLoraBackward& op, const Threads& threads)
      : op(op), f(op.forward), threads(threads), used(f),
        tiled(P::kPair == 2 && amx::chosen() && f.tokens >= 16 && f.features_in % amx::kStep == 0 &&
              f.features_out % amx::kStep == 0),
        tiling(tiling_of(f, tiled)), most_rows(f.picks * f.rank), parallel(worth_threads(f)) {}

  void run() {
    const int64_t items = f.samples * tiling.tiles;
    const int64_t size = (items * most_rows + (tiled ? amx::kRows * tiling.tiles : 0)) * tiling.tile;
    if (op.grad_b) scaled_s.at_least(size);
    if (op.grad_a) scaled_q.at_least(size);
    if (op.grad_weights) weight_parts.at_least(items * f.picks);
    if (op.grad_x || op.grad_a || op.grad_b || op.grad_weights) sweep_tokens(items);
    if (op.grad_weights) add_weight_parts();
    if (op.grad_a) sweep_columns(f.x, scaled_q.data(), f.features_in, static_cast<T*>(op.grad_a));
    if (op.grad_b) sweep_columns(op.grad, scaled_s.data(), f.features_out, static_cast<T*>(op.grad_b));
  }

 private:
  static Tiling tiling_of(const MultiLora& f, bool tiled) {
    Tiling found(f.tokens, std::max(f.features_in, f.features_out) * static_cast<int64_t>(sizeof(T)));
    if (!tiled) return found;
    found.tile = (found.tile + amx::kStep - 1) / amx::kStep * amx::kStep;
    found.tiles = (f.tokens + found.tile - 1) / found.tile;
    return found;
  }

  void sweep_tokens(int64_t items) {
    if constexpr (P::kPair == 2)
      if (tiled) return this->sweep_tokens_in_tiles(items);
    threads.for_each(items, parallel, [&] {
      return [&, rows = SlotRows<T>(f), shrink_s = Shrink<T, P>(f, tiling.tile), shrink_q = Shrink<T, P>(f, tiling.tile),
              expand = Expand<T, P>(f, tiling.tile)](int64_t item) mutable {
        const int64_t b = item / tiling.tiles, first = item % tiling.tiles * tiling.tile;
        const int64_t tokens = std::min(tiling.tile, f.tokens - first);
        rows.of_sample(f, b);
        A *s = nullptr, *q = nullptr;
        if (op.grad_b || op.grad_weights)
          s = shrink_s(at<T>(f.x, b, first), f.x.token_stride, tokens, rows.a.data(), rows.count, f.features_in);
        if (op.grad_x || op.grad_a || op.grad_weights)
          q = shrink_q(at<T>(op.grad, b, first), op.grad.token_stride, tokens, rows.b.data(), rows.count, f.features_out);
        if (op.grad_weights) {
          A* parts = weight_parts.data() + item * f.picks;
          std::fill_n(parts, f.picks, A(0));
          for (int64_t n = 0; n < rows.count; ++n)
            parts[rows.pick[n]] += product(s + n * tiling.tile, q + n * tiling.tile, tokens);
        }
        const int64_t place = item * most_rows * tiling.tile;
        if (op.grad_b) scale(rows, s, tokens, scaled_s.data() + place);
        if (op.grad_a || op.grad_x) scale(rows, q, tokens, op.grad_a ? scaled_q.data() + place : nullptr);
        if (op.grad_x)
          expand(
              expand.coefficients(q, rows.count), rows.a.data(), b, rows.count, tokens, f.features_in, nullptr, 0,
              static_cast<T*>(op.grad_x) + (b * f.tokens + first) * f.features_in, f.features_in,
              tiling.ahead<T>(f, f.x, item + 1, 0, f.features_in));
      };
    });
  }

  static A product(const A* s, const A* q, int64_t tokens) {
    Vec<A> sums[4] = {};
    for (int64_t t = 0; t < tokens; t += kLanes<A>)
      sums[0] = load_first<A>(s + t, tokens - t) * load_first<A>(q + t, tokens - t) + sums[0];
    A parts[4];
    sum_each_of_4<A>(sums, parts);
    return parts[0];
  }

  // Scales by the slots' weights, in place and also into `to` unless null, zero-padded to whole vectors.
  void scale(const SlotRows<T>& rows, A* sums, int64_t tokens, E* to) const {
    for (int64_t n = 0; n < rows.count; ++n)
      for (int64_t t = 0; t < tokens; t += kLanes<A>) {
        A* at_t = sums + n * tiling.tile + t;
        const Vec<A> scaled = load_first<A>(at_t, tokens - t) * broadcast(static_cast<A>(rows.weight[n]));
        store(at_t, scaled);
        if (to) store(to + n * tiling.tile + t, scaled);
      }
  }

  void add_weight_parts() {
    for (int64_t b = 0; b < f.samples; ++b)
      for (int64_t k = 0; k < f.picks; ++k) {
        A sum = 0;
        for (int64_t tile = 0; tile < tiling.tiles; ++tile)
          sum += weight_parts[(b * tiling.tiles + tile) * f.picks + k];
        if (f.weights_are_double) static_cast<double*>(op.grad_weights)[b * f.picks + k] = static_cast<double>(sum);
        else static_cast<float*>(op.grad_weights)[b * f.picks + k] = static_cast<float>(sum);
      }
  }

#if defined(__AVX512BF16__)
  void sweep_tokens_in_tiles(int64_t items) {
    threads.for_each(items, parallel, [&] {
      return [&, rows = SlotRows<T>(f), across_s = ShrinkAcross<P>(f, tiling.tile),
              across_q = ShrinkAcross<P>(f, tiling.tile), expand = Expand<T, P>(f, tiling.tile),
              turned = Buffer<E>(across_width() * kPanelColumns<P>)](int64_t item) mutable {
        const int64_t b = item / tiling.tiles, first = item % tiling.tiles * tiling.tile;
        const int64_t tokens = std::min(tiling.tile, f.tokens - first);
        rows.of_sample(f, b);
        T* const to_x = static_cast<T*>(op.grad_x) + (b * f.tokens + first) * f.features_in;
        if (rows.count == 0) {
          if (op.grad_x) std::fill_n(to_x, tokens * f.features_in, T{0});
          if (op.grad_weights) std::fill_n(weight_parts.data() + item * f.picks, f.picks, A(0));
          return;
        }
        E* const to_s = op.grad_b ? scaled_s.data() + place(b) + first : nullptr;
        E* const to_q = op.grad_a ? scaled_q.data() + place(b) + first : nullptr;
        Coefficients<P> s{}, q{};
        if (op.grad_b || op.grad_weights) {
          across_s.pack(b, rows.a.data(), rows.weight.data(), rows.count, f.features_in);
          s = across_s(at<T>(f.x, b, first), f.x.token_stride, tokens, rows.count, f.features_in);
        }
        if (op.grad_x || op.grad_a || op.grad_weights) {
          across_q.pack(b, rows.b.data(), rows.weight.data(), rows.count, f.features_out);
          q = across_q(at<T>(op.grad, b, first), op.grad.token_stride, tokens, rows.count, f.features_out);
        }
        if (op.grad_weights) {
          A* parts = weight_parts.data() + item * f.picks;
          std::fill_n(parts, f.picks, A(0));
          Vec<A> sums{};
          for (int64_t n = 0; n < rows.count; ++n) {
            if (n % kLanes<A> == 0) {
              sums = Vec<A>{};
              for (int64_t t = 0; t < tokens; ++t) {
                const int64_t place = t * across_s.width + n;
                sums = load<A>(across_s.sums.data() + place) * load<A>(across_q.sums.data() + place) + sums;
              }
            }
            parts[rows.pick[n]] += sums[n % kLanes<A>];
          }
        }
        if (to_s) turn(s, tokens, rows.count, turned.data(), to_s);
        if (to_q) turn(q, tokens, rows.count, turned.data(), to_q);
        if (op.grad_x)
          expand(
              q, rows.a.data(), b, rows.count, tokens, f.features_in, nullptr, 0, to_x, f.features_in,
              tiling.ahead<T>(f, f.x, item + 1, 0, f.features_in));
      };
    });
  }

  int64_t across_width() const { return (most_rows + 31) / 32 * 32; }
  // Where a sample's rows of tokens begin, and how far apart they are.
  int64_t place(int64_t sample) const { return sample * most_rows * apart(); }
  int64_t apart() const { return tiling.tiles * tiling.tile; }

  // From a tile's tokens of pairs to rows of tokens, zero past the last token.
  void turn(const Coefficients<P>& c, int64_t tokens, int64_t count, E* turned, E* to) const {
    const auto* pairs = reinterpret_cast<const E*>(c.at);
    turn_rows<P>(turned, [&](int64_t t) { return pairs + 2 * t * c.stride; }, tokens, count);
    alignas(64) uint16_t low_halves[32], high_halves[32];
    for (int i = 0; i < 32; ++i) low_halves[i] = static_cast<uint16_t>(2 * i), high_halves[i] = low_halves[i] + 1;
    const __m512i low = _mm512_load_si512(low_halves), high = _mm512_load_si512(high_halves);
    for (int64_t n = 0; n < count; n += 2)
      for (int64_t t = 0; t < tiling.tile; t += 32) {
        const E* from = turned + n * kPanelColumns<P> + 2 * t;
        const __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 32);
        const __mmask32 inside = first_lanes(tokens - t);
        _mm512_storeu_si512(
            to + n * apart() + t, _mm512_maskz_permutex2var_epi16(inside, first, low, second));
        if (n + 1 < count)
          _mm512_storeu_si512(
              to + (n + 1) * apart() + t, _mm512_maskz_permutex2var_epi16(inside, first, high, second));
      }
  }

  // Adds the products of a sample's rows of tokens by one block of its columns.
  void add_sample(
      const Rows& source, const E* scaled, int64_t b, int64_t count, int64_t first, int64_t last, E* panel, A* found,
      const int64_t* row_of, A* sums, int64_t width) const {
    constexpr int64_t kColumns = kPanelColumns<P>;
    const int64_t row_tiles = tiles_of(count);
    for (int64_t t = 0; t < f.tokens; t += kTokensAtOnce)
      for (int64_t column = first; column < last; column += kColumns) {
        const int64_t tokens = std::min(kTokensAtOnce, f.tokens - t), steps = (tokens + amx::kStep - 1) / amx::kStep;
        const int64_t packed = (tokens + 1) / 2 * 2;
        pack_panel<T, P>(
            panel, [&](int64_t n) { return at<T>(source, b, t + n) + column; }, tokens,
            std::min(kColumns, last - column));
        std::fill_n(panel + packed * kColumns, (steps * amx::kStep - packed) * kColumns, E{0});
        const int64_t column_tiles = (std::min(kColumns, last - column) + 31) / 32 * 2;
        amx::score({reinterpret_cast<const char*>(scaled + place(b) + t), 2 * apart(), 2 * amx::kStep,
                    2 * apart() * amx::kRows, 0, reinterpret_cast<const uint32_t*>(panel), 0, row_tiles, column_tiles,
                    steps, kColumns, found});
        const OntoSlots<P> out{sums + (column - first), row_of, width};
        for (int64_t row = 0; row < count; ++row)
          for (int64_t c = 0; c < column_tiles * kLanes<A>; c += kLanes<A>)
            out.add(row, c, load<A>(found + row * kColumns + c));
      }
  }
#endif

  // grad[slot, j, :] = sum over samples and tokens of scaled[b, (k, j), t] * rows[b, t, :]
  void sweep_columns(const Rows& source, const E* scaled, int64_t length, T* grad) {
    constexpr int64_t kColumns = kPanelColumns<P>, kWide = 2 * kColumns;
    const int64_t slot_size = f.rank * length;
    threads.for_each(f.slots, parallel, [&] {
      return [&](int64_t slot) {
        if (!used.has(slot)) std::memset(static_cast<void*>(grad + slot * slot_size), 0, slot_size * sizeof(T));
      };
    });
    threads.for_each((length + kWide - 1) / kWide, parallel, [&] {
      return [&, sums = Buffer<A>(used.distinct * f.rank * kWide), row_of = Buffer<int64_t>(most_rows),
              panel = Buffer<E>((tiled ? kTokensAtOnce : tiling.tile) * kColumns),
              found = Buffer<A>(tiled ? (most_rows + amx::kRows) * kColumns : 0)](int64_t block) mutable {
        const int64_t first = block * kWide, last = std::min(first + kWide, length);
        std::fill_n(sums.data(), used.distinct * f.rank * kWide, A(0));
        if constexpr (P::kPair == 2) {
          const amx::Tiles tiles(tiled);
          for (int64_t b = 0; tiled && b < f.samples; ++b)
            this->add_sample(
                source, scaled, b, find_rows(b, row_of.data()), first, last, panel.data(), found.data(), row_of.data(),
                sums.data(), kWide);
        }
        for (int64_t item = 0; !tiled && item < f.samples * tiling.tiles; ++item) {
          const int64_t b = item / tiling.tiles, t = item % tiling.tiles * tiling.tile;
          const int64_t tokens = std::min(tiling.tile, f.tokens - t), count = find_rows(b, row_of.data());
          const auto* c = reinterpret_cast<const typename P::Coefficient*>(scaled + item * most_rows * tiling.tile);
          Ahead ahead = tiling.ahead<T>(f, source, item + 1, first, last - first);
          const int64_t lines = ahead.lines() / std::max<int64_t>(1, 2 * ((count + kCombineM<P> - 1) / kCombineM<P>)) + 1;
          for (int64_t column = first; column < last; column += kColumns) {
            const int64_t columns = std::min(kColumns, last - column);
            pack_panel<T, P>(
                panel.data(), [&](int64_t n) { return at<T>(source, b, t + n) + column; }, tokens, columns);
            for (int64_t row = 0; row < count; row += kCombineM<P>) {
              ahead.ask(lines);
              combine<P>(
                  c, 1, tiling.tile / P::kPair, panel.data(), (tokens + P::kPair - 1) / P::kPair, row,
                  std::min<int64_t>(row + kCombineM<P>, count), columns,
                  OntoSlots<P>{sums.data() + (column - first), row_of.data(), kWide});
            }
          }
        }
        for (int64_t row = 0; row < used.distinct * f.rank; ++row) {
          T* to = grad + used.slots[row / f.rank] * slot_size + row % f.rank * length + first;
          const A* from = sums.data() + row * kWide;
          const int64_t columns = last - first;
          if constexpr (P::kPair == 2) {
#if defined(__AVX512BF16__)
            for (int64_t i = 0; i < columns; i += 32)
              store_even_odd(to + i, {load<A>(from + i), load<A>(from + i + 16)}, columns - i);
#endif
          } else {
            for (int64_t i = 0; i < columns; i += kLanes<A>) store_first(to + i, load<A>(from + i), columns - i);
          }
        }
      };
    });
  }

  // Maps each of a sample's R rows to its index among the rows of used slots. Returns their number.
  int64_t find_rows(int64_t b, int64_t* row_of) const {
    int64_t count = 0;
    for (int64_t k = 0; k < f.picks; ++k) {
      const int64_t slot = used.index[b * f.picks + k];
      for (int64_t j = 0; slot >= 0 && j < f.rank; ++j) row_of[count++] = slot * f.rank + j;
    }
    return count;
  }

  static constexpr int64_t kTokensAtOnce = 256;  // in tiles
  const MultiLoraBackward& op;
  const MultiLora& f;
  const Threads& threads;
  const UsedSlots used;
  const bool tiled;
  const Tiling tiling;
  const int64_t most_rows;  // R
  const bool parallel;
  Buffer<E> scaled_s, scaled_q;  // [sample, tile][R][token]: w S and w Q; if tiled, [sample][R][tile, token]
  Buffer<A> weight_parts;        // [sample, tile][K]
};

void multi_lora_backward(const MultiLoraBackward& op, const Threads& threads) {
  switch (op.forward.type) {
    case Type::float32: return Backward<float, Plain<float>>(op, threads).run();
    case Type::float64: return Backward<double, Plain<double>>(op, threads).run();
    case Type::float16: return Backward<Float16, Plain<float>>(op, threads).run();
#if defined(__AVX512BF16__)
    case Type::bfloat16: return Backward<BFloat16, Bf16Pairs>(op, threads).run();
#else
    case Type::bfloat16: return Backward<BFloat16, Plain<float>>(op, threads).run();
#endif
  }
}

}  // namespace slm_fast::SLM_ISA
