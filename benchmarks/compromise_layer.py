"""One decoder layer of LLaVA-1.5-7B through the compromise: time by phase, memory, HPA's adapter path, eager torch.

``python -m benchmarks.compromise_layer [--layers N] [--budget X | --strength X] [--earlier]``: a rank-128 adapter
on the seven linears of N decoder layers, harmonized by `harmonize_adapter` with Grams that are made when they are asked
for: all Grams of the model are 26 GB, and making them is no part of what is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hpa_ext import CompromiseConfig, Gram, GramFile, harmonize_adapter, ops
from hpa_ext.compromise import gram_sources, solution
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.ops.cholesky import Cholesky
from hpa_ext.reporting.table import format_table

from .bench_compromise import compromise, eager

_READING = "Grams: matrices, checks"
WIDTH, INNER, RANK, TOKENS = 4096, 11008, 128, 2048
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH, "attention"),
    "self_attn.k_proj": (WIDTH, WIDTH, "attention"),
    "self_attn.v_proj": (WIDTH, WIDTH, "attention"),
    "self_attn.o_proj": (WIDTH, WIDTH, "o"),
    "mlp.gate_proj": (INNER, WIDTH, "mlp"),
    "mlp.up_proj": (INNER, WIDTH, "mlp"),
    "mlp.down_proj": (WIDTH, INNER, "down"),
}
"""Rows and columns of each weight, and which input it has."""


class GeneratedGrams(GramFile):
    """Stands for a file of 13 GB: random Grams of full rank, each made when it is asked for, with the time it took."""

    def __init__(self, layers: int, seed: int) -> None:
        self.path, self.form, self.device = Path(f"generated-{seed}"), "triangle", torch.device("cpu")
        self.groups: dict[str, list[str]] = {}
        for layer in range(layers):
            by_input: dict[str, list[str]] = {}
            for name, (_, _, key) in LINEARS.items():
                by_input.setdefault(key, []).append(module_name(layer, name))
            self.groups |= {names[0]: names for names in by_input.values()}
        self._leader_of = {name: leader for leader, names in self.groups.items() for name in names}
        self._seed, self.seconds = seed, (0.0, 0.0)

    def __getitem__(self, name: str) -> Gram:
        leader = self._leader_of[name]
        start = now()
        width = self.in_features(name)
        generator = torch.Generator().manual_seed(1000 * self._seed + list(self.groups).index(leader))
        scale = torch.randn(width, generator=generator).mul_(0.5).exp_()
        x = torch.randn(TOKENS, width, generator=generator).mul_(scale).bfloat16()
        total = torch.zeros(width, width)
        ops.gram_accumulate_(total, x)
        total.diagonal().add_(0.02 * TOKENS * scale.square())
        self.seconds = plus(self.seconds, since(start))
        return Gram.of_sum(total, TOKENS)

    def in_features(self, name: str) -> int:
        return LINEARS[name.split(".", 3)[3]][1]

    def token_count(self, name: str) -> int:
        return TOKENS

    def fingerprint(self) -> str:
        return f"generated {self._seed}"

    def forget(self) -> None:
        """Nothing is kept."""


def module_name(layer: int, name: str) -> str:
    """As the loaded LLaVA has it, without the prefix of the language model."""
    return f"model.layers.{layer}.{name}"


def write_adapter(directory: Path, layers: int) -> int:
    """A rank-128 bfloat16 adapter with random factors; its bytes."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns, _) in LINEARS.items():
            prefix = f"base_model.model.{module_name(layer, name)}"
            a = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (0.02 * torch.randn(rows, RANK, generator=generator)).bfloat16()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    targets = [name.split(".")[1] for name in LINEARS]
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets,
        "bias": "none", "task_type": "CAUSAL_LM", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


class Phases:
    """Seconds (of the clock, of all processors) and calls by phase, of functions that are wrapped for a run.

    Processor seconds hold on a machine that does other work, too: divided by the threads, they are what the clock would
    show on one that does not.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self.calls: dict[str, int] = {}
        self._undo: list[Callable[[], None]] = []
        self._running = False

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count the calls of ``owner.name`` as this phase."""
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            if self._running:
                return original(*args, **options)
            self._running, start = True, now()
            try:
                return original(*args, **options)
            finally:
                self._running = False
                self.seconds[phase] = plus(self.seconds.get(phase, (0.0, 0.0)), since(start))
                self.calls[phase] = self.calls.get(phase, 0) + 1

        setattr(owner, name, watched)
        self._undo.append(lambda: setattr(owner, name, original))

    def stop(self) -> None:
        """Put the functions back."""
        for undo in self._undo:
            undo()


