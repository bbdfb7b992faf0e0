"""The build and the package: build_info, import in a fresh interpreter, and that the CUDA sources compile."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hpa_ext
from hpa_ext.build_info import OPERATIONS

ROOT = Path(__file__).resolve().parent.parent
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")


def test_build_info():
    info = hpa_ext.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "cuda_version",
        "cuda_architectures",
        "cuda_devices",
        "torch",
        "instruction_sets",
        "instruction_set",
        "unverified_instruction_sets",
        "operations",
    }
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", info["version"])
    assert info["version"] == hpa_ext.__version__ == (ROOT / "hpa_ext" / "VERSION").read_text().strip()
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][0] == "portable"
    assert set(info["unverified_instruction_sets"]) <= set(info["instruction_sets"]) - {info["instruction_set"]}
    assert bool(info["cuda_version"]) == bool(info["cuda_architectures"])
    assert info["cuda_devices"] >= 0
    assert set(info["operations"]) == set(OPERATIONS)
    for served in info["operations"].values():
        assert served["cpu"] == "native"
        assert served["cuda"] == "native" or served["cuda"].startswith("torch (")
    json.dumps(info)  # plain values only


def test_operations():
    assert set(OPERATIONS) == {
        "gram",
        "inverse_diagonal",
        "column_scores",
        "column_mask",
        "project_merge",
        "routed_lora",
        "low_rank",
    }


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_stem_in_every_layer(name):
    for path in (
        f"csrc/include/hpa/{name}.h",
        f"csrc/cpu/{name}.cpp",
        f"csrc/cuda/{name}.cu",
        f"hpa_ext/ops/{name}.py",
        f"python_tests/test_{name}.py",
    ):
        assert (ROOT / path).is_file(), f"{path} is missing"


def test_a_fresh_interpreter_without_a_gpu_imports_it():
    script = "import hpa_ext, json; print(json.dumps(hpa_ext.build_info()))"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(hpa_ext.__file__).parent.parent)}
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert process.returncode == 0, process.stderr
    info = json.loads(process.stdout)
    assert info["version"] == hpa_ext.__version__
    assert info["cuda_devices"] == 0


def test_the_native_core_knows_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
            assert not re.search(r'#include\s*[<"](torch|ATen|c10)/', path.read_text()), path
            if path.name != "bindings.cpp":
                assert not re.search(r'#include\s*[<"](pybind11/|Python\.h)', path.read_text()), path


def test_no_fast_math():
    for path in (ROOT / "CMakeLists.txt", ROOT / "setup.py", *(ROOT / "cmake").glob("*.cmake")):
        assert not re.search(r"-ffast-math|use_fast_math|-Ofast", path.read_text()), path


def test_the_build_needs_no_torch():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    def names(requirements):
        return {re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower() for requirement in requirements}

    assert names(project["build-system"]["requires"]) == {"setuptools", "pybind11", "cmake", "ninja"}
    assert "torch" in names(project["project"]["dependencies"])
    for extra in project["project"].get("optional-dependencies", {}).values():
        assert "flash-attn" not in names(extra)
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_every_native_source_is_in_the_one_list():
    lists = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").glob("*.cmake")]
    listed = "".join(path.read_text() for path in lists)
    for path in [*(ROOT / "csrc" / "cpu").rglob("*.cpp"), *CUDA_SOURCES, *(ROOT / "csrc").glob("*.cpp")]:
        assert path.name in listed, f"{path.relative_to(ROOT)} is built by nobody"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile(source, tmp_path):
    command = [NVCC, "-std=c++20", "-gencode", "arch=compute_90a,code=sm_90a", "-c", str(source)]
    command += ["-I", str(ROOT / "csrc" / "include"), "-I", str(ROOT / "csrc"), "-o", str(tmp_path / "object.o")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "object.o").stat().st_size > 0
