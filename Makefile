# make serve   set up .venv, then serve the default model on port 8000
#              make serve MODEL=gemma3-270m PORT=8123 ARGS="--max-model-len 4096"
# make test    set up .venv, then run the tests        make test ARGS="-m nightly"
# make lint    format check, lint, types
# make clean   remove .venv and caches
#
# Variables: PYTHON (3.11-3.13), MODEL (folder, .gguf file, hub id or packaged name), PORT, ARGS, TORCH_INDEX (URL of an extra package index that torch may come from)

PYTHON ?= python3
PORT ?= 8000
ARGS ?=
MODEL ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := requirements-$(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu).txt
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

# Behind pip's own messages, of which the last ones seldom name the cause.
define NO_PACKAGES
echo "error: the packages could not be installed; pip says why above. They come from the package index that pip is set up \
for (pip config list). Without a network, fetch them where there is one, as wheels for Python $$($(BIN)/python -V | cut -d' ' -f2): \
pip download -d wheels setuptools -r $(REQUIREMENTS) . -- and here: PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make serve" >&2; exit 1
endef

.PHONY: serve test lint clean
.DELETE_ON_ERROR:

serve: $(INSTALLED)
	exec $(BIN)/python -m vllm.entrypoints.openai.api_server $(if $(MODEL),--model "$(MODEL)") --port $(PORT) $(ARGS)

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch goes first, by itself: the build that is then present satisfies every later `torch>=...`.
$(INSTALLED): pyproject.toml setup.py vllm/version.py $(REQUIREMENTS) $(wildcard csrc/cpu/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "Python 3.11, 3.12 or 3.13 is needed, this is %d.%d; name another one: make PYTHON=python3.12 ..." % v)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r $(REQUIREMENTS) || { $(NO_PACKAGES); }
	@$(PIP) install -e . || { $(NO_PACKAGES); }
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	@$(PIP) install -e '.[test,dev]' || { $(NO_PACKAGES); }
	@touch $@
