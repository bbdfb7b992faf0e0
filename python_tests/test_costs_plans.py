"""Plans against what the runs then did: operations, factorisations, bytes, waits for the disk, memory; time loosely."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter

import compromise_adapters
import pytest
import torch
from harmonize_inputs import make_inputs

from hpa_ext import CompromiseConfig, GramFile, harmonize_adapter, ops
from hpa_ext.checkpoints.buffers import Buffers
from hpa_ext.checkpoints.gram_file import save_grams
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.cli import bench
from hpa_ext.compromise import checkpoint as compromise_checkpoint
from hpa_ext.compromise import estimate as compromise_estimate
from hpa_ext.compromise import solution, times
from hpa_ext.costs import Rates, memory, work
from hpa_ext.costs.disk import DiskRates
from hpa_ext.hpa.checkpoint import estimate, harmonize_checkpoint, plan_checkpoint, samples
from hpa_ext.hpa.checkpoint.job import prepare
from hpa_ext.hpa.checkpoint.pieces import cut

OPERATIONS = Rates(0.0, 0.0, 1.0)
BYTES = Rates(0.0, 1.0, 0.0)
NO_TIME = DiskRates(1e30, 1e30, 1e30, 0.0)
FIXED, BUDGET = CompromiseConfig(strength=1.0), CompromiseConfig(budget=0.1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The same model with adapters of two ranks, on square and on other weights."""
    made = {}
    for rank in (2, 8):
        pattern = dict.fromkeys(("q_proj", "v_proj", "down_proj"), rank)
        made[rank] = make_inputs(tmp_path_factory.mktemp(f"rank-{rank}"), rank_pattern=pattern)
    return made


def without_time(monkeypatch, rates: Rates) -> None:
    """Let plans count: a second is an operation, or a byte, and disks take no time."""
    monkeypatch.setattr(samples, "update_rates", lambda *args, **options: rates)
    monkeypatch.setattr(estimate, "inverse_diagonal_rates", lambda *args: rates)
    monkeypatch.setattr(estimate, "gram_read_rate", lambda *args: 1e30)
    monkeypatch.setattr(estimate, "measure_disk", lambda directory: NO_TIME)
    monkeypatch.setattr(compromise_estimate, "measure_disk", lambda directory: NO_TIME)
    monkeypatch.setattr(times, "gram_read_rate", lambda *args, **options: 1e30)
    for name in ("cholesky_rates", "solve_rates", "product_rates", "energy_rates", "_merge_rates"):
        monkeypatch.setattr(times, name, lambda *args: rates)


def gram_bytes(*paths, modules=r".*") -> int:
    """Of the triangles in Gram files that belong to modules of these names."""
    total = 0
    for path in paths:
        with GramFile(path) as file:
            chosen = [leader for leader, names in file.groups.items() if any(re.fullmatch(modules, n) for n in names)]
            total += sum(work.triangle_bytes(file.in_features(leader)) for leader in chosen)
    return total


@pytest.mark.parametrize("output", ["checkpoint", "adapter"])
def test_low_rank_updates_are_planned_by_their_rank_and_shapes(ranks, tmp_path, monkeypatch, output):
    without_time(monkeypatch, OPERATIONS)
    found = {}
    for rank, made in ranks.items():
        plan = plan_checkpoint(**made.arguments("adapter"), out=tmp_path / "out", output=output)
        arguments = made.arguments("adapter").values()
        job = prepare(*arguments, None, output, [], None)
        shapes = [tuple(job.linears[name].base_weight().shape) for name in job.names]
        job.close()
        assert len(set(shapes)) > 1
        expected = sum(work.low_rank_scores(*shape, rank, 2).operations for shape in shapes)
        if output == "checkpoint":
            expected += sum(work.low_rank_merge(*shape, rank, 2).operations for shape in shapes)
        found[rank] = plan.seconds["harmonize"]
        assert found[rank] == pytest.approx(expected, rel=1e-6)
    assert 3.9 < found[8] / found[2] < 5.5


