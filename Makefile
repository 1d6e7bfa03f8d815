# `make demo` and `make test` do their whole set-up; they need Python >= 3.10, pip and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(BIN)/sparsecore demo

test: lint
	$(BIN)/python -m pytest -n 2

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

bench: .venv/.test
	$(BIN)/python -m bench

.venv/.python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python >= 3.10 is needed')"
	$(PYTHON) -m venv .venv
	touch $@

.venv/.demo: .venv/.python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[demo]'
	touch $@

.venv/.test: .venv/.python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[demo,test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
