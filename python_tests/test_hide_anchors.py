"""Anchors: exact streaming means, routing by the paper's equations, files, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import refuses

from hpa_ext import NumericalError
from hpa_ext.hide import Anchors, HiDeConfig
from hpa_ext.hide.tensor_files import read_tensors, write_tensors

CONFIG = HiDeConfig()


def features(n, d, seed=0, offset=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def filled(tasks=3, d_v=5, d_t=7):
    anchors = Anchors()
    for task in range(tasks):
        anchors.update(f"task {task}", features(4, d_v, task), features(6, d_t, 10 + task))
    return anchors


def by_hand(anchors, image, text, config):
    """Equations 3 and 4 in a loop."""
    rows = []
    for v, t in zip(image, text, strict=True):
        r = []
        for task in anchors.tasks:
            m_v, m_t = anchors.mean(task, "image"), anchors.mean(task, "text")
            r.append(
                config.image_weight * (v @ m_v) / (v.norm() * m_v.norm())
                + config.text_weight * (t @ m_t) / (t.norm() * m_t.norm())
            )
        rows.append(torch.softmax(torch.stack(r) / config.temperature, 0))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mean_is_exact_and_streaming(dtype):
    """A million samples in chunks: a bfloat16 counter stalls at 8,192, a float32 sum loses digits."""
    values = features(20_000, 3, offset=100.0).to(dtype)
    anchors = Anchors()
    for chunk in values.split(24):
        anchors.update("a", chunk, text_features=chunk[:, :2])
    assert anchors.count("a", "image") == 20_000
    torch.testing.assert_close(anchors.mean("a", "image"), values.double().mean(0), rtol=1e-13, atol=0)
    assert anchors.mean("a", "text").dtype == torch.float64


def test_tasks_keep_the_order_in_which_they_came():
    anchors = Anchors().update("z", features(1, 2)).update("a", features(1, 2)).update("z", features(1, 2))
    assert anchors.tasks == ["z", "a"]


def test_the_two_modalities_are_counted_apart():
    anchors = Anchors().update("a", text_features=features(3, 2)).update("a", features(2, 4), features(5, 2))
    assert (anchors.count("a", "image"), anchors.count("a", "text")) == (2, 8)


@pytest.mark.parametrize(
    "config", [CONFIG, HiDeConfig(image_weight=0.2, text_weight=1.5, temperature=0.37)], ids=["paper", "other"]
)
def test_routing_is_equations_3_and_4(config):
    anchors, image, text = filled(), features(6, 5, 50), features(6, 7, 51)
    weights = anchors.route(image, text, config)
    torch.testing.assert_close(weights, by_hand(anchors, image, text, config), rtol=1e-12, atol=1e-14)
    assert weights.shape == (6, 3)


def test_routing_in_lower_precision_gives_float32():
    anchors = filled()
    weights = anchors.route(features(2, 5).bfloat16(), features(2, 7).bfloat16())
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(2))


def test_every_row_is_routed_by_itself():
    anchors, image, text = filled(), features(5, 5, 60), features(5, 7, 61)
    together = anchors.route(image, text, CONFIG)
    alone = [anchors.route(image[i : i + 1], text[i : i + 1], CONFIG) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_batch_routing_is_the_authors_and_mixes_rows():
    """Theirs takes each task's largest similarity in the batch, so that rows of two tasks get one set of weights."""
    anchors, image, text = filled(), features(4, 5, 70), features(4, 7, 71)
    config = CONFIG.replace(routing="batch")
    weights = anchors.route(image, text, config)
    assert torch.equal(weights, weights[:1].expand_as(weights))
    unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)  # noqa: E731
    m_v = torch.stack([anchors.mean(task, "image") for task in anchors.tasks])
    m_t = torch.stack([anchors.mean(task, "text") for task in anchors.tasks])
    r = 0.5 * (unit(image) @ unit(m_v).T).amax(0) + 0.5 * (unit(text) @ unit(m_t).T).amax(0)
    torch.testing.assert_close(weights[0], torch.softmax(r / 0.1, 0))
    assert not torch.allclose(weights, anchors.route(image, text, CONFIG), atol=1e-3)
    torch.testing.assert_close(
        anchors.route(image[:1], text[:1], config), anchors.route(image[:1], text[:1]), rtol=1e-12, atol=0
    )


