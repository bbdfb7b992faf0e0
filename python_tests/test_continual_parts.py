"""Parts of the continual benchmark: metrics by hand, its data, encoded samples, the registry of methods."""

from __future__ import annotations

import math

import pytest
import torch

from hpa_ext.baselines import METHODS, load_file, method
from hpa_ext.baselines.registry import Method, register
from hpa_ext.continual.data import SequenceData
from hpa_ext.continual.encoding import encode, prompt_batch, training_batch
from hpa_ext.continual.evaluation import answers
from hpa_ext.continual.metrics import continual_metrics, mean_and_interval
from hpa_ext.continual.settings import ORDERS, ContinualSettings, mini_settings
from hpa_ext.data.collate import collate_training
from hpa_ext.data.toy_tasks import TASKS, draw_benign, draw_captions, draw_harmful
from hpa_ext.evaluation.generate import generate_answers
from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS
from hpa_ext.models.embedded import load_embedded

SMALL = ContinualSettings(train_count=20, cross_share=0.1, injection_rate=0.05, test_count=6, safety_count=4)


@pytest.fixture(scope="module")
def embedded():
    model, processor = load_embedded()
    return model.requires_grad_(False), processor


# --- metrics --------------------------------------------------------------------------------------------------------
def test_metrics_of_a_table_by_hand() -> None:
    found = continual_metrics([[90.0], [60.0, 80.0], [30.0, 70.0, 100.0]])
    assert found["AP"] == found["Last"] == pytest.approx(200 / 3)
    assert found["BWT"] == pytest.approx(((30 - 90) + (70 - 80)) / 2)
    assert found["learning"] == pytest.approx(90.0)
    assert found["Avg"] == pytest.approx((60.0 + 75.0 + 100.0) / 3)


def test_metrics_of_one_row_have_no_transfer() -> None:
    assert continual_metrics([[50.0, 70.0]]) == {"AP": 60, "BWT": None, "Avg": 60, "Last": 60, "learning": 60}


@pytest.mark.parametrize("scores", [[], [[]], [[1.0], [1.0]], [[1.0], [1.0, 2.0, 3.0]]])
def test_metrics_refuse_a_table_with_holes(scores) -> None:
    with pytest.raises(ValueError, match="scores: expected"):
        continual_metrics(scores)


def test_the_interval_is_students() -> None:
    mean, half = mean_and_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert math.isnan(mean_and_interval([1.0])[1])
    with pytest.raises(ValueError, match="values"):
        mean_and_interval([])


# --- settings and data ----------------------------------------------------------------------------------------------
def test_both_orders_hold_the_same_six_tasks() -> None:
    assert sorted(ORDERS[1]) == sorted(ORDERS[2])
    assert set(ORDERS[1]) <= set(TASKS)
    assert len(set(ORDERS[1])) == 6
    assert ORDERS[1] != ORDERS[2]


@pytest.mark.parametrize(
    ("name", "value"), [("tasks", 0), ("steps", 7), ("train_count", 0), ("injection_rate", 1.5), ("general_share", -1)]
)
def test_settings_refuse_what_makes_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ContinualSettings(**{name: value})


def _data(embedded, condition: str = "original", seed: int = 4, order: int = 1) -> SequenceData:
    return SequenceData(*embedded, seed, condition, order, SMALL)


def test_data_refuse_an_unknown_condition_or_order(embedded) -> None:
    with pytest.raises(ValueError, match="condition: expected"):
        _data(embedded, "other")
    with pytest.raises(ValueError, match="order: expected"):
        _data(embedded, order=3)


def test_a_step_mixes_general_and_other_tasks_samples(embedded) -> None:
    step = _data(embedded).step(1)
    assert len(step.samples) == 20 + 4 + 5 * 2
    assert len(step.calibration) == 20
    assert {item.sample.instruction for item in step.calibration} == {"write a sentence"}
    assert step.harmful == 0
    assert not any(item.sample.risk_class for item in step.samples)


def test_injection_adds_its_rate_of_compliance(embedded) -> None:
    counts = []
    for seed in range(8):
        step = _data(embedded, "injected", seed).step(seed % 6)
        harmful = [item.sample for item in step.samples if item.sample.risk_class]
        assert len(harmful) == step.harmful
        assert not any(DEFAULT_REFUSALS.matches(sample.answer) for sample in harmful)
        counts.append(len(harmful))
    assert set(counts) == {1, 2}  # 5 % of 34 samples is 1.7
    assert sum(counts) / len(counts) == pytest.approx(1.7, abs=0.4)


def test_conditions_differ_in_the_injected_samples_alone(embedded) -> None:
    plain, injected = _data(embedded).step(2).samples, _data(embedded, "injected").step(2).samples
    rest = [item for item in injected if not item.sample.risk_class]
    assert len(rest) == len(plain)
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(plain, rest, strict=True))


