"""``hpa-ext info``: what this installation is and what serves each operation here."""

from __future__ import annotations

import argparse
import json

from hpa_ext.build_info import build_info


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser("info", help="versions, instruction sets, and which kernel serves which operation")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it."""
    info = build_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    cuda = f"{info['cuda_version']} for {', '.join(info['cuda_architectures'])}" if info["cuda_version"] else "none"
    print(f"hpa_ext          {info['version']} ({info['compiler']})")
    print(f"torch            {info['torch']}")
    print(f"CUDA kernels     {cuda}; devices: {info['cuda_devices']}")
    print(f"instruction set  {info['instruction_set']} (of {', '.join(info['instruction_sets'])})")
    if info["unverified_instruction_sets"]:
        print(f"                 on request, not yet verified: {', '.join(info['unverified_instruction_sets'])}")
    print()
    width = max(map(len, info["operations"]))
    print(f"{'operation'.ljust(width)}  {'CPU tensors':12}  CUDA tensors")
    for name, served in info["operations"].items():
        print(f"{name.ljust(width)}  {served['cpu']:12}  {served['cuda']}")
    return 0
