# Every target sets up its own environment in .venv first, and again only when what it is made of changes.
#
#   make demo       DeepSeek-V2-Lite and -V3 geometry in eager, Inductor and dsopt, side by side
#   make test       the quick tests           make test-all   every test
#   make lint       ruff check and format     make clean      remove .venv and everything built
#   make aot        compiles the Triton kernels for GPUs that need not be here; fails where registers spill
#   make sanitize   tests the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
#   make valgrind   runs them on small samples under valgrind's memcheck
#
# PYTHON=... names the interpreter to build .venv from; ARGS=... goes to the demo, to pytest or to aot.
#
# On a machine with an NVIDIA GPU, in the interpreter PYTHON itself, without a .venv and without a network:
#
#   make gpu        the tests that need a GPU, and those of the CPU side under that machine's versions
#   make gpu-bench PART=ops|moe|attn|model|sanitize     measures, with JSON in $OUT, or build/gpu

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint aot sanitize valgrind gpu gpu-bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.dsopt-installed
TORCH := torch==2.13.0
# the version that make aot's verdict on spills is for
TRITON := triton==3.6.0
ARGS ?=
# two workers of one thread each: most of a test is tracing, which knows one thread
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal
NATIVE_TESTS := $(wildcard tests/kernels/test_cpu_*.py)
# a build of its own, package and all, which the tests find before the one in .venv
SANITIZED := $(CURDIR)/build/sanitize
SOURCES := pyproject.toml setup.py $(sort $(shell find csrc -type f 2>/dev/null))

help:
	@sed -n 's/^#   //p' Makefile

setup: $(STAMP)

demo: $(STAMP)
	@$(BIN)/dsopt demo $(ARGS)

test: $(STAMP)
	@$(PYTEST) $(ARGS)

test-all: $(STAMP)
	@$(PYTEST) -m "slow or not slow" $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

aot: $(STAMP)
	@$(BIN)/python -m dsopt.aot $(ARGS)

sanitize: $(STAMP)
	@runtime() { "$${CXX:-c++}" -print-file-name=lib$$1.so; }
	if [ ! -e "$$(runtime asan)" ]; then
	  echo "$${CXX:-c++} has no libasan.so; make sanitize needs GCC with its sanitizers (Debian, Ubuntu: apt install g++)" >&2
	  exit 1
	fi
	DSOPT_CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
	  $(BIN)/python setup.py -q build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	# libstdc++ beside it, or exceptions of libraries that are loaded later are not found
	export LD_PRELOAD="$$(runtime asan) $$(runtime stdc++)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib
	$(PYTEST) $(NATIVE_TESTS) $(ARGS)

# valgrind knows no AVX-512; what it says about Python, PyTorch and what they load is not for us
valgrind: $(STAMP)
	@if ! command -v valgrind >/dev/null 2>&1; then
	  echo "valgrind is not installed (Debian, Ubuntu: apt install valgrind)" >&2
	  exit 1
	fi
	mkdir -p build
	OMP_NUM_THREADS=1 PYTHONMALLOC=malloc valgrind -q --log-file=build/valgrind.log \
	  $(BIN)/python tests/support/native_samples.py avx2
	if grep -q 'dsopt::' build/valgrind.log; then
	  echo "reports with the native kernels in them, in build/valgrind.log:" >&2
	  grep 'dsopt::' build/valgrind.log >&2
	  exit 1
	fi

gpu:
	@$(or $(PYTHON),python3) tests/gpu/run.py tests

gpu-bench:
	@$(or $(PYTHON),python3) tests/gpu/run.py $(or $(PART),ops)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
	find dsopt -name '*.so' -delete

# PyTorch goes first and pinned on a host without an NVIDIA GPU. On a host with one, a CUDA build that the
# interpreter or .venv already has is kept, and anything to be downloaded is announced.
$(STAMP): $(SOURCES)
	@say() { printf '\033[1m[setup]\033[0m %s\n' "$$*"; }
	has_cuda_torch() { "$$1" -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null; }
	gpu=no
	if command -v nvidia-smi >/dev/null 2>&1 || [ -d /proc/driver/nvidia ]; then gpu=yes; fi
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	  rm -rf $(VENV)
	  python= found=
	  for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10 python; do
	    version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
	    if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
	    then python=$$candidate; break; fi
	    found="$$found $$candidate ($$version)"
	  done
	  if [ -z "$$python" ]; then
	    echo "dsopt needs Python >= 3.10 with the venv module; found:$${found:- no Python}." >&2
	    echo "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2
	    exit 1
	  fi
	  site=
	  if [ $$gpu = yes ] && has_cuda_torch "$$python"; then site=--system-site-packages; fi
	  say "creating $(VENV) from $$python ($$version)$${site:+, which brings its own CUDA build of PyTorch}"
	  "$$python" -m venv $$site $(VENV)
	fi
	install() { $(BIN)/python -m pip install -qq --disable-pip-version-check "$$@"; }
	if [ $$gpu = no ]; then
	  say "installing $(TORCH) (no NVIDIA GPU here)"
	  install '$(TORCH)'
	  if [ "$$(uname -sm)" = 'Linux x86_64' ]; then install '$(TRITON)'; fi
	elif has_cuda_torch $(BIN)/python; then
	  say "keeping the CUDA build of PyTorch that is installed"
	else
	  say "an NVIDIA GPU is here: downloading PyTorch with CUDA next, about 3 GB; interrupt now to install your own into $(VENV)"
	  install 'torch>=2.11'
	fi
	say "installing the tools and libraries"
	install 'setuptools>=77' wheel 'pybind11>=2.12'
	if command -v "$${CXX:-c++}" >/dev/null 2>&1; then say "installing dsopt, with its C++ kernels"
	else say "installing dsopt; there is no C++ compiler here, so without its C++ kernels"; fi
	install --no-build-isolation --editable '.[dev]'
	touch $@
	say "ready: $$($(BIN)/python -c 'import torch, transformers as t; print(f"PyTorch {torch.__version__}, transformers {t.__version__}")' 2>/dev/null)"
