// The choice among the searches: one Searcher or, for queries that it cannot decide, another.
#include "search.h"

#include "screen.h"
#include "searcher.h"

namespace slm_fast::SLM_ISA {

// What only a Screen can read is left out.
static Search without_rounded_keys(const Search& s) {
  Search plain = s;
  if (!s.cosine) plain.prepared = nullptr;
  return plain;
}

#if defined(__AVX512BF16__)
// `allowed` for the queries left undecided by another search.
struct AllowedAmong final : Allowed {
  const Allowed& allowed;
  const int64_t* query;
  AllowedAmong(const Allowed& allowed, const int64_t* query)
      : Allowed(allowed.asks), allowed(allowed), query(query) {}
  bool slot(int64_t q, int64_t list, int64_t key) const override { return allowed.slot(query[q], list, key); }
  bool any(int64_t q, int64_t first, int64_t count) const override { return allowed.any(query[q], first, count); }
};

// Searches as First does and, for the queries that this leaves undecided, as Plain<float> does.
template <class T, class First>
void search_in_two(const Search& s, const Threads& threads, const Allowed& allowed, const Use& use) {
  Buffer<char> left(s.queries);
  std::fill_n(left.data(), s.queries, 0);
  First(s, threads).run(allowed, use, [&](int64_t query) { left[query] = 1; });
  Search rest = without_rounded_keys(s);
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
  Searcher<T, Plain<float>>(rest, threads).run(
      AllowedAmong(allowed, which.data()),
      [&](int64_t query, int64_t list, const Ranked* best, int64_t count) { use(which[query], list, best, count); },
      [](int64_t) {});
}
#endif

template <class T>
void search(const Search& s, const Threads& threads, const Allowed& allowed, const Use& use) {
#if defined(__AVX512BF16__)
  if (s.cosine && (s.prepared || (s.queries > kFew && s.slots >= 4 * (s.k + 24))))
    return search_in_two<T, Searcher<T, Bf16Pairs>>(s, threads, allowed, use);
  if constexpr (std::is_same_v<T, float>)
    if (!s.cosine) {
      if (s.prepared && !allowed.asks && Screen::pays(s))
        return search_in_two<T, Screen>(s, threads, allowed, use);
      if (amx::chosen() && s.queries >= kManyToSplit && s.slots >= 4 * (s.k + 24))
        return search_in_two<T, Searcher<T, Split>>(without_rounded_keys(s), threads, allowed, use);
    }
#endif
  Searcher<T, Plain<float>>(without_rounded_keys(s), threads).run(allowed, use, [](int64_t) {});
}

template void search<float>(const Search&, const Threads&, const Allowed&, const Use&);
template void search<double>(const Search&, const Threads&, const Allowed&, const Use&);
template void search<Float16>(const Search&, const Threads&, const Allowed&, const Use&);
template void search<BFloat16>(const Search&, const Threads&, const Allowed&, const Use&);

}  // namespace slm_fast::SLM_ISA
