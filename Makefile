# Each target does its own set-up: on a fresh machine `make demo` or `make test` is the only command needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo demo-vl test test-cluster test-docker test-browser lint benchmark clean

help:
	@echo "make setup      create $(VENV) and install everything (does nothing when it is up to date)"
	@echo "make demo       train the demo on 2 ranks and write its report (about 5 minutes)"
	@echo "make demo-vl    train a vision-language model in three stages, and dense and as top-2 beside it (about 9 minutes)"
	@echo "make test       lint, types and all tests (about half an hour on 2 cores)"
	@echo "make test-cluster  launches on a real Slurm and on two virtual hosts (root and Debian packages needed)"
	@echo "make test-browser  reports and \`dynmoe watch\` in a headless Chromium (also part of make test where there is one)"
	@echo "make test-docker   builds the images and runs them, with two hosts by compose (root and Debian packages needed)"
	@echo "make benchmark  compare the layer with a dense FFN and the layers of others (half an hour)"
	@echo "make clean      remove $(VENV) and caches; runs/ is kept"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed. Use: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/dynmoe train experiment=demo

# The third stage once more, from the same model. A dense model is one expert that takes every token.
PEER := experiment=demo_vl stage=demo_experts stage.start=runs/demo_vl/2_demo_language/model router=top_k adaptation=none

demo-vl: setup data/digits
	$(BIN)/dynmoe stages experiment=demo_vl stages=demo_projector,demo_language,demo_experts run_dir=runs/demo_vl
	$(BIN)/dynmoe train $(PEER) run_dir=runs/demo_vl/3_top_2
	$(BIN)/dynmoe train $(PEER) run_dir=runs/demo_vl/3_dense \
	  router.k=1 model.num_experts=1 model.num_slots=1 parallel.ep_size=1
	$(BIN)/dynmoe evaluate runs/demo_vl/3_demo_experts --answers runs/demo_vl/3_demo_experts/answers.png
	$(BIN)/dynmoe report runs/demo_vl/3_demo_experts
	$(BIN)/dynmoe report runs/demo_vl

data/digits: | setup
	$(BIN)/python -m dynmoe_ds.data.digit_questions $@

# Two workers, since tests wait for programs that start more than they compute. A file's tests stay together: they share runs.
test: setup lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Root and Debian's packages are needed; what is missing is skipped with a sentence, and where all of it is, that is a failure.
test-cluster: setup
	$(BIN)/python -m pytest tests/cluster -m cluster

# Fails with a sentence where there is no Chromium; make test skips these tests there.
test-browser: setup
	$(BIN)/python -m pytest tests/browser -m browser

# Fails with a sentence where there is no podman.
test-docker: setup
	$(BIN)/python -m pytest tests/docker -m docker

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/*.Dockerfile tests/docker/*.Dockerfile

benchmark: setup
	$(BIN)/python -m benchmarks.layer

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
