# Few targets, each one command. `make run` and `make test` set up what they need.
PYTHON ?= python3
BIN := .venv/bin
export PREFECT_HOME ?= $(CURDIR)/.prefect

.PHONY: run test serve ui lint bench clean

run: .venv/installed ## fetch -> ... -> publish once, as the scheduled flow would
	$(BIN)/python -m flows

test: .venv/installed ## the whole suite
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

serve: .venv/installed ## published pages and data on http://localhost:8000
	$(BIN)/python -m pipeline.serve --published data/published --port 8000

ui: .venv/installed ## Prefect's server and UI on http://localhost:4200
	$(BIN)/prefect server start

lint: .venv/installed ## what CI and pre-commit check
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: .venv/installed ## the speed tables of docs/benchmarks.md
	$(BIN)/python -m benchmarks

clean: ## everything that can be made again, raw data excepted
	rm -rf .venv .prefect data/ingested data/checked data/sensors data/runs data/scores data/forecasts data/reports data/published

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Fieldcast needs Python 3.11 or newer, found {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
