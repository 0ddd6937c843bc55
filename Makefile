# Set-up, tests, demonstration. `make venv` does nothing when .venv is up to date.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# compiled modules make workers start in 2 s instead of 7 s
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv system demo test test-oldest test-newest test-newest-here test-all test-distributed check bench clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(shell grep '^torch==' constraints.txt) $(TORCH_INDEX)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test,compiled]'
	touch $@

# RELION is the other side of the convention tests (without it their committed figures are used), Slurm what pools are tested on,
# strace what shows the order of system calls, chromium and nginx what the pages are tested with
PROGRAMS := relion_project sinfo munged strace chromium nginx
PACKAGES := relion slurm-wlm munge strace chromium nginx-light
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

# most tests wait, for workers, jobs and faults: four at a time keep two cores busy; each more imports, collects and starts its own for 15 CPU s
TOGETHER := -n 4 --dist loadfile --no-loadscope-reorder

# numba compiles for 20 s, and pytest rewrites the modules of the tests for 8 s: once, not in each of the processes that begin together
$(VENV)/.compiled: cryodask/kernels/_slices_numba.py cryodask/kernels/_grids_numba.py cryodask/kernels/_insertion_numba.py | venv
	$(BIN)/python -m pytest -k test_local_search
	touch $@

test: venv system check $(VENV)/.compiled
	$(BIN)/python -m pytest $(TOGETHER) -m "not slow"

# the fast tests, without Slurm, among other packages: the oldest that pyproject.toml admits, and the newest there are on the newest Python
FAST := -m "not slow and not heavy and not slurm"
# these ask about packages, `make test` asks about load: a failure counts if it stays when the test is run again alone
define among
export PATH=$(abspath $(1)/bin):$$PATH; python -m pytest $(TOGETHER) $(FAST) || python -m pytest --last-failed --last-failed-no-failures none $(FAST)
endef
OLDEST := $(VENV)/oldest
NEWEST := $(VENV)/newest
NEWEST_PYTHON ?= $(shell for p in python3.13 $$HOME/.pyenv/versions/3.13*/bin/python; do $$p -c '' 2>/dev/null && echo $$p && break; done)

test-oldest: $(OLDEST)/.ready
	export CRYODASK_TESTS_OLDEST=1; $(call among,$(OLDEST))

test-newest:
	@if [ -n "$(NEWEST_PYTHON)" ]; then $(MAKE) test-newest-here; else echo "NOT tested: there is no Python 3.13 (NEWEST_PYTHON=...)"; fi

test-newest-here: $(NEWEST)/.ready
	$(call among,$(NEWEST))
	rm -rf $(NEWEST)/demo && $(NEWEST)/bin/cryodask demo $(NEWEST)/demo --movies 6

# numba follows new releases of Python and numpy late: among the newest packages the searches run in torch
COMMA := ,
EXTRAS := test,notebook
# torch first: what uv would take by itself is a build for CUDA, of gigabytes, where there is another
define packages
	$(BIN)/python -m pip --python $(1)/bin/python install --quiet --no-compile --no-deps $(3) $(TORCH_INDEX)
	$(BIN)/uv pip install --quiet --python $(1)/bin/python --resolution $(2) --editable '.[$(4)]'
	touch $(1)/.ready
endef

$(OLDEST)/.ready: pyproject.toml | venv
	$(BIN)/python -m venv --clear $(OLDEST)
	$(call packages,$(OLDEST),lowest-direct,$(shell grep '^torch==' constraints.txt),$(EXTRAS)$(COMMA)compiled)

$(NEWEST)/.ready: pyproject.toml | venv
	$(NEWEST_PYTHON) -m venv --clear $(NEWEST)
	$(call packages,$(NEWEST),highest,torch,$(EXTRAS))

test-all: venv system check $(VENV)/.compiled
	$(BIN)/python -m pytest $(TOGETHER)

# distributed's own tests with our schedulers in the place of its own; they come from the tag of its version, or from DISTRIBUTED_REPOSITORY
test-distributed: venv
	$(BIN)/python tests/of_distributed --folder $(VENV)/of_distributed $(DISTRIBUTED)

bench: venv system
	for b in benchmarks/[a-z]*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

clean:
	rm -rf $(VENV) demo benchmarks/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