def test_dense_updates_are_planned_by_the_bytes_on_disk(inputs, tmp_path, monkeypatch):
    """The skeleton's weights are float32, those on disk bfloat16."""
    without_time(monkeypatch, BYTES)
    plan = plan_checkpoint(**inputs.arguments(), out=tmp_path / "out")
    with CheckpointReader(inputs.old) as reader:
        harmonized = [e for e in reader.entries.values() if "language_model" in e.name and "_proj.weight" in e.name]
        assert len(harmonized) == plan.modules
        assert plan.seconds["harmonize"] == pytest.approx(5 * sum(e.nbytes for e in harmonized))
        assert plan.write_bytes == reader.nbytes
    assert plan.read_bytes == reader.nbytes + sum(e.nbytes for e in harmonized) + gram_bytes(inputs.safety, inputs.task)


def test_every_inverse_is_planned_with_its_own_width(inputs, tmp_path, monkeypatch):
    without_time(monkeypatch, OPERATIONS)
    plan = plan_checkpoint(**inputs.arguments(), out=tmp_path / "out")
    counted = Counter()
    original = ops.inverse_diagonal

    def counting(h, *args, **options):
        counted[h.shape[-1]] += 1
        return original(h, *args, **options)

    monkeypatch.setattr(ops, "inverse_diagonal", counting)
    harmonize_checkpoint(**inputs.arguments(), out=tmp_path / "out", progress=False)
    assert len(counted) > 1 and plan.grams == counted.total()
    expected = sum(count * work.inverse_diagonal(width).operations for width, count in counted.items())
    assert plan.seconds["inverse diagonals"] == pytest.approx(expected)


@pytest.mark.parametrize("config", [FIXED, BUDGET], ids=["strength", "budget"])
@pytest.mark.parametrize(("new", "output"), [("new", "checkpoint"), ("adapter", "checkpoint"), ("adapter", "adapter")])
def test_the_compromise_is_planned_with_its_factorisations(inputs, tmp_path, monkeypatch, new, output, config):
    """Of a whole checkpoint the Grams of o come between those that k and q share, which are then factored again."""
    without_time(monkeypatch, OPERATIONS)
    arguments = inputs.arguments(new) | {"out": tmp_path / "out", "output": output, "config": config}
    plan = compromise_estimate.plan_checkpoint(**arguments)
    counted = Counter()
    original = solution.factorize

    def counting(grams, *args):
        counted[grams.in_features] += 1
        return original(grams, *args)

    monkeypatch.setattr(solution, "factorize", counting)
    report = compromise_checkpoint.harmonize_checkpoint(**arguments, progress=False)
    assert plan.modules == len(report)
    operations = sum(count * work.cholesky(width).operations for width, count in counted.items())
    if config is FIXED:
        assert plan.seconds["factor"] == pytest.approx(operations)
    else:  # the number of strengths to try is only known about
        assert 1 / 2 < plan.seconds["factor"] / operations < 2


def test_solving_is_planned_by_rank(ranks, tmp_path, monkeypatch):
    without_time(monkeypatch, OPERATIONS)
    found = {}
    for rank, made in ranks.items():
        plan = compromise_estimate.plan_adapter(
            made.adapter, made.safety, made.task, tmp_path / "out", FIXED, base=made.old
        )
        found[rank] = plan.seconds["solve"]
        with GramFile(made.task) as grams:
            least = sum(
                work.solve_rows(rank, grams.in_features(name)).operations
                + 4 * work.product(rank, grams.in_features(name)).operations
                for name in grams
                if name.rsplit(".", 1)[1] in ("q_proj", "v_proj", "down_proj")
            )
        assert least < plan.seconds["solve"] < 1.6 * least  # energies come on top
    assert found[8] > 3.9 * found[2]


def counted_syncs(monkeypatch) -> Counter:
    found: Counter = Counter()

    def watch(name: str) -> None:
        original = getattr(os, name)

        def counting(descriptor):
            found[name] += 1
            original(descriptor)

        monkeypatch.setattr(os, name, counting)

    watch("fsync")
    watch("fdatasync")
    return found


