# Two commands for a fresh machine, `make demo` and `make test`, and the pieces they are made of.

PYTHON ?= python3
# The environment to make and use. Empty: use PYTHON as it is and install nothing.
VENV ?= .venv
# In pip's words, split at spaces: TORCH="torch==2.13.0", TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch>=2.11
TRITON ?= triton>=3.6
# Test processes. More of them need more memory: torch and Triton's compiler are loaded in each.
JOBS ?= 2
# Of tests with many cases: all, few (each value of each parameter; what `make test` runs), or one. All before a release:
# make test CASES=all
CASES ?= all
# Further arguments for the demo, pytest or the benchmarks: make test-cpu ARGS="-k hashing"
ARGS ?=
# Where `make gpu` leaves its results and its log.
OUT ?= build/gpu

# Triton reads it at import, so only the interpret lane may see it.
unexport TRITON_INTERPRET
# Each of the many processes that tests start would compile all files of the package again.
unexport PYTHONDONTWRITEBYTECODE

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
ready = check-python
else
PY := $(VENV)/bin/python
# An environment is ready for an extra once this file is there. Its name is keyed to what it was made from.
KEY := $(shell { cat pyproject.toml; $(PYTHON) --version; printf '%s\n' '$(PYTHON)' '$(TORCH)' '$(TRITON)'; } 2>&1 \
	| sha256sum | cut -c 1-12)
STAMP := $(VENV)/.engram_kernels-$(KEY)
ready = $(STAMP)-$(1)
endif

# The oldest Triton supported, with a numpy that its interpreter takes, put before the environment's own by PYTHONPATH.
OLDEST := $(CURDIR)/build/triton-3.6.0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-cpu test-interpret test-machine test-compile mutation test-oldest test-oldest-machine test-oldest-torch \
	test-simulated-gpu simulated-gpu docs hub compile-report peers-report gpu commit-file bench lint check-python

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' Makefile
	@echo "PYTHON, VENV, TORCH, TRITON, JOBS, CASES, ARGS and OUT are explained at the top of the Makefile."

demo: $(call ready,demo) ## Engram on real text, and what each kernel does; needs no GPU
	$(PY) -m engram_kernels demo $(ARGS)

checks := test-cpu test-interpret test-compile test-machine mutation
ifneq ($(strip $(VENV)),)
checks := docs $(checks) test-oldest-machine
endif
test: CASES = few
test: $(checks) ## every check that needs no GPU, of many cases a few

test-cpu: $(call ready,test) ## the references, the CPU path, packaging
	$(PY) -m pytest -n $(JOBS) --lane cpu --cases $(CASES) tests $(ARGS)

test-interpret: $(call ready,test) ## the kernels in Triton's interpreter
	TRITON_INTERPRET=1 $(PY) -m pytest -n $(JOBS) --lane interpret --cases $(CASES) tests $(ARGS)

test-compile: $(call ready,test) ## the kernels compiled for four GPU generations, and what came out
	$(PY) -m pytest -n $(JOBS) --lane compile --cases $(CASES) tests $(ARGS)

# After the compile lane, whose compiled code is found on disk.
test-machine: $(call ready,test) ## the kernels' machine code (PTX), executed on a CPU: bounds, races, orders of warps
	$(PY) -m pytest -n $(JOBS) --lane machine --cases $(CASES) tests $(ARGS)

docs: $(call ready,test) ## the documents as a site, build/site; a link that leads nowhere ends it
	$(PY) -m tests.reports.site

hub: $(call ready,test) ## the package as a kernel of the Hugging Face Hub, build/hub: see docs/hub.md
	$(PY) -m tests.reports.hub

mutation: $(call ready,test) ## each kernel broken in one way at a time: does a test notice?
	$(PY) -m tests.mutation $(if $(filter all,$(CASES)),,--few )--jobs $(JOBS)

test-oldest: $(call ready,test) $(OLDEST) ## the lanes of kernels under Triton 3.6.0, a case of each test where they run; before every release
	PYTHONPATH=$(OLDEST) TRITON_INTERPRET=1 $(PY) -m pytest -n $(JOBS) --lane interpret -m 'not graphs' --cases one tests $(ARGS)
	PYTHONPATH=$(OLDEST) $(PY) -m pytest -n $(JOBS) --lane compile tests $(ARGS)
	$(MAKE) test-oldest-machine

test-oldest-machine: $(call ready,test) $(OLDEST) ## of these the last: the machine code for sm_80
	PYTHONPATH=$(OLDEST) $(PY) -m pytest -n $(JOBS) --lane machine --target sm_80 --cases one tests $(ARGS)

