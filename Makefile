# `make demo` and `make test` do all their own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
# Where the interpreter already has torch (a GPU machine, say), that one is used. Elsewhere torch is installed, at the
# version this project is tested with.
HAS_TORCH := $(shell $(PYTHON) -c "import importlib.util as u; print(1 if u.find_spec('torch') else '')" 2>/dev/null)

.PHONY: demo test lint setup clean

demo: $(VENV)/.ready
	$(RUN) -m slm_fast.cli demo

test: lint
	$(RUN) -m pytest

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools $(if $(HAS_TORCH),,-c constraints.txt torch)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation $(if $(HAS_TORCH),,-c constraints.txt) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
