"""Options, and what every test starts from: two threads, fixed seeds, and the devices to test on."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch

from hpa_ext import _C, ops
from hpa_ext.build_info import OPERATIONS
from hpa_ext.ops import _backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow as well")
    parser.addoption(
        "--torch-path", action="store_true", help="test the plain torch implementations instead of the native kernels"
    )

    parser.addoption(
        "--emulated-cuda",
        metavar="DIRECTORY",
        help="run the CUDA cases on the CPU through the emulated kernels (csrc/tests/cuda_emulation_tests.cmake)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--torch-path"):
        _backend.DTYPE_TAGS.clear()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --run-slow"))


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """The same numbers for a test whether it runs alone or among others, on two threads."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated_module(request: pytest.FixtureRequest) -> ModuleType | None:
    """The native module on the emulated CUDA kernels, if --emulated-cuda says where it is."""
    directory = request.config.getoption("--emulated-cuda")
    if directory is None:
        return None
    (path,) = Path(directory).glob("_C*.so")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(
    request: pytest.FixtureRequest, emulated_module: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """Where the tensors of the test lie; on CUDA the native kernels serve it, verified or not.

    With --emulated-cuda the CUDA cases keep their tensors on the CPU and take the operations' CUDA branch.
    """
    if request.param == "cuda" and emulated_module is not None:
        for name in (*OPERATIONS, "gram_list"):
            operation = importlib.import_module(f"hpa_ext.ops.{name}")
            monkeypatch.setattr(operation, "_C", emulated_module)
            monkeypatch.setattr(operation, "on_cuda", lambda tensor: True)
            monkeypatch.setattr(operation, "stream_of", lambda tensor: 0)
        yield torch.device("cpu")
        return
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        if not _C.build_info()["cuda_version"]:
            pytest.skip("hpa_ext was built without CUDA kernels")
    with ops.native_cuda():
        yield torch.device(request.param)
