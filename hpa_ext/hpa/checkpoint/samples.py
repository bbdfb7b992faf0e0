"""Short measurements on the inputs of a job: what its weights and Grams take to read, and to harmonize."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from hpa_ext.checkpoints.buffers import Buffers
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.costs import Rates, Stage, Work, work
from hpa_ext.costs.samples import Sample, filled, shortest_seconds
from hpa_ext.gram_diagonal import GramDiagonal
from hpa_ext.hpa.checkpoint.job import Job, has_low_rank
from hpa_ext.hpa.checkpoint.merge import moved, plan_modules
from hpa_ext.hpa.checkpoint.models import entry_of
from hpa_ext.hpa.checkpoint.reduce import SETS
from hpa_ext.hpa.low_rank import LowRankUpdate
from hpa_ext.hpa.update import DenseUpdate, WeightUpdate

# Larger than a core's cache, so that the weights come from where those of a model come from.
_MOST_ELEMENTS = 1 << 23
_TINY = 64
_READ_BUDGET_S = 0.4
_MOST_GRAM_BYTES = 64 << 20


def rank_of(job: Job, module: str) -> int | None:
    """The rank of a module's update, None where the new weight is read or formed whole."""
    if job.adapter is None or not has_low_rank(job.adapter, module):
        return None
    return job.adapter.rank(module)


def dtype_of(job: Job, module: str) -> torch.dtype:
    """Of a module's weight on disk, which is not that of the model's skeleton."""
    return entry_of(job.old, f"{module}.weight").dtype


def module_work(rows: int, columns: int, itemsize: int, rank: int | None, *, merges: bool) -> Work:
    """What scoring, and if it `merges` merging, a weight ``[rows, columns]`` takes, dense (rank None) or low-rank."""
    if rank is None:
        parts = [work.dense_scores(rows, columns, itemsize), work.dense_merge(rows, columns, itemsize)]
    else:
        parts = [
            work.low_rank_scores(rows, columns, rank, itemsize),
            work.low_rank_merge(rows, columns, rank, itemsize),
        ]
    return sum(parts if merges else parts[:1], Work())


class UpdateTimes:
    """The time of harmonizing each module, from rates that are measured for each kind of update once.

    Args:
        job: the inputs; nothing of them is read.
        device: where the arithmetic is done.
        merges: whether weights are merged, or only scored.

    Random weights of a few shapes and of two ranks are put through the job's own method: the overhead of a module, the
    bandwidth and the arithmetic rate of whatever kernels serve it follow from them.
    """

    def __init__(self, job: Job, device: torch.device, *, merges: bool) -> None:
        self._job, self._device, self._merges = job, device, merges
        self._rates: dict[bool, Rates] = {}

    def work(self, module: str) -> Work:
        """What a module takes."""
        shape, itemsize = self._job.linears[module].base_weight().shape, dtype_of(self._job, module).itemsize
        return module_work(*shape, itemsize, rank_of(self._job, module), merges=self._merges)

    def seconds(self, module: str) -> float:
        """The time that a module takes."""
        is_dense = rank_of(self._job, module) is None
        if is_dense not in self._rates:
            self._rates[is_dense] = self._measure(is_dense)
        return self._rates[is_dense].seconds(self.work(module))

    def _measure(self, is_dense: bool) -> Rates:
        modules = [name for name in self._job.names if (rank_of(self._job, name) is None) == is_dense]
        shapes = [tuple(self._job.linears[name].base_weight().shape) for name in modules]
        most = None if is_dense else max(rank_of(self._job, name) for name in modules)
        dtype = dtype_of(self._job, modules[0])
        return update_rates(shapes, most, dtype, partial(self._harmonize, modules[0]), merges=self._merges)

    def _harmonize(self, module: str, update: WeightUpdate) -> None:
        job, damping = self._job, self._job.config.damping
        columns = update.shape[1]
        dead = torch.zeros(columns, dtype=torch.bool)
        diagonal = GramDiagonal(torch.ones(columns), dead, 1, damping, damping, 32)
        reduced = {kind: {module: diagonal} for kind in SETS}
        there = moved(update, self._device)
        if self._merges:
            ((weight, _),) = job.method.merge(job, reduced, [module], [there])
            weight.cpu()
        else:
            plan_modules(job, reduced, [module], [there])[0].report(module)


