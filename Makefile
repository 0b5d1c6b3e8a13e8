# `make demo` and `make test` are all that a newcomer needs; both make .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := ollm-core ollm-kv-paged ollm-kv-journal ollm-kv-quant ollm-offload ollm-bench
SOURCES := $(PACKAGES:%=packages/%/src)

.PHONY: help setup demo test survey nightly lint types imports docs wheels check clean

help:
	@echo "make demo     run a small model from disk-backed keys and values and compare it with stock transformers"
	@echo "make test     all tests"
	@echo "make check    lint, types, import contracts, docs"
	@echo "make wheels   build every wheel and test each alone with core in a clean environment"
	@echo "make survey   try every causal architecture of transformers and write docs/reference/models.md"
	@echo "make nightly  what takes longer than a test run may"
	@echo "make clean    remove what make made"

setup: $(READY)

$(READY): constraints.txt requirements-dev.txt $(PACKAGES:%=packages/%/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt $(PACKAGES:%=-e packages/%)
	@touch $@

demo: setup
	$(BIN)/python demo/run.py

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

survey: setup
	PYTHONPATH=tests $(BIN)/python -m together.survey

nightly: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --hypothesis-profile=nightly

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy $(SOURCES)

imports: setup
	$(BIN)/lint-imports

docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

wheels: setup
	.ci/wheels

check: lint types imports docs

clean:
	rm -rf $(VENV) dist docs/_build demo/work
