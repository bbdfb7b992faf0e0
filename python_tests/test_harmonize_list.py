"""harmonize of a list of layers: bit for bit what each gets alone, by one operation a phase, without the host."""

from __future__ import annotations

import pytest
import torch
import transformers.pytorch_utils
from helpers import assert_same_bits
from test_harmonize import SETTINGS, make_grams, make_layer
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hpa_ext import CompromiseConfig, HPAConfig, NumericalError, harmonize, harmonize_, ops
from hpa_ext.hpa.layer import Layers
from hpa_ext.hpa.layer_plan import merge_layers
from hpa_ext.hpa.plan import plan_layers

SHAPES = [
    (48, 64, torch.bfloat16),
    (64, 64, torch.bfloat16),
    (48, 64, torch.float32),
    (96, 64, torch.float16),
    (64, 96, torch.bfloat16),
    (48, 64, torch.float64),
]
DEPTHS = [0.1, 0.5, 1.0, 0.25, 0.75, 0.6]


def make_layers(device="cpu", shapes=SHAPES):
    layers = [make_layer(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes)]
    olds, news = [old for old, _, _ in layers], [new for _, new, _ in layers]
    return olds, news, [make_grams(activations) for _, _, activations in layers]


def assert_same_reports(actual, expected):
    for key, value in vars(expected).items():
        found = getattr(actual, key)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, key


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))
def test_each_layer_gets_what_it_gets_alone(settings, device):
    config = HPAConfig(**settings)
    olds, news, grams = make_layers(device)
    weights, reports = harmonize(olds, news, grams, DEPTHS, config, return_report=True)
    for index, (old, new, gram, depth) in enumerate(zip(olds, news, grams, DEPTHS, strict=True)):
        weight, report = harmonize(old, new, gram, depth, config, return_report=True)
        assert_same_bits(weights[index], weight)
        assert_same_reports(reports[index], report)


def test_one_depth_for_all_and_any_composition():
    olds, news, grams = make_layers()
    together = harmonize(olds, news, grams, 0.3)
    for first, last in ((0, 1), (1, 4), (3, 6)):
        part = harmonize(tuple(olds[first:last]), tuple(news[first:last]), tuple(grams[first:last]), 0.3)
        for actual, expected in zip(part, together[first:last], strict=True):
            assert_same_bits(actual, expected)
    assert harmonize([], [], []) == []


def test_modules_of_every_kind():
    olds, news, grams = make_layers(shapes=[(48, 64, torch.float32)] * 3)
    linear, conv1d = nn.Linear(64, 48), transformers.pytorch_utils.Conv1D(48, 64)
    linear.weight.data, conv1d.weight.data = news[0].clone(), news[1].mT.clone()
    weights = harmonize(olds, [linear, conv1d, news[2]], grams)
    assert [list(weight.shape) for weight in weights] == [[48, 64], [64, 48], [48, 64]]
    expected = harmonize(olds, news, grams)
    assert_same_bits(weights[1].mT.contiguous(), expected[1])
    reports = harmonize_(olds, [linear, conv1d, news[2]], grams)
    assert len(reports) == 3
    for written, weight in zip((linear.weight, conv1d.weight.mT, news[2]), expected, strict=True):
        assert torch.equal(written, weight)


@pytest.mark.parametrize(("rows", "granularity"), [(0, "input"), (0, "output"), (1, "output")])
def test_a_layer_without_rows_is_harmonized_to_itself(rows, granularity):
    olds, news, grams = make_layers(shapes=[(rows, 64, torch.bfloat16), (48, 64, torch.bfloat16)])
    config = HPAConfig(granularity=granularity)
    weights, reports = harmonize(olds, news, grams, config=config, return_report=True)
    assert weights[0].shape == (rows, 64) and reports[0].alpha == pytest.approx(0.6, abs=0.2 if rows else 1e-12)
    assert_same_bits(weights[1], harmonize(olds[1], news[1], grams[1], config=config))


