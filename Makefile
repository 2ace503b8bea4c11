# make reproduce | test | test-all | figures | report | lint. Each sets up .venv by itself, from constraints.txt.
PYTHON ?= python3
SCALE ?= laptop
EXTRAS ?= dev
BIN := .venv/bin
PY := $(BIN)/python
RUNS := results/runs/$(SCALE)
# make reproduce SCALE=text TRAIN=train.txt VALID=valid.txt CORPUS=its name in tables
DATA := $(if $(TRAIN),data.train=$(TRAIN)) $(if $(VALID),data.valid=$(VALID)) $(if $(CORPUS),data.label=$(CORPUS))
# A second text for what is asked of two: TRAIN2=train.txt VALID2=valid.txt CORPUS2=another name
comma := ,
DATA2 := $(if $(TRAIN2),data.train=$(TRAIN2) data.valid=$(VALID2) data.label=$(or $(CORPUS2),second_text))
TRAINING := $(PY) -m vocabfold.train --multirun scale=$(SCALE)

CORPUS_laptop := stories
CORPUS_text := text
CORPUS_paper := tinystories

# What is reproduced, a part at a time (make heads SCALE=text ...). What has finished, been measured or drawn is not done again
# but drawn again, so that a killed make goes on where it stopped.
AREAS := paper pictures heads embeddings tokens
trained = @$(TRAINING) $(DATA) experiment=$(1) $(2)
sweep = $(trained) && $(PY) -m vocabfold.runs.record $(1) $(SCALE)
second = $(if $(DATA2),@$(TRAINING) $(DATA2) experiment=$(1) $(2) && $(PY) -m vocabfold.runs.record $(1) $(SCALE))
once = @test -f $(RUNS)/$(1).done || { $(PY) -m experiments $(1) $(2) && touch $(RUNS)/$(1).done; }
write_report = @$(PY) -m experiments audit > /dev/null && $(PY) -m experiments report $(SCALE)
draw = @for figure in $(1); do $(PY) -m experiments $$figure $(SCALE) || exit; done

DRAWN := main_comparison figure3_group_size heads_pareto order_matters rare_tokens group_accuracy vocabulary_scaling larger_vocabulary fold \
	embedding_compression both_ends caching table1_story_quality figure2_shapes_accuracy figure6_shapes_loss figure7_group_accuracy

.PHONY: help setup reproduce everything $(AREAS) report figures test test-all lint
help:
	@echo "make reproduce [SCALE=laptop|text|paper] [TRAIN=file VALID=file]   the main paper: train, measure, draw into results/"
	@echo "make $(AREAS)   a part each, with the same settings; make everything  all of them"
	@echo "make figures   redraw every figure from the committed tables, and write every report again"
	@echo "make report    each claim of the papers beside our tables, with its verdict: results/SCALE/report.md"
	@echo "make test      quick tests;  make test-all  the slow ones too;  make lint  style and types"

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "vocabfold needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# The main paper, whole, in the time that the README states; everything: the rest too.
reproduce: paper pictures
	$(write_report)

everything: $(AREAS)
	$(write_report)

report: .venv/ready
	$(write_report)

paper: .venv/ready
	$(call sweep,main_comparison)
	$(call once,document_losses,--measure $(SCALE))
	$(call sweep,figure3_group_size)
	$(call second,figure3_group_size,head.partition.group_size=28$(comma)104$(comma)225$(comma)728$(comma)3864)
	$(call second,figure3_baseline)
	$(call once,training_step,--scale $(SCALE))
	$(call once,figure45_loop_or_shared,--scale $(SCALE) $(if $(TRAIN),--train $(TRAIN)))
	@test -f results/simulated/figure3_simulated_memory.csv || $(PY) -m experiments figure3_simulated_memory
	@$(PY) -m experiments table2_memory
	@test -f results/laptop/table3_speed.csv || $(PY) -m experiments table3_speed
	$(if $(filter laptop,$(SCALE)),@$(TRAINING) experiment=table1_story_quality)
	$(call once,table1_story_quality,--measure $(SCALE))
	$(call draw,main_comparison figure3_group_size table1_story_quality)

