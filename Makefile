# Everything runs in .venv, which is made once and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: colab colab-fast colab-install colab-python tour test drill lint lab notebooks figures bench parity release clean

tour: $(STAMP)  ## execute all notebooks (or ONLY=00,01) on the embedded data, print where to look
	$(BIN)/moekit tour $(if $(ONLY),--only $(ONLY))

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest

drill: $(STAMP)  ## faults while runs train (or SHORT=1, SEED=3, ONLY=kills,bits), print a table
	$(BIN)/python tests/drill --seed $(or $(SEED),0) $(if $(SHORT),--short) $(if $(ONLY),--only $(ONLY))

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
	$(BIN)/moekit bench generation

release: $(STAMP)  ## write address and tag: make release REPO=https://github.com/OWNER/NAME TAG=v0.1.0
	$(BIN)/python tools/release.py "$(REPO)" "$(TAG)"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "moekit needs Python 3.11 or newer; $(PYTHON) is older. Use: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $(STAMP)

# Colab's runtimes: Python 3.13, jax 0.7.2, flax 0.11.2 and the rest of tests/colab/colab-tpu.txt
COLAB_PYTHON ?= $(shell for each in python3.13 $$HOME/.pyenv/versions/3.13*/bin/python; do \
	"$$each" --version >/dev/null 2>&1 && echo "$$each" && break; done)
COLAB := .venv-colab
COLAB_PINS := tests/colab/colab-tpu.txt
COLAB_TEST := MOEKIT_PINS=$(COLAB_PINS) JAX_COMPILATION_CACHE_DIR=.jax_cache/colab \
	$(COLAB)/bin/python -m pytest

# alone: a process that compiles 30 s longer than the other is given up by gloo
TWO_PROCESSES := tests/training/test_multihost.py

colab-python:
	@echo "$(COLAB_PYTHON)"

colab: $(COLAB)/installed  ## notebooks and tests on the packages of a Colab runtime
	$(COLAB_TEST) tests/colab tests/moe tests/model tests/test_sharding.py tests/training \
		--ignore $(TWO_PROCESSES)
	$(COLAB_TEST) -n 0 $(TWO_PROCESSES)
	JAX_COMPILATION_CACHE_DIR=$$PWD/.jax_cache/colab $(COLAB)/bin/moekit tour --out tour-colab --only 00,01,02,05

colab-fast: $(COLAB)/installed  ## a few minutes of it
	$(COLAB_TEST) tests/colab tests/moe/test_layer.py tests/training/test_train.py \
		-k "pins or accepts or oracle or function or lowers"

colab-install: $(COLAB)/installed

$(COLAB)/installed: pyproject.toml $(COLAB_PINS)
	@test -n "$(COLAB_PYTHON)" || { echo "make colab needs Python 3.13: make colab COLAB_PYTHON=..."; exit 1; }
	$(COLAB_PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install --quiet -r $(COLAB_PINS)
	$(COLAB)/bin/python -m pip install --quiet -e ".[test]"
	@touch $(COLAB)/installed

clean:
	rm -rf $(VENV) $(COLAB) tour tour-colab runs .jax_cache
