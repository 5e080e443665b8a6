# Two commands: `make book` builds the executed book, `make test` checks everything. Each makes what it needs, and is
# quick the second time. SCALE=gpu enlarges the experiments; it never changes what is computed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env book notebooks pdf audit colab site wheel test unit field lint format bench bench-gpu suite lock clean distclean

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
SCALE ?= $(or $(GRSD_SCALE),cpu)

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
BUILD := _build/$(SCALE)
MEASURED := grsd/data/results
BASED := $(STAMPS)/$(subst =,-,$(TORCH))

export PATH := $(BIN):$(PATH)
export GRSD_SCALE := $(SCALE)
export GRSD_CACHE ?= $(CURDIR)/.cache
export GRSD_EVIDENCE := $(CURDIR)/_build/evidence/$(SCALE)
# A Python that other software prepared may point elsewhere; the environment made here stands alone.
unexport PYTHONPATH PYTHONHOME

help:
	@echo "make book       the executed book, in $(BUILD)/_build/html (SCALE=cpu or gpu)"
	@echo "make test       lint, unit tests, and every chapter run as a test"
	@echo "make lint       style, types, and the layer contract"
	@echo "make unit       the unit tests alone"
	@echo "make field      every cell of the page Works on, exact or refused; rewrites the stored result"
	@echo "make bench      measure M u and Lanczos against other libraries; rewrites the stored result and README's tables"
	@echo "make bench-gpu  the same of the larger shapes, on a CUDA device"
	@echo "make suite      trains and measures the nets of the stored result protocol-mini (cached)"
	@echo "make notebooks  the chapters as notebooks for readers, in $(BUILD)/_build/jupyter"
	@echo "make pdf        the book as one PDF, printed by Chromium; make audit looks at every page in it"
	@echo "make colab      the readers' notebooks, each run from its first cell in an environment like Colab's"
	@echo "make wheel      sdist and wheel, in dist"
	@echo "make lock       resolve the dependencies again and write requirements.txt"
	@echo "make clean      remove what was built; distclean also removes .venv and .cache"

# --- The environment: python, torch, the lock, the package ----------------------------------------------

$(STAMPS)/python:
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON) on the PATH; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; grsd needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "make: this Python has no venv module; install it (Debian, Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(BASED): $(STAMPS)/python
	python -m pip install --quiet "$(TORCH)"
	@touch $@

$(STAMPS)/lock: requirements.txt $(BASED)
	python -m pip install --quiet -r requirements.txt
	@touch $@

$(STAMPS)/package: pyproject.toml $(STAMPS)/lock
	python -m pip install --quiet --no-deps --editable .
	@touch $@

env: $(STAMPS)/package

lock: $(BASED)
	python tools/lock.py "$(TORCH)"

# --- Checkpoints: cached by content in $GRSD_CACHE, so the stamp only spares asking ------------------------

$(GRSD_CACHE)/.suite-$(SCALE): $(STAMPS)/package $(shell find grsd/lab grsd/spectrum grsd/experiments -name "*.py" 2> /dev/null) grsd/scale.py
	grsd protocol mini
	@mkdir -p $(@D) && touch $@

suite: $(GRSD_CACHE)/.suite-$(SCALE)

# --- The book --------------------------------------------------------------------------------------------
# What of an earlier build may be kept is decided by book/_ext/companion_fresh.py.

book: $(STAMPS)/package
	jupyter-book build . --path-output $(BUILD) -W -n --keep-going
	@echo "The book: $(CURDIR)/$(BUILD)/_build/html/index.html"

notebooks: $(STAMPS)/package
	jupyter-book build . --path-output $(BUILD) --builder custom --custom-builder jupyter -W -n --keep-going
	@echo "The notebooks: $(CURDIR)/$(BUILD)/_build/jupyter"

# Both want a Chromium or Chrome on the PATH, and the pages of `make book`.
pdf:
	python tools/pdf.py $(BUILD)/_build/html $(BUILD)/_build/html/grsd.pdf

audit:
	python tools/audit.py $(BUILD)/_build/html --output _build/audit

# --- Colab, and what is released --------------------------------------------------------------------------
# The packages that Colab had on a day (tools/colab-packages.txt, with the date) under its Python where there is one;
# ONLY=mup runs the notebooks whose name holds that word. The times of a whole run are stored.

