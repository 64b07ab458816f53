# Trine's tasks. Each makes the virtual environment it needs, so a fresh clone needs Python 3.11 or later and make.
#
#   make serve     the embedded model on http://127.0.0.1:8000 (PORT=8001 make serve for another port)
#   make test      every test
#   make help      the rest

PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 8000
MODEL  ?= tiny
# Installed before the rest, so that nothing below picks another build of it.
TORCH  ?= torch==2.13.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Tests run in as many processes as there are processors, up to four; `make test WORKERS=` runs them in one.
WORKERS ?= -n logical --maxprocesses 4 --dist loadfile

# What decides that an installation is out of date: the metadata, and the native library's sources.
SOURCES := pyproject.toml $(wildcard setup.py) $(wildcard csrc/* csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast lint types format proto docs docs-serve bench doctor clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(BIN)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "make: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "make: no virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) install -q $(TORCH)
	@touch $@

$(BIN)/.serve: $(BIN)/.torch $(SOURCES)
	$(PIP) install -q -e '.[server]'
	@touch $@

$(BIN)/.test: $(BIN)/.torch $(SOURCES)
	$(PIP) install -q -e '.[server,test]'
	@touch $@ $(BIN)/.serve

$(BIN)/.dev: $(BIN)/.torch $(SOURCES)
	$(PIP) install -q -e '.[server,test,dev]'
	@touch $@ $(BIN)/.serve $(BIN)/.test

$(BIN)/.docs: $(BIN)/.torch pyproject.toml
	$(PIP) install -q -e '.[docs]'
	@touch $@

serve: $(BIN)/.serve  ## Install, and serve MODEL (default: tiny, the embedded model) on HOST:PORT
	$(BIN)/trine serve $(MODEL) --host $(HOST) --port $(PORT)

test: $(BIN)/.test  ## Install, and run every test
	$(BIN)/python -m pytest -q $(WORKERS) $(PYTEST)

test-fast: $(BIN)/.test  ## The tests that take less than ten seconds each
	$(BIN)/python -m pytest -q $(WORKERS) -m 'not slow' $(PYTEST)

lint: $(BIN)/.dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.dev  ## mypy, strict
	$(BIN)/mypy

format: $(BIN)/.dev  ## Rewrite the code as ruff formats it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(BIN)/.test  ## Compile the server's protobuf messages
	cd trine/server/proto && $(abspath $(BIN))/python -m grpc_tools.protoc -I. --descriptor_set_out=descriptors.binpb *.proto

docs: $(BIN)/.docs  ## The book, into site/
	$(BIN)/mkdocs build --strict

docs-serve: $(BIN)/.docs  ## The book on http://127.0.0.1:8001, rebuilt as files change
	$(BIN)/mkdocs serve -a 127.0.0.1:8001

bench: $(BIN)/.serve  ## Speed of the embedded model on this machine, beside the machine's limits
	$(BIN)/python bench/llm.py --model tiny --workload cpu-1 --workload cpu-8 --workload cpu-32

doctor: $(BIN)/.serve  ## What this machine has, and what is wrong with it
	$(BIN)/trine doctor

clean:  ## Remove the environment and what was built
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache trine/kernels/cpu/*.so
