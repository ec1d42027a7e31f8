// Shared by retrieve and key_loss: each query's K best slots.
#pragma once

#include <functional>

#include "ranked.h"
#include "scores.h"
#include "threads.h"

namespace slm_fast::SLM_ISA {

// Which slots a query may retrieve; by itself, all. Asked only of slots that would otherwise be returned, so the calls
// need not be inlined, and the search is compiled once for all users.
struct Allowed {
  const bool asks;  // whether anything is forbidden
  explicit Allowed(bool asks = false) : asks(asks) {}
  virtual bool slot(int64_t /*query*/, int64_t /*list*/, int64_t /*key*/) const { return true; }
  // False only if none of `count` keys from `first` on is allowed.
  virtual bool any(int64_t /*query*/, int64_t /*first*/, int64_t /*count*/) const { return true; }
};

// Takes the best slots of one of a query's lists, best first.
using Use = std::function<void(int64_t query, int64_t list, const Ranked* best, int64_t count)>;

// Finds each query's K best slots by the fastest method. Queries come in no particular order and on several threads; a
// query's lists come in order, and may all come a second time. T: storage type of queries and keys; see search.cpp.
template <class T>
void search(const Search& s, const Threads& threads, const Allowed& allowed, const Use& use);

}  // namespace slm_fast::SLM_ISA
