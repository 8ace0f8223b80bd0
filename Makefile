# make demo   install, train on the built-in data (CPU, about five minutes), sample, write pictures to demo/
# make test   install, run the tests (CPU, no network)
# make lint   install, check style

PYTHON ?= python3
VENV ?= .venv
# The release of torch that this checkout was tested with. PyPI's build for Linux brings CUDA along; options are allowed:
# TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# Shorten the demo, e.g. TRAIN_ARGS="--max_steps 60" SAMPLE_ARGS="--images_per_class 1".
TRAIN_ARGS ?=
SAMPLE_ARGS ?=

BIN := $(VENV)/bin

.PHONY: demo test lint

demo: $(VENV)/installed
	@if [ -d demo/run ]; then echo "replacing the run of an earlier demo, demo/run"; rm -rf demo/run; fi
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		training/train.py --config training/configs/demo.yaml $(TRAIN_ARGS)
	$(BIN)/python training/demo.py --pipeline demo/run/pipeline --out demo $(SAMPLE_ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test]"
	touch $@
