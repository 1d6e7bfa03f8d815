# `make demo` and `make test` do their whole set-up; they need Python >= 3.10, pip and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-integrations fuzz lint bench gpu compare-gpu clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(BIN)/sparsecore demo

test: lint
	$(BIN)/python -m pytest -n 2

# In the loops of timm, transformers, accelerate, lightning and peft; nothing is downloaded but the packages.
test-integrations: .venv/.test-integrations
	SPARSECORE_INTEGRATIONS=1 $(BIN)/python -m pytest -n 2 tests/integrations

# Hostile files, options, calls, full disks and kills: make fuzz ARGS='--seed 1 --kind "search *"'
fuzz: .venv/.test
	$(BIN)/python -m tests.hostile $(ARGS)

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

# make bench ARGS='run --suite step'
bench: .venv/.test
	$(BIN)/python -m bench $(or $(ARGS),table)

# All that needs a GPU, in slices of BUDGET seconds: the same command again goes on.  It installs nothing: PY is a
# Python that has the packages.  CACHE is a folder for an archive of compiled kernels; DATA holds CIFAR-10 (it is
# downloaded otherwise); COMMIT is for a copy without .git.
PY ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
BUDGET ?= 540
CACHE ?=
DATA ?= $(SPARSECORE_DATA)
OUT ?= build/gpu
SLICE = --device cuda --budget $(BUDGET) $(if $(CACHE),--cache $(CACHE)) $(if $(DATA),--data-dir $(DATA))

gpu:
	BENCH_COMMIT=$(or $(COMMIT),$(BENCH_COMMIT)) $(PY) -m bench gpu $(SLICE) --out $(OUT)

# Methods on ResNet-20: hours, in the same slices.
compare-gpu:
	BENCH_COMMIT=$(or $(COMMIT),$(BENCH_COMMIT)) $(PY) -m bench compare $(SLICE) --out $(OUT)/compare-resnet20

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

.venv/.test-integrations: .venv/.test
	$(BIN)/pip install --quiet -c constraints.txt --editable '.[demo,test,test-integrations]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
