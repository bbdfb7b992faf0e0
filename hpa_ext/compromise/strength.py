"""The strength at which a decreasing share meets a budget: a safeguarded secant, where both are nearly straight."""

from __future__ import annotations

import math
from collections.abc import Callable

from hpa_ext.errors import NumericalError

_LARGEST_STEP = math.log(100.0)
_MOST_EVALUATIONS = 60
_PATIENCE = 8
_CLOSEST = 1e-9
_LARGEST = 1e37  # what a float32 matrix can be multiplied by


def find_strength(
    share: Callable[[float], float], budget: float, start: float, tolerance: float, scale: float = 1.0
) -> float:
    """A strength mu with ``(1 - tolerance) budget <= share(mu) <= budget``.

    Args:
        share: of the strength, 1 at 0 and falling towards 0; evaluated at positive strengths.
        budget: in (0, 1).
        start: where to begin, positive; the answer for a similar layer saves evaluations.
        tolerance: in (0, 1).
        scale: the strength at which both sides weigh alike; answers are looked for within 1e-12 to 1e12 of it,
            and not above 1e37.

    Returns:
        The strength. Where the share jumps over the budget, the smallest one found that holds it.

    Raises:
        NumericalError: no strength in that range holds the budget.

    A share is a mean of ``(1 + mu lambda)^-2``, so that ``log(1/share - 1)`` is nearly straight in ``log mu``, with a
    slope of 1 at small mu and at most 2 at large ones: about four evaluations do, each one factorisation and a solve. A
    generalised eigendecomposition of the two Grams would give all strengths at once and serve all linears with that
    input, but takes as long as 10 (float32) to 18 (float64) evaluations at a width of 2048 on a CPU core, more at wider
    ones and on GPUs, and loses digits in float32 where the Gram of a few safety samples is nearly singular.
    """
    aim = _logit(budget * (1 - tolerance / 2))
    highest = budget * (1 - tolerance / 100)  # so that what rounds otherwise in the end still holds the budget
    most = min(math.log(scale) + math.log(1e12), math.log(_LARGEST))
    least = min(math.log(scale) - math.log(1e12), most)
    x = min(max(math.log(start), least), most)
    above: tuple[float, float] | None = None  # the largest strength known to exceed the budget, and aim - logit
    below: tuple[float, float] | None = None  # the smallest one known to hold it
    previous: tuple[float, float] | None = None
    for count in range(_MOST_EVALUATIONS):
        value = share(math.exp(x))
        if (1 - tolerance) * budget <= value <= highest:
            return math.exp(x)
        point = x, aim - _logit(value)
        # Of a share that is not quite monotonous the bracket still shrinks around a crossing.
        if value > highest:
            above, left = point, value
        else:
            below = point
        if above is not None and below is not None:
            if abs(below[0] - above[0]) < _CLOSEST:
                break
            x = _between(above, below, point, previous)
            if count > _PATIENCE and count % 2:
                x = (above[0] + below[0]) / 2  # a kink in the share can hold a chord up at one end
        elif (x <= least and below is not None) or (x >= most and above is not None):
            break
        else:
            x = min(max(_beyond(point, previous), least), most)
        previous = point
    if below is None:
        raise NumericalError(
            f"budget: expected a strength that leaves a share of {budget:g} on the protected samples, but "
            f"{math.exp(above[0]):g} still leaves {left:.3g}; raise the damping or the budget"
        )
    return math.exp(below[0])


def _logit(share: float) -> float:
    """``log(1/share - 1)``, within what float64 tells apart at 0 and at 1."""
    return math.log(max(1 / max(share, 1e-300) - 1, 1e-15))


def _beyond(point: tuple[float, float], previous: tuple[float, float] | None) -> float:
    """The next guess while the crossing is outside of what was tried: along the secant, a bounded step."""
    slope = -1.0
    if previous is not None and previous[0] != point[0]:
        slope = (point[1] - previous[1]) / (point[0] - previous[0])
    step = -point[1] / slope if slope < -0.2 else math.copysign(_LARGEST_STEP, point[1])
    return point[0] + min(max(step, -_LARGEST_STEP), _LARGEST_STEP)


def _between(
    above: tuple[float, float],
    below: tuple[float, float],
    point: tuple[float, float],
    previous: tuple[float, float] | None,
) -> float:
    """The next guess within the bracket: the chord, or the middle where the chord would hardly move an end."""
    width = below[0] - above[0]
    x = above[0] + width * above[1] / (above[1] - below[1])
    if previous is not None and previous[0] != point[0]:
        slope = (point[1] - previous[1]) / (point[0] - previous[0])
        secant = point[0] - point[1] / slope if slope < 0 else math.inf
        if above[0] < secant < below[0]:  # the last two points are the closest ones
            x = secant
    margin = 1e-3 * abs(width)
    inside = min(above[0], below[0]) + margin < x < max(above[0], below[0]) - margin
    return x if inside else (above[0] + below[0]) / 2
