# Every target sets up what it needs: a virtual environment in .venv, filled once and refilled when
# pyproject.toml, constraints.txt or the version change. Needs make and Python >= 3.11, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.bench-ready
RELEASE := $(VENV)/.release-ready

.PHONY: setup demo test soak check format bench bench-gpu docs dist release-check clean

$(READY): pyproject.toml constraints.txt src/ununennium/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ununennium needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

setup: $(READY)  ## the virtual environment alone

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

$(RELEASE): $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[demo,dev,release]'
	touch $@

dist: $(RELEASE)  ## sdist, and the wheel that is built of it, in dist/
	rm -rf dist
	$(BIN)/python -m build --installer uv
	$(BIN)/twine check --strict dist/*
	$(BIN)/python .github/check_dist.py

release-check: dist  ## the above, types of all that is public, and the demo from the wheel in a fresh environment
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --verifytypes ununennium --ignoreexternal
	rm -rf build/fresh build/elsewhere
	$(BIN)/uv venv --quiet --python $(BIN)/python build/fresh
	$(BIN)/uv pip install --quiet --python build/fresh/bin/python --constraint constraints.txt "$$(echo dist/*.whl)[demo]"
	mkdir build/elsewhere && cd build/elsewhere && ../fresh/bin/ununennium demo $(ARGS)

docs: $(READY)   ## guides and reference, to site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site
