#!/usr/bin/env bash
# bash benchmarks/gpu.sh OUT [PYTHON]
#
# On a machine with an NVIDIA GPU: builds with CUDA, runs the operator tests (with transformers, also those of decoding
# and encoding with CUDA graphs) alongside a short compute-sanitizer run, then the benchmark. CSVs, logs and a proposed
# preference.csv go to OUT. Finishes within 8 minutes, needs no network and installs nothing: torch >= 2.10 with CUDA,
# Triton, nvcc, cmake, ninja, pybind11, pytest and hypothesis must be present. DRY_RUN=1 runs the same steps, as far as
# possible, without a GPU.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT [PYTHON]}" && cd "$1" && pwd)
python=$("${2:-python3}" -c 'import sys; print(sys.executable)') || exit 1
cd "$(dirname "$0")/.."
# cmake and ninja may exist only in PYTHON's environment, and the CUDA tools only beside nvcc.
PATH=$(dirname "$python"):$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH PYTHONPATH=$PWD HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 python out
deadline=$((SECONDS + 470))
status=0

step() { # step NAME SECONDS COMMAND...: limited to SECONDS and the overall deadline; logs to OUT
  local name=$1 most=$2 left=$((deadline - SECONDS)) began=$SECONDS
  shift 2
  if ((left < most)); then most=$left; fi
  if ((most < 10)); then echo "== $name: left out, the time is up"; return 1; fi
  timeout -k 5 "$most" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  echo "== $name: $( ((rc == 0)) && echo ok || { ((rc == 124)) && echo "CUT OFF" || echo "FAILED ($rc)"; } ), $((SECONDS - began)) s; $out/$name.log"
  if ((rc)); then tail -n "${LINES_OF_ERROR:-25}" "$out/$name.log"; fi
  return $rc
}

build() {
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$python" -DSLM_FAST_CUDA="$1" \
    -DSLM_FAST_OUTPUT="$PWD/slm_fast" && cmake --build build/gpu
}

# Compiling the Triton kernels dominates test time, so the tests are split over several processes.
tests() { # tests PROCESSES PYTEST-ARGUMENTS...
  local many=$1 rc=0 job jobs=()
  shift
  "$python" -m pytest --collect-only "$@" >"$out/tests.txt" || { cat "$out/tests.txt"; return 1; }
  for ((job = 0; job < many; job++)); do
    grep '^tests/.*::' "$out/tests.txt" | awk "NR % $many == $job" >"$out/tests_$job.txt"
    xargs -r -d '\n' -a "$out/tests_$job.txt" "$python" -m pytest -p no:cacheprovider --maxfail 10 >"$out/tests_$job.log" 2>&1 &
    jobs+=($!)
  done
  for job in "${!jobs[@]}"; do
    wait "${jobs[job]}" || { rc=1; grep -E '^(FAILED|ERROR|E  )' "$out/tests_$job.log" || tail -n 20 "$out/tests_$job.log"; }
    tail -n 1 "$out/tests_$job.log"
  done
  return $rc
}

sanitize() { # without torch's caching allocator, which hides out-of-bounds accesses
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 3 "$python" -m pytest \
    -p no:cacheprovider tests/ops/test_cuda.py tests/ops/test_cuda_retrieve.py tests/ops/test_triton.py \
    -k "specification and not kernels_code"
}

racecheck() {
  compute-sanitizer --tool racecheck --error-exitcode 3 "$python" -m pytest -p no:cacheprovider \
    tests/ops/test_cuda.py tests/ops/test_cuda_retrieve.py \
    -k "(decoding_equals or retrieve_gives) and not kernels_code"
}
export -f build tests sanitize racecheck

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
from slm_fast import ops
print(torch.__version__, 'triton', triton.__version__)
for backend in ops.backends(): print(backend.name, backend.why_not() or 'ready')"

# If tests fail, the benchmark still runs, after a warning that its timings may be of wrong kernels.
if [[ ${DRY_RUN:-} ]]; then
  step tests 180 bash -c "tests 1 tests/ops/test_triton.py tests/ops/test_cuda.py tests/ops/test_cuda_retrieve.py" || status=1
else
  others=()
  if command -v compute-sanitizer >/dev/null; then
    step sanitizer 170 bash -c sanitize & others+=($!)
    step racecheck 170 bash -c racecheck & others+=($!)
  else
    echo "== sanitizer: left out, no compute-sanitizer"
  fi
  many=$(($(nproc) < 8 ? $(nproc) : 8))
  writing=$("$python" -c "import transformers" 2>/dev/null && echo tests/test_kv_cache.py tests/test_encoder_graphs.py) # CUDA graphs
  step tests 240 bash -c "tests $many tests/ops $writing -k 'not native and not cpu' --ignore tests/ops/test_native.py" \
    || status=1
  for other in "${others[@]}"; do wait "$other" || status=1; done
fi
((status)) && echo "== the tests failed: what follows times kernels that may be wrong"

left=$((deadline - SECONDS - 40)) # the shape in progress may overrun
step benchmark 400 "$python" -m benchmarks.speed.operators.gpu "$out" --within "$left" "${dry[@]}" || status=1
cat "$out/benchmark.log"
exit $status