def test_one_operation_for_each_phase(monkeypatch):
    calls = []
    for name in ("column_scores_list", "column_mask_list", "project_merge_list"):
        original = getattr(ops, name)

        def counted(first, *args, original=original, name=name, **kwargs):
            calls.append((name, len(first)))
            return original(first, *args, **kwargs)

        monkeypatch.setattr(ops, name, counted)
    olds, news, grams = make_layers(shapes=SHAPES[:5])
    harmonize(olds, news, grams, DEPTHS[:5])
    # S and T of all layers; then what is safety's alone; then what is shared.
    masks = [("column_mask_list", 10), ("column_mask_list", 5), ("column_mask_list", 5)]
    assert calls == [("column_scores_list", 5), *masks, ("project_merge_list", 5)]


def test_a_gram_in_several_pairs_is_factored_once(monkeypatch):
    import hpa_ext.hpa.layer_grams as module

    olds, news, _ = make_layers(shapes=[(48, 64, torch.float32)] * 3)
    matrices = [gram.matrix() for gram in make_grams(make_layer()[2])]
    expected = [harmonize(old, new, tuple(matrices)) for old, new in zip(olds, news, strict=True)]
    factored, original = [], module.ops.inverse_diagonal
    monkeypatch.setattr(module.ops, "inverse_diagonal", lambda h, *a, **k: factored.append(h) or original(h, *a, **k))
    weights = harmonize(olds, news, [tuple(matrices)] * 3)
    assert len(factored) == 2
    for actual, wanted in zip(weights, expected, strict=True):
        assert_same_bits(actual, wanted)


@pytest.mark.parametrize("broken", ["layer_old", "layer_new", "gram.safety", "gram.task"])
def test_what_is_not_finite_is_named_and_nothing_is_written(broken):
    olds, news, grams = make_layers()
    matrices = [[gram.matrix() for gram in pair] for pair in grams]
    if broken.startswith("layer"):
        {"layer_old": olds, "layer_new": news}[broken][3][5, 7] = torch.nan
    else:
        matrices[3][broken == "gram.task"][2, 2] = torch.inf
    before = [new.clone() for new in news]
    with pytest.raises(NumericalError, match=rf"^layers\[3\]: {broken}"):
        harmonize_(olds, news, [tuple(pair) for pair in matrices], DEPTHS)
    for new, kept in zip(news, before, strict=True):
        assert torch.equal(new.nan_to_num(7.0), kept.nan_to_num(7.0))


def test_scores_that_overflow_name_their_layer():
    olds, news, grams = make_layers(shapes=[(48, 64, torch.float32)] * 3)
    matrices = [tuple(gram.matrix() for gram in pair) for pair in grams]
    matrices[1] = (matrices[1][0], matrices[1][1] * 1e37)
    with pytest.raises(NumericalError, match=r"^layers\[1\]: gram.task: too large for these weights"):
        harmonize(olds, [new * 1e3 for new in news], matrices)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"layer_new": 0}, TypeError, r"^layer_new: expected a list of 2, .*got Tensor"),
        ({"layer_new": [0]}, ValueError, r"^layer_new: expected 2, one for each of layer_old, got 1"),
        ({"layer_old": 0}, TypeError, r"^layer_new: expected one layer like layer_old, got a list of 2"),
        ({"gram": [0]}, ValueError, r"^gram: expected 2, one for each of layer_old, got 1"),
        ({"gram": 0}, TypeError, r"^gram: expected a list of 2, .*got GramPair"),
        ({"depth": [0.5]}, ValueError, r"^depth: expected 2"),
        ({"depth": [0.5, 2.0]}, ValueError, r"^layers\[1\]: depth: expected a number in \[0, 1\]"),
        ({"layer_new": [0, "x"]}, TypeError, r"^layer_new\[1\]: expected a Tensor"),
        ({"layer_new": [0, 2]}, ValueError, r"^layers\[1\]: w_new: expected shape \[48, 64\] like w_old"),
        ({"gram": [0, None]}, TypeError, r"^layers\[1\]: gram: expected a GramPair"),
    ],
)
def test_lists_that_do_not_fit(change, error, text):
    olds, news, grams = make_layers(shapes=[(48, 64, torch.float32)] * 2 + [(64, 96, torch.float32)])
    arguments = {"layer_old": olds[:2], "layer_new": news[:2], "gram": grams[:2], "depth": 0.5}
    values = {"layer_old": olds, "layer_new": news, "gram": grams}
    for name, chosen in change.items():
        pool = values.get(name)
        if pool is None:
            arguments[name] = chosen
        elif isinstance(chosen, int):
            arguments[name] = pool[chosen]
        else:
            arguments[name] = [pool[item] if isinstance(item, int) else item for item in chosen]
    with pytest.raises(error, match=text):
        harmonize(**arguments)


