# make setup | test | check | format | clean    (see CONTRIBUTING.md)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# ninja, needed to build the extension, is looked up on PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where this is set, every process would compile torch's Python files anew (5 s each).
unexport PYTHONDONTWRITEBYTECODE
CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: setup test test-nightly check format clean
.DELETE_ON_ERROR:

setup: $(VENV)/.package
	@:

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# Compiling every installed module would double the time; importing compiles the ones in use.
WARM_UP := import deepspeed, torch._dynamo, torch._inductor.compile_fx, torch.utils.tensorboard, transformers
$(VENV)/.requirements: requirements.lock $(VENV)/.python
	$(BIN)/pip install --quiet --quiet --no-compile --disable-pip-version-check -r requirements.lock
	$(BIN)/python -W ignore -c "$(WARM_UP)" 2> $(VENV)/warm-up.log || { cat $(VENV)/warm-up.log; exit 1; }
	touch $@

$(VENV)/.package: pyproject.toml setup.py $(CSRC) $(VENV)/.requirements
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

test: setup
	$(BIN)/python -m pytest -m "not nightly"

test-nightly: setup
	$(BIN)/python -m pytest -m nightly

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not slow and not nightly"

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find megatron_iiet tests -name __pycache__ -type d -prune -exec rm -rf {} +