def test_prompts_without_images_go_by_text_alone():
    anchors, image, text = filled(), features(3, 5, 80), features(3, 7, 81)
    unit = lambda rows: rows / rows.norm(dim=-1, keepdim=True)  # noqa: E731
    m_t = torch.stack([anchors.mean(task, "text") for task in anchors.tasks])
    cosine = unit(text) @ unit(m_t).T
    alone = anchors.route(None, text, CONFIG)
    torch.testing.assert_close(alone, torch.softmax(0.5 * cosine / 0.1, 1))
    rescaled = anchors.route(None, text, CONFIG.replace(missing_modality="rescale"))
    torch.testing.assert_close(rescaled, torch.softmax(cosine / 0.1, 1))
    has_image = torch.tensor([True, False, True])
    image[1] = torch.nan  # what does not count may be anything
    mixed = anchors.route(image, text, CONFIG, has_image)
    torch.testing.assert_close(mixed[1], alone[1])
    torch.testing.assert_close(mixed[[0, 2]], anchors.route(image[[0, 2]], text[[0, 2]], CONFIG))
    mixed = anchors.route(image, text, CONFIG.replace(missing_modality="rescale"), has_image)
    torch.testing.assert_close(mixed[1], rescaled[1])
    torch.testing.assert_close(mixed[[0, 2]], anchors.route(image[[0, 2]], text[[0, 2]], CONFIG))


def test_batch_routing_takes_images_from_rows_that_have_one():
    """A row without an image has cosine 0, which would be the largest where all others are negative."""
    anchors = filled()
    image, text = features(3, 5, 82), features(3, 7, 83)
    m_v = torch.stack([anchors.mean(task, "image") for task in anchors.tasks])
    image[0], image[2] = -m_v.sum(0), -2 * m_v.sum(0) - 0.1 * m_v[0]
    has_image = torch.tensor([True, False, True])
    config = CONFIG.replace(routing="batch")
    grouped = anchors.route(image, text, config, has_image)
    unit = lambda rows: rows / rows.norm(dim=-1, keepdim=True)  # noqa: E731
    m_t = torch.stack([anchors.mean(task, "text") for task in anchors.tasks])
    cosine_v, cosine_t = (unit(image[[0, 2]]) @ unit(m_v).T).amax(0), (unit(text) @ unit(m_t).T).amax(0)
    assert bool((cosine_v < 0).any())
    torch.testing.assert_close(grouped[[0, 2]], torch.softmax((cosine_v + cosine_t) / 0.2, 0).expand(2, 3))
    torch.testing.assert_close(grouped[1], torch.softmax(cosine_t / 0.2, 0))
    nobody = anchors.route(image, text, config, torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(nobody, torch.softmax(cosine_t / 0.2, 0).expand(3, 3))


def test_one_modality_alone_needs_no_anchors_of_the_other():
    anchors = Anchors().update("a", text_features=features(2, 4)).update("b", text_features=features(2, 4, 1))
    config = HiDeConfig(image_weight=0.0, text_weight=1.0)
    assert anchors.route(features(2, 9), features(2, 4, 5), config).shape == (2, 2)
    with refuses(ValueError, "anchors"):
        anchors.route(features(2, 9), features(2, 4, 5), CONFIG)
    with refuses(ValueError, "image_weight"):
        anchors.route(features(2, 9), None, config)


def test_merging_counts_every_sample_once():
    whole = Anchors()
    parts = [Anchors(), Anchors()]
    for number, chunk in enumerate(features(100, 3).split(7)):
        whole.update("a", chunk)
        parts[number % 2].update("a", chunk)
    parts[1].update("b", features(2, 3, 9))
    merged = parts[0].merge_(parts[1])
    assert merged.tasks == ["a", "b"]
    assert merged.count("a", "image") == 100
    torch.testing.assert_close(merged.mean("a", "image"), whole.mean("a", "image"), rtol=1e-13, atol=1e-15)


def test_a_file_holds_everything(tmp_path):
    anchors = filled()
    anchors.features = {"image": "pooled", "skip_ids": [1, 2]}
    anchors.update("text only", text_features=features(3, 7))
    read = Anchors.load(anchors.save(tmp_path / "anchors.safetensors"))
    assert read.tasks == anchors.tasks
    assert read.features == anchors.features
    for task in anchors.tasks[:-1]:
        for modality in ("image", "text"):
            assert read.count(task, modality) == anchors.count(task, modality)
            assert torch.equal(read.mean(task, modality), anchors.mean(task, modality))
    assert read.count("text only", "image") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.safetensors"]


def test_a_broken_or_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = filled().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"a\.safetensors: expected a whole safetensors file"):
        Anchors.load(path)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected anchors of HiDe"):
        Anchors.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        Anchors.load(tmp_path / "none.safetensors")


