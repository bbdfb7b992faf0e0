# Everything from a fresh machine with Python (3.10 to 3.13), a C++20 compiler and make. With nvcc the build includes CUDA.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(shell find csrc cmake CMakeLists.txt setup.py pyproject.toml hpa_ext/VERSION -type f)
PYTEST_ARGS ?=

.PHONY: help install demo test test-cpp test-emulated test-python lint format bench benchmark gpu-check clean

help:
	@echo "make demo       build, then fine-tune, erode and harmonize the embedded LLaVA (three seeds)"
	@echo "make test       C++ and Python tests"
	@echo "make install    the virtual environment alone: dependencies and an editable install"
	@echo "make lint       ruff and clang-format, as CI runs them"
	@echo "make format     rewrite the sources as lint wants them"
	@echo "make bench      microbenchmarks on this machine, written to benchmarks/results/"
	@echo "make benchmark  methods compared on sequences of tuning steps, many hours; resumable"
	@echo "make gpu-check  build, GPU tests, compute-sanitizer and GPU benchmarks, on a machine with a CUDA device"
	@echo "make clean      remove builds and the virtual environment"

# --- the environment ------------------------------------------------------------------------------------------------
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.dependencies: constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11 cmake ninja \
	  torch transformers peft accelerate safetensors numpy pillow matplotlib pyyaml tqdm pytest ruff clang-format
	@touch $@

# Editable, so that Python sources need no new install; the native module is built again when its sources change.
$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE_SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c "import hpa_ext, json; print(json.dumps(hpa_ext.build_info(), indent=1))"
	@touch $@

install: $(VENV)/.installed

# --- what people run ------------------------------------------------------------------------------------------------
# Passive waiting: where cores are shared, threads that spin for each other make small models many times slower.
demo: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hpa-ext demo

test: test-cpp test-emulated test-python

test-cpp: $(VENV)/.dependencies
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cpp -G Ninja -DHPA_BUILD_PYTHON=OFF -DHPA_CUDA=OFF \
	  -DHPA_BUILD_TESTS=ON -DHPA_EMULATED_PYTHON=ON -DPython_EXECUTABLE="$(abspath $(BIN))/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/cpp --output-on-failure --parallel 2

# The operations' CUDA cases, their kernels run by the emulator of csrc/tests/cuda_emulation: logic, not hardware.
test-emulated: install test-cpp
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -m gpu --emulated-cuda=build/cpp/csrc/tests/emulated \
	  $(foreach op,gram gram_sm90 inverse_diagonal column_scores column_scores_list column_mask column_mask_list \
  project_merge project_merge_list routed_lora routed_lora_list routed_lora_backward low_rank_ops harmonize_list,python_tests/test_$(op).py)

test-python: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | \
	  xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

bench: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hpa-ext bench

benchmark: install
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hpa-ext bench continual

# In the virtual environment if there is one, else with PYTHON, which must then hold torch.
gpu-check:
	PYTHON="$(if $(wildcard $(BIN)/python),$(abspath $(BIN)/python),$(PYTHON))" bash benchmarks/gpu_check.sh

clean:
	rm -rf build dist *.egg-info hpa_ext/_C*.so .pytest_cache .ruff_cache $(VENV)
	find benchmarks examples hpa_ext python_tests -name __pycache__ -type d -prune -exec rm -rf {} +
