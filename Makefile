# make help lists everything. Each target sets up .venv by itself, from constraints.txt, and what has finished is skipped:
# a run by its configuration and its text, a measured table by its settings and its text.
PYTHON ?= python3
EXTRAS ?= dev
BIN := .venv/bin
PY := $(BIN)/python

# The text: the embedded stories, DATA=tinystories (the paper's own; it wants a GPU), or local files:
# make reproduce TRAIN=train.txt VALID=valid.txt CORPUS='its name in tables'. TRAIN2, VALID2, CORPUS2: a second one.
DATA ?= $(if $(value TRAIN),text,stories)

# A value is one word for the shell and one string for Hydra, whatever is in it: NAME="VALUE" within single quotes.
shell = '$(subst ','\'',$(1))'
quoted = '$(subst ','\'',$(1)="$(subst ",\",$(subst \,\\,$(value $(2))))")'
local_text = data=text $(call quoted,data.train,TRAIN$(1)) $(call quoted,data.valid,VALID$(1)) \
	$(if $(value CORPUS$(1)),$(call quoted,data.label,CORPUS$(1)),$(if $(1),data.label=second_text))
missing_valid = $(if $(value TRAIN$(1)),$(if $(value VALID$(1)),,$(error TRAIN$(1) is given without VALID$(1): name both files)))
TEXT := $(call missing_valid,)$(if $(value TRAIN),$(call local_text,),data=$(DATA))
TEXT2 := $(call missing_valid,2)$(if $(value TRAIN2),$(call local_text,2))

train = $(PY) -m vocabfold.train --multirun
experiment = $(PY) -m experiments
FEWER_SIZES := 28,104,225,728,3864
# The finished runs of an experiment whose names begin so, as one swept value of start.run.
NAME = $(or $(value CORPUS),$(DATA))
teachers = "start.run=$$(printf '"%s"\n' results/runs/$(call shell,$(NAME))/$(1)* | paste -sd,)"

.DEFAULT_GOAL := help
.PHONY: help setup smoke reproduce everything paper pictures heads embeddings tokens report figures test test-all lint

help: ## what each target does
	@sed -n 's/^\([a-z-]*\):[^#]*## /make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20
	@$(if $(wildcard $(PY)),$(experiment),echo "make setup, and the experiments are listed here too")

setup: .venv/ready ## the virtual environment (PYTHON=python3.12, EXTRAS=dev,hf)

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vocabfold needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

smoke: .venv/ready ## two small heads trained and one figure drawn, in two minutes
	@$(train) experiment=first_look
	@$(experiment) first_look measure
	@$(experiment) first_look draw

reproduce: paper pictures report ## the main paper: train, measure, draw into results/ (22 minutes on two cores)

everything: paper pictures heads embeddings tokens report ## all parts

paper: .venv/ready ## losses, group sizes, memory, speed and stories of the main paper
	@$(train) $(TEXT) experiment=main_comparison
	@$(experiment) main_comparison measure $(TEXT)
	@$(experiment) document_losses measure $(TEXT)
	@$(train) $(TEXT) experiment=figure3_group_size
	@$(experiment) figure3_group_size measure $(TEXT)
	$(if $(TEXT2),@$(train) $(TEXT2) experiment=figure3_group_size head.partition.group_size=$(FEWER_SIZES))
	$(if $(TEXT2),@$(train) $(TEXT2) experiment=figure3_baseline)
	$(if $(TEXT2),@$(experiment) figure3_group_size measure $(TEXT2))
	@$(experiment) training_step measure $(TEXT)
	@$(experiment) figure45_loop_or_shared measure $(TEXT)
	@$(experiment) figure3_simulated_memory measure
	@$(experiment) table2_memory measure
	$(if $(filter stories,$(DATA)),@$(train) $(TEXT) experiment=table1_story_quality)
	@$(experiment) table1_story_quality measure $(TEXT)
	@for name in main_comparison figure3_group_size training_step figure45_loop_or_shared table1_story_quality table2_memory; \
		do $(experiment) $$name draw || exit; done

