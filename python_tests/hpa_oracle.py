"""HPA written out in float64 numpy from its equations, column by column: shares no code with the library."""

from __future__ import annotations

import math

import numpy as np


def count_of(percent: float, columns: int) -> int:
    return min(max(math.floor(percent * columns / 100 + 0.5), 0), columns)


def top(scores: np.ndarray, count: int, among: set[int] | None = None) -> list[int]:
    """Indices of the `count` highest scores, ties to the lower index."""
    candidates = sorted(range(len(scores)) if among is None else among, key=lambda j: (-scores[j], j))
    return candidates[:count]


def inverse_diagonal(h: np.ndarray, damping: float) -> np.ndarray:
    return np.diag(np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(len(h))))


def harmonize(
    old, new, h_safety, h_task, *, depth=0.5, alpha_min=0.4, alpha_max=0.8, retain_min=5.0, retain_max=15.0,
    focus_multiple=2.0, damping=0.01, granularity="input", importance="quotient", orthogonal=True,
    safety_scores=True, shared_selection=True,
):  # fmt: skip
    """Harmonized weight, retained indices, alpha and coefficient."""
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    update = new - old
    scores = []
    for h in (h_safety, h_task):
        inverse = inverse_diagonal(np.asarray(h, np.float64), damping)
        elementwise = update**2 / inverse[None, :] if importance == "quotient" else update**2 * inverse[None, :]
        scores.append(elementwise.mean(axis=0 if granularity == "input" else 1))
    safety, task = scores
    columns = len(safety)
    logs = [math.log(s / t) for s, t in zip(safety, task, strict=True) if s > 0 and t > 0]
    mean = sum(logs) / len(logs) if logs else 0.0
    alpha = (alpha_min + alpha_max) / 2 + (alpha_max - alpha_min) / 2 * math.tanh(mean)
    percent = retain_max - depth * (retain_max - retain_min)
    retain, focus = count_of(percent, columns), count_of(percent * focus_multiple, columns)
    focused, tasked = set(top(safety, focus)), set(top(task, focus))
    balanced = safety - alpha * task
    if safety_scores and shared_selection:
        retained = top(safety, retain, focused - tasked)
        retained += top(balanced, retain - len(retained), focused & tasked)
    elif safety_scores:
        retained = top(safety, retain)
    elif shared_selection:
        retained = top(balanced, retain)
    else:
        retained = []
    norm = (old**2).sum()
    coefficient = (update * old).sum() / norm if orthogonal and norm > 0 else 0.0
    merged = new - coefficient * old
    if granularity == "input":
        merged[:, retained] = old[:, retained]
    else:
        merged[retained, :] = old[retained, :]
    return merged, sorted(retained), alpha, coefficient