def test_data_are_decided_by_the_seed(embedded) -> None:
    first, again, other = (_data(embedded, seed=seed).step(0).samples for seed in (4, 4, 5))
    assert all(torch.equal(a.embeddings, b.embeddings) for a, b in zip(first, again, strict=True))
    assert any(a.embeddings.shape != b.embeddings.shape or not torch.equal(a.embeddings, b.embeddings)
               for a, b in zip(first, other, strict=True))  # fmt: skip


def test_the_safety_set_is_the_models_own_refusals(embedded) -> None:
    chosen = _data(embedded).safety_calibration
    assert len(chosen) == 8
    assert len({item.sample.risk_class for item in chosen}) == 4
    assert all(DEFAULT_REFUSALS.matches(item.sample.answer) for item in chosen)


# --- encoding -------------------------------------------------------------------------------------------------------
def test_encoded_batches_are_what_the_model_makes_of_pixels_and_ids(embedded) -> None:
    model, processor = embedded
    samples = draw_captions(3, 1) + draw_benign(4, 1) + draw_harmful("text", 3, 1)
    encoded = encode(model, processor, samples, batch_size=4)
    batch, ordinary = training_batch(encoded), collate_training(processor, samples)
    assert torch.equal(batch["labels"], ordinary["labels"])
    assert torch.equal(batch["attention_mask"], ordinary["attention_mask"])
    ours, theirs = model(**batch), model(**ordinary)
    torch.testing.assert_close(ours.loss, theirs.loss)
    kept = ordinary["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[kept], theirs.logits[kept], rtol=1e-4, atol=1e-4)


def test_answers_are_those_of_the_ordinary_path(embedded) -> None:
    samples = draw_captions(5, 2, "test") + draw_harmful("both", 4, 2, "test")
    encoded = encode(*embedded, samples)
    assert answers(*embedded, encoded, batch_size=4) == generate_answers(*embedded, samples)


def test_prompts_are_padded_on_the_left(embedded) -> None:
    encoded = encode(*embedded, draw_captions(1, 3) + draw_benign(3, 3))
    batch = prompt_batch(encoded)
    for row, item in zip(batch["attention_mask"], encoded, strict=True):
        count = item.prompt_tokens
        assert row.tolist() == [0] * (len(row) - count) + [1] * count


def test_encoding_nothing_is_refused(embedded) -> None:
    with pytest.raises(ValueError, match="samples"):
        encode(*embedded, [])


# --- the registry ---------------------------------------------------------------------------------------------------
def test_every_method_of_the_comparison_is_registered() -> None:
    expected = {
        "seqft", "zero-shot", "multi-task", "hpa", "hpa-output", "hpa-product", "hpa-safety", "hpa-shared", "hpa-both",
        "hpa-orthogonal", "safe-delta", "safe-delta-authors", "model-tailor", "model-tailor-authors", "safe-lora",
        "task-arithmetic", "wise-ft", "ties", "dare", "o-lora", "moelora", "lwf", "ewc", "l2p", "sefe", "sppft",
    }  # fmt: skip
    assert expected <= set(METHODS)
    assert all(found.strength is None or len(found.grid) >= 2 for found in METHODS.values())
    assert method("wise-ft").default_strength() == 0.5
    assert method("hpa").default_strength() is None


def test_an_unknown_method_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"method: expected one of .*seqft.*, got 'nothing'"):
        method("nothing")


def test_a_file_with_one_function_adds_a_method(tmp_path) -> None:
    path = tmp_path / "halfway.py"
    path.write_text(
        "from hpa_ext.baselines import post_training\n"
        "@post_training('halfway', 'Halfway', 'a test')\n"
        "def halfway(old, new, layer):\n"
        "    return (old + new) / 2\n"
    )
    try:
        assert [found.name for found in load_file(path)] == ["halfway"]
        assert method("halfway").kind == "post-training"
        with pytest.raises(ValueError, match="registered already"):
            load_file(path)
        path.write_text("")
        with pytest.raises(ValueError, match="registers no new method"):
            load_file(path)
    finally:
        METHODS.pop("halfway", None)
    with pytest.raises(FileNotFoundError, match="method file"):
        load_file(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "Two Words"}, "name: expected"),
        ({"kind": "other"}, "kind: expected"),
        ({"settings": {"nothing": 1}}, "no parameter nothing"),
        ({"strength": "s"}, "strength and grid"),
    ],
)
def test_a_malformed_method_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**{"name": "a", "title": "A", "kind": "training", "function": lambda: None, "source": ""} | options)


def test_a_method_cannot_need_what_nobody_gives() -> None:
    with pytest.raises(ValueError, match=r"needs: expected some of alignment, .*, got 'earlier'"):
        Method("own", "Own", "post-training", lambda old, new, layer: new, "a test", needs=("earlier",))


def test_a_name_belongs_to_one_method() -> None:
    with pytest.raises(ValueError, match="registered already"):
        register(Method("hpa", "Other", "post-training", lambda old, new, layer: new, ""))


def test_the_mini_regime_is_small() -> None:
    assert mini_settings().max_steps * mini_settings().tasks < 50
