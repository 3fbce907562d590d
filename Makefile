# On a fresh machine with Python 3.11, git and make:
#   make demo   searches, evaluates and exports a sampler for the embedded digits
#   make emoji  does the same for the emoji in worlds/, with a report
#   make test   runs the tests
# All install the pinned dependencies into .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A Python with benchmarks/requirements-pytorch.txt, for `make bench`.
PYTORCH ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m ddss_tf.main
PUBLISHED := $(RUN) --mode=search --gin_file=gin_configs/published.gin \
  --run_dir=results/published
FEWER := --gin_param='search.batch_size = 64' \
  --gin_param='search.real_samples = 64' \
  --gin_param='search.num_search_steps = 60'
# Two workers share two cores.
PYTEST := python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests
export TF_CPP_MIN_LOG_LEVEL ?= 2
test test-all test-lowest: export OMP_NUM_THREADS ?= 1

.PHONY: demo demo-full emoji table table-cosine objectives figures published latent bench docs test test-all test-lowest clean

demo: $(VENV)/.installed
	$(RUN) --gin_file=gin_configs/demo.gin --run_dir=runs/demo

demo-full: $(VENV)/.installed
	$(RUN) --gin_file=gin_configs/demo_full.gin --run_dir=runs/demo-full-k5
	$(RUN) --gin_file=gin_configs/demo_full.gin --run_dir=runs/demo-full-k10 \
	  --gin_param='NUM_STEPS = 10'

emoji: $(VENV)/.installed
	$(RUN) --gin_file=gin_configs/emoji.gin --run_dir=runs/emoji

table: $(VENV)/.installed
	$(RUN) --mode=compare --gin_file=gin_configs/table.gin \
	  --run_dir=results/digits16

table-cosine: $(VENV)/.installed
	$(RUN) --mode=compare --gin_file=gin_configs/table_cosine.gin \
	  --run_dir=results/cosine

objectives: $(VENV)/.installed
	$(RUN) --mode=compare --gin_file=gin_configs/objectives.gin \
	  --run_dir=results/objectives

figures: $(VENV)/.installed
	$(RUN) --mode=compare --gin_file=gin_configs/figures.gin \
	  --run_dir=results/figures

published: $(VENV)/.installed
	$(PUBLISHED)/k5
	$(PUBLISHED)/k10 $(FEWER) --gin_param='NUM_STEPS = 10'
	$(PUBLISHED)/k20 $(FEWER) --gin_param='NUM_STEPS = 20' \
	  --gin_param='search.rate_schedule = "cosine"'
	$(RUN) --mode=search --gin_file=gin_configs/published_ours.gin \
	  --run_dir=results/published/k5-ours
	$(RUN) --mode=compare --gin_file=gin_configs/published_table.gin \
	  --run_dir=results/published
	$(RUN) --mode=compare --gin_file=gin_configs/published_families.gin \
	  --run_dir=results/published/families

latent: $(VENV)/.installed
	$(RUN) --mode=compare --gin_file=gin_configs/latent_table.gin \
	  --run_dir=results/latent_digits
	$(RUN) --gin_file=gin_configs/latent_guidance.gin \
	  --run_dir=results/latent_digits/k4-guidance
	$(RUN) --gin_file=gin_configs/latent_guidance.gin \
	  --run_dir=results/latent_digits/k8-guidance --gin_param='NUM_STEPS = 8'

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.start_up
	$(BIN)/python -m benchmarks.metrics_50k
	$(BIN)/python -m benchmarks.search_memory
	$(BIN)/python -m benchmarks.decoder_memory
	$(BIN)/python -m benchmarks.evaluation_pass
	$(BIN)/python -m benchmarks.search_step --pytorch=$(PYTORCH)
	$(BIN)/python -m benchmarks.beside_pytorch --pytorch=$(PYTORCH)

test: $(VENV)/.installed
	$(BIN)/$(PYTEST) -m 'not slow'

test-all: $(VENV)/.installed
	$(BIN)/$(PYTEST)

test-lowest: build/lowest-venv/.installed
	build/lowest-venv/bin/$(PYTEST) -m 'not slow'

build/lowest-venv/.installed: requirements-lowest.txt setup.py
	$(PYTHON) -m venv build/lowest-venv
	build/lowest-venv/bin/python -m pip install -q -r requirements-lowest.txt
	build/lowest-venv/bin/python -m pip install -q --no-deps \
	  --no-build-isolation -e .
	touch $@

$(VENV)/.installed: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), \
	  "Python 3.11 is needed. Received: " + sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

docs: build/docs-venv/.installed
	NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build -q

build/docs-venv/.installed: requirements-docs.txt
	$(PYTHON) -m venv build/docs-venv
	build/docs-venv/bin/pip install -q -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
