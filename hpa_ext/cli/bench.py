"""``hpa-ext bench``: each operation against what others do, on this machine."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import secrets
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from hpa_ext import ops
from hpa_ext.build_info import OPERATIONS, build_info

NAMES = (*OPERATIONS, "gram_kernels", "harmonize", "compromise", "hide")
_PICTURES = (".png", ".svg", ".pdf")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the operations against what others do",
        description="Measures each operation against its peer in pairs, and against the device's own ceilings, after "
        "checking the result against float64. Prints a table, and writes the numbers to benchmarks/results/ of the "
        "checkout, or to ./hpa-ext-benchmarks/.",
        epilog="`hpa-ext bench continual --help`: methods on sequences of tuning steps. Exit code: 0, or 1 if a "
        "result was wrong (nothing is saved then) or the picture could not be written, or 2 for wrong usage.",
    )
    parser.add_argument("op", nargs="*", help=f"what to measure, of: {', '.join(NAMES)}; all by default")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny sizes, to see that all runs; saved only with --out")
    size.add_argument("--full", action="store_true", help="larger sizes too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (default: cpu)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads of both sides (default: torch's)")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="pairs of each measurement (default: by time)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--out", type=Path, metavar="FILE", help="where to write the numbers")
    target.add_argument("--no-save", action="store_true", help="only print")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw how cost grows (.png, .svg or .pdf); best with --full"
    )
    parser.add_argument(
        "--instruction-set", metavar="NAME", help="the CPU kernels to use, of those that `hpa-ext info` lists"
    )
    parser.add_argument(
        "--native-cuda", action="store_true", help="use the CUDA kernels even where torch is the default"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, save."""
    unknown = [name for name in args.op if name not in NAMES]
    if unknown:
        return _refuse(f"unknown operation {', '.join(map(repr, unknown))}: expected some of {', '.join(NAMES)}")
    if args.native_cuda and args.device != "cuda":
        return _refuse("--native-cuda needs --device cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: torch sees no CUDA device here")
    if args.out is not None and (args.out.is_dir() or not _can_write_beside(args.out)):
        return _refuse(f"--out: expected a file that can be written, got {args.out}")
    if args.plot is not None and not _can_draw(args.plot):
        return _refuse(f"--plot: expected a file {', '.join(_PICTURES)} that can be written, got {args.plot}")
    if args.instruction_set is not None and args.instruction_set not in build_info()["instruction_sets"]:
        known = ", ".join(build_info()["instruction_sets"])
        return _refuse(f"--instruction-set: expected one of {known} on this processor, got {args.instruction_set!r}")
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    benchmarks = load_benchmarks()
    results, table = (importlib.import_module(f"{benchmarks.__name__}.{name}") for name in ("results", "table"))
    setting = benchmarks.Setting(device, args.quick, args.full, args.repeats, seed=secrets.randbits(31))
    kernels = ops.native_cuda() if args.native_cuda else contextlib.nullcontext()
    chosen = ops.instruction_set(args.instruction_set) if args.instruction_set else contextlib.nullcontext()
    with _threads(args.threads), kernels, chosen:
        rows = benchmarks.run(dict.fromkeys(args.op or NAMES), setting, _progress)
        document = results.contents(rows, setting)
    _progress("")
    print(table.header(document, setting.ceilings), table.table(rows), sep="\n\n")
    if not all(row.correct for row in rows):
        print("hpa-ext bench: a result was WRONG (see the table); nothing was saved", file=sys.stderr)
        return 1
    if args.out is not None or not (args.quick or args.no_save):
        print(f"\nsaved to {results.save(document, args.out)}")
    return 0 if args.plot is None else _plot(document, args.plot)


def _plot(document: dict, path: Path) -> int:
    """Draw to the file; the exit code."""
    from hpa_ext.reporting.bench_plot import growth

    title = f"{document['device']}, {document['threads']} threads, {document['instruction_set']}"
    title += f"; load average before {document['load_average']:.1f}"
    try:
        picture = growth(document["rows"], title)
    except ValueError:
        print("\nno picture: no metric has two sizes that differ in one dimension; try --full", file=sys.stderr)
        return 0
    try:
        picture.savefig(path)
    except OSError as error:
        print(f"hpa-ext bench: --plot: {path} could not be written: {error}", file=sys.stderr)
        return 1
    print(f"\ndrawn to {path}")
    return 0


def load_benchmarks() -> ModuleType:
    """The package ``hpa_ext.benchmarks``; in a source tree that is not installed, the folder benchmarks/ under it."""
    name = "hpa_ext.benchmarks"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "__init__.py"
    if not path.is_file():
        raise RuntimeError("this installation of hpa_ext has no benchmarks")
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _threads(count: int | None):
    """Within the context, torch (and with it the native kernels) uses `count` threads."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _progress(text: str) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    print(f"hpa-ext bench: {message}", file=sys.stderr)
    return 2


def _can_draw(path: Path) -> bool:
    return path.suffix.lower() in _PICTURES and not path.is_dir() and _can_write_beside(path)


def _can_write_beside(path: Path) -> bool:
    """Whether a file can be made there, its folders included; tried before minutes of measuring."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return True
    except OSError:
        return False


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value
