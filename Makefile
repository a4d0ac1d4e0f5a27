# make demo    the main job, end to end, on an embedded default
# make test    lint, types, walls, tests
# make lint    the first three of them
# make venv    only the set-up, which the others do by themselves
# make peers   environments of their own for what the benchmarks compare with (peers*.txt)
# make clean   caches and build outputs; make distclean also .venv and .peers
#
# PYTHON=python3.12 picks an interpreter. On a Linux machine without a GPU, the small build of torch:
#   make TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell grep -E '^torch==' constraints.txt)
pip = $(if $(shell command -v uv),uv pip install --python $(1),$(1) -m pip install --disable-pip-version-check)
PIP := $(call pip,$(BIN)/python)
PEERS_STAMP := .peers/.installed
PEERS_PIP := $(call pip,.peers/bin/python)

.PHONY: demo test lint venv peers clean distclean
.NOTPARALLEL:

demo: $(STAMP)
	$(BIN)/python -m pipelines.demo

test: lint
	@echo "== pytest"
	@$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== lint-imports"
	@$(BIN)/lint-imports

venv: $(STAMP)

# torch goes first and alone: the resolver then keeps the build that is there.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else \
	  f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; try: make PYTHON=python3.12")'
	@test -x $(BIN)/python || { echo "== creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "== installing $(TORCH) (one to three minutes the first time)"
	@$(PIP) $(TORCH_ARGS) $(TORCH)
	@echo "== installing the rest of constraints.txt"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

peers: $(PEERS_STAMP) .peers-streaming/.installed

# Its pins exclude those of the others; its trainers run without what it pins.
UNPINNED := dictionary-learning==0.1.0

# The same torch and libraries as ours, so that the tools are compared and not their dependencies.
$(PEERS_STAMP): peers.txt constraints.txt
	@test -x .peers/bin/python || { echo "== creating .peers"; $(PYTHON) -m venv .peers; }
	@echo "== installing $(TORCH) for the peers"
	@$(PEERS_PIP) $(TORCH_ARGS) $(TORCH)
	@echo "== installing peers.txt"
	@$(PEERS_PIP) -c constraints.txt -r peers.txt
	@$(PEERS_PIP) --no-deps $(UNPINNED)
	@touch $@

# mosaicml's streaming wants other versions of what the others share.
.peers-streaming/.installed: peers-streaming.txt
	@test -x .peers-streaming/bin/python || $(PYTHON) -m venv .peers-streaming
	@echo "== installing peers-streaming.txt"
	@$(call pip,.peers-streaming/bin/python) $(TORCH_ARGS) $(TORCH)
	@$(call pip,.peers-streaming/bin/python) $(TORCH) -r peers-streaming.txt
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.peers*/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .peers .peers-streaming
