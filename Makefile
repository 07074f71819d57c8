# The words that people try. Tools come from .venv if there is one ("make setup"), else from the PATH.
BIN := $(if $(wildcard .venv/bin/python),.venv/bin/)

.PHONY: help setup check format-check lint types fast one test docs format gate

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## an environment in .venv with everything, and the checks before each commit
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --editable ".[dev,docs]"
	if [ -e .git ]; then .venv/bin/pre-commit install; fi

check: format-check lint types fast ## before each push: format, lint, types, fast tests

format-check:
	$(BIN)ruff format --check .

lint: ## what ruff finds
	$(BIN)ruff check .

types: ## what mypy finds
	$(BIN)mypy

fast: ## tests and doctests, but for those with two processes and the zoo of models
	$(BIN)python -m pytest -m "not slow and not ddp"

one: ## one test: make one TEST=tests/plan/test_recipe.py::test_there_and_back
	$(BIN)python -m pytest $(if $(TEST),"$(TEST)",$(error say which: make one TEST=tests/plan/test_recipe.py))

test: ## all tests
	$(BIN)python -m pytest

docs: ## the documentation, in site/index.html
	$(BIN)python -m mkdocs build --quiet --strict --site-dir site
	$(BIN)python .ci/check_docs.py site

format: ## formats the code, and repairs what ruff can
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

gate: ## all that must pass before a release; makes environments of its own, takes long
	bash .ci/run
