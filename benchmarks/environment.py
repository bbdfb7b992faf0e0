"""What a measurement was taken on: device, driver, versions, threads."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import hpa_ext

_PACKAGE = Path(__file__).resolve().parent


def source_root() -> Path | None:
    """The checkout that these benchmarks run from; None for an installed package."""
    root = _PACKAGE.parent
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


def environment(device: torch.device) -> dict[str, Any]:
    """Plain values; ``driver`` and ``cuda`` (torch's) are None where there is none."""
    info = hpa_ext.build_info()
    on_cuda = device.type == "cuda"
    return {
        "device": device_name(device),
        "driver": _driver() if on_cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(source_root()) or f"version {info['version']}",
        "threads": torch.get_num_threads(),
        "instruction_set": info["instruction_set"],
        "hpa_ext": info["version"],
        "compiler": info["compiler"],
        "native_cuda": info["cuda_version"] or None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The name that the GPU, or the processor, gives itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return (names[0] if names else platform.processor() or platform.machine() or "cpu").strip()


def _driver() -> str | None:
    lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return lines.splitlines()[0].strip() if lines else None


def _commit(root: Path | None) -> str | None:
    """The checked-out commit, with "-modified" if tracked files differ from it."""
    if root is None or not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return commit and f"{commit}{'-modified' if changed else ''}"


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
