"""Arguments for every operator under ``torch.ops.hpa_ext``."""

from __future__ import annotations

import torch
from helpers import normal


def symmetric(size, *batch, dtype=torch.float32, device="cpu"):
    x = normal(*batch, 3 * size, size, dtype=torch.float64)
    return (x.mT @ x / size).to(dtype).to(device)


def samples(operation, dtype, device):
    """Arguments of the operator, in the order of its schema, once for each way of calling it."""
    of_scores = torch.float64 if dtype == torch.float64 else torch.float32
    w_old, w_new = (normal(7, 5, dtype=dtype, device=device) for _ in range(2))
    mask = torch.tensor([True, False, True, False, False], device=device)
    coefficient = torch.tensor(0.25, dtype=of_scores, device=device)
    tokens = torch.tensor([[True, False, True]] * 2, device=device)
    if operation == "gram_accumulate_":
        gram = torch.zeros(5, 5, device=device)
        x = normal(2, 3, 5, dtype=dtype, device=device)
        return [(gram, x), (gram.clone(), x, tokens), (gram.clone(), x.permute(1, 0, 2), tokens.mT)]
    if operation == "inverse_diagonal":
        return [
            (symmetric(5, dtype=of_scores, device=device), 0.01),
            (symmetric(5, 2, dtype=of_scores, device=device), 0.01, "none", False),
        ]
    if operation == "column_scores":
        return [(w_old, w_new), (w_old.mT, w_new.mT)]
    if operation == "column_mask":
        scores = normal(3, 5, dtype=of_scores, device=device)
        counts = torch.tensor([0, 2, 5], device=device)
        return [(scores, counts), (scores, counts, scores > 0), (scores[0], counts[1])]
    if operation == "project_merge":
        return [(w_old, w_new, mask, coefficient, "input"), (w_old.mT, w_new.mT, mask, coefficient, "output")]
    if operation == "project_merge_out":
        return [
            (w_old, w_new, mask, coefficient, "input", torch.zeros_like(w_old)),
            (w_old.mT, w_new.mT, mask, coefficient, "output", torch.zeros_like(w_old).mT),
        ]
    if operation.startswith("routed_lora_"):
        return samples_of_linears(operation, dtype, of_scores, device)
    if operation.endswith("_list") or operation.endswith("_list_out"):
        return samples_of_lists(operation, dtype, device)
    if operation.startswith("low_rank"):
        weight, a, b = w_old, normal(3, 5, dtype=dtype, device=device), normal(7, 3, dtype=dtype, device=device)
        turned = (weight.mT, b.mT, a.mT)
        if operation == "low_rank_scores":
            return [(weight, a, b, 0.5), (*turned, 0.5)]
        if operation == "low_rank_merge":
            return [(weight, a, b, 0.5, mask, coefficient, "input"), (*turned, 0.5, mask, coefficient, "output")]
        if operation == "low_rank_merge_out":
            return [(*case, torch.zeros_like(case[0])) for case in samples("low_rank_merge", dtype, device)]
        gain = torch.ones(5, dtype=of_scores, device=device)
        out = torch.zeros_like(weight)
        return [(weight, a, b, 0.5, None, "input", out), (*turned, 0.5, gain, "output", out.clone().mT)]
    assert operation == "routed_lora"
    shapes = ((2, 3, 5), (3, 4, 5), (3, 6, 4))
    tensors = [normal(*shape, dtype=dtype, device=device) for shape in shapes]
    tensors += [normal(*shape, dtype=of_scores, device=device) for shape in ((2, 3), (3,))]
    return [tuple(tensors), tuple(tensor.clone().requires_grad_() for tensor in tensors)]


def samples_of_lists(operation, dtype, device):
    """Two layers of different shapes, the second one transposed."""
    of_scores = torch.float64 if dtype == torch.float64 else torch.float32
    w_old, w_new = ([normal(*s, dtype=dtype, device=device) for s in ((7, 5), (4, 3))] for _ in range(2))
    w_old[1], w_new[1] = w_old[1].mT, w_new[1].mT
    masks = [torch.arange(w.shape[1], device=device) % 2 == 0 for w in w_old]
    coefficients = torch.tensor([0.25, -0.5], dtype=of_scores, device=device)
    if operation == "column_scores_list":
        return [(w_old, w_new), (w_old[:1], w_new[:1])]
    if operation == "column_mask_list":
        scores = [normal(n, dtype=of_scores, device=device) for n in (5, 8)]
        count = torch.tensor(3, device=device)
        return [(scores, [2, 0], [None, count], [None, scores[1] > 0])]
    if operation == "project_merge_list":
        return [(w_old, w_new, masks, coefficients, "input")]
    assert operation == "project_merge_list_out"
    return [(w_old, w_new, masks, coefficients, "input", [w.clone() for w in w_old])]


def samples_of_linears(operation, dtype, of_scores, device):
    """Two linears with one input."""
    x = normal(2, 3, 5, dtype=dtype, device=device)
    a = [normal(3, rank, 5, dtype=dtype, device=device) for rank in (4, 1)]
    b = [normal(3, out, rank, dtype=dtype, device=device) for out, rank in ((6, 4), (2, 1))]
    onto = [normal(2, 3, out, dtype=dtype, device=device) for out in (6, 2)]
    weights = normal(2, 3, dtype=of_scores, device=device)
    scaling = [normal(3, dtype=of_scores, device=device) for _ in range(2)]
    if operation == "routed_lora_backward":
        return [(onto, x, a, b, weights, scaling, [True] * 8), (onto, x, a, b, weights, scaling, [False, True] * 4)]
    if operation == "routed_lora_add_":
        return [(onto[0], x, a[0], b[0], weights, scaling[0])]
    assert operation == "routed_lora_list"
    tensors = [x, a, b, weights, scaling]
    leaves = [
        [t.clone().requires_grad_() for t in value] if isinstance(value, list) else value.clone().requires_grad_()
        for value in (*tensors, onto)
    ]
    return [(*tensors, []), (*tensors, onto), tuple(leaves)]
