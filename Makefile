# Two commands: `make demo` and `make test`. Both set up what they need, and may be run again.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Where the demo writes, and what it trains; DATA is the user's own tree, LIMIT the most images of a split.
DEMO ?= $(CURDIR)/demo
CONFIG ?= configs/internimage_tiny_synthetic.yaml
export DATA LIMIT DEMO CONFIG
# Packages in ~/.local would come before the environment's.
export PYTHONNOUSERSITE := 1
PY = cd classification && . ./mimic_settings.sh && "$$MIMIC_PYTHON"

.PHONY: help setup demo test lint

help:
	@echo "make demo              train and test a small InternImage on synthetic chest X-rays"
	@echo "make demo DATA=FOLDER  the same on your own tree in the layout of MIMIC-CXR; LIMIT=2000: on 2,000 images per split"
	@echo "make test              run the tests"
	@echo "make lint              check the code's style"

setup:
	@bash classification/setup_mimic_env.sh --yes --no-weights

demo: setup
	@bash classification/jobs/demo.sh

test: setup
	@bash classification/tests/all.sh

lint: setup
	@$(PY) -m ruff check .. && "$$MIMIC_PYTHON" -m ruff format --check ..
