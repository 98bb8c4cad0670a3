# Two commands are all a newcomer needs: `make demo` and `make test`.

VENV   := .venv
GPU    := build/venv-gpu
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CODE   := setup.py trainingcompiler frameworks launchers tests examples benchmarks notebooks

.PHONY: help demo test test-slow test-all bench conformance models fuzz gpu-plan tested-models lint clean

help:
	@echo "make demo      train a small GPT twice, compiled and eager, and compare"
	@echo "make test      lint, type check and the fast tests, on the CPU (ten minutes)"
	@echo "make test-slow  the other tests that a change must pass (half an hour)"
	@echo "make test-all  all of them, more models, and float32 as well as float64 (two hours)"
	@echo "make lint      lint and type check only"
	@echo "make gpu-plan  compile for GPUs that are not there, and check (4 GB of wheels, no GPU needed)"
	@echo "make tested-models  the original's table of largest batches, planned (two hours, no GPU needed)"
	@echo "make conformance  every operator of PyTorch's own database, compared with torch (20 minutes)"
	@echo "make models    a training step of every architecture in docs/models.md, compared with eager (two hours)"
	@echo "make fuzz      2,000 training loops by chance, compared with eager (an hour)"
	@echo "make bench     the benchmark of benchmarks/README.md, in full (hours)"
	@echo "make clean     remove the environment and everything that was built"

# torch comes first and alone: pulled in as somebody's dependency, it would be the CUDA build, several GB of it. So does
# TensorFlow's CPU wheel, whose name is another one than that which the `tensorflow` extra asks for.
$(READY): setup.py pyproject.toml constraints.txt
	@python=; for candidate in python3 python3.11 python3.12 python3.13 python3.14; do \
	  if $$candidate -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "No Python >= 3.11 with ensurepip found; install one and repeat." >&2; exit 1; fi; \
	test -x $(BIN)/python || $$python -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt tensorflow-cpu keras tensorboard
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[torch,huggingface,ray,checkpoints,dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

test: lint
	$(BIN)/python -m pytest -n auto -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -n auto -m slow

test-all: lint
	$(BIN)/python -m pytest -n auto --all

conformance: $(READY)
	$(BIN)/python tests/conformance/run.py --write docs/operators.md

models: $(READY)
	$(BIN)/python tests/huggingface/write_models.py --write docs/models.md
	$(BIN)/python benchmarks/keras_applications.py --write docs/models.md

bench: $(READY)
	$(BIN)/python benchmarks/pytorch_step.py --json build/pytorch_step.json --plot build/pytorch_step.png
	$(BIN)/python benchmarks/keras_fit.py --json build/keras_fit.json

# XLA's compiler for GPUs, in an environment of its own; JAX_PLATFORMS, or JAX looks for a driver.
$(GPU)/.ready: $(READY)
	test -x $(GPU)/bin/python || $(BIN)/python -m venv $(GPU)
	$(GPU)/bin/pip install --quiet torch==2.13.0
	$(GPU)/bin/pip install --quiet --constraint constraints.txt tensorflow-cpu keras
	$(GPU)/bin/pip install --quiet --constraint constraints.txt --editable '.[torch,huggingface,dev,cuda12]'
	@touch $@

fuzz: $(READY)
	FUZZ_LOOPS=2000 FUZZ_SEED=1 $(BIN)/python -m pytest -q -n auto -rP tests/fuzz

gpu-plan: $(GPU)/.ready
	JAX_PLATFORMS=cpu $(GPU)/bin/python -m pytest tests/gpu

tested-models: $(GPU)/.ready
	$(GPU)/bin/python benchmarks/tested_models.py --write docs/tested_models.md

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lizard --CCN 20 --warnings_only $(CODE)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
