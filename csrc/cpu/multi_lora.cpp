// multi_lora forward:  y[b, t] = base[b, t] + sum_k w[b, k] (x[b, t] . A[s]^T) . B[s],  s = slot_ids[b, k]
//
// The K slots of a sample act as one matrix of R = K r rows, read in place. x is read once, y is read and written once,
// and the [R, tokens] intermediate stays in the nearest cache. 4 N R H flops for N = B T rows and I = O = H.
#include "products.h"

namespace slm_fast::SLM_ISA {

// Many tokens per sample: token tiles, each against all R rows of its sample.
template <class T, class P>
class ForwardTile {
  using A = typename P::Accumulator;

 public:
  ForwardTile(const MultiLora& op, const Tiling& tiling)
      : op(op), tiling(tiling), rows(op), shrink(op, tiling.tile), across(op, tiling.tile), expand(op, tiling.tile) {}

  void operator()(int64_t item) {
    const int64_t b = item / tiling.tiles, first = item % tiling.tiles * tiling.tile;
    const int64_t tokens = std::min(tiling.tile, op.tokens - first);
    rows.of_sample(op, b);
    const Coefficients<P> c = shrunk(b, at<T>(op.x, b, first), tokens);
    const T* base = op.base.data ? at<T>(op.base, b, first) : nullptr;
    expand(
        c, rows.b.data(), b, rows.count, tokens, op.features_out, base, op.base.token_stride, at<T>(op.y, b, first),
        op.y.token_stride, tiling.ahead<T>(op, op.x, item + 1, 0, op.features_in));
  }

 private:
  Coefficients<P> shrunk(int64_t b, const T* x, int64_t tokens) {
    if constexpr (P::kPair == 2)
      if (across.serves(op.tokens, rows.count, op.features_in)) {
        across.pack(b, rows.a.data(), rows.weight.data(), rows.count, op.features_in);
        return across(x, op.x.token_stride, tokens, rows.count, op.features_in);
      }
    A* sums = shrink(x, op.x.token_stride, tokens, rows.a.data(), rows.count, op.features_in);
    for (int64_t n = 0; n < rows.count; ++n)
      for (int64_t t = 0; t < tokens; ++t) sums[n * tiling.tile + t] *= A(rows.weight[n]);
    return expand.coefficients(sums, rows.count);
  }

  const MultiLora& op;
  const Tiling& tiling;
  SlotRows<T> rows;
  Shrink<T, P> shrink;
  ShrinkAcross<P> across;
  Expand<T, P> expand;
};

template <class T, class P>
void forward_tiles(const MultiLora& op, const Threads& threads) {
  // Larger tiles reuse packed rows more, but only pay off if enough items remain for all threads.
  const int64_t larger = op.samples >= 4 * threads.workers ? 2 : 1;
  const Tiling tiling(
      op.tokens, op.features_in * static_cast<int64_t>(sizeof(T)), larger * kTileTokens, larger * kTileBytes);
  threads.for_each(op.samples * tiling.tiles, worth_threads(op), [&] { return ForwardTile<T, P>(op, tiling); });
}

constexpr int64_t kRunPairs = 16;

// The (sample, pick) pairs sorted by slot and split into runs of one slot and at most kRunPairs pairs.
struct SharedSlots : UsedSlots {
  int64_t runs = 0;
  Buffer<int64_t> place;      // [B * K] index of each pair in `pairs`, -1 for slot -1
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

