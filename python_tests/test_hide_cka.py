"""Linear CKA by its definition, streamed without activations, for layers of models, with a suggestion and pictures."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import hide_models as hm
import pytest
import torch
from helpers import refuses
from tiny_models import batches, tuned

from hpa_ext import NumericalError
from hpa_ext.hide import HiDeConfig, linear_cka
from hpa_ext.hide.cka import StreamingCKA
from hpa_ext.hide.layer_cka import CKARun, LayerCKA, expert_cka, layer_cka
from hpa_ext.hide.structure import decoder_layers


def by_definition(x, y):
    """Appendix B: HSIC of centred Gram matrices, in float64."""
    n = x.shape[0]
    h = torch.eye(n, dtype=torch.float64) - torch.full((n, n), 1 / n, dtype=torch.float64)
    kx, ky = h @ x.double() @ x.double().T @ h, h @ y.double() @ y.double().T @ h
    hsic = lambda a, b: torch.trace(a @ b) / (n - 1) ** 2  # noqa: E731
    return hsic(kx, ky) / torch.sqrt(hsic(kx, kx) * hsic(ky, ky))


@pytest.mark.parametrize(("n", "p", "q"), [(40, 5, 7), (6, 30, 20), (10, 10, 10), (2, 3, 1), (500, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cka_is_the_definition(n, p, q, dtype):
    x = (torch.randn(n, p, dtype=torch.float64) + 3).to(dtype)
    y = (torch.randn(n, q, dtype=torch.float64) + x[:, :1].double()).to(dtype)
    cka = linear_cka(x, y)
    torch.testing.assert_close(cka, by_definition(x, y), rtol=1e-10, atol=1e-12)
    assert cka.shape == ()
    assert 0 <= float(cka) <= 1 + 1e-12
    torch.testing.assert_close(linear_cka(y, x), cka)


def test_cka_ignores_rotation_scale_and_shift():
    x = torch.randn(50, 8, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert abs(float(linear_cka(x, 3 * x @ rotation + 5)) - 1) < 1e-12
    assert float(linear_cka(x, torch.randn(50, 8))) < 0.5


def test_few_samples_of_many_features_bias_it_upward():
    few = linear_cka(torch.randn(8, 500), torch.randn(8, 500))
    many = linear_cka(torch.randn(4000, 20), torch.randn(4000, 20))
    assert float(few) > 0.9
    assert float(many) < 0.02


def test_cka_refuses_what_it_is_not_defined_for():
    x = torch.randn(5, 3)
    with refuses(TypeError, "x"):
        linear_cka([[1.0]], x)
    with refuses(ValueError, "y"):
        linear_cka(x, torch.randn(4, 3))
    with refuses(ValueError, "y"):
        linear_cka(x[:1], x[:1])
    with refuses(ValueError, "x"):
        linear_cka(torch.ones(5, dtype=torch.int64), x)
    with pytest.raises(NumericalError, match="y: all samples have the same features"):
        linear_cka(x, torch.ones(5, 2))
    with pytest.raises(NumericalError, match="NaN"):
        linear_cka(x, x * torch.nan)


def test_streaming_agrees_with_the_direct_form():
    views = {"a": torch.randn(200, 6) + 100, "b": torch.randn(200, 9).double() - 7, "c": torch.randn(200, 6).bfloat16()}
    views["b"][:, :6] += views["a"]
    stream = StreamingCKA(list(views))
    for rows in torch.arange(200).split([1, 0, 30, 69, 100]):
        stream.update({name: value[rows] for name, value in views.items()})
    matrix = stream.matrix()
    for i, first in enumerate(views):
        for j, second in enumerate(views):
            torch.testing.assert_close(matrix[i, j], linear_cka(views[first], views[second]), rtol=1e-9, atol=1e-12)
    assert stream.count == 200
    kept = sum(value.numel() for value in stream._moments.values())
    assert kept == 3 * 36 + 2 * 54 + 81  # and none of the 200 rows


def test_streaming_refuses_what_does_not_fit():
    stream = StreamingCKA(["a", "b"])
    stream.update({"a": torch.randn(3, 2), "b": torch.randn(3, 4)})
    with refuses(ValueError, "features"):
        stream.update({"a": torch.randn(3, 2)})
    with refuses(ValueError, "features"):
        stream.update({"a": torch.randn(3, 2), "b": torch.randn(2, 4)})
    with pytest.raises(ValueError, match="features: b: expected width 4, got 5"):
        stream.update({"a": torch.randn(3, 2), "b": torch.randn(3, 5)})
    assert stream.count == 3
    with refuses(ValueError, "names"):
        StreamingCKA(["a", "a"])
    with refuses(ValueError, "cka"):
        StreamingCKA(["a", "b"]).value("a", "b")


def outputs(model, data, pool):
    """What `layer_cka` must have seen, with every activation stored."""
    stored = [[] for _ in decoder_layers(model)]
    for number, (_, layer) in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda m, a, o, number=number: stored[number].append(o))
    rows = [[] for _ in stored]
    for batch in data:
        with torch.no_grad():
            model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], pixel_values=batch["pixel_values"]
            )
        mask = batch["attention_mask"].bool()
        for number, states in enumerate(stored):
            state = states.pop()
            for row in range(len(state)):
                kept = state[row][mask[row]].double()
                rows[number].append({"mean": kept.mean(0, keepdim=True), "last": kept[-1:], "tokens": kept}[pool])
    return [torch.cat(values) for values in rows]


@pytest.mark.parametrize("pool", ["mean", "last", "tokens"])
def test_layers_are_compared_as_with_stored_activations(pool):
    first = hm.llava_of()
    models = {"a": first, "b": tuned(first, 0.05), "c": tuned(first, 0.1, seed=2)}
    data = batches(first, count=3, size=5)
    found = layer_cka({name: CKARun(model, data) for name, model in models.items()}, pool=pool, progress=False)
    expected = {name: outputs(copy.deepcopy(model), data, pool) for name, model in models.items()}
    assert found.tasks == ["a", "b", "c"]
    assert found.samples == (15 if pool != "tokens" else sum(int(batch["attention_mask"].sum()) for batch in data))
    assert found.values.shape == (3, 3, 3)
    for layer in range(3):
        for i, one in enumerate(models):
            for j, two in enumerate(models):
                direct = linear_cka(expected[one][layer], expected[two][layer])
                torch.testing.assert_close(found.values[layer, i, j], direct, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.curve(), (found.pair("a", "b") + found.pair("a", "c") + found.pair("b", "c")) / 3)
    assert not any(layer._forward_hooks for _, layer in decoder_layers(first))


def test_experts_are_compared_alone_and_the_model_stays_as_it_was():
    model = hm.hide()
    data = batches(hm.llava_of(), count=2, size=6)
    state = hm.state_of(model.model)
    found = expert_cka(model, data, progress=False)
    hm.assert_same_state(model.model, state)
    assert model.config == HiDeConfig()
    merged = {}
    for task in hm.TASKS:
        single = hm.hide(config=HiDeConfig(top_layers=3, projector="routed"))
        merged[task] = CKARun(single.merge_and_unload(task), data)
    direct = layer_cka(merged, progress=False)
    torch.testing.assert_close(found.values, direct.values, rtol=1e-4, atol=1e-5)
    own = expert_cka(
        model, {task: batches(hm.llava_of(), 2, 6, seed=n) for n, task in enumerate(hm.TASKS)}, progress=False
    )
    assert not torch.allclose(own.values, found.values, atol=1e-3)
    with refuses(ValueError, "batches"):
        expert_cka(model, {"alpha": data})


def test_runs_that_do_not_fit_are_refused():
    model = hm.llava_of()
    data = batches(model, count=2)
    with refuses(ValueError, "runs"):
        layer_cka({"a": CKARun(model, data)})
    with refuses(ValueError, "pool"):
        layer_cka({"a": CKARun(model, data), "b": CKARun(model, data)}, pool="max")
    with pytest.raises(ValueError, match="expected as many batches in each run"):
        layer_cka({"a": CKARun(model, data), "b": CKARun(model, data[:1])}, progress=False)
    with refuses(ValueError, "features"):
        layer_cka({"a": CKARun(model, data), "b": CKARun(model, batches(model, 2, 3), nullcontext)}, progress=False)


def curve_of(values):
    matrix = torch.eye(2, dtype=torch.float64).repeat(len(values), 1, 1)
    matrix[:, 0, 1] = matrix[:, 1, 0] = torch.tensor(values, dtype=torch.float64)
    return LayerCKA([f"layers.{i}" for i in range(len(values))], ["a", "b"], matrix, 100)


@pytest.mark.parametrize(
    ("curve", "count", "stands_out"),
    [
        ([0.98, 0.97, 0.98, 0.97, 0.6], 1, True),
        ([0.98, 0.97, 0.98, 0.97, 0.6, 0.55], 2, True),
        ([0.95, 0.84, 0.71, 0.54], 2, True),
        ([0.9, 0.2, 0.9, 0.9, 0.4], 1, True),
        ([0.98, 0.97, 0.98, 0.97, 0.97], 1, False),
        ([0.5, 0.9, 0.95, 0.99], 1, False),
    ],
)
def test_top_layers_are_those_that_stand_out(curve, count, stands_out):
    suggestion = curve_of(curve).suggest_top_layers()
    assert suggestion.count == count
    assert f"{curve[-1]:.3f}" in suggestion.reason
    assert ("no top layer stands out" in suggestion.reason) is not stands_out


def test_pictures(tmp_path):
    from hpa_ext.reporting.cka import plot_cka_curve, plot_cka_heat_maps

    cka = curve_of([0.98, 0.97, 0.98, 0.6])
    for path in (
        plot_cka_heat_maps(cka, tmp_path / "map.png", "map"),
        plot_cka_heat_maps(cka, tmp_path / "one.png", "map", layers=[3]),
        plot_cka_curve(cka, tmp_path / "curve.svg", "curve"),
    ):
        assert path.stat().st_size > 5000
    with refuses(ValueError, "layers"):
        plot_cka_heat_maps(cka, tmp_path / "no.png", "map", layers=[4])


def test_an_iterator_is_not_shared_between_runs():
    """Each run would get other samples, and the figure would be wrong without a word."""
    model = hm.llava_of()
    data = iter(batches(model, count=4))
    with refuses(ValueError, "runs"):
        layer_cka({"a": CKARun(model, data), "b": CKARun(model, data)}, progress=False)
    with refuses(TypeError, "batches"):
        expert_cka(hm.hide(), iter(batches(model, count=6)), progress=False)
