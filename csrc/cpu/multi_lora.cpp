// multi_lora forward:  y[b, t] = base[b, t] + sum_k w[b, k] (x[b, t] . A[s]^T) . B[s],  s = slot_ids[b, k]
//
// The K slots of a sample act as one matrix of R = K r rows, read where they lie. x is read once, y is read and written
// once, and the [R, tokens] intermediate never leaves the nearest cache. 4 N R H multiply-adds' flops for N = B T rows.
#include "multi_lora.h"

#include <algorithm>

namespace slm_fast::SLM_ISA {

// Many tokens a sample: tiles of tokens, each against all R rows of its sample.
template <class T, class P>
void forward_tiles(const MultiLora& op, const Pool& pool) {
  using A = typename P::Accumulator;
  const Tiling tiling(op.tokens, op.features_in * static_cast<int64_t>(sizeof(T)));
  pool.for_each(op.samples * tiling.tiles, worth_threads(op), [&] {
    return [&, rows = SlotRows<T>(op), shrink = Shrink<T, P>(op, tiling.tile), expand = Expand<T, P>(op, tiling.tile)](
               int64_t item) mutable {
      const int64_t b = item / tiling.tiles, first = item % tiling.tiles * tiling.tile;
      const int64_t tokens = std::min(tiling.tile, op.tokens - first);
      rows.of_sample(op, b);
      A* sums = shrink(at<T>(op.x, b, first), op.x.token_stride, tokens, rows.a.data(), rows.count, op.features_in);
      for (int64_t n = 0; n < rows.count; ++n)
        for (int64_t t = 0; t < tokens; ++t) sums[n * tiling.tile + t] *= A(rows.weight[n]);
      const T* base = op.base.data ? at<T>(op.base, b, first) : nullptr;
      expand(
          sums, rows.b.data(), rows.count, tokens, op.features_out, base, op.base.token_stride,
          at<T>(op.y, b, first), op.y.token_stride, tiling.ahead<T>(op, op.x, item + 1, 0, op.features_in));
    };
  });
}

// Few tokens a sample (decoding): the work is reading slots, so each slot is read once for all samples that share it.
template <class T, class P>
void forward_rows(const MultiLora& op, const Pool& pool) {
  using A = typename P::Accumulator;
  const int64_t rank = op.rank, per_pair = op.tokens;
  const SharedSlots shared(op);
    Buffer<A> sums(shared.count * rank * per_pair);  // [pair][r][token], weights folded in

  pool.for_each(shared.runs, worth_threads(op), [&] {
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

  // Columns are cut so that all slots' pieces stay in L2 while every sample passes over them.
  const int64_t piece = shared.column_piece(op, pool.workers, sizeof(T));
  pool.for_each((op.features_out + piece - 1) / piece, worth_threads(op), [&] {
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
void forward(const MultiLora& op, const Pool& pool) {
  if (op.samples * op.tokens * op.features_out == 0) return;
  // Above this many tokens, a sample's own tokens share its slots well enough.
  if (op.tokens < 4 && op.rank > 0 && op.picks > 0) return forward_rows<T, P>(op, pool);
  forward_tiles<T, P>(op, pool);
}

void multi_lora(const MultiLora& op, const Pool& pool) {
  switch (op.type) {
    case Type::float32: return forward<float, Plain<float>>(op, pool);
    case Type::float64: return forward<double, Plain<double>>(op, pool);
    case Type::float16: return forward<Float16, Plain<float>>(op, pool);
#if defined(__AVX512BF16__)
    case Type::bfloat16: return forward<BFloat16, Bf16Pairs>(op, pool);
#else
    case Type::bfloat16: return forward<BFloat16, Plain<float>>(op, pool);
#endif
  }
}

}  // namespace slm_fast::SLM_ISA
