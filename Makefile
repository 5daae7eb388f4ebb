# The interface of this repository; `make` alone explains it.
PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv
UV := uv==0.13.9

.DEFAULT_GOAL := help
.PHONY: help demo test check test-quick test-gpu requirements snapshot kernels bench clean

help:  ## Show what there is to make
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO)/.ready  ## Start a real Triton server, detect on photographs, stop it (IMAGES="a.jpg b.png" for your own)
	$(DEMO)/bin/python -m weaksam_rt.demo --output out/demo $(if $(IMAGES),--images $(IMAGES))

test: $(DEV)/.ready check  ## Set up everything and run all tests
	$(DEV)/bin/python -m pytest

check: $(DEV)/.ready  ## Lint, types and dependency rules; edits nothing
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

test-gpu: $(DEV)/.ready  ## The tests that need a GPU; then every prompt kernel under compute-sanitizer
	$(DEV)/bin/python -m pytest -m gpu
	.ci/sanitize_gpu

test-quick: $(DEV)/.ready  ## The tests that need no server
	$(DEV)/bin/python -m pytest -m "not gpu and not slow and not integration"

requirements:  ## Pin the requirement files anew from pyproject.toml
	$(DEV)/bin/uv pip compile -q --universal --python-version 3.11 --no-emit-index-url --no-header \
		pyproject.toml --extra client --extra server requirements/demo.in -o requirements/demo.txt
	$(DEV)/bin/uv pip compile -q --universal --python-version 3.11 --no-emit-index-url --no-header \
		pyproject.toml --extra client --extra server --group dev -o requirements/dev.txt

snapshot: $(DEV)/.ready  ## Write triton_models/ anew from the models in assets/
	$(DEV)/bin/python -m export snapshot

kernels: $(DEV)/.ready  ## Compile the prompt kernels for every GPU architecture into the package
	$(DEV)/bin/python -m weaksam_rt.prompt_clustering.build

bench: $(DEV)/.ready  ## Measure the demo detector through the server, and peaks and clustering
	$(DEV)/bin/python -m benchmarks.detect_latency assets/demo_models
	$(DEV)/bin/python -m benchmarks.peaks
	$(DEV)/bin/python -m benchmarks.prompt_kernels

clean:  ## Remove environments and outputs
	rm -rf $(DEMO) $(DEV) out

$(DEMO)/.ready: requirements/demo.txt pyproject.toml
	$(call environment,$(DEMO),requirements/demo.txt)

$(DEV)/.ready: requirements/dev.txt pyproject.toml
	$(call environment,$(DEV),requirements/dev.txt)

define environment
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit("Python 3.11 or 3.12 is needed, " + sys.executable + " is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(1)/bin/uv pip install --quiet --python $(1) -r $(2)
	$(1)/bin/uv pip install --quiet --python $(1) --no-deps -e .
	@touch $@
endef
