# Each target sets up .venv by itself, and only when the dependencies have changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install dev demo demo-flow precompute train inspect rounds test check bench bench-gpu evidence circle toyworld-base toyworld-flow clean

PYTHON ?= python3
# A build of torch by the name that https://pytorch.org/get-started has for it: cpu, cu128, ...; nothing: pip's own choice.
TORCH ?= $(shell cat .venv/.torch 2>/dev/null)
RECIPE ?= recipes/demo.toml
DEMO_PAIRS   := 1024
DEMO_PROMPTS := 200
INSTALLED := .venv/.installed
DEV       := .venv/.dev
PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INPO := .venv/bin/python -m inpo
ifneq ($(TORCH),)
ifeq ($(shell echo '$(TORCH)' | grep -Ex 'cpu|cu[0-9]+|rocm[0-9.]+'),)
$(error TORCH=$(TORCH) is no build of torch: expected cpu, or one such as cu128 or rocm6.4, see https://pytorch.org/get-started)
endif
ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
.PHONY: $(INSTALLED)
endif
endif
# From that index torch alone: what it needs stands in constraints.txt and comes from where everything comes from.
TORCH_FROM := $(if $(TORCH),--no-deps --force-reinstall --index-url https://download.pytorch.org/whl/$(TORCH))

demo: TOY := base
demo-flow: TOY := flow
# Nothing may wait for a network during the demo and the tests: models and data are in the repository.
demo demo-flow rounds circle test bench bench-gpu evidence: export HF_HUB_OFFLINE = 1
# Memory that a step frees stays with the process instead of being given back and fetched anew (docs/log.md).
demo demo-flow rounds circle evidence toyworld-base toyworld-flow: export MALLOC_MMAP_THRESHOLD_ = 4294967296
demo demo-flow rounds circle evidence toyworld-base toyworld-flow: export MALLOC_TRIM_THRESHOLD_ = 8589934592

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2]'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) $(TORCH_FROM) torch
	$(PIP_INSTALL) --editable .
	echo '$(TORCH)' > .venv/.torch
	touch $@

$(DEV): $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

install: $(INSTALLED) ## create .venv with what `inpo` needs (TORCH=cpu, TORCH=cu128, ...)

dev: $(DEV) ## and with what the checks, tests and benchmarks need besides

demo: ## the whole job on a toy world: pairs, precompute, train, compare
demo-flow: ## the same with a rectified flow in place of the UNet
demo demo-flow: $(INSTALLED)
	@printf '\n== 1/5  preference pairs, made with the base model\n'
	$(INPO) toyworld pairs --model $(TOY) --out runs/$@/pairs --pairs $(DEMO_PAIRS) --seed 0
	$(INPO) toyworld prompts --split test --limit $(DEMO_PROMPTS) --out runs/$@/test-prompts.txt
	@printf '\n== 2/5  precompute: invert every pair once\n'
	$(INPO) precompute --recipe recipes/$@.toml
	@printf '\n== 3/5  train: stream the cache\n'
	$(INPO) train --recipe recipes/$@.toml
	@printf '\n== 4/5  images of base and trained model for held-out captions, same seeds\n'
	$(INPO) evaluate generate --recipe recipes/$@.toml --model toyworld/$(TOY) --out runs/$@/images/base
	$(INPO) evaluate generate --recipe recipes/$@.toml --model runs/$@/train/pipeline --out runs/$@/images/trained
	@printf '\n== 5/5  does it align?\n'
	$(INPO) inspect pair runs/$@/cache --first --model toyworld/$(TOY) --out runs/$@/pair.png
	$(INPO) evaluate compare --recipe recipes/$@.toml runs/$@/images/base runs/$@/images/trained --out runs/$@/compare
	$(INPO) inspect run runs/$@/train --out runs/$@/run.html
	@printf '\nwhere:  runs/$@/compare (table and before/after picture), runs/$@/pair.png (one cached pair),\n'
	@printf '        runs/$@/run.html (what training did), runs/$@/cache, runs/$@/train/pipeline (load it with diffusers)\n'
	@printf 'next:   make inspect; .venv/bin/tensorboard --logdir runs/$@/train; docs/data.md for your own pairs\n'

precompute: $(INSTALLED) ## invert the recipe's pairs into its cache (RECIPE=...)
	$(if $(filter recipes/demo.toml,$(RECIPE)),$(INPO) toyworld pairs --out runs/demo/pairs --pairs $(DEMO_PAIRS) --seed 0)
	$(INPO) precompute --recipe $(RECIPE)

train: $(INSTALLED) ## train from the recipe's cache (RECIPE=...)
	$(INPO) train --recipe $(RECIPE)

inspect: $(INSTALLED) ## look at the recipe's cache (RECIPE=...)
	$(INPO) inspect summary --recipe $(RECIPE)

rounds: $(INSTALLED) ## sample, rank, cache, train, and again, three times, on the toy world
	$(INPO) toyworld prompts --split train --limit 1536 --out runs/rounds-prompts/train.txt
	$(INPO) toyworld prompts --split test --limit $(DEMO_PROMPTS) --out runs/rounds-prompts/test.txt
	$(INPO) round --recipe recipes/rounds.toml

test: $(DEV) ## the tests: CPU only, no network
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(DEV) ## ruff, mypy, import-linter
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: $(DEV) ## measure the ratios of docs/performance.md
	.venv/bin/python -m benchmarks

bench-gpu: $(DEV) ## measure the GPU's table of docs/performance.md, what matters most first (5 minutes each at most)
	.venv/bin/python -m benchmarks.gpu

evidence: $(DEV) ## measure the main tables of docs/evidence.md (an hour on 2 cores)
	.venv/bin/python -m benchmarks.evidence

circle: $(DEV) ## compare rounds, and ways of making points of own samples, over five seeds (an hour and a half on 2 cores)
	.venv/bin/python -m benchmarks.circle

toyworld-base: $(INSTALLED) ## train the toy world's base model from nothing (two hours on 2 cores)
	.venv/bin/python -m inpo.toyworld.train_base base

toyworld-flow: $(INSTALLED) ## train the toy world's flow from nothing, on the base's VAE (half an hour on 2 cores)
	.venv/bin/python -m inpo.toyworld.train_base flow

clean: ## remove .venv, runs and everything generated
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
