# Every target sets up what it needs in .venv; nothing else on the machine is touched.
# PYTHON=python3.12 chooses the interpreter, PIP_ARGS=... reaches every `pip install`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what is imported when it is: a small part of what is installed. That saves a third of the set-up.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt $(PIP_ARGS)
INSTALLED := $(VENV)/.installed
DEPLOY_TOOLS := $(VENV)/.deploy-tools
PROTOS := $(sort $(wildcard protos/segrpc/v1/*.proto protos/segrpc/admin/v1/*.proto))
STUBS := generated/python
# The reference in the tests' own process and the servers beside it must not spin for each other's cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest
# Tests often wait for servers: three files at a time keep two cores busy, each with servers of its own.
TOGETHER := -n 3 --dist loadfile --no-loadscope-reorder
# What the contract must stay compatible with: the last release.
BASE ?= $(shell git describe --tags --abbrev=0 2>/dev/null || echo main)

# Seconds for each target of `make fuzz`.
FUZZ_SECONDS ?= 300
FUZZ_TARGETS := counts images messages sources tensors

# Of `make soak`, `make overload` and `make chaos`, whose results go into reliability-results/.
SECONDS ?= 600
# The model of the long runs: sam2, grabcut or light; without it the run's own.
MODEL ?=

DEPLOY := service/deploy
MANIFESTS := $(filter-out %/kustomization.yaml,$(wildcard $(DEPLOY)/kustomize/base/*.yaml))
# The oldest Kubernetes that the manifests are for. kubectl is used if it is there: it is in no registry of packages.
KUBERNETES := 1.30
KUSTOMIZE ?= $(if $(shell command -v kubectl),kubectl kustomize,$(if $(shell command -v kustomize),kustomize build))
VALIDATE := $(BIN)/kubernetes-validate --kubernetes-version $(KUBERNETES) --strict --quiet

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-large fuzz soak overload chaos lint lint-deploy audit fix protos check-protos bench serve clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## create .venv with all that development needs

# torch comes first: the build of sam2 imports it, and its own torch requirement must find the pinned one.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes, about 2 GB) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools hatchling editables
	SAM2_BUILD_CUDA=0 $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## segment the shipped photos and write overlays to demo-output/
	$(BIN)/python -m tests.demo --output demo-output

test: $(INSTALLED) lint check-protos ## run all checks and tests, without the larger SAM 2 sizes
	$(PYTEST) -m "not large" $(TOGETHER) $(PYTEST_ARGS)

test-large: $(INSTALLED) ## compare the larger SAM 2 sizes with the reference; minutes, and CI runs it too
	$(PYTEST) -m large tests/parity tests/unit/models

# All targets run, even if one fails; inputs that fail are in fuzz-results/.
fuzz: $(INSTALLED) ## fuzz each target for FUZZ_SECONDS=300, guided by coverage; needs a wheel of atheris
	$(PIP) --no-build-isolation --editable '.[fuzz]'
	@failed=; for target in $(FUZZ_TARGETS); \
	  do $(BIN)/python -m tests.fuzz $$target --seconds $(FUZZ_SECONDS) || failed="$$failed $$target"; done; \
	  test -z "$$failed" || { echo "failed:$$failed; see fuzz-results/"; exit 1; }

soak: $(INSTALLED) ## edit in 64 sessions and call beside them for SECONDS=600 (MODEL=sam2|grabcut|light)
	$(BIN)/python -m tests.reliability soak --seconds $(SECONDS) $(if $(MODEL),--model $(MODEL))

overload: $(INSTALLED) ## ask for twice of what a server can do, SECONDS=600 in all
	$(BIN)/python -m tests.reliability overload --seconds $(SECONDS) $(if $(MODEL),--model $(MODEL))

chaos: $(INSTALLED) ## kill workers and cut connections while sessions edit, for SECONDS=600
	$(BIN)/python -m tests.reliability chaos --seconds $(SECONDS) $(if $(MODEL),--model $(MODEL))

lint: $(INSTALLED) ## check format, lint, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint

# The project again, with an extra; all else is there.
$(DEPLOY_TOOLS): $(INSTALLED)
	$(PIP) --no-build-isolation --editable '.[deploy]'
	@touch $@

lint-deploy: $(DEPLOY_TOOLS) ## check the Dockerfile, the manifests and, where systemd is, the unit
	$(BIN)/hadolint $(DEPLOY)/Dockerfile
	$(BIN)/yamllint --strict --config-file $(DEPLOY)/.yamllint.yaml $(DEPLOY)/kustomize
	$(VALIDATE) $(MANIFESTS)
	@mkdir -p $(VENV)/rendered && rm -rf $(VENV)/rendered/*
ifneq ($(KUSTOMIZE),)
	$(KUSTOMIZE) $(DEPLOY)/kustomize/base > $(VENV)/rendered/base.yaml
	$(KUSTOMIZE) $(DEPLOY)/kustomize/gpu > $(VENV)/rendered/gpu.yaml
	$(VALIDATE) $(VENV)/rendered/base.yaml $(VENV)/rendered/gpu.yaml
else
	@echo "neither kubectl nor kustomize is there: the overlay was not rendered"
endif
	@if command -v systemd-analyze > /dev/null; then \
	  sed 's|^ExecStart=[^ ]*|ExecStart=/bin/true|' $(DEPLOY)/segrpc-server.service > $(VENV)/rendered/segrpc-server.service && \
	  systemd-analyze verify $(VENV)/rendered/segrpc-server.service && echo "the unit is right"; \
	  else echo "systemd-analyze is not there: the unit was not checked"; fi

# --strict: what could not be looked up is an error, not something safe.
audit: $(DEPLOY_TOOLS) ## write dist/sbom.cdx.json (CycloneDX) and look the pinned versions up among known vulnerabilities
	@mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file dist/sbom.cdx.json $(BIN)/python
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

fix: $(INSTALLED) ## repair format and lint where that can be done by machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

# $(1): where the stubs go.
define generate
	$(BIN)/python -m grpc_tools.protoc -I protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)
	@touch $(1)/segrpc/v1/py.typed $(1)/segrpc/admin/v1/py.typed
endef

protos: $(INSTALLED) ## generate the stubs in generated/ anew
	rm -rf $(STUBS)/segrpc
	$(call generate,$(STUBS))

check-protos: $(INSTALLED) ## prove that the stubs are fresh and the contract breaks no client of the last release
	rm -rf $(VENV)/fresh-stubs && mkdir $(VENV)/fresh-stubs
	$(call generate,$(VENV)/fresh-stubs)
	diff --recursive --exclude __pycache__ $(VENV)/fresh-stubs $(STUBS)
	@if git rev-parse --quiet --verify '$(BASE):protos' > /dev/null; \
	  then $(BIN)/buf breaking --against '.git#ref=$(BASE)'; \
	  else echo "no protos at $(BASE): nothing that could break"; fi

bench: $(INSTALLED) ## measure beside the in-process reference, into bench-results/ (QUICK=1: within 3 minutes)
	$(BIN)/python -m tests.benchmarks $(if $(QUICK),--quick) $(BENCH_ARGS)

serve: $(INSTALLED) ## serve the GrabCut model on 127.0.0.1:50051 (ARGS=... adds options)
	$(BIN)/segrpc-server serve $(ARGS)

clean: ## remove what the other targets made
	rm -rf $(VENV) dist demo-output bench-results fuzz-results reliability-results .pytest_cache .mypy_cache .ruff_cache .hypothesis
