# Two commands: `make demo` and `make test`. Both set up their own virtual environment in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE = 1

.PHONY: demo demo-ci test check clean

demo: $(STAMP)  ## build the demo corpus, run every stage, print recall, serve the search page
	$(BIN)/ace demo

demo-ci: $(STAMP)  ## the same path on a small corpus; queries the server and stops
	$(BIN)/ace demo --ci --folder build/demo-ci

test: $(STAMP)  ## pass the tests
	$(BIN)/python -m pytest

check: $(STAMP)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo,dev]' -c constraints.txt
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo
