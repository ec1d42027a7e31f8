# `make demo` and `make test` do all their own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
# Bytecode is kept even where the environment says otherwise, since tests start many processes.
RUN := HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python
# Where the interpreter already has torch 2.10 or newer (a GPU machine, say), that one is used. Elsewhere torch is
# installed, at the version this project is tested with.
HAS_TORCH := $(shell $(PYTHON) -c "from importlib.metadata import version as v; \
  print('1' if tuple(map(int, v('torch').split('.')[:2])) >= (2, 10) else '')" 2>/dev/null)

.PHONY: demo test style lint fuzz setup sanitize cuda clean

demo: $(VENV)/.ready
	$(RUN) -m slm_fast.cli demo

# Processes with a thread each, one more than there are processors, because some tests wait: for servers, Ray, kills.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(len(os.sched_getaffinity(0)), 7) + 1)" 2>/dev/null || echo 2)
test: style
	$(VENV)/bin/mypy & mypy=$$!; \
	  OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	  wait $$mypy && exit $$tests

# 10,000 damaged stores, 5,000 lines, 500 kills, two minutes of writers and readers: `make test` does a little of each.
fuzz: $(VENV)/.ready
	SLM_FAST_FUZZ=1 $(RUN) -m pytest tests/fuzz tests/test_resume.py tests/server/test_reload.py tests/server/test_openapi.py

style: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

lint: style
	$(VENV)/bin/mypy

setup: $(VENV)/.ready

# The C++ build begins while pip downloads. pip would compile the packages' Python files in one process, and all of
# them: the folders that NOT_COMPILED matches have a third, and hardly anything in them is imported.
NOT_COMPILED := /(tests?|testing|models|_inductor|rllib|mypy)/
INSTALL = $(VENV)/bin/python -m pip install --quiet --no-compile
$(VENV)/.ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*) $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(INSTALL) --upgrade pip setuptools cmake ninja pybind11 $(if $(HAS_TORCH),,-c constraints.txt torch)
	$(VENV)/bin/python setup.py --quiet build_ext >/dev/null 2>&1 & \
	  $(INSTALL) --no-build-isolation $(if $(HAS_TORCH),,-c constraints.txt) -e ".[dev]"; status=$$?; wait; exit $$status
	-$(VENV)/bin/python -m compileall -q -j 0 -x '$(NOT_COMPILED)' $(VENV)/lib >/dev/null
	touch $@

# The operator tests against a build with AddressSanitizer and UndefinedBehaviorSanitizer, in build/sanitize. The
# sanitizers have to be in the process before Python is, and libstdc++ with them, for exceptions to be caught.
SANITIZED := $(CURDIR)/build/sanitize
preload = $(shell $(CXX) -print-file-name=$(1))
sanitize: $(VENV)/.ready
	$(VENV)/bin/cmake -S . -B build/sanitize-objects -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python \
	  -DSLM_FAST_SANITIZE=address,undefined -DSLM_FAST_OUTPUT=$(SANITIZED)/slm_fast
	$(VENV)/bin/cmake --build build/sanitize-objects
	cd slm_fast && find . -name '*.py' -exec cp --parents {} $(SANITIZED)/slm_fast/ \;
	cd $(SANITIZED) && LD_PRELOAD=$(call preload,libasan.so):$(call preload,libubsan.so):$(call preload,libstdc++.so) \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(SANITIZED) PYTHONMALLOC=malloc \
	  $(CURDIR)/$(VENV)/bin/python -m pytest -p no:cacheprovider -k "native and not compile and not instruction_set" \
	  $(CURDIR)/tests/ops

# The CUDA operators, and Triton's, compiled only: needs nvcc and triton, but neither a GPU nor a torch that has CUDA.
# Which registers and shared memory they use goes to build/gpu_kernels.csv.
cuda: $(VENV)/.ready
	$(VENV)/bin/cmake -S . -B build/cuda -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python -DSLM_FAST_CUDA=compile \
	  "-DSLM_FAST_CUDA_BINARIES=80;86;89;90a" -DSLM_FAST_WERROR=ON
	$(VENV)/bin/cmake --build build/cuda --target kernels_cuda
	PYTHONPATH=$(CURDIR) $(VENV)/bin/python tests/ops/compile_kernels.py build/cuda build/gpu_kernels.csv

clean:
	rm -rf $(VENV) build *.egg-info