def test_a_weight_that_is_its_own_old_one_is_refused():
    olds, news, grams = make_layers(shapes=[(48, 64, torch.float32)] * 2)
    kept = news[0].clone()
    with pytest.raises(ValueError, match=r"layers\[1\]: layer_new: is the same memory"):
        harmonize_(olds, [news[0], olds[1]], grams)
    assert torch.equal(news[0], kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_that_share_memory_are_refused_before_any_is_written(dtype):
    """Float64 layers are merged after the others, so what is wrong with them must be known before."""
    olds, news, grams = make_layers(shapes=[(48, 64, torch.float32)] + [(48, 64, dtype)] * 2)
    wide = torch.cat([news[2], news[2][:4]])
    for old, new, text in (
        (olds, [*news[:2], news[1]], r"^layers\[2\]: layer_new: overlaps layer_new of layers\[1\]"),
        ([*olds[:2], news[1]], news, r"^layers\[1\]: layer_new: overlaps layer_old of layers\[2\]"),
        ([*olds[:2], wide[:48]], [*news[:2], wide[4:]], r"^layers\[2\]: layer_new: is the same memory as layer_old"),
        (olds, [*news[:2], news[2][:1].expand(48, 64)], r"^layers\[2\]: layer_new: expected elements apart"),
    ):
        before = [weight.clone() for weight in (*old, *new)]
        with pytest.raises(ValueError, match=text):
            harmonize_(old, new, grams)
        for weight, kept in zip((*old, *new), before, strict=True):
            assert torch.equal(weight, kept)


def test_the_compromise_takes_one_layer():
    olds, news, grams = make_layers(shapes=[(48, 64, torch.float32)] * 2)
    with pytest.raises(TypeError, match="layer_old: expected a Tensor"):
        harmonize(olds, news, grams, config=CompromiseConfig())


@pytest.mark.parametrize("granularity", ["input", "output"])
def test_nothing_reads_the_device_without_checks(granularity):
    """Fake tensors hold no numbers: whatever asks for one raises."""
    config = HPAConfig(granularity=granularity)
    with FakeTensorMode():
        olds, news = ([torch.empty(s[:2], dtype=s[2]) for s in SHAPES[:5]] for _ in range(2))
        grams = [(torch.empty(old.shape[1], old.shape[1]), torch.empty(old.shape[1], old.shape[1])) for old in olds]
        plans = plan_layers(olds, news, grams, DEPTHS[:5], config, check=False)
        merged = merge_layers(plans, olds, news)
        assert [weight.shape for weight in merged] == [new.shape for new in news]
        with pytest.raises(DataDependentOutputException):
            plan_layers(olds, news, grams, DEPTHS[:5], config, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_capture_in_a_cuda_graph():
    olds, news, grams = make_layers("cuda", SHAPES[:5])
    matrices = [tuple(gram.matrix() for gram in pair) for pair in grams]
    outs = [torch.empty_like(new) for new in news]

    def step():
        layers = Layers.of(olds, news, matrices, DEPTHS[:5])
        plans = plan_layers(layers.olds, layers.news, layers.grams, layers.depths, HPAConfig(), check=False)
        merge_layers(plans, olds, news, outs)

    with ops.native_cuda():
        expected = harmonize(olds, news, matrices, DEPTHS[:5])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for out in outs:
            out.zero_()
        graph.replay()
        for out, weight in zip(outs, expected, strict=True):
            assert_same_bits(out, weight)
        for new in news:  # a replay works on the weights as they are then
            new.mul_(1.5)
        graph.replay()
        for out, weight in zip(outs, harmonize(olds, news, matrices, DEPTHS[:5]), strict=True):
            assert_same_bits(out, weight)
