# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/smollm2-135m
PIP := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt
# Spinning OpenMP threads cost milliseconds an operation when cores are shared.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 0

.PHONY: demo test style bench clean

demo: $(VENV)/.ready $(MODEL)/config.json
	$(BIN)/hf-compress run recipes/demo.yaml

test: style $(MODEL)/config.json
	HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/pytest -q

style: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.ready $(MODEL)/config.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.pruning

# torch comes first and alone: asked for by another package, pip may choose a CUDA build.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev,gguf]'
	touch $@

$(MODEL)/config.json: $(VENV)/.ready
	$(BIN)/python -m benchmarks.smollm2 $(MODEL)

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache
