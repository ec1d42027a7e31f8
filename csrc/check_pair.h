// Checks shared by retrieve and key_loss: a query, its keys and their division into groups.
#pragma once

#include "tensor.h"

namespace slm_fast {

inline void check_pair(const Tensor& query, const Tensor& keys, int64_t k, int64_t groups) {
  if (query.dim() != 2 || !query.is_cpu()) fail("query: expected floating [B, D] on cpu, got ", shape_of(query));
  type_of("query", query);
  if (keys.dim() != 2) fail("keys: expected [P, ", query.size(1), "], got ", shape_of(keys));
  check_like("keys", keys, query.scalar_type(), {keys.size(0), query.size(1)});
  if (k < 1) fail("k: expected at least 1, got ", k);
  if (keys.size(0) >= int64_t{1} << 32) fail("keys: expected fewer than 2**32 slots, got ", keys.size(0));
  if (groups < 1 || query.size(1) % groups != 0)
    fail("groups: expected a divisor of the query width ", query.size(1), ", got ", groups);
}

}  // namespace slm_fast