COLAB := $(CURDIR)/.venv-colab
COLAB_PYTHON ?= $(firstword $(shell for p in python3.13 $(PYTHON); do $$p -c 0 2> /dev/null && echo $$p; done))
ONLY ?=

$(COLAB)/ready: tools/colab-packages.txt
	$(COLAB_PYTHON) tools/colab.py environment $(COLAB)
	@touch $@

# What is published: the pages, and the notebooks that their buttons open. Needs `make book notebooks`.
SITE ?= _build/site
site:
	rm -rf $(SITE) && mkdir -p $(SITE)/notebooks
	cp -r $(BUILD)/_build/html/. $(SITE)
	cd $(BUILD)/_build/jupyter && find . -name '*.ipynb' -exec cp --parents {} $(abspath $(SITE))/notebooks \;

wheel: $(STAMPS)/package
	rm -rf dist build
	python -c "from setuptools.build_meta import build_sdist, build_wheel; build_sdist('dist'); build_wheel('dist')"
	rm -rf build
	@ls dist

colab: $(COLAB)/ready wheel
	python tools/colab.py notebooks _build/colab
	$(COLAB)/bin/python tools/colab.py run _build/colab/jupyter dist/grsd-*.whl $(MEASURED)/chapter-times.json $(ONLY)

# --- Checks ----------------------------------------------------------------------------------------------

lint: $(STAMPS)/package
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-cache

# Each chapter becomes a notebook without outputs and runs as a test: its assertions are what is checked. One worker runs
# one notebook, with one thread, and the evidence goes where no book will read it.
# book/pythia.md needs the hub; a test runs its cells against a small one.
CHAPTERS := $(filter-out book/pythia.md,$(shell grep -l '^kernelspec:' book/*.md book/*/*.md 2> /dev/null))
NBVAL := _build/nbval
NOTEBOOKS := $(CHAPTERS:%.md=$(NBVAL)/%.ipynb)
PYTEST := OMP_NUM_THREADS=1 GRSD_EVIDENCE=$(CURDIR)/_build/evidence/nbval python -m pytest -n $(WORKERS) --dist loadscope --durations=12

$(NBVAL)/%.ipynb: %.md $(STAMPS)/package
	@mkdir -p $(@D)
	jupytext --quiet --to ipynb --output $@ $<

unit: $(STAMPS)/package
	$(PYTEST) tests

# The cells are kept as they are measured, so that the second command only gathers them.
field: $(STAMPS)/package
	$(PYTEST) --dist load tests/field --every-cell
	grsd experiment field --output grsd/data/results/field.json

test: lint $(NOTEBOOKS)
	$(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout 300 tests $(NOTEBOOKS)

# The libraries to compare with lie in a folder of their own, without their dependencies, so that none can change torch.
OTHERS := $(VENV)/others
BENCH := PYTHONPATH=$(OTHERS) python benchmarks
BENCH_SHAPES ?= h256 70m h1024

$(STAMPS)/others: benchmarks/requirements.txt $(STAMPS)/package
	rm -rf $(OTHERS)
	python -m pip install --quiet --no-deps --target $(OTHERS) -r benchmarks/requirements.txt
	@touch $@

bench: $(STAMPS)/others
	for shape in $(BENCH_SHAPES); do for part in time memory profile; do \
	    $(BENCH)/products.py --shape $$shape --parts $$part --out $(MEASURED); done; done
	for part in time memory profile; do \
	    $(BENCH)/products.py --shape smollm2 --parts $$part --repeats 3 --profiles 1 --out $(MEASURED); done
	$(BENCH)/krylov.py --out $(MEASURED)
	$(BENCH)/krylov.py --parts share --shape h256 --batch 32 --out $(MEASURED)
	$(BENCH)/mup_peer.py --out $(MEASURED)
	$(BENCH)/stacked.py --repeats 5 --out $(MEASURED)
	for width in 64 128 256; do $(BENCH)/newton_schulz.py --width $$width --out $(MEASURED); done
	python benchmarks/readme.py

bench-gpu: $(STAMPS)/package
	python benchmarks/shapes.py --device cuda --tf32 --shapes 70m 410m 1.4b 6.9b --out $(MEASURED)
	python benchmarks/readme.py

format: $(STAMPS)/package
	ruff format .
	ruff check --fix .

clean:
	rm -rf _build dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find grsd tests book -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(COLAB) $(CURDIR)/.cache
