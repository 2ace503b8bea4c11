# make help lists everything. Each target sets up .venv by itself, from constraints.txt, and what has finished is skipped:
# a run by its configuration and its text, a measured table by its settings and its text. What each part trains,
# measures and draws stands in experiments/study/parts.py.
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin
PY := $(BIN)/python

# The text: the embedded stories, DATA=tinystories (the paper's own; it wants a GPU), or local files:
# make reproduce TRAIN=train.txt VALID=valid.txt CORPUS='its name in tables'. TRAIN2, VALID2, CORPUS2: a second one.
DATA ?= $(if $(value TRAIN),text,stories)

# A value is one word for the shell and one string for Hydra, whatever is in it: NAME="VALUE" within single quotes.
quoted = '$(subst ','\'',$(1)="$(subst ",\",$(subst \,\\,$(value $(2))))")'
local_text = data=text $(call quoted,data.train,TRAIN$(1)) $(call quoted,data.valid,VALID$(1)) \
	$(if $(value CORPUS$(1)),$(call quoted,data.label,CORPUS$(1)),$(if $(1),data.label=second_text))
missing_valid = $(if $(value TRAIN$(1)),$(if $(value VALID$(1)),,$(error TRAIN$(1) is given without VALID$(1): name both files)))
TEXT := $(call missing_valid,)$(if $(value TRAIN),$(call local_text,),data=$(DATA))
TEXT2 := $(call missing_valid,2)$(if $(value TRAIN2),--second $(call local_text,2))

experiment = $(PY) -m experiments
install = -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' --constraint

.DEFAULT_GOAL := help
.PHONY: help setup smoke reproduce everything paper pictures heads embeddings tokens report figures test test-all newest test-newest lint

help: ## what each target does
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@$(if $(wildcard $(PY)),$(experiment),echo "make setup, and the experiments are listed here too")

setup: .venv/ready ## the virtual environment (PYTHON=python3.12, EXTRAS=dev,hf)

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vocabfold needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) $(install) constraints.txt
	touch $@

smoke: .venv/ready ## two small heads trained and one figure drawn, in two minutes
	@$(experiment) smoke reproduce

reproduce: paper pictures report ## the main paper: train, measure, draw into results/ (22 minutes on two cores)

everything: paper pictures heads embeddings tokens report ## all parts

paper: .venv/ready ## losses, group sizes, memory, speed and stories of the main paper
	@$(experiment) paper reproduce $(TEXT) $(TEXT2)

pictures: .venv/ready ## the image study of the main paper
	@$(experiment) pictures reproduce

heads: .venv/ready ## which head, in which order, at what cost
	@$(experiment) heads reproduce $(TEXT)

embeddings: .venv/ready ## compressed embeddings
	@$(experiment) embeddings reproduce $(TEXT)

tokens: .venv/ready ## coded tokens and cached inference
	@$(experiment) tokens reproduce $(TEXT)

report: .venv/ready ## each claim of the papers beside our tables, with its verdict: results/CORPUS/report.md
	@$(experiment) report reproduce

figures: .venv/ready ## every figure and table in words again from the tables that are there
	@$(experiment) all draw

test: .venv/ready ## quick tests (2 minutes on two cores)
	$(PY) -m pytest -q -m "not slow"

test-all: .venv/ready ## the slow tests too
	$(PY) -m pytest -q

newest: .venv-newest/ready ## an environment with the newest torch that installs (5.5 GB where that is one with CUDA)

.venv-newest/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep -v -e '^torch==' -e '^triton==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python $(install) .venv-newest/constraints.txt
	touch $@

test-newest: .venv-newest/ready ## quick tests with it
	.venv-newest/bin/python -c 'import torch; print("torch", torch.__version__)'
	.venv-newest/bin/python -m pytest -q -m "not slow"

lint: .venv/ready ## style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
