# Two commands do everything: `make demo` and `make test`. Both need only python3, pip and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint types unit bench recipes clean
.DEFAULT_GOAL := demo

$(BIN)/quantmix: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

demo: $(BIN)/quantmix
	$(BIN)/quantmix design deepseek-r1 --vram 192G --out demo/recipes

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
