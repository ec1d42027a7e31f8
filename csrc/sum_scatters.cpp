// The CPU sum_scatters operator: checks all arguments, then passes plain pointers to the kernel.
#include "cpu/kernels.h"
#include "operators.h"
#include "tensor.h"
#include "torch_threads.h"

namespace slm_fast {

std::tuple<Tensor, Tensor> sum_scatters(Tensor factor, Tensor rows, Tensor exponent, Tensor diagonal) {
  if (factor.dim() != 2 || rows.dim() != 1)
    fail("factor, rows: expected two axes and one, got ", shape_of(factor), shape_of(rows));
  const int64_t tasks = rows.size(0), width = factor.size(1);
  check_like("factor", factor, ScalarType::Char, {factor.size(0), width});
  check_like("rows", rows, ScalarType::Long, {tasks});
  check_like("exponent", exponent, ScalarType::Char, {tasks, width});
  check_like("diagonal", diagonal, ScalarType::Float, {tasks, width});
  factor = dense(factor), rows = dense(rows), exponent = dense(exponent), diagonal = dense(diagonal);
  SumScatters op{};
  op.tasks = tasks, op.width = width, op.rows = static_cast<const int64_t*>(rows.data_ptr());
  int64_t all = 0;
  for (int64_t t = 0; t < tasks; ++t) {
    if (op.rows[t] < 0 || op.rows[t] > factor.size(0) - all)
      fail("rows: expected numbers of rows of factor, ", factor.size(0), " in all, got ", op.rows[t]);
    all += op.rows[t];
  }
  op.factor = static_cast<const int8_t*>(factor.data_ptr());
  op.exponent = static_cast<const int8_t*>(exponent.data_ptr());
  op.diagonal = static_cast<const float*>(diagonal.data_ptr());
  Tensor coarse = empty(ScalarType::Long, {width * (width + 1) / 2});
  Tensor fine = empty(ScalarType::Long, {width * (width + 1) / 2});
  op.coarse = static_cast<int64_t*>(coarse.data_ptr()), op.fine = static_cast<int64_t*>(fine.data_ptr());
  kernels().sum_scatters(op, torch_threads());
  return {coarse, fine};
}

}  // namespace slm_fast