def update_rates(
    shapes: Sequence[tuple[int, int]],
    rank: int | None,
    dtype: torch.dtype,
    harmonize: Callable[[WeightUpdate], object],
    *,
    merges: bool,
) -> Rates:
    """Of `module_work`, from random weights of a few shapes, and of two ranks.

    Args:
        shapes: ``(out, in)`` of the weights that are to come: measured is the one that most elements are in, the one
            with the widest input, up to 8 million elements each, and a tiny one.
        rank: the largest rank to come, None for dense updates.
        dtype: of the weights.
        harmonize: what is timed; may write to the update's tensors.
        merges: whether it merges, or only scores.
    """
    common = max(dict.fromkeys(shapes), key=lambda shape: shapes.count(shape) * shape[0] * shape[1])
    widest = max(shapes, key=lambda shape: shape[1])
    tiny = (_TINY, _TINY, None if rank is None else min(rank, _TINY))
    wanted = [tiny, tiny]
    for shape in dict.fromkeys((common, widest)):
        rows = max(1, min(shape[0], _MOST_ELEMENTS // shape[1]))
        wanted += [(rows, shape[1], one) for one in ([None] if rank is None else {max(1, rank // 8), rank})]
    samples = [_update_sample(*one, dtype, harmonize, merges) for one in wanted]
    return Rates.fit(samples[1:])  # the first call of all loads what is loaded then


def _update_sample(
    rows: int,
    columns: int,
    rank: int | None,
    dtype: torch.dtype,
    harmonize: Callable[[WeightUpdate], object],
    merges: bool,
) -> Sample:
    update = filled_update(rows, columns, rank, dtype)
    counted = module_work(rows, columns, dtype.itemsize, rank, merges=merges)
    return counted, shortest_seconds(lambda: harmonize(update))


def filled_update(rows: int, columns: int, rank: int | None, dtype: torch.dtype) -> WeightUpdate:
    """The update of a made-up weight, dense where the rank is None."""
    old = filled((rows, columns), dtype)
    if rank is None:
        return DenseUpdate(old, filled((rows, columns), dtype, shift=77))
    a, b = filled((rank, columns), torch.float32), filled((rows, rank), torch.float32, shift=77)
    return LowRankUpdate(old, a, b, 0.01)


def read_stage(job: Job, nbytes: float) -> Stage:
    """Reading so many bytes: at the rate at which the updates of the first, the largest and the last module come."""
    names = job.names
    if not names:
        return Stage(nbytes / 1e9, 0.0)
    buffers = Buffers()
    largest = max(names, key=lambda name: job.linears[name].base_weight().numel())
    room = [buffers.take(job.linears[largest].base_weight().shape, torch.float32).fill_(0) for _ in range(2)]
    buffers.release(*room)
    del room
    read = seconds = processor = 0.0
    for name in dict.fromkeys((names[0], largest, names[-1])):
        start, started = time.perf_counter(), time.process_time()
        update = job.weight_update(name, buffers)
        seconds += time.perf_counter() - start
        processor += time.process_time() - started
        tensors = [update.old, update.a, update.b] if isinstance(update, LowRankUpdate) else [update.old, update.new]
        read += sum(tensor.nbytes for tensor in tensors)
        buffers.release(*tensors)
        if seconds > _READ_BUDGET_S:
            break
    return Stage(nbytes * seconds / read, nbytes * processor / read)


def gram_read_rate(
    files: Iterable[GramFile], modules: Iterable[str], device: torch.device, *, matrix: bool = False
) -> float | None:
    """Bytes a second at which Grams, or with `matrix` H, come from files; None without one of triangles.

    Measured with the widest of these modules' Grams up to 64 MB: fresh memory for a wide one takes longer.
    """
    for file in files:
        if file.form == "triangle":
            sizes = {name: work.triangle_bytes(file.in_features(name)) for name in modules}
            few = {name: size for name, size in sizes.items() if size <= _MOST_GRAM_BYTES}
            name = max(few, key=few.get) if few else min(sizes, key=sizes.get)
            return sizes[name] / shortest_seconds(partial(_read_gram, file, name, device, matrix), 2, 0.4)
    return None


def _read_gram(file: GramFile, module: str, device: torch.device, matrix: bool) -> None:
    gram = file[module]
    gram.check_finite()
    if matrix:
        bool(torch.isfinite(gram.matrix().to(device)).all())
    del gram
    file.forget()
