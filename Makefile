# Everything a person does with this project, as one verb each. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The first Python that constraints.txt is made for, else a newer one; override with `make setup PYTHON=/path/to/python3`.
PYTHON ?= $(shell for newest in 13 99; do for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	"$$p" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $$newest))" 2>/dev/null && echo "$$p" && break 2; done; done)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup demo test check docs format weights bench bench-train bench-pairs bench-inference clean

help:  ## list the verbs
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with the pinned versions (does nothing when it is up to date)

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.10 or newer is needed: install it, or name it with PYTHON=/path/to/python3." >&2; exit 2; fi
	@# One that was left half made (no python3-venv, an interrupt, a Python that is gone) is made anew.
	@{ $(PY) -c pass && { $(VENV)/bin/uv --version || $(PY) -m pip --version; }; } >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	@$(VENV)/bin/uv --version >/dev/null 2>&1 || $(PY) -m pip install --quiet --constraint constraints.txt uv
	$(VENV)/bin/uv pip install --quiet --python $(PY) --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)  ## four people x six prompts with the shipped weights, and pairs of them, as scored contact sheets
	$(PY) -m imagine demo

# Each process takes whole files, so that what the tests of a file share is made once.
TEST_PROCESSES ?= auto
test: $(READY)  ## the tests, on the CPU, one process per core and at most four (TEST_PROCESSES=0 for one after another)
	$(PY) -m pytest --numprocesses $(TEST_PROCESSES) --maxprocesses 4 --dist loadfile $(ARGS)

check: $(READY)  ## formatting, lint, types and import layers
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

docs: $(READY)  ## the documentation as a site in out/site; a broken link fails (for the search: python -m http.server -d out/site)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

format: $(READY)  ## put the code in its standard form
	$(PY) -m ruff check --fix --quiet . || true
	$(PY) -m ruff format .

weights: $(READY)  ## train the shipped weights from nothing into runs/weights/final (stop and repeat at will: it carries on, and exits with 3 when stopped)
	$(PY) -m train configs/weights.yaml --output runs/weights $(ARGS)
	$(PY) -m train.assemble runs/weights --output runs/weights/final --guidance-scale 5 --refine-faces

bench: $(READY)  ## seconds per picture, cold start, rendered pictures per second
	$(PY) benchmarks/bench.py $(ARGS)

bench-train: $(READY)  ## images per second of the trainer and of a loop that keeps nothing; where a step's time goes
	$(PY) benchmarks/training.py $(ARGS)

bench-pairs: $(READY)  ## pairs per second of the world's build, and of Ray with ARGS=--ray
	$(PY) benchmarks/pairs.py $(ARGS)

bench-inference: $(READY)  ## what identity costs while drawing, against the bare denoiser and diffusers' IP-Adapter; SDXL with ARGS="--size full"
	$(PY) benchmarks/inference.py $(ARGS)

clean:  ## remove what the verbs made, except .venv and runs/
	rm -rf build dist out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find imagine train data_synth tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
