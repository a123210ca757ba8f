# Two commands matter: `make demo` and `make test`. Both make .venv first when it is missing.
PYTHON ?= python3
BIN := .venv/bin
# Without a GPU, torch comes as a CPU build wherever that index can be reached; plain PyPI has CUDA.
CPU_INDEX := https://download.pytorch.org/whl/cpu
TORCH_FROM = $$(command -v nvidia-smi >/dev/null 2>&1 \
	|| { curl -fsI -m 5 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(CPU_INDEX); })

.PHONY: demo test test-all lint format clean

demo: .venv/demo
	$(BIN)/seqzoo ablate configs/ablation/small.yaml --out runs/demo/small
	$(BIN)/seqzoo report runs/demo/small --open
	$(BIN)/seqzoo demo --out runs/demo --steps 60

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not gpu"

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch $(TORCH_FROM)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[report]'
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,lint]'
	touch $@

clean:
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
