# The front door. `make serve` and `make test` are each enough on a fresh machine with Python 3.11 or later.
# `make help` lists the targets and their variables.

SHELL := /bin/sh
.DEFAULT_GOAL := help

TORCH := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
SERVE := $(STAMPS)/serve$(if $(EXTRAS),-$(EXTRAS))
DEV := $(STAMPS)/dev$(if $(EXTRAS),-$(EXTRAS))
BENCH := $(STAMPS)/bench$(if $(EXTRAS),-$(EXTRAS))

ARGS ?=
EXTRAS ?=
HOST ?= http://127.0.0.1:8000
USERS ?= 8
WORKERS ?= 2
RUN_TIME ?= 60s
STOP_TIMEOUT ?= 120
RATE ?= 0

comma := ,
.PHONY: help serve test test-gpu check bench bench-gpu interference mixing decode verify_cost chaos load clean

help: ## List the targets
	@echo "Longreach. Targets:"
	@sed -n 's/^\([a-z_-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 21
	@echo "Variables:"
	@echo "  PYTHON=python3.12           the interpreter that .venv is made from (3.11 or later)"
	@echo "  ARGS='--port 9000'          passed on by serve, test, bench and load"
	@echo "  EXTRAS=gpu                  further extras of pyproject.toml to install, separated by commas"
	@echo "  WORKERS=2                   processes that share the tests; 0: one, which a debugger needs"
	@echo "  HOST USERS RUN_TIME RATE    load: server, concurrent users, duration, requests per second (0: closed loop)"

serve: $(SERVE) ## Install what is needed, fetch the demo models, serve on 127.0.0.1:8000
	$(BIN)/longreach serve $(ARGS)

test: $(DEV) ## Install what is needed and run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-gpu: $(DEV) ## On a machine with an NVIDIA GPU: its kernels against fp32 references, memory flat in length
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: torch sees no CUDA device")'
	$(BIN)/python -m pytest tests/gpu tests/kernels/triton $(ARGS)

check: $(DEV) ## Lint, format, types, documents, Dockerfile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py tests/test_documents.py
	@if [ -x $(BIN)/hadolint ]; then echo "$(BIN)/hadolint Dockerfile"; $(BIN)/hadolint Dockerfile; \
	else echo "check: the Dockerfile is not linted: there is no hadolint binary for this platform in $(BIN)"; fi

bench: $(BENCH) ## Time every attention backend against torch's own attention
	$(BIN)/python -m kernels.bench $(ARGS)

bench-gpu: $(BENCH) ## The same on an NVIDIA GPU, against SDPA, FlexAttention and flash-attention
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("bench-gpu: torch sees no CUDA device")'
	$(BIN)/python -m kernels.bench_gpu --json docs/kernels-gpu.json --plot docs/kernels-gpu.png $(ARGS)

interference: $(SERVE) ## Short requests beside a long one, on a running server (HOST=...)
	$(BIN)/python -m loadtests.interference --host $(HOST) $(ARGS)

mixing: $(SERVE) ## Eight attentions at once against one at a time, on a running server (HOST=...)
	$(BIN)/python -m loadtests.mixing --host $(HOST) $(ARGS)

decode: $(SERVE) ## Tokens per second of 16 sequences and of one, on a running server (HOST=...)
	$(BIN)/python -m loadtests.decode_batch --host $(HOST) $(ARGS)

verify_cost: $(SERVE) ## What measuring the error costs, on a running server (HOST=...)
	$(BIN)/python -m loadtests.verify_cost --host $(HOST) $(ARGS)

chaos: $(SERVE) ## 10,000 mixed requests against a server of its own
	$(BIN)/python -m loadtests.chaos --serve $(ARGS)

