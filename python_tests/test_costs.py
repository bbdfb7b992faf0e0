"""The model of work and memory: counts against counted operations, fits, pools; and measured rates, loosely."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpa_ext import Gram, ops, reference
from hpa_ext.checkpoints.buffers import Buffers
from hpa_ext.checkpoints.gram_file import GramFile, save_grams
from hpa_ext.costs import Rates, Stage, Work, disk, memory, pipeline_seconds, samples, work
from hpa_ext.gram import GramCollection

CPU = torch.device("cpu")


class Counted:
    """Matrices of a few rows, and the multiplications that textbook loops over them make."""

    def __init__(self) -> None:
        self.multiplications = 0

    def times(self, a: float, b: float) -> float:
        self.multiplications += 1
        return a * b

    def cholesky(self, a: list[list[float]]) -> list[list[float]]:
        size = len(a)
        lower = [[0.0] * size for _ in a]
        for j in range(size):
            for i in range(j, size):
                rest = a[i][j] - sum(self.times(lower[i][k], lower[j][k]) for k in range(j))
                lower[i][j] = math.sqrt(rest) if i == j else rest / lower[j][j]
        return lower

    def solve(self, lower: list[list[float]], b: list[float], first: int = 0) -> list[float]:
        """``L y = b`` where b is zero before `first`."""
        y = [0.0] * len(b)
        for i in range(first, len(b)):
            y[i] = (b[i] - sum(self.times(lower[i][k], y[k]) for k in range(first, i))) / lower[i][i]
        return y


def spd(size: int) -> torch.Tensor:
    rows = torch.randn(2 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return rows.mT @ rows


@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_factorisations_count_what_loops_do(size):
    counted, matrix = Counted(), spd(size)
    lower = counted.cholesky(matrix.tolist())
    assert work.cholesky(size).operations == pytest.approx(2 * counted.multiplications, abs=1e-9)
    columns = [counted.solve(lower, [float(i == j) for i in range(size)], first=j) for j in range(size)]
    assert work.inverse_diagonal(size).operations == pytest.approx(2 * counted.multiplications, abs=1e-9)
    diagonal = torch.tensor(columns, dtype=torch.float64).square().sum(1)
    torch.testing.assert_close(diagonal, torch.linalg.inv(matrix).diagonal())  # the loops are those of the operation
    counted.multiplications = 0
    for _ in range(3):  # L and its transpose take the same number
        counted.solve(lower, counted.solve(lower, [1.0] * size))
    assert work.solve_rows(3, size).operations == pytest.approx(2 * counted.multiplications)


@pytest.mark.parametrize(("tokens", "width"), [(1, 5), (4, 9), (6, 6)])
def test_both_forms_of_a_gram_count_what_loops_do(tokens, width):
    x = torch.randn(tokens, width, dtype=torch.float64).tolist()
    counted = Counted()
    for i in range(width):
        for j in range(i + 1):
            sum(counted.times(row[i], row[j]) for row in x)
    assert work.gram_accumulation(tokens, width, 2).operations == 2 * counted.multiplications
    counted.multiplications = 0
    square = [[0.0] * tokens for _ in x]
    for s in range(tokens):
        for t in range(s + 1):
            square[s][t] = sum(counted.times(a, b) for a, b in zip(x[s], x[t], strict=True)) + float(s == t)
    lower = counted.cholesky(square)
    for j in range(width):
        counted.solve(lower, [row[j] for row in x])
    found = work.inverse_diagonal_of_rows(tokens, width, 2).operations
    assert found == pytest.approx(2 * counted.multiplications)


def test_few_tokens_cost_less_by_the_rows_and_many_by_the_gram():
    def share(width: int, tokens: int) -> float:
        by_gram = work.gram_accumulation(tokens, width, 2) + work.inverse_diagonal(width)
        return work.inverse_diagonal_of_rows(tokens, width, 2).operations / by_gram.operations

    assert share(4096, 400) < 0.05 and share(4096, 2400) < 0.7 and share(4096, 4096) > 1
    assert share(4096, 1200) == pytest.approx(share(8192, 2400), rel=1e-3)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(48, 32, 4), (24, 56, 8), (600, 16, 3)])
def test_low_rank_counts_are_those_of_its_products(rows, columns, rank):
    generator = torch.Generator().manual_seed(0)
    old, a, b = (torch.randn(size, generator=generator) for size in ((rows, columns), (rank, columns), (rows, rank)))
    with FlopCounterMode(display=False) as scores:
        inner = ((old @ a.mT) * b).sum()
        squares = (((b.mT @ b) @ a) * a).sum(0)
    counted = work.low_rank_scores(rows, columns, rank, 2)
    assert counted.operations == scores.get_total_flops() and counted.bytes == 2 * rows * columns
    with FlopCounterMode(display=False) as product:
        update = b @ a
    merged = work.low_rank_merge(rows, columns, rank, 2)
    assert merged.operations == product.get_total_flops() and merged.bytes == 2 * 2 * rows * columns
    torch.testing.assert_close(squares, update.square().sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(inner, (update * old).sum(), rtol=1e-4, atol=1e-3)


def test_low_rank_counts_are_those_of_the_reference():
    """Torch cannot count inside a native kernel, which does the same products but for those of B^T B."""
    rows, columns, rank = 1500, 64, 8
    old, a, b = torch.randn(rows, columns), torch.randn(rank, columns), torch.randn(rows, rank)
    with FlopCounterMode(display=False) as flops:
        reference.low_rank_scores(old, a, b, 2.0)
    assert flops.get_total_flops() == work.low_rank_scores(rows, columns, rank, 4).operations
    mask = torch.zeros(columns, dtype=torch.bool)
    with FlopCounterMode(display=False) as flops:
        reference.low_rank_merge(old, a, b, 2.0, mask, torch.tensor(0.1), old)
    assert flops.get_total_flops() == work.low_rank_merge(rows, columns, rank, 4).operations


def test_other_counts():
    with FlopCounterMode(display=False) as flops:
        torch.ones(6, 40) @ torch.ones(40, 40)
    assert work.product(6, 40).operations == flops.get_total_flops()
    with FlopCounterMode(display=False) as flops:
        torch.ones(6, 40) @ torch.ones(40, 6)
    assert work.energy(6, 40).operations == flops.get_total_flops()
    old = torch.ones(48, 32, dtype=torch.bfloat16)
    assert work.dense_scores(48, 32, 2).bytes == 2 * old.nbytes
    assert work.dense_merge(48, 32, 2).bytes == 3 * old.nbytes
    assert sum([Work(1, 2, 3), 2 * Work(1, 2, 3)], Work()) == Work(3, 6, 9)


def test_a_gram_file_has_the_bytes_of_a_triangle(tmp_path):
    save_grams(GramCollection({"a": Gram(37).update(torch.randn(50, 37))}), tmp_path / "grams.safetensors")
    with GramFile(tmp_path / "grams.safetensors") as file:
        assert file._reader.nbytes == work.triangle_bytes(37)


@pytest.mark.parametrize("true", [Rates(1e-5, 2e-10, 3e-12), Rates(0, 1e-10, 2e-12), Rates(1e-4, 0, 1e-12)])
def test_a_fit_finds_the_rates_that_made_the_samples(true):
    done = [work.inverse_diagonal(width) for width in (64, 512, 1536, 4096)]
    found = Rates.fit([(one, true.seconds(one)) for one in done])
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(true), rel=1e-6, abs=1e-18)
    assert found.seconds(work.inverse_diagonal(11008)) == pytest.approx(true.seconds(work.inverse_diagonal(11008)))


def test_a_fit_has_no_negative_rates_and_refuses_what_is_no_sample():
    falling = [(Work(1, 1e6, 1e6), 2.0), (Work(1, 1e7, 1e9), 1.0), (Work(1, 1e8, 1e8), 0.5)]
    assert min(dataclasses.astuple(Rates.fit(falling))) >= 0
    one = Rates.fit([(Work(2, 0, 0), 3.0)])
    assert one == Rates(1.5, 0.0, 0.0)
    for wrong in ([], [(Work(1), 0.0)], [(Work(), 1.0)], [(Work(1), math.nan)]):
        with pytest.raises(ValueError, match="samples: expected"):
            Rates.fit(wrong)


def test_a_pipeline_takes_its_slowest_stage_or_its_cores():
    reading, computing, hashing = Stage(4.0, 0.5), Stage(3.0, 6.0), Stage(2.0, 2.0)
    assert pipeline_seconds([reading, computing, hashing], 8) == 4.0
    assert pipeline_seconds([reading, computing, hashing], 2) == 4.25
    assert pipeline_seconds([], 2) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_pool_is_that_of_the_buffers(seed):
    """Put through the real pool in the order of a run: read one, write the result of the one before the last."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [100, 200, 250, 4000]
    items = []
    for _ in range(40):
        size = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        tensors, weights = (1 + int(torch.randint(2, (), generator=generator)) for _ in range(2))
        items.append([[size] * tensors] * weights)
    pool = Buffers()
    computed, written = [], []
    for item in items:
        taken = [[pool.take([size], torch.uint8) for size in sizes] for sizes in item]
        pool.release(*written, *(tensor for weight in computed for tensor in weight[:-1]))
        written, computed = [weight[-1] for weight in computed], taken
    held = sum(buffer.numel() for buffer in [*pool._free, *pool._taken.values()])
    assert memory.pipeline_pool(items) == held
    assert memory.pipeline_pool([[[10, 10]]] * 9) == 50 and memory.pipeline_pool([[[10]]] * 9) == 30
    assert memory.pipeline_pool([]) == 0


