# Two commands do everything: `make demo` and `make test`. Both need only python3, pip and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Trellis types are left out: on two cores they take minutes to quantize.
DEMO_TYPES := q8_0,iq6_k,iq5_k,iq5_ks,iq4_k,iq4_ks,iq4_xs,iq3_k,iq3_s

.PHONY: demo test lint types unit bench recipes clean
.DEFAULT_GOAL := demo

$(BIN)/quantmix: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: $(BIN)/quantmix
	$(BIN)/quantmix design deepseek-r1 --vram 192G --out demo/recipes
	@printf '\nThe same on real weights: a small model, measured, designed, quantized, verified.\n\n'
	$(BIN)/quantmix demo-model --out demo/smol-f16.gguf
	$(BIN)/quantmix imatrix demo/smol-f16.gguf --chunks 20 --out demo/smol.dat
	$(BIN)/quantmix measure demo/smol-f16.gguf --imatrix demo/smol.dat --by role \
	    --types iq3_k,iq5_k --chunks 3 --out demo/roles.json
	$(BIN)/quantmix design demo/smol-f16.gguf --size 4.5bpw --measurements demo/roles.json \
	    --types $(DEMO_TYPES) --name smol-4.5bpw --out demo/recipes
	$(BIN)/quantmix quantize demo/recipes/smol-4.5bpw demo/smol-f16.gguf --imatrix demo/smol.dat
	$(BIN)/quantmix verify demo/recipes/smol-4.5bpw --base demo/smol-f16.gguf --chunks 8 \
	    --measurements demo/roles.json --imatrix demo/smol.dat --db demo/measurements.db

lint: $(BIN)/quantmix
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/quantmix
	$(BIN)/mypy quantmix

unit: $(BIN)/quantmix
	$(BIN)/python -m pytest

test: lint types unit

bench: $(BIN)/quantmix
	$(BIN)/python tests/bench/bench_design.py

recipes: $(BIN)/quantmix
	$(BIN)/python recipes/regenerate.py

clean:
	rm -rf $(VENV) demo
