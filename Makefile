# make demo | demo-compare | demo-distill | setup | lock | test | test-long | test-layouts | test-kills | test-faults | test-hosts | test-slurm | test-versions | test-vllm | test-remote | test-cleaning | check | mutants | cuda-check | gpu-check | gpu-bundle | format | clean    (see README.md and CONTRIBUTING.md)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# ninja, needed to build the extension, is looked up on PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Where this is set, every process would compile torch's Python files anew (5 s each).
unexport PYTHONDONTWRITEBYTECODE
CSRC := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inl' -o -name '*.cuh' \) 2>/dev/null)

.PHONY: setup lock demo demo-compare demo-distill test test-long test-layouts test-kills test-faults test-hosts test-slurm test-versions test-transformers test-vllm test-remote test-cleaning check mutants cuda-check gpu-check gpu-bundle format clean
.DELETE_ON_ERROR:

setup: $(VENV)/.package
	@:

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# Compiling every installed module would double the time; importing compiles the ones in use.
WARM_UP := import deepspeed, torch._dynamo, torch._inductor.compile_fx, torch.utils.tensorboard, transformers
# Which of the two lock files, both with the hash of every file; by whether there is an NVIDIA GPU:
#   make setup ACCELERATOR=cpu
ACCELERATOR ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu)
LOCK := requirements-$(ACCELERATOR).lock
# Has torch's CPU build, which PyPI has not; asked only if no index that pip knows has it.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL := $(BIN)/pip install --quiet --quiet --no-compile --disable-pip-version-check --no-deps --require-hashes -r $(LOCK)
$(VENV)/.requirements-$(ACCELERATOR): $(LOCK) $(VENV)/.python
	$(INSTALL) $(if $(filter cpu,$(ACCELERATOR)),|| $(INSTALL) --extra-index-url $(TORCH_INDEX))
	$(BIN)/python -W ignore -c "$(WARM_UP)" 2> $(VENV)/warm-up.log || { cat $(VENV)/warm-up.log; exit 1; }
	touch $@

$(VENV)/.package: pyproject.toml setup.py $(CSRC) $(VENV)/.requirements-$(ACCELERATOR)
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# The lock files anew, after a change of requirements.in; needs uv (pip install uv).
RESOLVE := uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes \
	--no-header --no-annotate --default-index https://pypi.org/simple
lock:
	{ echo "# Made of requirements.in by \`make lock\`. torch is PyPI's, built for CUDA 13. Linux, Python 3.11."; \
		$(RESOLVE) requirements.in; } > requirements-cuda.lock.new
	{ echo "# Made of requirements.in by \`make lock\`. torch is PyTorch's CPU build. Linux, Python 3.11."; \
		sed 's/^torch==.*/&+cpu/' requirements.in | $(RESOLVE) --no-deps --index $(TORCH_INDEX) -; } > requirements-cpu.lock.new
	mv requirements-cuda.lock.new requirements-cuda.lock
	mv requirements-cpu.lock.new requirements-cpu.lock

# The demo: text -> tokenizer -> shards -> training -> model -> sample and curve. Every step is made once and
# reused; an interrupted training goes on from its newest checkpoint. With text of your own:
#   make demo NAME=mine CORPUS=/path/to/mine.jsonl.zst
NAME ?= demo
RANKS ?= 2
DATA := data/$(NAME)
RUN := runs/$(NAME)
CORPUS ?= $(DATA)/corpus.jsonl.zst
SHARD := $(DATA)/corpus_text_document
# One thread a rank: the ranks share the cores.
LAUNCH := OMP_NUM_THREADS=1 deepspeed --num_accelerators $(RANKS)
# The run says whether it is: a launcher that lost its ranks may not know.
COMPLETE = $(BIN)/python tools/summarize_run.py --complete
SETTINGS := --config examples/configs/demo.yaml --ds-config examples/ds_configs/zero1.json \
	--data.prefix $(SHARD) --data.tokenizer $(DATA)/tokenizer.model

demo: $(RUN)/loss.png $(RUN)/sample.txt
	@$(BIN)/python tools/summarize_run.py $(RUN) --also $(DATA)

$(DATA)/corpus.jsonl.zst: | setup
	mkdir -p $(DATA)
	$(BIN)/python examples/demo/docstring_corpus.py --output $@

$(DATA)/tokenizer.model: $(CORPUS) | setup
	mkdir -p $(DATA)
	$(BIN)/python tools/train_tokenizer.py --input $(CORPUS) --output-prefix $(DATA)/tokenizer --vocab-size 4096

$(SHARD).shards: $(CORPUS) $(DATA)/tokenizer.model | setup
	$(BIN)/python tools/preprocess_data.py --input $(CORPUS) --output-prefix $(DATA)/corpus \
		--tokenizer-model $(DATA)/tokenizer.model --append-eod --workers 2 --overwrite

$(RUN)/.trained: $(SHARD).shards | setup
	$(LAUNCH) pretrain_iiet.py $(SETTINGS) --output_dir $(RUN)
	$(COMPLETE) $(RUN)
	touch $@

$(RUN)/model/model.safetensors: $(RUN)/.trained
	rm -rf $(RUN)/model
	$(BIN)/python tools/convert_checkpoint.py --from-run $(RUN) --to $(RUN)/model

$(RUN)/sample.txt: $(RUN)/model/model.safetensors
	$(BIN)/python tools/generate.py --model $(RUN)/model --max-new-tokens 80 \
		--prompt "The function returns" --prompt "This class is used to" --prompt "If the input is" > $@

$(RUN)/loss.png: $(RUN)/.trained
	$(BIN)/python tools/plot_losses.py --run "$(NAME)=$(RUN)" --output $@