def now() -> tuple[float, float]:
    """The clock, and the time that all processors spent on this process."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    return plus(now(), start, -1)


def plus(one: tuple[float, float], other: tuple[float, float], sign: int = 1) -> tuple[float, float]:
    return one[0] + sign * other[0], one[1] + sign * other[1]


def hpa_seconds() -> dict[str, tuple[float, float]]:
    """HPA's adapter path on one layer: the inverse diagonals of both sets, then the scores of each low-rank update."""
    found = {"inverse diagonals": (0.0, 0.0), "scores": (0.0, 0.0)}
    for grams in (GeneratedGrams(1, 1), GeneratedGrams(1, 2)):
        for leader in grams.groups:
            gram = grams[leader]
            start = now()
            gram.inverse_diagonal()
            found["inverse diagonals"] = plus(found["inverse diagonals"], since(start))
    for rows, columns, _ in LINEARS.values():
        old = torch.randn(rows, columns).bfloat16()
        update = LowRankUpdate(old, torch.randn(RANK, columns).bfloat16(), torch.randn(rows, RANK).bfloat16(), 2.0)
        start = now()
        update.column_sums()
        found["scores"] = plus(found["scores"], since(start))
    return found


def eager_seconds() -> dict[str, tuple[float, float]]:
    """One evaluation of the formula in eager float32 torch, by width, and the same through the library's operations."""
    found = {}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        task, safety = (GeneratedGrams(1, seed)[module_name(0, name)].matrix() for seed in (2, 1))
        update = torch.randn(RANK, task.shape[0])
        for kind, call in (("eager", eager), ("ours", compromise)):
            start = now()
            call(update, task, safety)
            found[f"{kind} {task.shape[0]}"] = since(start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--earlier", action="store_true", help="with the Grams of earlier tasks")
    parser.add_argument("--compare", action="store_true", help="also HPA's path and eager torch, on one layer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", type=Path, help="where to write the adapter; deleted afterwards")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    directory = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        size = write_adapter(directory / "adapter", args.layers)
        config = CompromiseConfig(strength=args.strength, budget=args.budget)
        safety, task, earlier = (GeneratedGrams(args.layers, seed) for seed in (1, 2, 3))
        others = [earlier] if args.earlier else []
        phases = Phases()
        phases.watch(gram_sources, "read_full_grams", _READING)
        phases.watch(solution, "factorize", "sum and factor")
        phases.watch(Cholesky, "solve_rows", "solve")
        phases.watch(solution.Compromise, "_products", "products")
        phases.watch(solution.UpdateRows, "energy", "energies")
        before, start = _peak(), now()
        report = harmonize_adapter(
            directory / "adapter", safety, task, directory / "out", config, earlier=others, progress=False
        )
        whole = since(start)
        peak = _peak() - before
        phases.stop()
    finally:
        shutil.rmtree(directory)
    made = plus(plus(safety.seconds, task.seconds), earlier.seconds)
    taken = plus(whole, made, -1)
    phases.seconds[_READING] = plus(phases.seconds[_READING], made, -1)
    rest = taken
    for seconds in phases.seconds.values():
        rest = plus(rest, seconds, -1)
    evaluations = sum(layer.evaluations for layer in report.layers.values())
    bits = sorted({layer.precision_bits for layer in report.layers.values()})
    print(f"{len(report)} linears, {len(safety.groups)} inputs, {size / 1e6:.0f} MB, {args.threads} threads, {config}")
    print(f"load average {os.getloadavg()[0]:.1f}; {evaluations} evaluations, in float{bits}")
    rows = [(name, seconds, phases.calls[name]) for name, seconds in phases.seconds.items()]
    rows += [("the rest: outputs of what is tried, files", rest, ""), ("sum", taken, "")]
    rows += [("beside it: making the Grams", made, "")]
    if args.compare:
        rows += [(f"HPA: {name}", seconds, "") for name, seconds in hpa_seconds().items()]
        rows += [(f"one evaluation, {name}", seconds, "") for name, seconds in eager_seconds().items()]
    cells = [(name, f"{clock:.2f}", f"{cpu:.2f}", str(calls)) for name, (clock, cpu), calls in rows]
    print(format_table(("phase", "seconds", "processor seconds", "calls"), cells))
    print(f"peak memory {peak / 2**20:.0f} MiB above the {before / 2**20:.0f} MiB before")


def _peak() -> int:
    """The most memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