@pytest.mark.parametrize(("new", "output"), [("new", "checkpoint"), ("adapter", "checkpoint"), ("adapter", "adapter")])
def test_the_plan_knows_the_waits_for_the_disk_and_the_bytes(tmp_path, monkeypatch, new, output):
    inputs = make_inputs(tmp_path / "inputs", shard="1GB")
    arguments = inputs.arguments(new) | {"out": tmp_path / "out", "output": output}
    plan = plan_checkpoint(**arguments)
    syncs = counted_syncs(monkeypatch)
    harmonize_checkpoint(**arguments, progress=False)
    assert abs(plan.syncs - syncs.total()) <= 3
    written = sum(CheckpointReader(path).nbytes for path in (tmp_path / "out").glob("*model*.safetensors"))
    gains = 0
    if output == "adapter":
        gains = sum(CheckpointReader(path).nbytes for path in (tmp_path / "out").glob("*gain*.safetensors"))
        assert gains > 0
    assert plan.write_bytes == written + gains


def test_the_plan_of_an_adapter_knows_the_waits_for_the_disk_and_the_bytes(tmp_path, monkeypatch):
    made = compromise_adapters.make(tmp_path)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("safety", "task")}
    for name, path in files.items():
        save_grams(getattr(made, name), path)
    arguments = files | {"out": tmp_path / "out", "base": made.base, "config": FIXED}
    plan = compromise_estimate.plan_adapter(made.adapter, **arguments)
    syncs = counted_syncs(monkeypatch)
    harmonize_adapter(made.adapter, **arguments, progress=False)
    assert abs(plan.syncs - syncs.total()) <= 3
    assert plan.write_bytes == sum(tensor.nbytes for tensor in made.tensors(tmp_path / "out").values())
    assert plan.read_bytes == plan.write_bytes + gram_bytes(*files.values(), modules=".*(q_proj|v_proj|down_proj)")


@pytest.mark.parametrize("new", ["new", "adapter"])
def test_the_plans_pool_is_that_of_the_run(inputs, tmp_path, monkeypatch, new):
    """Grams are reduced, so that the pool decides the memory; which buffer is free depends on the threads too."""
    reduced = {}
    for name in ("safety", "task"):
        reduced[name] = tmp_path / f"{name}.safetensors"
        save_grams(inputs.grams[name], reduced[name], reduce="diagonal")
    arguments = inputs.arguments(new) | reduced | {"out": tmp_path / "out"}
    job = prepare(*(arguments[name] for name in ("old", "new", "safety", "task")), None, "checkpoint", [], None)
    predicted = estimate.pool_bytes(job)
    job.close()
    plan = plan_checkpoint(**arguments)
    assert plan.memory_bytes >= memory.ALLOCATOR + predicted
    taken = []
    original = Buffers.take

    def counting(self, shape, dtype):
        buffer = original(self, shape, dtype)
        taken.append((id(self), buffer.untyped_storage().data_ptr(), buffer.untyped_storage().nbytes()))
        return buffer

    monkeypatch.setattr(Buffers, "take", counting)
    harmonize_checkpoint(**arguments, progress=False)
    held = sum(size for _, _, size in set(taken))
    assert predicted / 3 <= held <= 1.5 * predicted


@pytest.mark.parametrize("new", ["new", "adapter"])
def test_the_plan_knows_what_goes_through_the_pool(inputs, tmp_path, monkeypatch, new):
    planned, taken = [], []
    pool, take = memory.pipeline_pool, Buffers.take
    monkeypatch.setattr(
        memory, "pipeline_pool", lambda items: planned.extend(s for i in items for w in i for s in w) or pool(items)
    )
    plan_checkpoint(**inputs.arguments(new), out=tmp_path / "out")

    def counting(self, shape, dtype):
        buffer = take(self, shape, dtype)
        taken.append(buffer.nbytes)
        return buffer

    monkeypatch.setattr(Buffers, "take", counting)
    harmonize_checkpoint(**inputs.arguments(new), out=tmp_path / "out", progress=False)
    job = prepare(*inputs.arguments(new).values(), None, "checkpoint", [], None)
    formed = [
        piece.nbytes for unit in cut(job.source, job.kind_of()) for piece in unit.pieces if piece.kind == "update"
    ]
    job.close()
    # What an adapter changes and nobody harmonizes is formed outside, and goes back to the pool when it is written.
    assert Counter(planned) == Counter(taken) + Counter(formed)
    assert len(formed) == (4 if new == "adapter" else 0)


