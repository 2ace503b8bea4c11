# make reproduce | test | test-all | figures | lint. Each sets up .venv by itself, from constraints.txt.
PYTHON ?= python3
SCALE ?= laptop
BIN := .venv/bin
RUN := $(BIN)/python -m vocabfold.train --multirun scale=$(SCALE)
PICTURES_RUN := $(RUN) experiment=shapes
# make reproduce SCALE=text TRAIN=train.txt VALID=valid.txt
ifneq ($(TRAIN),)
RUN += data.train=$(TRAIN)
endif
ifneq ($(VALID),)
RUN += data.valid=$(VALID)
endif
SWEEPS := main_comparison figure3_group_size
PICTURES := figure2_shapes_accuracy figure6_shapes_loss figure7_group_accuracy
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
	@$(PICTURES_RUN) && $(BIN)/python -m vocabfold.records shapes $(SCALE) && $(BIN)/python -m vocabfold.curves shapes $(SCALE)
	@test -f results/$(SCALE)/figure1_shapes.csv || $(BIN)/python experiments/figure1_shapes.py $(SCALE)
	@for picture in $(PICTURES); do $(BIN)/python experiments/$$picture.py $(SCALE) || exit; done
	@$(BIN)/python experiments/table2_memory.py
	@test -f results/laptop/table3_speed.csv || $(BIN)/python experiments/table3_speed.py

figures: .venv/ready
	@for sweep in $(SWEEPS); do $(BIN)/python experiments/$$sweep.py || exit; done
	@test -z "$(wildcard results/*/shapes_curves.csv)" || for picture in $(PICTURES); do $(BIN)/python experiments/$$picture.py || exit; done
	@$(BIN)/python experiments/table2_memory.py

test: .venv/ready
	$(BIN)/python -m pytest -q -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest -q

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
