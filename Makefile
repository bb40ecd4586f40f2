# Everything a newcomer or CI needs; each target sets up what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The vLLM to install; docs/vllm-versions.md lists those that hold.
VLLM ?= 0.32.0
# vLLM pins a torch. On a machine without a GPU a CPU build saves gigabytes: name the index that has it, e.g.
# make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH = torch==$(shell $(PYTHON) f2l_vllm/vllm_versions.py $(VLLM))
TORCH_INDEX ?=
FUZZ_SECONDS ?= 600
SOAK_SECONDS ?= 3600
# Several modules at a time keep two cores busy: unit tests wait for short processes and clocks, others for servers.
PARALLEL ?= --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup clients serve demo cluster-demo check unit test test-clients test-next test-full-size fuzz soak lint format site bench page model release clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create .venv with everything in it (once; 6.3 GB)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or later is needed, this is {v.major}.{v.minor}; try: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' vllm==$(VLLM)
	touch $@

CLIENTS := .venv-clients
clients: $(CLIENTS)/.installed ## Create .venv-clients with what applications ask with, for its tests

$(CLIENTS)/.installed: tests/e2e/server/clients.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

serve: $(STAMP) ## Serve the default model on http://127.0.0.1:8000
	$(BIN)/f2l-vllm serve

demo: $(STAMP) ## The whole way once: video in, answers out, compared with frames in context
	$(BIN)/f2l-vllm demo

cluster-demo: $(STAMP) ## Two engines, two fronts and a worker as one service; one engine is killed, questions go on
	$(BIN)/f2l-vllm cluster demo

check: lint unit ## The gate before a commit: style, types, who imports whom, unit tests

unit: $(STAMP) ## Run the tests that start no server, no Ray and no engine
	$(BIN)/python -m pytest tests/unit -n 3 $(PARALLEL)

test: unit ## Run the tests, unit and end to end
	$(BIN)/python -m pytest tests/e2e -n 2 $(PARALLEL)

test-clients: $(STAMP) clients ## Run what docs/integrations.md shows, with the packages of clients.txt
	$(BIN)/python -m pytest tests/e2e/server/test_documents_over_http.py -k "integration or notebook"

test-next: VLLM = 0.33.0
test-next: ## Run unit tests, contracts, parity and leaks with another vLLM, installed in build/ (VLLM=0.33.0)
	$(MAKE) setup VENV=build/vllm-$(VLLM) VLLM=$(VLLM)
	build/vllm-$(VLLM)/bin/python -m pytest tests/unit -n 3 $(PARALLEL)
	build/vllm-$(VLLM)/bin/python -m pytest tests/e2e/cpu tests/e2e/engine tests/e2e/server/test_leaks_over_http.py -n 2 $(PARALLEL)

test-full-size: $(STAMP) ## Run the tests on models of the released shapes (10 minutes, 15 GB of memory)
	$(BIN)/python -m pytest tests/soak/full_size -m full_size

fuzz: $(STAMP) ## Attack a server of its own with mutated requests (10 minutes; FUZZ_SECONDS=60 for one)
	$(BIN)/python -m tests.soak.fuzz --seconds $(FUZZ_SECONDS) --json build/fuzz.json

soak: $(STAMP) ## Harm servers of one PostgreSQL and one store, and check what clients saw (an hour; SOAK_SECONDS=300 for less)
	$(BIN)/python -m tests.soak.history --seconds $(SOAK_SECONDS) --json build/history.json

lint: $(STAMP) ## Check style, types, who imports whom, and what launches
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint launch/Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec launch/compose.yaml
	$(BIN)/shellcheck .ci/run .ci/release launch/local.sh

format: $(STAMP) ## Rewrite in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(STAMP) ## Build the documentation as a site in build/site; a warning fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP) ## Measure start-up, upload to ready, first token and memory of the default model
	$(BIN)/python -m benchmarks.startup --json benchmarks/results/startup.json

page: $(STAMP) ## Make a page of 24 videos with every answer, in build/page
	rm -rf build/page
	$(BIN)/f2l-vllm eval --world held-out --videos 24 --seed 7 --through transformers --work build/page-work --browse build/page

model: $(STAMP) ## Make the default model again, in build/model (40 minutes on a core; goes on where it was stopped)
	$(BIN)/f2l-vllm make-model build/model

release: $(STAMP) ## Build wheel, sdist and bill of materials in dist/; refuses changes and a version without its changelog
	PYTHON=$(BIN)/python .ci/release

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
