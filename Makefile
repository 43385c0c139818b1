# Two commands: `make demo` and `make test`. Both set up what they need, and may be run again.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

DEMO := $(CURDIR)/demo
CONFIG := configs/internimage_tiny_synthetic.yaml
# A run belongs to its data: another DATA folder gets a run of its own.
TAG := $(if $(DATA),data-$(firstword $(shell printf '%s' '$(abspath $(DATA))' | cksum)),synthetic)
IMAGES := $(if $(DATA),$(abspath $(DATA)),$(DEMO)/synthetic)
PY = cd classification && . ./mimic_settings.sh && "$$MIMIC_PYTHON"
ARGS = --cfg $(CONFIG) --data-path '$(IMAGES)' --output '$(DEMO)/output' --tag $(TAG) --opts RESULTS '$(DEMO)/results/$(TAG)'

.PHONY: help setup demo test lint

help:
	@echo "make demo              train and test a small InternImage on synthetic chest X-rays"
	@echo "make demo DATA=FOLDER  the same on your own tree in the layout of MIMIC-CXR"
	@echo "make test              run the tests"
	@echo "make lint              check the code's style"

setup:
	@bash classification/setup_mimic_env.sh --yes

demo: setup
	@if [ -z '$(DATA)' ]; then $(PY) -m dataset.synthetic --out '$(DEMO)/synthetic'; fi
	@$(PY) main.py $(ARGS)
	@$(PY) main.py $(ARGS) --eval
	@echo
	@echo "data         $(IMAGES)"
	@echo "the run      $(DEMO)/output/internimage_tiny/$(TAG)   (checkpoints, log, training.png)"
	@echo "the results  $$(ls -d '$(DEMO)/results/$(TAG)'/evaluation_* | tail -n 1)   (metrics.json, predictions.csv, roc.png)"

test: setup
	@$(PY) -m pytest -q --durations=10 tests ops_dcnv3/tests

lint: setup
	@$(PY) -m ruff check .. && "$$MIMIC_PYTHON" -m ruff format --check ..
