# Everything runs in .venv, which is made once and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: tour test lint lab notebooks figures bench parity release clean

tour: $(STAMP)  ## execute all notebooks on the embedded data, print where to look
	$(BIN)/moekit tour

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(STAMP)  ## JupyterLab on the notebooks
	$(BIN)/python -m pip install --quiet -e ".[notebooks]"
	$(BIN)/jupyter lab notebooks

notebooks: $(STAMP)  ## execute the notebooks in place and store their outputs
	$(BIN)/moekit tour --in-place

figures: $(STAMP)  ## redraw assets/figures from assets/results
	$(BIN)/moekit figures

bench: $(STAMP)
	$(BIN)/moekit bench layer

parity: $(STAMP)  ## add torch and transformers, compare with them
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[parity]"
	$(BIN)/python -m pytest tests/parity -n 0
	$(BIN)/moekit bench peers

release: $(STAMP)  ## write address and tag: make release REPO=https://github.com/OWNER/NAME TAG=v0.1.0
	$(BIN)/python tools/release.py "$(REPO)" "$(TAG)"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moekit needs Python 3.11 or newer; $(PYTHON) is older. Use: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) tour runs .jax_cache
