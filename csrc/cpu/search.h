// Shared by retrieve and key_loss: each query's K best slots, by one Searcher or, if undecided, another.
#pragma once

#include "searcher.h"

namespace slm_fast::SLM_ISA {

#if defined(__AVX512BF16__)
// `allowed` for the queries left undecided by another search.
template <class Allowed>
struct AllowedAmong {
  static constexpr bool kAsks = Allowed::kAsks;
  const Allowed& allowed;
  const int64_t* query;
  bool operator()(int64_t q, int64_t list, int64_t slot) const { return allowed(query[q], list, slot); }
  bool any(int64_t q, int64_t first, int64_t count) const { return allowed.any(query[q], first, count); }
};
#endif

// Finds each query's K best slots by the fastest method; see Searcher::run for `allowed` and `use`. A query's lists
// come in order, and may all come a second time.
template <class T, class Allowed, class Use>
void search(const Search& s, const Threads& threads, const Allowed& allowed, const Use& use) {
  Search rest = s;
  auto never = [](int64_t) {};
#if defined(__AVX512BF16__)
  if (s.cosine && (s.prepared || (s.queries > kFew && s.slots >= 4 * (s.k + 24)))) {
    Buffer<char> left(s.queries);
    std::fill_n(left.data(), s.queries, 0);
    Searcher<T, Bf16Pairs>(s, threads).run(allowed, use, [&](int64_t query) { left[query] = 1; });
    rest.queries = std::count(left.data(), left.data() + s.queries, 1);
    if (rest.queries == 0) return;
    Buffer<int64_t> which(rest.queries);
    Buffer<T> rows(rest.queries * s.width);
    for (int64_t query = 0, next = 0; query < s.queries; ++query) {
      if (!left[query]) continue;
      std::copy_n(static_cast<const T*>(s.query) + query * s.width, s.width, rows.data() + next * s.width);
      which[next++] = query;
    }
    rest.query = rows.data();
    return Searcher<T, Plain<float>>(rest, threads).run(
        AllowedAmong<Allowed>{allowed, which.data()},
        [&](int64_t query, int64_t list, const Ranked* best, int64_t count) { use(which[query], list, best, count); },
        never);
  }
#endif
  Searcher<T, Plain<float>>(rest, threads).run(allowed, use, never);
}

}  // namespace slm_fast::SLM_ISA
