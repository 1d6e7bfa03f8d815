# `make demo` and `make test` do their whole set-up; they need Python >= 3.10, pip and make.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint bench gpu compare-gpu clean
.DELETE_ON_ERROR:

demo: .venv/.demo
	$(BIN)/sparsecore demo

test: lint
	$(BIN)/python -m pytest -n 2

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

# make bench ARGS='run --suite step'
bench: .venv/.test
	$(BIN)/python -m bench $(or $(ARGS),table)

# All that needs a GPU, in at most ten minutes, into one folder.  It installs nothing: PY is a Python that has
# the packages.  DATA holds CIFAR-10 (it is downloaded otherwise); COMMIT is for a copy without .git.
# A part that fails or runs out of time leaves what it has, and the others run all the same.
PY ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
OUT ?= build/gpu
DATA ?= $(SPARSECORE_DATA)
GPU_TEST_SECONDS ?= 120
GPU_SEARCH_SECONDS ?= 130
GPU_STEP_SECONDS ?= 25
GPU_TRAIN_SECONDS ?= 110
GPU_TICKET_SECONDS ?= 115
GPU_COMPARE_SECONDS ?= 85
# Methods on Conv-4, cut short to fit; without the cuts: make compare-gpu.
COMPARE = compare --data cifar10 $(if $(DATA),--data-dir $(DATA)) --recipe amp=bf16 --device cuda

gpu:
	@mkdir -p $(OUT); : > $(OUT)/gpu.log; status=0; \
	part() { \
	  limit=$$1; shift; echo "== $$*" | tee -a $(OUT)/gpu.log; begin=$$(date +%s); \
	  BENCH_COMMIT=$(COMMIT) PYTHONUNBUFFERED=1 timeout -k 5 $$limit "$$@" >> $(OUT)/gpu.log 2>&1; code=$$?; \
	  echo "== exit $$code after $$(( $$(date +%s) - begin )) s" | tee -a $(OUT)/gpu.log; \
	  [ $$code -eq 0 ] || status=1; \
	}; \
	part $(GPU_TEST_SECONDS) $(PY) -m pytest -q -n 12 -m gpu -p no:cacheprovider; \
	part $(GPU_SEARCH_SECONDS) $(PY) -m bench run --suite search --device cuda --out $(OUT); \
	part $(GPU_STEP_SECONDS) $(PY) -m bench run --suite step --device cuda --out $(OUT); \
	part $(GPU_TRAIN_SECONDS) $(PY) -m bench run --suite ticket --device cuda --out $(OUT); \
	part $(GPU_TICKET_SECONDS) $(PY) -m bench tickets --suite cts-resnet20 --lengths short --device cuda \
	  --out $(OUT) $(if $(DATA),--data-dir $(DATA)); \
	part $(GPU_COMPARE_SECONDS) $(PY) -m sparsecore $(COMPARE) --model conv-4 --epochs 8 --sparsities 0.98 \
	  --seeds 1 --methods joint,cts,snip,ltr --out $(OUT)/compare; \
	grep -E "^== |^FAILED|^(FAILED|ERROR) |passed|failed|error:" $(OUT)/gpu.log; ls $(OUT); exit $$status

# Hours on a GPU, cell by cell: run it again to go on.
# pace=56 is a twelfth of ltr's epochs, as 4.5 is where a training has 12.
compare-gpu:
	$(PY) -m sparsecore $(COMPARE) --model resnet-20 --model-option shortcut=3x3 --model-option bn_init=uniform \
	  --rewind-epochs 9 --epochs 151 --sparsities 0.9,0.98,0.99262 --methods joint,joint:pace=56,cts,ltr,ltr+reinit,snip \
	  --out $(OUT)/compare-resnet20

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
