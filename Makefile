# Every target sets up what it needs: a virtual environment in .venv, filled once and refilled when
# pyproject.toml or constraints.txt change. Needs make and Python >= 3.11, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.bench-ready

.PHONY: demo test soak check format bench bench-gpu clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ununennium needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: $(READY)   ## train, validate and map a real scene (Indian Pines) in under two minutes
	$(BIN)/ununennium demo $(ARGS)

test: $(READY)   ## the test suite
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

soak: $(READY)   ## runs killed and resumed, processes killed under torchrun, two hosts: half an hour
	$(BIN)/python -m pytest --numprocesses 2 -m soak $(ARGS)

check: $(READY)  ## formatting, linting, typing, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(PEERS): $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[bench,demo,dev]'
	touch $@

bench: $(PEERS)  ## against peers and loops by hand, in one run: prints, and writes benchmarks/results/cpu.md and .json
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-gpu: $(PEERS)  ## the same on one CUDA GPU, to benchmarks/results/gpu.md and .json
	$(BIN)/python benchmarks/run.py --only gpu --keep $(ARGS)

clean:
	rm -rf $(VENV) build dist
