# Every target makes its own .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test quality style clean

demo: $(VENV)/.demo
	$(BIN)/mudjack demo --output-dir demo_output

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quality: $(VENV)/.quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.quality
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

$(VENV)/.quality: constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) ruff
	@touch $@

clean:
	rm -rf $(VENV) demo_output build dist src/*.egg-info
