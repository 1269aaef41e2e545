# VENV says where the environment lies; several checkouts may share one (it weighs 6 GB).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The versions to install, if they can be had together. In a new environment CONSTRAINTS= takes
# whatever pip chooses.
TESTED := constraints/tested.txt
CONSTRAINTS ?= $(TESTED)
# Of what is installed and from where: another checkout on the same environment installs itself there.
KEY := $(shell (cat setup.cfg pyproject.toml $(CONSTRAINTS) /dev/null; pwd) | sha256sum | cut -c1-12)
INSTALLED := $(VENV)/.installed-$(KEY)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo,parquet,vae,eval,dev]"
# Processes that share the tests, file by file; many tests start ranks of their own besides.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all test-oldest test-upstream install versions check format clean

## demo: train, resume, export, sample and score a model on handwritten digits, then report
demo: $(INSTALLED)
	$(BIN)/srepa-ds demo $(DEMO)

## test: lint, types, floors, and the quick tests
test: check
	$(PYTEST) -m "not slow and not upstream"

## test-all: everything that runs without a GPU
test-all: check
	$(PYTEST) -m "not upstream"

## test-oldest: the same with the oldest versions that setup.cfg admits, in an environment of its own
test-oldest:
	$(MAKE) test-all VENV=$(VENV)-oldest CONSTRAINTS=constraints/oldest.txt

## test-upstream: whether DeepSpeed still has the faults that this package avoids
test-upstream: $(INSTALLED)
	$(PYTEST) -m upstream

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

## versions: what is installed beside what this release was tested with
versions: $(INSTALLED)
	@$(BIN)/srepa-ds version

install: $(INSTALLED)

# The tested versions are preferred; any other constraints must be met.
$(INSTALLED):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(CONSTRAINTS),$(TESTED))
	$(INSTALL) --constraint $(TESTED) 2> $(VENV)/pip.log || { cat $(VENV)/pip.log; \
	  grep -qE "ResolutionImpossible|No matching distribution" $(VENV)/pip.log || exit 1; \
	  echo "Not all of the versions in $(TESTED) can be installed here: taking those that pip chooses."; \
	  $(INSTALL); }
else
	$(INSTALL) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
endif
	rm -f $(VENV)/.installed-*
	touch $@

clean:
	rm -rf .venv .venv-oldest build *.egg-info
