# Each target sets up what it needs in .venv: a fresh clone needs Python ≥ 3.10 and a C++ compiler.
# CUDA kernels are built where there is a GPU; CUDA=1 builds them anywhere with nvcc, CUDA=0 nowhere.

PYTHON ?= python3
BIN := .venv/bin
CUDA ?= $(if $(wildcard /dev/nvidia[0-9]*)$(shell nvidia-smi -L 2>/dev/null),1,0)
INSTALLED := .venv/installed$(if $(filter 1,$(CUDA)),-cuda)
ifneq ($(CUDA),1)
export PYKERNELS_NO_CUDA := 1
endif

# That pyproject.toml promises.
OLDEST_TRITON := 3.6.0

.PHONY: bench test test-all audit check gpu lint typecheck format format-csrc clean

bench: $(INSTALLED)  ## our ops against their peers on this machine: tables, JSON and plots in bench-results/
	$(BIN)/python -m pykernels bench $(if $(FULL),,--quick) --json bench-results/bench.json --plot bench-results

test: $(INSTALLED)  ## Triton's interpreter and CUDA kernels on the CPU in processes of their own; ALL=--all: undrawn
	$(BIN)/python -m pytest tests -n 2 $(ALL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_matrix.py tests/ops/test_attention.py -n 2 $(ALL)
	$(BIN)/python tests/cuda_host/run.py tests -n 2 $(ALL)
	$(if $(filter 1,$(CUDA)),,@echo "Skipped: the tests that load the CUDA library, which is not built; CUDA=1 builds it.")

test-all:  ## weekly: every test, and the baseline's kernels compiled by the oldest Triton that is supported
	$(MAKE) test ALL=--all
	$(MAKE) audit TRITON=$(OLDEST_TRITON)

audit: $(INSTALLED)  ## compile every GPU kernel for every target and judge the result; needs no GPU. TRITON=3.6.0: by it
	$(BIN)/python -m pykernels audit $(if $(TRITON),--triton $(TRITON) --representative,--baseline \
		tests/tools/audit_baseline.tsv --json bench-results/audit.json)

check: $(INSTALLED)  ## every op on every backend against its fp64 reference
	$(BIN)/python -m pykernels check

gpu: $(INSTALLED)  ## for whoever has one: self-test, check, bench and the audit's predictions, into one file
	$(BIN)/python -m pykernels gpu $(if $(FULL),--full) --json bench-results/gpu.json

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(INSTALLED)  ## the public surface, and code that uses it
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

format-csrc: $(INSTALLED)  ## all of csrc; `make format` leaves it, since only changed lines are held to it
	$(BIN)/clang-format -i $(wildcard csrc/*.h csrc/*/*)

$(INSTALLED): requirements.txt setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python setup.py --quiet build_ext --inplace  # pip would show none of its progress
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build bench-results *.egg-info pykernels/*.so pykernels/left_out.json
