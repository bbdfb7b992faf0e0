"""The numbers of a sequence from its table of scores, and their mean and interval over seeds. All in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence

# 97.5 % quantiles of Student's t, by degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def continual_metrics(scores: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """AP, BWT, Avg, Last and learning accuracy.

    Args:
        scores: ``scores[t][i]``, the score on task i after step t, for i <= t at least; as many steps as tasks. One row
            alone with several scores is a model that learnt all tasks at once (or none).

    ``AP = Last = mean_i a_{T,i}``; ``BWT = mean_{i<T} (a_{T,i} - a_{i,i})`` over T - 1 tasks; ``Avg``: mean over tasks
    of the task's mean score from the step that learnt it onward; ``learning = mean_i a_{i,i}``. BWT is None for one
    task or one row.
    """
    if not scores or not scores[-1]:
        raise ValueError("scores: expected at least one step and one task")
    last = list(scores[-1])
    final = sum(last) / len(last)
    if len(scores) == 1:
        return {"AP": final, "BWT": None, "Avg": final, "Last": final, "learning": final}
    count = len(scores)
    if len(last) != count or any(len(row) <= step for step, row in enumerate(scores)):
        raise ValueError(f"scores: expected {count} steps with a score for each task learnt so far, got {scores}")
    learnt = [scores[task][task] for task in range(count)]
    histories = [[scores[step][task] for step in range(task, count)] for task in range(count)]
    return {
        "AP": final,
        "BWT": sum(last[task] - learnt[task] for task in range(count - 1)) / (count - 1),
        "Avg": sum(sum(history) / len(history) for history in histories) / count,
        "Last": final,
        "learning": sum(learnt) / count,
    }


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t over the values); NaN for a single value."""
    if not values:
        raise ValueError("values: expected at least one, got none")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    quantile = _STUDENT[len(values) - 2] if len(values) - 2 < len(_STUDENT) else 1.96
    return mean, quantile * math.sqrt(variance / len(values))
