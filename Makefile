# `make quickstart`: set up and show what the library does. `make test`: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test slow-test lint docs clean

.venv/ready: requirements.txt requirements-core.txt requirements-experiments.txt requirements-deploy.txt requirements-test.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version}")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

# For benchmarks only: FedJAX's released version needs an older JAX.
.venv-fedjax/ready: requirements-fedjax.txt
	$(PYTHON) -m venv .venv-fedjax
	.venv-fedjax/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-fedjax.txt
	touch $@

quickstart: .venv/ready
	$(BIN)/python -m experiments.quickstart

test: .venv/ready
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses=4 --dist loadscope --max-worker-restart=0

# Runs on eight devices and on several processes.
slow-test: .venv/ready
	$(BIN)/python -m pytest -m slow -n auto --maxprocesses=4 --dist loadscope --max-worker-restart=0

# Style, by pre-commit's rules, and the library's types.
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in docs/_build/html; its notebooks are run while it is built.
docs: .venv/docs-ready
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

.venv/docs-ready: .venv/ready requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv .venv-fedjax build *.egg-info .pytest_cache