@pytest.mark.parametrize("method", [estimate, compromise_estimate])
def test_a_plan_refuses_what_the_run_refuses(inputs, tmp_path, method):
    runs = {estimate: harmonize_checkpoint, compromise_estimate: compromise_checkpoint.harmonize_checkpoint}
    for call in (method.plan_checkpoint, runs[method]):
        with pytest.raises(ValueError, match='output: "adapter" needs a LoRA adapter as new'):
            call(**inputs.arguments(), out=tmp_path / "out", output="adapter")


@pytest.mark.parametrize(
    ("float64", "said"), [(3_000_000, "3 MB, beyond"), (5_000_000, "3 MB, 5 MB where a Gram needs")]
)
def test_a_plan_says_twice_only_what_differs(float64, said):
    plan = estimate.CheckpointPlan("checkpoint", 1, 1, 0, 0, 10**9, 2_999_990, float64, {"open": 1.0})
    assert f"memory   {said}" in str(plan)


def test_low_rank_updates_are_timed_at_two_ranks():
    seen = []
    samples.update_rates(
        [(128, 96)] * 3 + [(96, 256)], 64, torch.float32, lambda u: seen.append((*u.shape, len(u.a))), merges=True
    )
    assert {(128, 96, 8), (128, 96, 64), (96, 256, 8), (96, 256, 64)} <= set(seen)


def test_grams_that_come_again_are_read_again(inputs):
    """Of a checkpoint in alphabetical order: k, o, q, v; the Grams of o are between those that share an input."""
    groups = [["q", "k", "v"], ["o"]]
    assert compromise_estimate._in_a_row(groups, ["k", "o", "q", "v"]) == [["k"], ["o"], ["q", "v"]]
    assert compromise_estimate._in_a_row(groups, ["q", "k", "v", "o"]) == groups


_RUN = """
import json, sys, torch
torch.set_num_threads(1)
from hpa_ext.hpa.checkpoint import harmonize_checkpoint
from hpa_ext.hpa.checkpoint.job import prepare
from hpa_ext.hpa.checkpoint.pieces import cut
arguments = json.loads(sys.argv[1])
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))
prepare(*(arguments[name] for name in ("old", "new", "safety", "task")), None, "checkpoint", [], None).close()
before = status("VmRSS")
harmonize_checkpoint(**arguments, progress=False)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of width 1024 with full Grams, 75 MB."""
    bench.load_benchmarks()
    return importlib.import_module("hpa_ext.benchmarks.cost_inputs").make_inputs(
        tmp_path_factory.mktemp("wide") / "inputs", 1024, 1, (8,)
    )


def test_the_plans_memory_is_that_of_a_fresh_process(wide, tmp_path):
    arguments = {"old": wide.old, "new": wide.new, "safety": wide.safety, "task": wide.task, "out": tmp_path / "out"}
    plan = plan_checkpoint(**arguments)
    words = [sys.executable, "-c", _RUN, json.dumps({name: str(path) for name, path in arguments.items()})]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert plan.memory_bytes == pytest.approx(json.loads(done.stdout), rel=0.5)
    assert plan.memory_bytes_float64 > plan.memory_bytes


def test_the_plans_time_is_about_that_of_the_run(wide, tmp_path):
    arguments = {"old": wide.old, "new": wide.new, "safety": wide.safety, "task": wide.task, "out": tmp_path / "out"}
    plan = plan_checkpoint(**arguments)
    start = time.perf_counter()
    harmonize_checkpoint(**arguments, progress=False)
    assert 1 / 10 < (time.perf_counter() - start) / sum(plan.seconds.values()) < 10
    arguments = {"safety": wide.safety, "task": wide.task, "out": tmp_path / "adapter", "config": FIXED}
    plan = compromise_estimate.plan_adapter(wide.adapters[8], **arguments)
    start = time.perf_counter()
    harmonize_adapter(wide.adapters[8], **arguments, progress=False)
    assert 1 / 10 < (time.perf_counter() - start) / sum(plan.seconds.values()) < 10


def test_reduced_grams_cost_nothing_to_reduce(inputs, tmp_path):
    reduced = {}
    for name in ("safety", "task"):
        reduced[name] = tmp_path / f"{name}.safetensors"
        save_grams(inputs.grams[name], reduced[name], reduce="diagonal")
    plan = plan_checkpoint(**inputs.arguments() | reduced, out=tmp_path / "out")
    assert plan.grams == 0 and plan.seconds["inverse diagonals"] == 0 and "inverse" not in plan.rates
