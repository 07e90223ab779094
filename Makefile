# `make demo` and `make test` set up everything they need from a package registry; nothing else is required.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint bench clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/lr-ray fetch
	touch $@

demo: $(VENV)/.ready
	$(BIN)/lr-ray demo

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -rs -m 'not slow'

test-slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready
	$(BIN)/lr-ray bench inversion
	$(BIN)/python -m bench.driver_memory
	$(BIN)/python -m bench.storage
	$(BIN)/python -m bench.library
	$(BIN)/lr-ray bench training
	$(BIN)/lr-ray bench eval
	$(BIN)/lr-ray bench serve

clean:
	rm -rf $(VENV) runs build *.egg-info
