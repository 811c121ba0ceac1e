# Everything happens in .venv, made from constraints.txt; nothing of the system is touched.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test coverage slow mutants lint type bench bench-quickstart clean

quickstart: $(VENV)/.quickstart
	$(BIN)/plaudit run recipes/quickstart.yaml

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term -m "not slow"

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow --timeout=3600

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants/run.py

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests recipes benchmarks docs
	$(BIN)/ruff format --check src tests recipes benchmarks docs

type: $(VENV)/.dev
	$(BIN)/mypy

bench: $(VENV)/.quickstart
	$(BIN)/python benchmarks/against_trl.py --rounds 1
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/label_latency.py

bench-quickstart: $(VENV)/.quickstart
	$(BIN)/python benchmarks/quickstart.py

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by itself: where a CPU build of the pinned release is at hand, no CUDA packages are fetched.
$(VENV)/.quickstart: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch
	$(INSTALL) --editable '.[quickstart]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch
	$(INSTALL) --editable '.[quickstart,dev]'
	touch $@ $(VENV)/.quickstart
