"""``hpa-ext``: one module for each command, each with ``add_parser(subparsers)`` and ``run(args) -> exit code``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hpa_ext import __version__
from hpa_ext.cli import (
    adapter,
    bench,
    bench_continual,
    calibrate,
    cvit,
    datasets,
    demo,
    evaluate,
    grams,
    harmonize,
    hide,
    info,
    merge,
    safety_set,
    verify,
)
from hpa_ext.errors import NumericalError

_COMMANDS = (
    demo,
    safety_set,
    calibrate,
    grams,
    harmonize,
    adapter,
    merge,
    verify,
    hide,
    bench,
    bench_continual,
    datasets,
    evaluate,
    cvit,
    info,
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="hpa-ext", description="Keep safety and earlier tasks after tuning.")
    top.add_argument("--version", action="version", version=f"hpa_ext {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:2] == ["bench", "continual"]:  # its options have nothing in common with those of the other benchmarks
        argv[:2] = ["bench-continual"]
    args = parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except KeyboardInterrupt as error:
        print(f"\n{error or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has gone; there is nobody to tell
        return 1
    except (ValueError, TypeError, OSError) as error:
        print(f"hpa-ext: {error}", file=sys.stderr)
        return 2
    except (NumericalError, RuntimeError) as error:
        print(f"hpa-ext: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
