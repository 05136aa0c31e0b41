# Every target sets itself up: on a fresh machine `make quickstart` and `make test` are all there is to type.
PYTHON ?= python3
BIN := .venv/bin
CHECKED := src recipes benchmarks tests docs
LLAMA_CPP := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/plainlora/llama-cpp-python-0.3.36
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test test-all test-slow llama-cpp compare compat matrix bench bench-gpu docs style quality clean

help:
	@echo "make quickstart  install, train the embedded default on the CPU, merge it, show the result"
	@echo "make test        install, run the quick tests, in minutes (no model hub, no GPU needed)"
	@echo "make test-all    these, and what runs whole programs and commands: kills, publishing, the proof with planted faults"
	@echo "make test-slow   every architecture of Transformers through the proof, and llama.cpp's where it is built; most of an hour"
	@echo "make llama-cpp   build llama.cpp once, for the proof of plainlora export and its slow tests; some minutes"
	@echo "make compat      the core beside older and newer versions of Transformers and PEFT, each in a fresh environment"
	@echo "make matrix      two processes on every engine beside one process; most of an hour on two cores"
	@echo "make docs        the site, in outputs/site; a dead link fails"
	@echo "make compare     the proof: the hand-written LoRA beside PEFT, level by level"
	@echo "make bench       time and memory beside PEFT with TRL; about an hour on two cores; options: make bench ARGS=--help"
	@echo "make bench-gpu   the same on one GPU, with the tests that need one; at most ten minutes"
	@echo "make quality     lint, formatting and types"
	@echo "make style       fix what lint and formatting can fix"
	@echo "make install     .venv with the package in editable mode and its plainlora command"

install: .venv/installed

.venv/installed: requirements.txt tests/requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --requirement tests/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/torchao torchao==0.18.0
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --quiet --config_file accelerate_configs/cpu.yaml \
		recipes/sft.py --config recipes/quickstart/lora.yaml --overwrite
	$(BIN)/python recipes/quickstart/check.py outputs/quickstart/all_results.json

test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 -m "not integration and not slow"

test-all: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2

test-slow: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# With the default flags the build is for the processor at hand, and elsewhere dies of an illegal instruction.
llama-cpp: .venv/llama_cpp

.venv/llama_cpp: .venv/installed
	test -f "$(LLAMA_CPP)"/llama_cpp_python-*.whl || \
		CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" \
		$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir "$(LLAMA_CPP)" llama-cpp-python==0.3.36
	$(BIN)/python -m pip install --quiet --upgrade --target $@ "$(LLAMA_CPP)"/llama_cpp_python-*.whl

compare: install
	HF_HUB_OFFLINE=1 $(BIN)/plainlora compare

matrix: install
	$(BIN)/python -m tests.engines.matrix $(ARGS)

bench: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks $(ARGS)

bench-gpu: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu

compat: install
	$(BIN)/python tests/compat/grid.py

docs: install .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/docs-installed: docs/requirements.txt .venv/installed
	$(BIN)/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

style: install
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

quality: install
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

clean:
	rm -rf .venv outputs
