// The CPU invariant_linear operator: checks all arguments, then passes plain pointers to the kernel.
#include "cpu/kernels.h"
#include "operators.h"
#include "tensor.h"
#include "torch_threads.h"

namespace slm_fast {

Tensor invariant_linear(Tensor x, Tensor weight) {
  if (x.dim() != 2 || weight.dim() != 2) fail("x, weight: expected two axes each, got ", shape_of(x), shape_of(weight));
  check_like("x", x, ScalarType::Double, {x.size(0), weight.size(1)});
  check_like("weight", weight, ScalarType::Double, {weight.size(0), weight.size(1)});
  x = dense(x), weight = dense(weight);
  Tensor y = empty(ScalarType::Double, {x.size(0), weight.size(0)});
  InvariantLinear op{};
  op.rows = x.size(0), op.width = x.size(1), op.features = weight.size(0);
  op.x = static_cast<const double*>(x.data_ptr()), op.weight = static_cast<const double*>(weight.data_ptr());
  op.y = static_cast<double*>(y.data_ptr());
  kernels().invariant_linear(op, torch_threads());
  return y;
}

}  // namespace slm_fast
