#!/usr/bin/env bash
# bash benchmarks/gpu.sh OUT [SECTION ...]
#
# On a machine with an NVIDIA GPU, in this order; default: all.
#   build      with CUDA
#   tests      of the operators and, with transformers, of decoding and encoding with CUDA graphs
#   sanitizer  memcheck and racecheck of compute-sanitizer, if it is there; tests and sanitizers run side by side
#   operators  the benchmark: CSVs, targets met or missed, and a proposed preference.csv
#   passes     BERT-base and LLaMA 7B shapes: whole passes with the preference.csv of the package, and if another was
#              proposed, with that
# Logs and results go to OUT as they come, so sections may be run one at a time. All finish within 8 minutes and need no
# network: torch >= 2.10 with CUDA, Triton, nvcc, cmake, ninja, pybind11, pytest, hypothesis and, for passes,
# transformers must be present. PYTHON: the interpreter that has them (default: python3). DRY_RUN=1 runs the same, as
# far as possible, without a GPU.
set -uo pipefail
out=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT [SECTION ...]}" && cd "$1" && pwd) || exit 1
python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || exit 1
shift
all="build tests sanitizer operators passes"
for section in "$@"; do
  [[ " $all " == *" $section "* ]] || { echo "gpu.sh: $section: expected one of $all"; exit 2; }
done
sections=" ${*:-$all} "
wanted() { [[ $sections == *" $1 "* ]]; }
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

build() { # build on|compile: all of it, or the CUDA kernels alone
  local target=()
  if [[ $1 == compile ]]; then target=(--target kernels_cuda); fi
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$python" -DSLM_FAST_CUDA="$1" \
    -DSLM_FAST_OUTPUT="$PWD/slm_fast" && cmake --build build/gpu "${target[@]}"
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
    -p no:cacheprovider tests/ops/test_cuda.py tests/ops/test_cuda_linear.py tests/ops/test_cuda_retrieve.py \
    tests/ops/test_triton.py -k "specification and not kernels_code"
}

racecheck() {
  compute-sanitizer --tool racecheck --error-exitcode 3 "$python" -m pytest -p no:cacheprovider \
    tests/ops/test_cuda.py tests/ops/test_cuda_retrieve.py \
    -k "(decoding_equals or retrieve_gives) and not kernels_code"
}

passes() { # passes CSV: mixed batches beside the bare backbone
  local of=(--section ways --dtype bfloat16 --ways trunk --output "$1")
  if [[ ${DRY_RUN:-} ]]; then
    "$python" -m benchmarks.speed.inference "${of[@]}" --backbone bert-base --layers 1 --batches 1 --batch-tokens 128 --rounds 1
    return
  fi
  "$python" -m benchmarks.speed.inference "${of[@]}" --backbone bert-base --layers 12 --batches 4 --batch-tokens 8192 --rounds 15 &&
    "$python" -m benchmarks.speed.inference "${of[@]}" --backbone llama-2-7b --layers 32 --batches 1 --batch-tokens 4096 --rounds 8
}
export -f build tests sanitize racecheck passes

if [[ ${DRY_RUN:-} ]]; then
  dry=(--dry-run --within 60) mode=compile
  export TRITON_INTERPRET=1
else
  dry=() mode=on
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || exit 1
fi
if wanted build; then step build 300 bash -c "build $mode" || exit 1; fi
"$python" -c "
import torch, triton
from slm_fast import ops
print(torch.__version__, 'triton', triton.__version__)
for backend in ops.backends(): print(backend.name, backend.why_not() or 'ready')"

others=()
if wanted sanitizer && ! command -v compute-sanitizer >/dev/null; then
  echo "== sanitizer: left out, no compute-sanitizer"
elif wanted sanitizer && [[ ! ${DRY_RUN:-} ]]; then
  step sanitizer 170 bash -c sanitize & others+=($!)
  step racecheck 170 bash -c racecheck & others+=($!)
fi
if wanted tests && [[ ${DRY_RUN:-} ]]; then
  step tests 180 bash -c "tests 1 tests/ops/test_triton.py tests/ops/test_cuda.py tests/ops/test_cuda_linear.py \
    tests/ops/test_cuda_retrieve.py" || status=1
elif wanted tests; then
  many=$(($(nproc) < 8 ? $(nproc) : 8))
  writing=$("$python" -c "import transformers" 2>/dev/null && echo tests/test_kv_cache.py tests/test_encoder_graphs.py) # CUDA graphs
  step tests 240 bash -c "tests $many tests/ops $writing -k 'not native and not cpu' --ignore tests/ops/test_native.py" \
    || status=1
fi
for other in "${others[@]}"; do wait "$other" || status=1; done
((status)) && echo "== the tests failed: what follows times kernels that may be wrong"

if wanted operators; then
  left=$((deadline - SECONDS - 40)) # the shape in progress may overrun
  if wanted passes && ((left > 150)); then left=150; fi
  step operators 400 "$python" -m benchmarks.speed.operators.gpu "$out" --within "$left" "${dry[@]}" || status=1
  cat "$out/operators.log"
fi
if wanted passes; then
  step passes 150 bash -c "passes '$out/inference_gpu.csv'" || status=1
  tail -n 20 "$out/passes.log"
  own=slm_fast/ops/preference.csv
  if [[ -e $out/preference.csv ]] && ! diff -q <(grep -v '^#' "$own") <(grep -v '^#' "$out/preference.csv") >/dev/null; then
    cp "$own" "$out/preference_before.csv"
    cp "$out/preference.csv" "$own"
    step passes_as_proposed 150 bash -c "passes '$out/inference_gpu_as_proposed.csv'" || status=1
    cp "$out/preference_before.csv" "$own"
    tail -n 20 "$out/passes_as_proposed.log"
  fi
fi
exit $status