load: $(STAMPS)/load ## Load test a running server (HOST=...) and print a summary
	$(BIN)/python -m locust -f loadtests/locustfile.py --headless --only-summary --host $(HOST) --users $(USERS) \
	  --spawn-rate $(USERS) --run-time $(RUN_TIME) --stop-timeout $(STOP_TIMEOUT) --arrival-rate $(RATE) $(ARGS)

clean: ## Remove .venv and every cache that the tools made here
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find kernels models service loadtests tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is younger than pyproject.toml when what it stands for is installed, so a second run starts at once and
# a changed pyproject.toml installs again. torch goes first and by itself: pip takes a CPU build where it finds one.
retry = { echo; echo "make: installing $(1) failed; pip's last lines above say why (network, disk space, or a package" \
	"without a build for this Python). Then run the same make command again: it goes on where it stopped."; exit 1; } >&2

# A copied or moved .venv still runs the interpreter and the packages of the place where it was made.
made_here = { $(BIN)/python -m pip --version >/dev/null 2>&1 && grep -q '^\#!$(CURDIR)/\|exec.*$(CURDIR)/' $(BIN)/pip; }
ifneq ($(shell cat $(STAMPS)/venv 2>/dev/null),$(CURDIR))
.PHONY: $(STAMPS)/venv
endif

$(STAMPS)/venv:
	@python='$(PYTHON)'; \
	if [ -z "$$python" ]; then \
	  for candidate in python3.11 python3.12 python3.13 python3.14 python3; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done; \
	elif ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  echo "make: PYTHON=$$python is not a Python 3.11 or later that runs here." >&2; exit 1; \
	fi; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.11 or later found. Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "make: $$python has no venv module. Install it (Debian, Ubuntu: apt-get install python3-venv) and run make again." >&2; exit 1; \
	fi; \
	if [ -e $(VENV) ] && ! $(made_here); then \
	  echo "make: $(VENV) was made elsewhere or only half made. Remove it with 'make clean' and run make again." >&2; exit 1; \
	fi; \
	if [ ! -e $(VENV) ]; then \
	  echo "make: creating $(VENV) with $$($$python --version)"; \
	  $$python -m venv $(VENV) || { echo "make: '$$python -m venv $(VENV)' failed, see above." >&2; exit 1; }; \
	fi; \
	mkdir -p $(STAMPS) && echo '$(CURDIR)' >$@

$(STAMPS)/torch-$(TORCH): | $(STAMPS)/venv
	@echo "make: installing torch $(TORCH) (a CPU build where pip finds one, else a CUDA build of several GB)"
	@$(BIN)/python -m pip install torch==$(TORCH) || $(call retry,torch $(TORCH))
	@touch $@

$(SERVE): pyproject.toml | $(STAMPS)/torch-$(TORCH)
	@echo "make: installing longreach and what it needs to serve"
	@$(BIN)/python -m pip install -e '.$(if $(EXTRAS),[$(EXTRAS)])' || $(call retry,longreach)
	@touch $@

$(DEV): pyproject.toml | $(STAMPS)/torch-$(TORCH)
	@echo "make: installing longreach and what its tests need"
	@$(BIN)/python -m pip install -e '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]' || $(call retry,longreach's test dependencies)
	@touch $@ $(SERVE) $(STAMPS)/load

$(BENCH): pyproject.toml | $(STAMPS)/torch-$(TORCH)
	@echo "make: installing longreach and what its benches draw with"
	@$(BIN)/python -m pip install -e '.[bench$(if $(EXTRAS),$(comma)$(EXTRAS))]' || $(call retry,longreach's bench dependencies)
	@touch $@ $(SERVE)

# A load generator needs neither torch nor the packages.
$(STAMPS)/load: pyproject.toml | $(STAMPS)/venv
	@echo "make: installing locust"
	@$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("$<", "rb"))["project"]["optional-dependencies"]; \
	  print(*extras["load"], sep="\n")' >$@.txt
	@$(BIN)/python -m pip install -r $@.txt || $(call retry,locust)
	@touch $@
