"""Small, odd shapes through every native CUDA kernel, for compute-sanitizer; compared with the torch path."""

from __future__ import annotations

import sys

import torch

from hpa_ext import ops


def run(dtype: torch.dtype) -> None:
    """One call of each operation at sizes that fill no tile."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)  # noqa: E731
    x, old = draw(77, 131).to(dtype), draw(67, 131).to(dtype)
    new = (old + 0.1 * draw(67, 131)).to(dtype)
    token_mask = draw(77) > 0
    experts = draw(3, 5, 131).to(dtype), draw(3, 67, 5).to(dtype)
    weights, scaling = draw(2, 3).softmax(-1), torch.ones(3, device="cuda")
    results = []
    for native in (True, False):
        with ops.native_cuda(native):
            gram = ops.gram_accumulate_(torch.zeros(131, 131, device="cuda"), x, token_mask)
            inverse = ops.inverse_diagonal(gram, 0.01)
            squared, inner, norm = ops.column_scores(old, new)
            mask = ops.column_mask(squared / inverse, 19)
            merged = ops.project_merge(old, new, mask, inner / norm)
            routed = ops.routed_lora(x[:76].view(2, 38, 131), *experts, weights, scaling)
            a, b = experts[0][0], experts[1][0]
            low_rank = ops.low_rank_scores(old, a, b, 0.5)[0]
            added = ops.low_rank_merge(old, a, b, 0.5, mask, inner / norm)
            results.append((gram, inverse, squared, merged.float(), routed.float(), low_rank, added.float()))
    for mine, theirs in zip(*results, strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < 5e-3, f"native and torch differ by {error:.1e} of the norm"


def run_wgmma(dtype: torch.dtype) -> None:
    """The wgmma kernel of gram: tails, a mask over NaN, a list, more tiles than splits, against torch."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)  # noqa: E731
    for tokens, size in ((77, 136), (1100, 264), (130, 2056)):
        xs = [draw(tokens, size).to(dtype), draw(65, size).to(dtype)]
        mask = draw(tokens) > 0
        xs[0][~mask] = torch.nan
        theirs, mine = torch.zeros(size, size, device="cuda"), torch.zeros(size, size, device="cuda")
        with ops.native_cuda(False):
            ops.gram_accumulate_list_(theirs, xs, [mask, None])
        with ops.native_cuda(), ops.cuda_gram_kernel("wgmma"):
            ops.gram_accumulate_list_(mine, xs, [mask, None])
        error = float((mine - theirs).norm() / theirs.norm())
        assert error < 5e-3, f"wgmma and torch differ by {error:.1e} of the norm"


if __name__ == "__main__":
    if "--wgmma" in sys.argv:  # off by default, and only for compute capability 9.0
        if torch.cuda.get_device_capability() != (9, 0):
            print("skipped: wgmma needs a device of compute capability 9.0")
            sys.exit(0)
        kernels, dtypes = run_wgmma, (torch.float16, torch.bfloat16)
    else:
        kernels, dtypes = run, (torch.float32, torch.float16, torch.bfloat16)
    for dtype in dtypes:
        kernels(dtype)
    torch.cuda.synchronize()
    print("native and torch agree")
