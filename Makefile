# Short forms of the commands in README.md. `make demo` and `make test` need Python 3.11+ and nothing else.
PYTHON ?= python3
CORES ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")
VENV := .venv
BIN := $(VENV)/bin
# GPU machines need one library more (requirements-gpu.txt says why).
GPU_REQUIREMENTS := $(if $(shell command -v nvidia-smi),-r requirements-gpu.txt)

.DEFAULT_GOAL := help
.PHONY: help install demo test torture lint format lock generate pictures clean

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed ## Install Cuepoint into .venv

$(VENV)/.installed: requirements.txt requirements-demo.txt requirements-gpu.txt pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Cuepoint needs Python 3.11 or newer: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-demo.txt $(GPU_REQUIREMENTS)
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed ## Transcribe, embed and load the demo's clips, then search them (offline)
	$(BIN)/python demo/site.py -- $(BIN)/snakemake --cores $(CORES) --directory demo
	$(BIN)/python demo/search.py

test: $(VENV)/.installed-dev lint ## Run all tests
	$(BIN)/pytest

KILLS ?= 500
torture: $(VENV)/.installed-dev ## Kill the demo KILLS times (500), run it again each time, compare what comes out (long)
	$(BIN)/python tests/kill_matrix.py --kills $(KILLS) --page docs/robustness.md

lint: $(VENV)/.installed-dev ## Check form and rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules

format: $(VENV)/.installed-dev ## Bring the code into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

generate: $(VENV)/.installed ## Write config.yaml, its schema and the settings reference from the typed settings
	$(BIN)/python -m cuepoint.settings.generate

lock: $(VENV)/.installed-dev ## Compile requirements.txt from requirements.in
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --annotation-style=line --no-header --no-emit-options \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host -o requirements.txt requirements.in
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.txt  # the registry's build, whichever was used to compile

pictures: $(VENV)/.installed-dev ## Draw the pictures of the documentation (needs Chromium)
	$(BIN)/python docs/make_pictures.py

clean: ## Remove what the demo made
	rm -rf demo/results demo/.snakemake
