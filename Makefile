# Tidings. `make` alone lists what there is; every target works on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTO_BIN := .venv-proto/bin
PROTOS := $(shell find protos -name '*.proto' | sort)
# Twice quiet: setuptools warns at every editable installation.
PIP    := $(BIN)/pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help run cluster test check proto proto-check drills drills-planted bench bench-traffic clean test-cluster test-processes test-loopback test-mysql test-drills test-floor test-all test-packages python

help:  ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile

run: $(VENV)/.run  ## Install, and run a server on this machine
	@exec $(BIN)/tidings run $(OPTIONS)

cluster: $(VENV)/.run test-packages  ## Start a database and three nodes on this machine, and show them
	@exec $(BIN)/python -m tidings.testing.cluster_demo $(OPTIONS)

test: $(VENV)/.test test-packages  ## Install what the tests need, and run them
	@$(BIN)/python tests/run.py test

test-all: test test-cluster test-processes test-loopback test-mysql  ## All tests in every way of running

test-cluster: $(VENV)/.test test-packages  ## The plays on one node and on three in every way, and all drills on clusters
	@$(BIN)/python tests/run.py cluster

test-processes: $(VENV)/.test  ## The conformance tests with one process for each service
	$(BIN)/python -m pytest -q tests/conformance tests/contract/test_component.py --way=processes

test-loopback: $(VENV)/.test  ## The same in one process that dials itself
	$(BIN)/python -m pytest -q tests/conformance tests/contract/test_component.py --way=loopback

test-mysql: $(VENV)/.test test-packages  ## The same on MariaDB
	$(BIN)/python -m pytest -q tests/conformance --way=processes --database=mysql

test-floor: | python  ## Unit and contract tests on the oldest runtimes that we promise
	@test -d .venv-floor || $(PYTHON) -m venv .venv-floor
	@.venv-floor/bin/pip install -qq --disable-pip-version-check grpcio==1.66.2 grpcio-health-checking==1.66.2 \
	  grpcio-reflection==1.66.2 protobuf==5.27.2
	@.venv-floor/bin/pip install -qq --disable-pip-version-check --editable '.[test]'
	.venv-floor/bin/python -m pytest -q tests/unit tests/contract

check: $(VENV)/.check proto-check  ## Format, lint, types, imports, generated code
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@$(BIN)/python tests/lint.py

proto: $(PROTO_BIN)/.made  ## Generate tidings/api from protos/
	@$(call generate,.)

proto-check: $(PROTO_BIN)/.made
	@rm -rf build/proto && mkdir -p build/proto && $(call generate,build/proto)
	@diff -r -x __pycache__ -x __init__.py build/proto/tidings/api tidings/api \
	  || { echo "tidings/api is not what protos/ say: run make proto" >&2; exit 1; }

drills: $(VENV)/.test test-packages  ## Break real clusters under load, and check the promise (SEEDS=N, SEED=n, LONG=1, DATABASE=galera)
	@SEEDS=$(or $(SEEDS),5) SEED=$(SEED) LONG=$(LONG) DATABASE=$(DATABASE) $(BIN)/python tests/drills/run.py

test-drills: $(VENV)/.test test-packages  ## Five lives of a cluster, and each planted bug once
	@$(BIN)/python tests/run.py drills

drills-planted: $(VENV)/.test test-packages  ## Plant bugs into clusters, and check that the drills find them (RUNS=N, BUG=name)
	@RUNS=$(or $(RUNS),20) BUG=$(BUG) $(BIN)/python tests/drills/planted/run.py

bench: $(VENV)/.test test-packages  ## Measure, and write docs/benchmarks.md (some minutes)
	@command -v gcc >/dev/null || { echo "gcc is missing: apt-get install gcc libc6-dev" >&2; exit 1; }
	gcc -O2 -Wall -o tests/bench/xmppload tests/bench/xmppload.c
	$(BIN)/python tests/bench/run.py

bench-traffic: $(VENV)/.bench test-packages  ## Count what goes between nodes, and write docs/traffic.md (20 minutes)
	$(BIN)/python tests/bench/traffic.py

clean:  ## Remove what make has made, but not data/
	rm -rf $(VENV) .venv-proto build dist *.egg-info

# --- what the targets above stand on ---

define generate
find $(1)/tidings/api -name '*_pb2*' -delete 2>/dev/null; \
PATH=$(CURDIR)/$(PROTO_BIN):$$PATH $(PROTO_BIN)/python -m grpc_tools.protoc -I protos \
  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS) && \
for d in $$(find $(1)/tidings/api -type d -not -name __pycache__); do touch $$d/__init__.py; done
endef

python:
	@command -v $(PYTHON) >/dev/null || { echo "Python is missing: apt-get install python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is wanted; this is $$($(PYTHON) --version)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python can't make virtual environments: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/bin/pip: | python
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip

$(VENV)/.run: pyproject.toml | $(VENV)/bin/pip
	@echo "installing Tidings (once; about a minute)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "installing what the tests need"
	@$(PIP) --editable '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@$(PIP) --editable '.[test,bench]'
	@touch $@

$(VENV)/.check: $(VENV)/.run
	@$(PIP) --editable '.[check,test]'
	@touch $@

# Debian packages that tests need: a database server and what replicates it, network namespaces, and clocks that are wrong.
DEBIAN := mariadb-server mariadb-backup galera-4 socat iproute2 libfaketime
NEEDED := /usr/lib/*/faketime/libfaketime.so.1 /usr/lib/galera/libgalera_smm.so /usr/bin/wsrep_sst_mariabackup
test-packages:
	@if ! { command -v mariadbd && command -v mariadb-backup && command -v socat && command -v ip && ls $(NEEDED); } \
	    >/dev/null 2>&1; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing $(DEBIAN)"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      $(DEBIAN) >/dev/null; \
	  else echo "the tests need some packages: apt-get install $(DEBIAN)" >&2; exit 1; fi; fi

$(PROTO_BIN)/.made: requirements/proto.txt | python
	@echo "installing the generator of tidings/api"
	@$(PYTHON) -m venv .venv-proto
	@$(PROTO_BIN)/pip install --quiet --disable-pip-version-check -r requirements/proto.txt
	@touch $@
