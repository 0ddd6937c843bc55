# Set-up, tests, demonstration. `make venv` does nothing when .venv is up to date.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# compiled modules make workers start in 2 s instead of 7 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv system demo test test-oldest test-all check bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(shell grep '^torch==' constraints.txt) $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

# RELION is the other side of the convention tests (without it their committed figures are used), Slurm what pools are tested on,
# strace what shows the order of system calls
PROGRAMS := relion_project sinfo munged strace
PACKAGES := relion slurm-wlm munge strace
system:
	@for program in $(PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && apt-get install -y -qq $(PACKAGES) >/dev/null; \
	else echo "NOT installed:$$missing. The tests that need them are SKIPPED (apt-get install $(PACKAGES), as root)"; fi

demo: venv
	$(BIN)/cryodask demo demo

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# most tests wait, for workers, jobs and faults: three at a time keep two cores busy
TOGETHER := -n 3 --dist loadfile --no-loadscope-reorder

test:
	$(MAKE) -j 2 venv system
	$(MAKE) -j 2 check test-oldest
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow"

# lanes lean on parts of distributed that are not documented: the oldest version that pyproject.toml admits beside the newest
OLDEST := 2025.7.0
test-oldest: venv
	test -d $(VENV)/oldest || $(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/oldest dask==$(OLDEST) distributed==$(OLDEST)
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest tests/test_contract_of_distributed.py tests/test_fairshare_edges.py tests/test_streams.py

test-all: venv system check
	$(BIN)/python -m pytest $(TOGETHER)

bench: venv system
	for b in benchmarks/[a-z]*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:
	rm -rf $(VENV) demo benchmarks/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
