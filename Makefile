# Each target sets up what it needs in .venv: a fresh clone needs Python ≥ 3.10 and a C++ compiler.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

# That pyproject.toml promises.
OLDEST_TRITON := 3.6.0

.PHONY: bench test test-all audit check gpu lint format clean

bench: $(INSTALLED)  ## our ops against their peers on this machine: tables, JSON and plots in bench-results/
	$(BIN)/python -m pykernels bench $(if $(FULL),,--quick) --json bench-results/bench.json --plot bench-results

test: $(INSTALLED)  ## everything; Triton's interpreter and CUDA kernels on the CPU in processes of their own
	$(BIN)/python -m pytest tests -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/ops/test_matrix.py tests/ops/test_attention.py -n 2
	$(BIN)/python tests/cuda_host/run.py tests -n 2

test-all: test  ## and the kernels that the baseline is about, compiled by the oldest Triton that is supported
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

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): requirements.txt setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv build bench-results *.egg-info pykernels/*.so pykernels/left_out.json