def test_what_does_not_fit_is_refused_and_adds_nothing():
    anchors = filled()
    with refuses(ValueError, "image_features"):
        anchors.update("task 0", features(2, 6))
    with refuses(ValueError, "text_features"):
        anchors.update("task 0", features(2, 5), features(2, 5))
    assert anchors.count("task 0", "image") == 4
    with refuses(TypeError, "image_features"):
        anchors.update("task 0", [[1.0]])
    with refuses(ValueError, "image_features"):
        anchors.update("task 0", torch.ones(2, 5, dtype=torch.int64))
    with refuses(ValueError, "image_features"):
        anchors.update("task 0", torch.ones(5))
    with pytest.raises(NumericalError, match="1 of 2 rows"):
        anchors.update("task 0", torch.tensor([[0.0] * 5, [torch.nan] * 5]))
    with refuses(ValueError, "task"):
        anchors.update("", features(2, 5))
    with pytest.raises(ValueError, match="at least one of them"):
        anchors.update("task 0")
    with refuses(ValueError, "anchors"):
        Anchors().route(features(1, 2), features(1, 2))
    with refuses(ValueError, "text_features"):
        anchors.route(features(2, 5), features(3, 7))
    with refuses(ValueError, "has_image"):
        anchors.route(features(2, 5), features(2, 7), has_image=torch.tensor([True]))
    with refuses(ValueError, "task"):
        anchors.mean("none", "image")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_layers", -1), ("top_layers", 1.0), ("image_weight", -0.1), ("temperature", 0.0),
        ("temperature", float("nan")), ("fusion", "sum"), ("routing", "token"), ("projector", "first"),
        ("fusion_coefficients", "one"), ("lower_role", "top"),
    ],
)  # fmt: skip
def test_settings_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        HiDeConfig(**{name: value})


def test_settings_as_plain_values():
    config = HiDeConfig(2, 0.3, 0.7, 0.2, "factors", "batch", {"a": 0.5})
    assert HiDeConfig.from_dict(config.to_dict()) == config
    assert (config.coefficient("a"), config.coefficient("b")) == (0.5, 1.0)
    with refuses(ValueError, "config"):
        HiDeConfig.from_dict({"top": 1})
    with pytest.raises(ValueError, match="not both 0"):
        HiDeConfig(image_weight=0, text_weight=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t["0.image.mean"].fill_(torch.nan), "image anchor of 'task 0': expected a finite float64 mean"),
        (lambda t, m: t.update({"0.image.mean": torch.zeros(5)}), "expected a finite float64 mean"),
        (lambda t, m: t.update({"1.text.mean": torch.zeros(6).double()}), "'task 1': expected width 7"),
        (lambda t, m: t.update({"0.text.count": torch.tensor(0)}), "expected an int64 count of at least 1"),
        (lambda t, m: t.pop("0.text.count"), "expected an int64 count of at least 1, got none"),
        (lambda t, m: t.update({"9.text.mean": torch.zeros(7).double()}), r"got 9\.text\.mean too"),
        (lambda t, m: m.pop("features"), "features: expected JSON in the metadata"),
        (lambda t, m: m.update(features="[1]"), "features: expected a description"),
        (lambda t, m: m.update(tasks="[1,"), "tasks: expected JSON in the metadata"),
        (lambda t, m: m.update(tasks="[1, 2, 3]"), "tasks: expected a list of names"),
        (lambda t, m: m.update(tasks='["a", "a", "b"]'), "tasks: expected each once"),
    ],
)
def test_a_file_that_was_changed_is_refused_by_name(tmp_path, change, message):
    path = filled().save(tmp_path / "a.safetensors")
    tensors, metadata = (dict(part) for part in read_tensors(path))
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=message):
        Anchors.load(path)


def test_empty_anchors_take_over_what_the_others_are_made_of():
    other = filled()
    other.features = {"image": "pooled"}
    assert Anchors().merge_(other).features == {"image": "pooled"}
    mine = filled()
    assert mine.merge_(other).features is None  # of unknown features, and some of them stay so
    other.features = {"image": "mean"}
    with refuses(ValueError, "other"):
        Anchors({"image": "pooled"}).merge_(other)


def test_extreme_settings_and_no_rows():
    anchors = filled()
    weights = anchors.route(features(3, 5, 90), features(3, 7, 91), CONFIG.replace(temperature=5e-324))
    assert torch.equal(weights.sort(1).values, torch.tensor([[0.0, 0.0, 1.0]]).double().expand(3, 3))
    one = anchors.route(features(1, 5), features(1, 7), CONFIG)
    torch.testing.assert_close(one.sum(1), torch.ones(1).double())
    for routing in ("sample", "batch"):
        assert anchors.route(features(0, 5), features(0, 7), CONFIG.replace(routing=routing)).shape == (0, 3)
    zero = Anchors().update("a", torch.zeros(2, 4)).update("b", torch.ones(2, 4))
    torch.testing.assert_close(zero.route(torch.ones(1, 4))[0], torch.softmax(torch.tensor([0.0, 0.5]) / 0.1, 0))
    with pytest.raises(ValueError, match="with a finite sum"):
        HiDeConfig(image_weight=1e308, text_weight=1e308)