demo-compare: $(SHARD).shards
	$(BIN)/python benchmarks/compare_demo.py --output-dir runs/$(NAME)-compare --ranks $(RANKS) \
		--data.prefix $(SHARD) --data.tokenizer $(DATA)/tokenizer.model

# E-IIET in small: an IIET is trained, the influence of its iterations measured, half of its evaluations kept, and
# the model that remains learns from the whole one; beside it, the same model goes on without a teacher.
DISTILL := runs/$(NAME)-distill
SMALL := --solver.coefficient_init average --evaluation.interval 50 --checkpoint.interval 50
FULL := $(SMALL) --solver.iterations 3 --training.steps 150 --optimizer.lr 4e-3
PLAN := $(DISTILL)/influence/plan.json
REDUCED := $(SMALL) --solver.iterations $(PLAN) --training.steps 50 --optimizer.lr 1e-3

demo-distill: $(DISTILL)/e-iiet/.trained $(DISTILL)/continued/.trained
	@for run in teacher e-iiet continued; do $(BIN)/python tools/summarize_run.py $(DISTILL)/$$run --brief; done

$(DISTILL)/teacher/.trained: $(SHARD).shards | setup
	$(LAUNCH) pretrain_iiet.py $(SETTINGS) $(FULL) --output_dir $(@D)
	$(COMPLETE) $(@D)
	touch $@

$(PLAN): $(DISTILL)/teacher/.trained
	$(BIN)/python tools/iteration_influence.py --model $(DISTILL)/teacher --output $(@D) --sequences 32 --flops-ratio 0.5

$(DISTILL)/e-iiet/.trained: $(PLAN)
	$(LAUNCH) distill_iiet.py $(SETTINGS) $(REDUCED) --teacher $(DISTILL)/teacher --output_dir $(@D)
	$(COMPLETE) $(@D)
	touch $@

$(DISTILL)/continued/.trained: $(PLAN)
	$(LAUNCH) pretrain_iiet.py $(SETTINGS) $(REDUCED) --training.initial_weights $(DISTILL)/teacher --output_dir $(@D)
	$(COMPLETE) $(@D)
	touch $@

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every grid up to 8 processes, and the benchmarks from text to table.
test-long: setup
	$(BIN)/python -m pytest -m long

# Layouts drawn at random, each against one process; minutes, and other ones every time.
test-layouts: setup
	$(BIN)/python -m pytest -m layouts tests/distributed/test_random_layouts.py

# Preprocessing killed at 50 random moments and resumed: the shards must be those of an undisturbed run.
test-kills: setup
	$(BIN)/python -m pytest -m kills tests/faults

# Kills, damages, double starts, hosts that see different folders, signals, hangs: counted, in a table; then what
# saving and guards cost. An hour:
#   make test-faults FAULTS="--only kills --kills 20"
FAULTS ?=
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults.matrix $(FAULTS)
	$(BIN)/python -W ignore benchmarks/checkpoint_saving.py --output $(RUN)/saving
	$(BIN)/python -W ignore benchmarks/guards.py

# torchrun and deepspeed across hosts made of namespaces, which die, restart and have other clocks.
test-hosts: setup
	$(BIN)/python -m pytest -m hosts -rs tests/faults

# Jobs of examples/slurm on the SLURM of this machine, two nodes of two ranks; where there is none, how to get it:
test-slurm: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m slurm --timeout 1800 tests/slurm

# Other releases of torch than the locked one, each in an environment of its own, 7 GB that go again:
#   make test-versions TORCH="2.11.0 2.14.1"
TORCH ?= 2.11.0 2.13.0 2.14.1
test-versions: setup
	$(BIN)/python tests/versions/check.py $(TORCH)

# Exports of every solver in a real vLLM, text for text; in an environment of its own, 4 GB that go again.
test-vllm: setup
	$(BIN)/python -m tests.vllm.check

# Corpora in a bucket, by a real client of S3 and a server of this machine; in an environment of its own, 160 MB
# that go again.
test-remote: setup
	$(BIN)/python -m tests.data.remote

# examples/cleaning with datatrove, beside the locked packages, in an environment of its own: 230 MB that go again.
test-cleaning: setup
	$(BIN)/python -m tests.cleaning.check

# Exports of every solver in other releases of transformers, each in a folder of its own; an hour for all:
#   make test-transformers TRANSFORMERS="5.24.0 4.57.6"
TRANSFORMERS ?=
test-transformers: setup
	$(BIN)/python -m tests.versions.transformers_matrix $(TRANSFORMERS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not long and not layouts and not kills and not hosts and not slurm"

# Do the tests fail where they should? Single-line faults are seeded one at a time, in a copy; all rooms, or some:
#   make mutants PLACES="config hf"      make mutants PLACES=schedules.py
PLACES ?=
mutants: setup
	$(BIN)/python -m tests.mutants.run $(PLACES)

# Everything that can be known of the CUDA kernels without a GPU; says what it skips where nvcc is missing.
cuda-check: setup
	$(BIN)/python tools/cuda_check.py

# What holds on this machine's GPU, in nine minutes (docs/gpu.md says how without this environment):
#   make gpu-check GPU_CHECK="--only kernels step"
GPU_CHECK ?=
gpu-check: setup
	$(BIN)/python tools/gpu_acceptance.py --output gpu-report $(GPU_CHECK)

# The wheels that gpu-check wants where only torch is, for a machine without network:
#   make gpu-bundle GPU_PYTHON=3.12 BUNDLE=gpu-bundle
GPU_PYTHON ?= 3.12
BUNDLE ?= gpu-bundle
gpu-bundle: setup
	$(BIN)/python tools/gpu_bundle.py --python $(GPU_PYTHON) --output $(BUNDLE)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find megatron_iiet tests -name __pycache__ -type d -prune -exec rm -rf {} +