heads: .venv/ready
	$(call sweep,learning_rates)
	$(call sweep,heads_pareto)
	$(call sweep,order_matters)
	$(call sweep,vocabulary_scaling)
	$(if $(filter laptop,$(SCALE)),$(call sweep,vocabulary_scaling,contender=full_free data.vocabulary_size=10000$(comma)50257$(comma)100277))
	$(if $(filter-out laptop,$(SCALE)),$(call sweep,larger_vocabulary))
	$(call once,heads_cost,--scale $(SCALE) $(DATA))
	$(call once,vocabulary_cost,--scale $(SCALE))
	$(call once,rare_tokens,--measure $(SCALE))
	$(call draw,heads_pareto order_matters group_accuracy rare_tokens vocabulary_scaling main_comparison $(if $(filter-out laptop,$(SCALE)),larger_vocabulary))
	$(call sweep,decode)
	$(call once,decode,--scale $(SCALE))
	$(call sweep,main_comparison,model=gpt2 head=full)
	@$(PY) -m vocabfold.fold $(RUNS)/main_comparison/gpt2-full-* --order bpe frequency clustered --tokens 16384 65536
	@$(PY) -m vocabfold.fold $(RUNS)/main_comparison/gpt2-full-* --order frequency --shortlist 2048 --tokens 16384 65536
	@$(PY) -m vocabfold.runs.record fold $(SCALE)
	$(call draw,fold)

embeddings: .venv/ready
	$(call sweep,embedding_compression)
	$(call second,embedding_compression)
	@$(PY) -m vocabfold.compress_embedding $(RUNS)/embedding_compression/gpt2-grouped-$(CORPUS_$(SCALE))-seed* \
		@conf/compression/embedding_compression_$(if $(filter laptop,$(SCALE)),laptop,text).txt
	@$(PY) -m vocabfold.runs.record embedding_compression $(SCALE)
	$(call sweep,main_comparison,model=gpt2 head=full)
	$(call trained,both_ends)
	$(call sweep,both_ends,embedding=tt_matrix embedding.compression=16)
	$(call once,embedding_speed,--scale $(SCALE))
	$(call once,embedding_tables,--scale $(SCALE))
	$(call draw,embedding_compression both_ends)

# A text that was read for training is coded for size and stored; one that was not is coded with the models.
tokens: .venv/ready
	$(call trained,heads_pareto,contender=full_free$(comma)scale_shift_bpe$(comma)linear_clustered$(comma)shortlist_frequency seed=0)
	$(call once,token_coding,--scale $(SCALE) $(if $(TRAIN),--text $(or $(CORPUS),text)=$(TRAIN)))
	$(call once,token_store,--scale $(SCALE) $(if $(TRAIN),--text $(TRAIN)))
	$(call once,model_coding,--scale $(SCALE) $(if $(VALID),--text $(VALID) --corpus $(or $(CORPUS),text)))
	$(call sweep,caching)
	$(call once,caching_speed,--scale $(SCALE))
	$(call once,caching_memory,--scale $(SCALE))
	$(call once,caching_perplexity,--scale $(SCALE))
	$(call draw,caching)

pictures: .venv/ready
	@$(TRAINING) experiment=shapes && $(PY) -m vocabfold.runs.record shapes $(SCALE)
	@test -f results/$(SCALE)/figure1_shapes.csv || $(PY) -m experiments figure1_shapes $(SCALE)
	$(call draw,figure2_shapes_accuracy figure6_shapes_loss figure7_group_accuracy)

figures: .venv/ready
	@for figure in $(DRAWN); do $(PY) -m experiments $$figure || true; done  # one without its table says so; the rest are drawn
	@$(PY) -m experiments table2_memory
	@for table in $(wildcard results/*/decode.csv results/*/figure45_loop_or_shared.csv); do \
		$(PY) -m experiments $$(basename $$table .csv) --redraw --scale $$(basename $$(dirname $$table)) || exit; done
	@for table in $(wildcard results/*/token_coding.csv results/*/model_coding.csv); do \
		$(PY) -m experiments $$(basename $$table .csv) --draw --scale $$(basename $$(dirname $$table)) || exit; done
	@$(PY) -m experiments audit > /dev/null
	@$(PY) -m experiments report

test: .venv/ready
	$(PY) -m pytest -q -m "not slow"

test-all: .venv/ready
	$(PY) -m pytest -q

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
