#!/usr/bin/env bash
# bash benchmarks/gpu.sh OUT [PYTHON]
#
# On a machine with an NVIDIA GPU: builds with CUDA, runs the operator tests, a short run under compute-sanitizer, then
# the benchmark. CSVs, logs and a proposed preference.csv go to OUT. Ends within 8 minutes, needs no network and installs
# nothing: torch >= 2.10 with CUDA, Triton, nvcc, cmake, ninja, pybind11, pytest and hypothesis must be there.
# DRY_RUN=1 goes through the same steps on a machine without a GPU, as far as they go.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT [PYTHON]}" && cd "$1" && pwd)
python=${2:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
deadline=$((SECONDS + 470))
status=0

step() { # step NAME SECONDS COMMAND...: at most so many seconds, and never past the end; the log goes to OUT
  local name=$1 most=$2 left=$((deadline - SECONDS)) began=$SECONDS
  shift 2
  if ((left < most)); then most=$left; fi
  if ((most < 10)); then echo "== $name: left out, the time is up"; status=1; return 1; fi
  timeout -k 5 "$most" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  echo "== $name: $( ((rc)) && echo "FAILED ($rc)" || echo ok), $((SECONDS - began)) s; $out/$name.log"
  if ((rc)); then tail -n "${LINES_OF_ERROR:-25}" "$out/$name.log"; status=1; fi
  return $rc
}

build() {
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -DSLM_FAST_CUDA="$1" -DSLM_FAST_OUTPUT="$PWD/slm_fast" && cmake --build build/gpu
}
export -f build
export python

if [[ ${DRY_RUN:-} ]]; then
  dry=(--dry-run --within 60)
  export TRITON_INTERPRET=1
  step build 300 bash -c "build compile" || exit 1
else
  dry=()
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
  step build 150 bash -c "build on" || exit 1
fi
"$python" -c "
import torch, triton
from slm_fast import _C, ops
print(torch.__version__, 'triton', triton.__version__, _C.build_info())
for backend in ops.backends(): print(backend.name, backend.why_not() or 'ready')"

# Wrong kernels are not timed. Compiling Triton's kernels takes most of the tests' time: in parallel where pytest can.
workers=$("$python" -c "import xdist; print('-n 8')" 2>/dev/null)
suite=(tests/ops/test_multi_lora.py tests/ops/test_retrieve.py tests/ops/test_key_loss.py tests/ops/test_triton.py
  tests/ops/test_cuda.py)
if [[ ${DRY_RUN:-} ]]; then suite=(tests/ops/test_triton.py tests/ops/test_cuda.py); fi
# shellcheck disable=SC2086
step tests 180 "$python" -m pytest $workers "${suite[@]}" -k "not native" --maxfail 10
tests=$?

if command -v compute-sanitizer >/dev/null && [[ -z ${DRY_RUN:-} ]]; then
  step sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 3 "$python" -m pytest -p no:cacheprovider \
    tests/ops/test_cuda.py -k "specification"
  step racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 3 "$python" -m pytest -p no:cacheprovider \
    tests/ops/test_cuda.py -k "decoding and float32"
else
  echo "== sanitizer: left out, no compute-sanitizer"
fi

((tests)) && echo "== the tests failed: what follows times kernels that may be wrong"
left=$((deadline - SECONDS - 40)) # the shape in hand may take some time more
step benchmark 400 "$python" -m benchmarks.ops.bench_gpu "$out" --within "$left" "${dry[@]}"
cat "$out/benchmark.log"
exit $status