pictures: .venv/ready ## the image study of the main paper
	@$(train) experiment=shapes
	@$(experiment) shapes measure
	@$(experiment) figure1_shapes measure
	@$(experiment) figure1_shapes draw
	@$(experiment) shapes draw

heads: .venv/ready ## which head, in which order, at what cost
	@$(train) $(TEXT) experiment=learning_rates
	@$(experiment) learning_rates measure $(TEXT)
	@$(train) $(TEXT) experiment=heads_pareto
	@$(experiment) heads_pareto measure $(TEXT)
	@$(train) $(TEXT) experiment=order_matters
	@$(experiment) order_matters measure $(TEXT)
	@$(train) experiment=vocabulary_scaling
	@$(train) experiment=vocabulary_scaling head=full_untied data.vocabulary_size=10000,50257,100277
	$(if $(value TRAIN),@$(train) $(TEXT) experiment=larger_vocabulary)
	@$(experiment) vocabulary_scaling measure
	@$(experiment) heads_cost measure $(TEXT)
	@$(experiment) vocabulary_cost measure
	@$(experiment) table3_speed measure
	@$(experiment) head_memory measure
	@$(experiment) rare_tokens measure $(TEXT)
	@$(train) $(TEXT) experiment=decode
	@$(experiment) decode measure $(TEXT)
	@$(train) $(TEXT) experiment=main_comparison model=gpt2 head=full
	@$(train) $(TEXT) experiment=fold $(call teachers,main_comparison/gpt2-full-seed)
	@$(train) $(TEXT) experiment=fold head.partition.order=frequency head.partition.shortlist=2048 $(call teachers,main_comparison/gpt2-full-seed)
	@$(experiment) fold measure $(TEXT)
	@for name in heads_pareto order_matters vocabulary_scaling vocabulary_cost table3_speed head_memory rare_tokens decode fold; \
		do $(experiment) $$name draw || exit; done

embeddings: .venv/ready ## compressed embeddings
	@$(train) $(TEXT) experiment=embedding_compression
	@$(train) $(TEXT) experiment=embedding_compressed $(call teachers,embedding_compression/gpt2-shortlist_frequency-seed)
	@$(experiment) embedding_compression measure $(TEXT)
	@$(train) $(TEXT) experiment=main_comparison model=gpt2 head=full
	@$(train) $(TEXT) experiment=both_ends
	@$(train) $(TEXT) experiment=both_ends embedding=tt_matrix embedding.compression=16
	@$(experiment) both_ends measure $(TEXT)
	@$(experiment) embedding_speed measure
	@$(experiment) embedding_tables measure $(TEXT)
	@for name in embedding_compression both_ends embedding_speed embedding_tables; do $(experiment) $$name draw || exit; done

tokens: .venv/ready ## coded tokens and cached inference
	@$(train) $(TEXT) experiment=heads_pareto head=full_untied,scale_shift_bpe,folded,shortlist_frequency seed=0
	@$(experiment) token_coding measure $(TEXT)
	@$(experiment) token_store measure $(TEXT)
	@$(experiment) model_coding measure $(TEXT)
	@$(train) $(TEXT) experiment=caching
	@$(experiment) caching measure $(TEXT)
	@for name in token_coding token_store model_coding caching; do $(experiment) $$name draw || exit; done

report: .venv/ready ## each claim of the papers beside our tables, with its verdict: results/CORPUS/report.md
	@$(experiment) audit draw
	@$(experiment) report draw

figures: .venv/ready ## every figure and table in words again from the tables that are there
	@$(experiment) all draw

test: .venv/ready ## quick tests
	$(PY) -m pytest -q -m "not slow"

test-all: .venv/ready ## the slow tests too
	$(PY) -m pytest -q

lint: .venv/ready ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