# Built for CUDA, as every torch of the index is: 5 GB to download, once. Triton's interpreter of then takes no later numpy.
OLDEST_TORCH := VENV=build/torch-2.11.0 TORCH=torch==2.11.0 TRITON='triton==3.6.0 numpy<2.4'

test-oldest-torch: ## the cpu and interpret lanes with the oldest torch supported, 2.11.0; before every release
	$(MAKE) test-cpu test-interpret $(OLDEST_TORCH)

test-simulated-gpu: ## the gpu lane, in that environment, on a GPU that is not there; before every release
	$(MAKE) simulated-gpu $(OLDEST_TORCH)

simulated-gpu: $(call ready,test)
	$(PY) -m tests.simulated_gpu -n $(JOBS) tests $(ARGS)
	$(PY) -m tests.simulated_gpu faults

compile-report: $(call ready,test) $(OLDEST) ## write what the kernels compile to and execute, under both Tritons
	$(PY) -m tests.reports.executed_report
	PYTHONPATH=$(OLDEST) $(PY) -m tests.reports.executed_report
	$(PY) -m tests.reports.compile_report
	PYTHONPATH=$(OLDEST) $(PY) -m tests.reports.compile_report
	$(PY) -m tests.reports.peers_report

peers-report: $(call ready,test) $(OLDEST) ## write what the kernels of other libraries, unpacked in peers/, execute
	$(PY) -m tests.reports.peers_report --peers peers
	PYTHONPATH=$(OLDEST) $(PY) -m tests.reports.peers_report --peers peers

gpu: check-python ## tests, then benchmarks on this machine's GPU, nothing installed: see docs/first_run.md
	$(PYTHON) -m tests.gpu --out $(OUT) $(ARGS)

commit-file: ## write the commit to COMMIT, for results of a copy of this folder that has no .git
	$(PYTHON) -c 'from bench.running.environment import commit; print(commit())' > COMMIT.part
	mv COMMIT.part COMMIT

bench: $(call ready,bench) ## benchmarks
	$(PY) -m bench $(ARGS)

lint: $(call ready,test) ## ruff, check and format; lint-imports, that rooms import one way
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(if $(strip $(VENV)),$(VENV)/bin/)lint-imports --no-cache

$(OLDEST): | $(call ready,test)
	rm -rf $@.part && mkdir -p $@.part
	$(PY) -m pip install --disable-pip-version-check --quiet --no-deps --target $@.part triton==3.6.0 'numpy<2.4'
	mv $@.part $@

minor_version = import sys; print("%d.%d" % sys.version_info[:2])

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null); \
		echo "engram_kernels needs Python 3.11 or later; $(PYTHON) is $${found:-missing or does not run}." \
			"Install a newer one, or run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }

ifneq ($(strip $(VENV)),)
# torch and Triton come first and alone, so that --index-url holds for torch only, and because a CPU build of torch does not
# ask for Triton. The variables are split by the shell ($$words), where `>=` is no redirection; set -f keeps `*` as it is.
# Older stamps go before anything is installed: a failure half-way must not leave one that lies.
$(STAMP)-%: | check-python
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		minor=$$($(PYTHON) -c '$(minor_version)'); \
		echo "engram_kernels: $(PYTHON) has no venv module. Install it (Debian, Ubuntu: apt install python$$minor-venv)," \
			"or use an environment that has the dependencies: make $(MAKECMDGOALS) VENV=" >&2; exit 1; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@want=$$($(PYTHON) -c '$(minor_version)'); have=$$($(PY) -c '$(minor_version)'); [ "$$want" = "$$have" ] || { \
		echo "engram_kernels: $(VENV) holds Python $$have and $(PYTHON) is $$want." \
			"Remove $(VENV), or run: make $(MAKECMDGOALS) VENV=.venv$$want" >&2; exit 1; }
	@$(PY) -c 'import pip' 2>/dev/null || { \
		echo "engram_kernels: $(PY) has no pip. Install it with: $(PY) -m ensurepip" >&2; exit 1; }
	@for old in $(VENV)/.engram_kernels-*; do case $$old in $(STAMP)-*) ;; *) rm -f "$$old" ;; esac; done
	@echo "Setting up $(VENV), once. torch is a large download."
	set -f; words='$(TORCH)'; $(PY) -m pip install --disable-pip-version-check $$words
	set -f; words='$(TRITON)'; $(PY) -m pip install --disable-pip-version-check --quiet $$words
	$(PY) -m pip install --disable-pip-version-check --quiet --editable '.[$*]'
	@touch $@
endif
