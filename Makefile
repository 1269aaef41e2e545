# VENV says where the environment lies; several checkouts may share one (it weighs 6 GB).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Of what is installed and from where: another checkout on the same environment installs itself anew.
KEY := $(shell (cat setup.cfg pyproject.toml; pwd) | sha256sum | cut -c1-12)
INSTALLED := $(VENV)/.installed-$(KEY)
# Processes that share the tests, file by file; many tests start ranks of their own besides.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all check format clean

## demo: train, resume, export, sample and score a model on handwritten digits, then report
demo: $(INSTALLED)
	$(BIN)/srepa-ds demo $(DEMO)

## test: lint, types, floors, and the quick tests
test: check
	$(PYTEST) -m "not slow"

## test-all: everything that runs without a GPU
test-all: check
	$(PYTEST)

## check: what a commit must pass, without the tests
check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

## format: let the formatter and the linter mend what they can
format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf .venv build *.egg-info
