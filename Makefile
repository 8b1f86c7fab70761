# Every target does its own set-up; run them in any order, as often as you like.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-slow lint bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossways needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: $(STAMP)
	$(BIN)/crossways study quickstart --out runs/quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/gpu_experts.py
	$(BIN)/python benchmarks/train_throughput.py

docs: $(STAMP)
	$(BIN)/python -c "from pathlib import Path; from crossways.study.reference import recipe_reference as text; \
	page = Path('docs/recipes.md'); mark = '<!-- printed by \`crossways recipes --reference\` -->'; \
	page.write_text(page.read_text().split(mark)[0] + mark + '\n' + text())"

routers-table: $(STAMP)
	$(BIN)/python benchmarks/routers_train.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
