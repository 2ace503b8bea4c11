# make reproduce | test | test-all | figures | lint. Each sets up .venv by itself, from constraints.txt.
PYTHON ?= python3
SCALE ?= laptop
BIN := .venv/bin
RUN := $(BIN)/python -m vocabfold.train --multirun scale=$(SCALE)
# make reproduce SCALE=text TRAIN=train.txt VALID=valid.txt
ifneq ($(TRAIN),)
RUN += data.train=$(TRAIN)
endif
ifneq ($(VALID),)
RUN += data.valid=$(VALID)
endif
SWEEPS := main_comparison figure3_group_size
# a text that was read for training is coded for size and stored; one that was not is coded with the models
STORED := $(if $(TRAIN),--text $(TRAIN))
UNSEEN := $(if $(VALID),--text $(VALID))
EXTRAS ?= dev

.PHONY: help setup reproduce figures test test-all lint
help:
	@echo "make reproduce [SCALE=laptop|text|paper] [TRAIN=file VALID=file]   train, measure, draw into results/"
	@echo "make figures   redraw every figure from the committed tables"
	@echo "make test      quick tests;  make test-all  the slow ones too;  make lint  style and types"

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vocabfold needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

reproduce: .venv/ready
	@for sweep in $(SWEEPS); do $(RUN) experiment=$$sweep || exit; done
	@for sweep in $(SWEEPS); do $(BIN)/python -m vocabfold.records $$sweep $(SCALE) || exit; done
	@test -f results/runs/$(SCALE)/training_step.done || { $(BIN)/python experiments/training_step.py --scale $(SCALE) \
		&& touch results/runs/$(SCALE)/training_step.done; }
	@test -f results/simulated/figure3_simulated_memory.csv || $(BIN)/python experiments/figure3_simulated_memory.py
	@for sweep in $(SWEEPS); do $(BIN)/python experiments/$$sweep.py $(SCALE) || exit; done
	@$(RUN) experiment=model_coding
	@test -f results/runs/$(SCALE)/coding.done || { \
		$(BIN)/python experiments/token_coding.py --scale $(SCALE) $(subst --text ,--text text=,$(STORED)) \
		&& $(BIN)/python experiments/token_store.py --scale $(SCALE) $(STORED) \
		&& $(BIN)/python experiments/model_coding.py --scale $(SCALE) $(UNSEEN) \
		&& touch results/runs/$(SCALE)/coding.done; }

figures: .venv/ready
	@for sweep in $(SWEEPS); do $(BIN)/python experiments/$$sweep.py || exit; done
	@for table in results/*/token_coding.csv results/*/model_coding.csv; do test ! -f $$table || $(BIN)/python \
		experiments/$$(basename $$table .csv).py --draw --scale $$(basename $$(dirname $$table)) || exit; done

test: .venv/ready
	$(BIN)/python -m pytest -q -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest -q

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