  // Columns of y that a thread processes at a time.
  int64_t column_piece(const MultiLora& op, int workers, int64_t element) const {
    const int64_t even = (op.features_out + 2 * workers - 1) / (2 * workers);
    const int64_t fits = (512 << 10) / std::max<int64_t>(1, distinct * op.rank * element);  // half of L2
    const bool reused = distinct * 2 <= count;
    const int64_t piece = reused ? std::min(even, fits) : even;
    return std::max<int64_t>(256, (piece + 127) / 128 * 128);
  }
};

// One output row, V vectors wide from `column`: y = base + sum over the sample's slots of sums * b.
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

// Few tokens per sample (decoding): bound by reading slots, so each is read once for all samples that share it.
template <class T, class P>
void forward_rows(const MultiLora& op, const Threads& threads) {
  using A = typename P::Accumulator;
  const int64_t rank = op.rank, per_pair = op.tokens;
  const SharedSlots shared(op);
  Buffer<A> sums(shared.count * rank * per_pair);  // [pair][r][token], weights folded in

  threads.for_each(shared.runs, worth_threads(op), [&] {
    using Row = const typename P::Element*;
    return [&, x = Buffer<Row>(kRunPairs * per_pair), a = Buffer<Row>(rank), convert = Convert<T, P>(),
            found = Buffer<A>(kRunPairs * per_pair * rank)](int64_t run) mutable {
      const int64_t begin = shared.run_begin[run], end = shared.run_begin[run + 1];
      const int64_t slot = op.slot_ids[shared.pairs[begin]];
      const int64_t rows = (end - begin) * per_pair;
      convert.reserve((rows + rank) * op.features_in);
      for (int64_t i = 0; i < rows; ++i)
        x[i] = convert(at<T>(op.x, shared.pairs[begin + i / per_pair] / op.picks, i % per_pair), op.features_in);
      for (int64_t j = 0; j < rank; ++j)
        a[j] = convert(static_cast<const T*>(op.lora_a) + (slot * rank + j) * op.features_in, op.features_in);
      dot<P>(x.data(), rows, a.data(), rank, op.features_in, found.data(), rows);
      for (int64_t i = begin; i < end; ++i) {
        const A weight = weight_at<A>(op, shared.pairs[i]);
        for (int64_t j = 0; j < rank; ++j)
          for (int64_t t = 0; t < per_pair; ++t)
            sums[(i * rank + j) * per_pair + t] = weight * found[j * rows + (i - begin) * per_pair + t];
      }
    };
  });

  // Column blocking keeps the pieces of all slots in L2 while every sample passes over them.
  const int64_t piece = shared.column_piece(op, threads.workers, sizeof(T));
  threads.for_each((op.features_out + piece - 1) / piece, worth_threads(op), [&] {
    return [&](int64_t item) {
      const int64_t first = item * piece, last = std::min(first + piece, op.features_out);
      for (int64_t b = 0; b < op.samples; ++b)
        for (int64_t t = 0; t < op.tokens; ++t) {
          const T* base = op.base.data ? at<T>(op.base, b, t) : nullptr;
          T* y = at<T>(op.y, b, t);
          constexpr int L = kLanes<A>, V = kRegisters / 4;
          for (int64_t column = first; column < last; column += V * L) {
            const int64_t left = last - column;
            if (left >= V * L) {
              add_rows<T, V>(op, shared, sums.data(), b, t, column, V * L, base, y);
            } else {
              for (int64_t c = column; c < last; c += L)
                add_rows<T, 1>(op, shared, sums.data(), b, t, c, std::min<int64_t>(L, last - c), base, y);
            }
          }
        }
    };
  });
}

template <class T, class P>
void forward(const MultiLora& op, const Threads& threads) {
  if (op.samples * op.tokens * op.features_out == 0) return;
  // With more tokens, reuse of slots within a sample is enough.
  if (op.tokens < 4 && op.rank > 0 && op.picks > 0) return forward_rows<T, P>(op, threads);
  forward_tiles<T, P>(op, threads);
}

void multi_lora(const MultiLora& op, const Threads& threads) {
  switch (op.type) {
    case Type::float32: return forward<float, Plain<float>>(op, threads);
    case Type::float64: return forward<double, Plain<double>>(op, threads);
    case Type::float16: return forward<Float16, Plain<float>>(op, threads);
#if defined(__AVX512BF16__)
    case Type::bfloat16: return forward<BFloat16, Bf16Pairs>(op, threads);
#else
    case Type::bfloat16: return forward<BFloat16, Plain<float>>(op, threads);
#endif
  }
}

}  // namespace slm_fast::SLM_ISA
