# deepv3: `make` lists the targets. Everything is installed into .venv; a machine needs python3 and make only.

PYTHON ?= python3
TORCH ?= 2.13.0
INDEX ?=
WHEELHOUSE ?=
PY ?= 3.12
ARGS ?=
WHAT ?= train

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-full soak test-gpu test-versions test-browser check fmt bench wheelhouse clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON)  the Python (3.11 to 3.13) that .venv is made with"
	@echo "  TORCH=$(TORCH)     torch to install, 2.11 to 2.13"
	@echo "  INDEX=URL        wheel index to take torch from; not set: pip's own, with its default build"
	@echo "  WHEELHOUSE=DIR   install offline from this folder, on top of the machine's own torch and transformers"
	@echo "  ARGS='key=value' added to the command of train, test, test-full, test-gpu, test-browser and bench"

setup: $(STAMP) ## create .venv and install everything (done by the targets that need it)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit((3, 11) > v or v > (3, 13)) ' || \
		{ echo "deepv3 needs Python 3.11 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1); use make PYTHON=python3.12 ..."; exit 2; }
ifeq ($(WHEELHOUSE),)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt setuptools wheel
	$(BIN)/pip install $(if $(INDEX),--index-url $(INDEX)) torch==$(TORCH)
	@# A CPU build of torch brings no Triton: take the one that the GPU figures were measured with.
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install triton==3.6.0
	$(BIN)/pip install --no-build-isolation -c constraints.txt -e '.[dev]'
else
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/pip install --no-index --find-links $(WHEELHOUSE) setuptools wheel pytest
	$(BIN)/pip install --no-index --find-links $(WHEELHOUSE) --no-build-isolation -e .
endif
	@touch $@

train: $(STAMP) ## train the tiny model here, sample from it, export it, verify the export (runs/tiny)
	$(BIN)/torchrun --standalone --nproc_per_node=1 launch/pretrain.py +config=tiny $(ARGS)

test: $(STAMP) ## the test suite, on the CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow and not browser and not versions" $(ARGS)

test-full: $(STAMP) ## the same with the full matrices, which take long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not browser and not versions" $(ARGS)

soak: $(STAMP) ## 200 kills of real runs and 2,000 damaged files, on the CPU: most of an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/durability tests/fuzz $(ARGS)

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-versions: $(STAMP) ## exports under three releases of transformers, tasks of lm_eval, installed into .cache/ (1.2 GB)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m versions $(ARGS)

test-browser: $(STAMP) ## the report in headless Chromium, which this installs where it is missing
	$(BIN)/pip install -q --no-build-isolation -c constraints.txt -e '.[browser]'
	@{ command -v chromium || command -v google-chrome; } >/dev/null || $(BIN)/playwright install --with-deps chromium || \
		{ apt-get update && apt-get install -y --no-install-recommends chromium fonts-dejavu-core; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser $(ARGS)

check: $(STAMP) ## format, lint and types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(STAMP) ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## measure this machine: WHAT=train, profile or kernels
	$(BIN)/python launch/bench.py what=$(WHAT) $(ARGS)

wheelhouse: $(STAMP) ## every wheel that an air-gapped GPU node with Python PY=3.12, torch and transformers lacks
	$(BIN)/python launch/wheelhouse.py python=$(PY) output=wheelhouse $(ARGS)

clean: ## remove the environment, caches and built files; runs/ stays
	rm -rf $(VENV) .cache wheelhouse build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