_PEAK = """
import json, sys, torch
from hpa_ext import ops
torch.set_num_threads(1)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))
ops.inverse_diagonal(torch.eye(64), 0.01)
before = status("VmRSS")
matrix = torch.eye(2048)
ops.inverse_diagonal(matrix, 0.01, assume_symmetric=True)
print(json.dumps(status("VmHWM") - before))
"""


def test_memory_of_an_inverse_is_that_of_a_fresh_process():
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert memory.inverse_diagonal(2048) == pytest.approx(measured, rel=0.2)
    assert memory.inverse_diagonal(2048, float64=True) - memory.inverse_diagonal(2048) == 2 * 2048 * 2049


def gram_factor() -> float:
    x, total = torch.ones(256, 512, dtype=torch.bfloat16), torch.zeros(512, 512)
    predicted = samples.gram_rates(512, 256, torch.bfloat16, CPU).seconds(work.gram_accumulation(256, 512, 2))
    return samples.shortest_seconds(lambda: ops.gram_accumulate_(total, x), 7) / predicted


def inverse_factor() -> float:
    predicted = samples.inverse_diagonal_rates(1024, CPU).seconds(work.inverse_diagonal(1024))
    matrix = torch.eye(1024)
    return samples.shortest_seconds(lambda: ops.inverse_diagonal(matrix, assume_symmetric=True), 7) / predicted


