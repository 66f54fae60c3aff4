# Tidings. `make` alone lists what there is; every target works on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PROTO_BIN := .venv-proto/bin
PROTOS := $(shell find protos -name '*.proto' | sort)

.DEFAULT_GOAL := help

help:  ## This list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile

proto: $(PROTO_BIN)/protoc-gen-mypy  ## Generate tidings/api from protos/
	@find tidings/api -name '*_pb2*' -delete
	PATH=$(CURDIR)/$(PROTO_BIN):$$PATH $(PROTO_BIN)/python -m grpc_tools.protoc -I protos \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. $(PROTOS)
	@for d in $$(find tidings/api -type d -not -name __pycache__); do touch $$d/__init__.py; done

$(PROTO_BIN)/protoc-gen-mypy: requirements/proto.txt
	$(PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/pip install --quiet --disable-pip-version-check -r requirements/proto.txt
	@touch $@
