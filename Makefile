# The interface of this repository; `make` alone explains it.
PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv
UV := uv==0.13.9

.DEFAULT_GOAL := help
.PHONY: help demo test check test-quick test-slow test-gpu requirements snapshot kernels bench clean

help:  ## Show what there is to make
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(DEMO)/.ready  ## Start a real Triton server, detect on photographs, stop it (IMAGES="a.jpg b.png" for your own)
	$(DEMO)/bin/python -m weaksam_rt.demo --output out/demo $(if $(IMAGES),--images $(IMAGES))

test: $(DEV)/.ready check  ## Set up everything and run all tests but the slow ones and those of a GPU
	$(DEV)/bin/python -m pytest

check: $(DEV)/.ready  ## Lint, types and dependency rules; edits nothing
	$(DEV)/bin/ruff format --check .
	$(DEV)/bin/ruff check .
	$(DEV)/bin/mypy
	$(DEV)/bin/lint-imports

test-slow: $(DEV)/.ready  ## The slow tests: soak, perf_analyzer, cold start, kills at every step of a release
	$(DEV)/bin/python -m pytest -m "slow and not gpu"

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

bench: $(DEV)/.ready  ## Short forms of the benchmarks that need no data of your own; results in out/bench
	$(DEV)/bin/python -m benchmarks serving assets/demo_models --concurrency 1 4 8 --loads 0.5 0.8 --repeats 2 --seconds 2 --slo-steps 3 --output out/bench/serving
	$(DEV)/bin/python -m benchmarks engines assets/demo_models --repeats 2 --requests 10 --seconds 2 --output out/bench/engines
	$(DEV)/bin/python -m benchmarks explain assets/demo_models --pipeline detect --output out/bench/explain_detect
	$(DEV)/bin/python -m benchmarks explain assets/demo_models --pipeline propose --repeats 2 --requests 2 --output out/bench/explain_propose
	$(DEV)/bin/python -m benchmarks proposals --models assets/demo_models --points-per-side 16 --images 1 --repeats 2 --output out/bench/proposals
	$(DEV)/bin/python -m benchmarks training --models assets/demo_models --repeats 2 --output out/bench/training
	$(DEV)/bin/python -m benchmarks cold_start assets/demo_models --starts 2 --output out/bench/cold_start
	$(DEV)/bin/python -m benchmarks soak assets/demo_models --minutes 2 --allowed-mib-an-hour 300 --output out/bench/soak
	$(DEV)/bin/python -m benchmarks peaks --repeats 2 --output out/bench/peaks
	$(DEV)/bin/python -m benchmarks prompt_kernels --repeats 2 --output out/bench/prompt_kernels
	$(DEV)/bin/python -m benchmarks mask_epilogue assets/demo_models --repeats 2 --output out/bench/mask_epilogue

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