@pytest.mark.parametrize("factor", [gram_factor, inverse_factor])
def test_measured_rates_predict_another_width(factor):
    """Measured and predicted one after the other; on a busy machine only one of several attempts may be left alone."""
    found = []
    for _ in range(6):
        found.append(factor())
        if 1 / 4 < found[-1] < 4:
            return
    pytest.fail(f"expected a factor within 4 in one of {len(found)} attempts, got {found}")


def test_every_rate_can_be_measured():
    torch.set_num_threads(1)  # on a busy machine torch's threads wait for each other longer than they work
    for measure in (
        lambda: samples.rows_rates(1024, torch.bfloat16),
        lambda: samples.cholesky_rates(1024, 3, CPU),
        lambda: samples.solve_rates(1024, 8, CPU),
        lambda: samples.product_rates(1024, 8, CPU),
        lambda: samples.energy_rates(8, CPU),
        lambda: samples.forward_rates(1024, 16, torch.float32, CPU),
    ):
        # Where something else took the processor from the small sample, the large one seems to cost no more.
        tries = (measure() for _ in range(5))
        assert any(rates.per_byte + rates.per_operation > 0 for rates in tries)
    assert work.forward(100, 7, 2) == Work(1, 200, 1400)


def test_the_widest_sample_is_near_the_widest_matrix_and_affordable(monkeypatch):
    def widths(widest: int, rate: float) -> list[int]:
        tried = []

        def measure(width: int) -> tuple[Work, float]:
            tried.append(width)
            done = work.inverse_diagonal(width)
            return done, (done.operations + 1) / rate

        samples.fitted(measure, widest)
        return tried[1:]

    assert widths(11008, 1e12) == [64, 512, 1536, 4096]  # a fast machine
    assert widths(2048, 1e12) == [64, 512, 1536, 2048]
    assert widths(1024, 1e12) == [64, 512, 1536]
    slow = widths(11008, 3e10)
    assert slow == [64, 512, 1536] or 2 / 3 * slow[-1] ** 3 / 3e10 < 0.4


def test_the_disk_is_measured_without_a_trace(tmp_path, monkeypatch):
    found = disk.measure_disk(tmp_path)
    assert list(tmp_path.iterdir()) == [] and min(dataclasses.astuple(found)) > 0
    assert found.kept(2e9, 10).seconds == pytest.approx(
        2e9 / found.sync + 2e9 / found.hash + 2e9 / found.copy + 10 * found.sync_seconds
    )

    true = disk.os.fdatasync
    with monkeypatch.context() as slow:
        slow.setattr(disk.os, "fdatasync", lambda descriptor: (time.sleep(0.05), true(descriptor)))
        waited = disk.measure_disk(tmp_path)
    assert waited.sync_seconds >= 0.05 and waited.sync <= (64 << 20) / 0.05

    def refused(*_):
        raise OSError

    monkeypatch.setattr(disk.os, "open", refused)
    guessed = disk.measure_disk(tmp_path)
    assert guessed.sync == 0.5e9 and guessed.sync_seconds == 0.01 and guessed.hash > 0
