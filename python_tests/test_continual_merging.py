"""How the continual benchmark gives post-training methods their Grams: earlier steps' ones, and layer by layer."""

from __future__ import annotations

import pytest
import torch

from hpa_ext import Gram
from hpa_ext.baselines.layer import LayerContext
from hpa_ext.baselines.registry import METHODS, Method
from hpa_ext.continual.earlier_grams import EarlierGrams, reduced, values_kept
from hpa_ext.continual.sequence import run_sequence
from hpa_ext.continual.settings import ContinualSettings, mini_settings
from hpa_ext.gram import GramCollection

WIDTH = 12
SHORT = mini_settings().changed(max_steps=2, train_count=32, test_count=2, safety_count=2, task_calibration_count=4)


def _gram(seed: int) -> Gram:
    gram = Gram(WIDTH)
    gram.update(torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(seed)))
    return gram


def _collection(seed: int) -> GramCollection:
    shared = _gram(seed)
    return GramCollection({"q": shared, "k": shared, "o": _gram(seed + 100)})


def test_earlier_grams_add_up_each_task_alike() -> None:
    first, second = _collection(1), _collection(2)
    kept = EarlierGrams()
    assert kept.matrices(first) == {}
    assert kept.nbytes() == 0
    kept.add(first)
    kept.add(second)
    found = kept.matrices(second)
    assert kept.steps == 2
    for name in ("q", "k", "o"):
        torch.testing.assert_close(found[name], first[name].matrix() + second[name].matrix())
    assert kept.nbytes() == 2 * 4 * WIDTH * (WIDTH + 1) // 2  # two distinct inputs, one triangle each


def test_the_last_step_alone_can_be_kept() -> None:
    kept = EarlierGrams("last")
    kept.add(_collection(1))
    kept.add(_collection(2))
    torch.testing.assert_close(kept.matrices(_collection(2))["o"], _collection(2)["o"].matrix())


def test_the_diagonal_and_the_low_rank_form_keep_the_diagonal() -> None:
    matrix = _gram(3).matrix()
    diagonal, low = reduced(matrix, "diagonal", 1), reduced(matrix, "low-rank", 4)
    torch.testing.assert_close(diagonal, torch.diag(matrix.diagonal()))
    torch.testing.assert_close(low.diagonal(), matrix.diagonal())
    # Closer to the whole the more is kept, and equal to it in the end.
    errors = [float((reduced(matrix, "low-rank", rank) - matrix).norm()) for rank in (1, 4, 8, WIDTH)]
    assert float((diagonal - matrix).norm()) > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] == 0
    assert float(torch.linalg.eigvalsh(low.double()).min()) > -1e-5
    assert values_kept(WIDTH, "low-rank", 4) == 5 * WIDTH
    assert values_kept(WIDTH, "diagonal", 4) == WIDTH


@pytest.mark.parametrize(
    ("options", "message"), [({"form": "whole"}, "memory: expected"), ({"rank": 0}, "memory_rank: expected")]
)
def test_an_unknown_form_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlierGrams(**options)


def _run(function, needs: tuple[str, ...], settings: ContinualSettings = SHORT, **options) -> dict:
    method = Method("probe", "probe", "post-training", function, "test", settings=options, needs=needs)
    return run_sequence(method, 3, "original", 1, settings)


def test_a_method_is_given_the_grams_of_earlier_steps() -> None:
    seen: list[tuple[torch.Tensor | None, torch.Tensor]] = []

    def probe(old, new, layer: LayerContext, *, memory: str = "triangle") -> torch.Tensor:
        if layer.name.endswith("layers.1.mlp.down_proj"):
            seen.append((layer.earlier, layer.task.matrix().clone()))
        return new

    row = _run(probe, ("earlier-grams",), memory="triangle")
    assert [earlier is None for earlier, _ in seen] == [True, False]
    torch.testing.assert_close(seen[1][0], seen[0][1])
    assert row["method_mb"] > _run(probe, ("earlier-grams",), memory="diagonal")["method_mb"]


def test_grams_of_a_sequential_method_come_through_the_merged_layers_below() -> None:
    """With every layer put back to the old weights, the task Gram of the last layer is that of the old model."""
    found: dict[str, list[torch.Tensor]] = {"old": [], "new": []}

    def keep(kind: str):
        def probe(old, new, layer: LayerContext) -> torch.Tensor:
            if layer.name.endswith("layers.3.self_attn.q_proj"):
                found[kind].append(layer.task.matrix().clone())
            return old if kind == "old" else new

        return probe

    one = SHORT.changed(steps=1, max_steps=6)
    _run(keep("old"), ("sequential",), one)
    _run(keep("new"), ("sequential",), one)
    plain: list[torch.Tensor] = []

    def probe(old, new, layer: LayerContext) -> torch.Tensor:
        if layer.name.endswith("layers.3.self_attn.q_proj"):
            plain.append(layer.task.matrix().clone())
        return new

    _run(probe, (), one)
    torch.testing.assert_close(found["new"][0], plain[0], rtol=1e-4, atol=1e-5)
    assert float((found["old"][0] - plain[0]).norm() / plain[0].norm()) > 1e-3


def test_registered_methods_with_a_memory_have_its_options() -> None:
    for method in METHODS.values():
        if "earlier-grams" in method.needs:
            run = EarlierGrams(method.settings.get("memory", "triangle"), method.settings.get("memory_rank", 64))
            assert run.steps == 0
