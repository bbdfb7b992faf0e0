"""gram's CUDA kernels against each other and against cuBLAS's full product: 8192 tokens, and a list of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hpa_ext import ops

from .bench_gram import cublas_full
from .rows import Check, Row, Setting, make_row, relative_error
from .timing import Call

# Tensor cores round towards zero into the accumulator, which costs 1e-5 at 8192 tokens.
_ERROR_LIMIT = 5e-5
_SAMPLES = 12


def rows(setting: Setting) -> Iterator[Row]:
    """On CUDA ``gram_<kernel>_vs_cublas_full`` for each kernel that the device has, ``gram_wgmma_vs_mma_sync`` and
    ``gram_wgmma_list_vs_singles``; elsewhere nothing.

    The native kernels are measured whether or not they serve by default.
    """
    if setting.device.type != "cuda":
        return
    # Tests run the quick sizes, and must not hang should wgmma, which has not run on a GPU yet, never end.
    hopper = torch.cuda.get_device_capability(setting.device) == (9, 0) and not setting.quick
    with ops.native_cuda():
        for tokens, size in setting.cases(
            quick=[(192, 136)], default=[(8192, 4096), (8192, 11008)], full=[(2048, 4096)]
        ):
            yield from _products(setting, tokens, size, hopper)
        if hopper:
            for tokens, size in setting.cases(quick=[], default=[(700, 4096)], full=[]):
                yield _list(setting, tokens, size)


def _with(kernel: str, call: Callable[[int], object]) -> Call:
    def chosen(index: int) -> object:
        with ops.cuda_gram_kernel(kernel):
            return call(index)

    return chosen


def _check(kernel: str, gram: Tensor, x: Tensor) -> Check:
    exact = gram.double() + x.double().mT @ x.double()
    with ops.cuda_gram_kernel(kernel):
        error = relative_error(ops.gram_accumulate_(gram.clone(), x), exact)
    return Check(error, _ERROR_LIMIT)


def _buffers(setting: Setting, tokens: int, size: int) -> tuple[Tensor, Tensor]:
    start = setting.randn(size, size, scale=tokens**0.5)
    return start + start.mT, setting.randn(tokens, size, dtype=torch.bfloat16)


def _products(setting: Setting, tokens: int, size: int, hopper: bool) -> Iterator[Row]:
    sets = setting.sets(size * size * 4 + tokens * size * 2, lambda: _buffers(setting, tokens, size))
    work = setting.operations(tokens * size * (size + 1), torch.bfloat16)
    ours = lambda index: ops.gram_accumulate_(*sets[index % len(sets)])  # noqa: E731
    full = cublas_full(*sets[0])
    for kernel in ("wgmma", "mma_sync") if hopper else ("mma_sync",):
        peers: list[tuple[str, str, Call]] = []
        if full is not None:
            name, product = full
            peers.append((f"gram_{kernel}_vs_cublas_full", name, lambda i, f=product: f(*sets[i % len(sets)])))
        if kernel == "wgmma":
            peers.append(("gram_wgmma_vs_mma_sync", "mma_sync", _with("mma_sync", ours)))
        check = _check(kernel, *sets[0])
        for metric, peer_name, peer in peers:
            paired = setting.pair(_with(kernel, ours), peer)
            shape = (tokens, size)
            yield make_row(
                metric, "tokens, in", shape, torch.bfloat16, peer_name, paired, work, check, f"native, {kernel}"
            )


def _list(setting: Setting, tokens: int, size: int) -> Row:
    gram, _ = _buffers(setting, tokens, size)
    xs = [setting.randn(tokens, size, dtype=torch.bfloat16) for _ in range(_SAMPLES)]
    with ops.cuda_gram_kernel("wgmma"):
        exact = gram.double() + sum(x.double().mT @ x.double() for x in xs)
        error = relative_error(ops.gram_accumulate_list_(gram.clone(), xs), exact)

    def singles(index: int) -> None:
        for x in xs:
            ops.gram_accumulate_(gram, x)

    paired = setting.pair(
        _with("wgmma", lambda index: ops.gram_accumulate_list_(gram, xs)), _with("wgmma", singles)
    )  # fmt: skip
    work = setting.operations(_SAMPLES * tokens * size * (size + 1), torch.bfloat16)
    return make_row(
        "gram_wgmma_list_vs_singles", "samples, tokens, in", (_SAMPLES, tokens, size), torch.bfloat16,
        "wgmma, sample by sample", paired, work, Check(error, _ERROR_LIMIT), "native, wgmma",
    )  # fmt: skip
