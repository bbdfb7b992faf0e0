"""The C++ package installs, and the example that embeds it without Python builds and runs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["OFF", "AUTO"])
def test_example_builds_against_the_installed_package(cuda, tmp_path):
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on PATH")
    configure = ("cmake", "-G", "Ninja", "-S")
    run(
        *configure,
        ROOT,
        "-B",
        tmp_path / "hpa",
        "-DHPA_BUILD_PYTHON=OFF",
        "-DHPA_BUILD_TESTS=OFF",
        f"-DHPA_CUDA={cuda}",
    )
    run("cmake", "--build", tmp_path / "hpa")
    run("cmake", "--install", tmp_path / "hpa", "--prefix", tmp_path / "prefix")
    run(
        *configure,
        ROOT / "examples" / "embed_cpp",
        "-B",
        tmp_path / "app",
        f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}",
    )
    run("cmake", "--build", tmp_path / "app")
    programs = [path for path in (tmp_path / "app").iterdir() if path.is_file() and path.stat().st_mode & 0o111]
    (program,) = [path for path in programs if not path.suffix]
    assert "retained" in run(program)
