"""A HiDe model merged into a plain one, in memory and from file to file."""

from __future__ import annotations

import weakref

import hide_models as hm
import pytest
import torch
from helpers import refuses

from hpa_ext import NumericalError
from hpa_ext.checkpoints.reader import CheckpointReader
from hpa_ext.hide import HiDeConfig, HiDeModel, merging
from hpa_ext.hide.experts import Expert, ExpertUpdate
from hpa_ext.hide.fusion import fuse_into
from hpa_ext.hide.merging import merge_checkpoint


def test_merging_into_a_plain_model():
    base = hm.llava_of()
    original = hm.state_of(base)
    found = hm.experts(base)
    batch = hm.prompts()
    model = HiDeModel(base, found, hm.anchors_of(base))
    with model.routed("beta"):
        expected = model(**batch).logits
    merged = model.merge_and_unload("beta")
    assert set(merged.state_dict()) == set(original)
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    base = hm.llava_of()
    fused = HiDeModel(base, found, hm.anchors_of(base)).merge_and_unload()
    name = "model.language_model.layers.2.mlp.up_proj.weight"
    assert torch.equal(fused.state_dict()[name], original[name])
    lower = HiDeModel(base_of := hm.llava_of(), found, config=HiDeConfig(top_role="none"))
    torch.testing.assert_close(fused(**batch).logits, lower(**batch).logits)
    assert base_of is lower.model


FORMS = {
    "paper": HiDeConfig(),
    "routed projectors": HiDeConfig(top_layers=2, projector="routed", fusion_coefficients=0.5),
    "factors, mean": HiDeConfig(fusion="factors", projector="mean"),
    "nothing on top": HiDeConfig(top_role="none", projector="last"),
}


def on_disk(folder, base, **options):
    base.save_pretrained(folder / "base", **options)
    return folder / "base"


@pytest.mark.parametrize("task", ["beta", None])
@pytest.mark.parametrize("form", FORMS)
def test_from_file_to_file_is_bit_for_bit_what_memory_gives(tmp_path, form, task):
    base = hm.llava_of(torch.bfloat16)
    path = on_disk(tmp_path, base, max_shard_size="40KB")
    model = HiDeModel(base, hm.experts(base), hm.anchors_of(base), FORMS[form])
    model.save(tmp_path / "hide")
    assert merge_checkpoint(tmp_path / "hide", path, tmp_path / "out", task, progress=False) == tmp_path / "out"
    expected = model.merge_and_unload(task)
    assert len(list(path.glob("*.safetensors"))) > 2
    assert sorted(file.name for file in path.iterdir()) == sorted(file.name for file in (tmp_path / "out").iterdir())
    merged = type(base).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    hm.assert_same_state(merged, hm.state_of(expected))


def test_a_weight_stored_the_other_way_round_and_gains_are_merged_too(tmp_path):
    from tiny_models import gpt2

    base = gpt2()
    names = [f"transformer.h.{n}.mlp.c_proj" for n in (0, 1)]
    updates = {}
    for name in names:
        rows, columns = base.get_submodule(name).weight.shape
        updates[name] = ExpertUpdate(torch.randn(2, rows), torch.randn(columns, 2), 0.5, 0.1 * torch.randn(rows))
    path = on_disk(tmp_path, base)
    model = HiDeModel(base, {"a": Expert("a", updates)}, hm.anchors_of(base, ("a",)))
    model.save(tmp_path / "hide")
    merge_checkpoint(tmp_path / "hide", path, tmp_path / "out", "a", progress=False)
    merged = type(base).from_pretrained(tmp_path / "out")
    hm.assert_same_state(merged, hm.state_of(model.merge_and_unload("a")))


def test_one_tensor_at_a_time_is_read(tmp_path, monkeypatch):
    """Tensors that no expert changes are not even read as such, and no read one is kept."""
    base = hm.llava_of()
    path = on_disk(tmp_path, base)
    HiDeModel(base, hm.experts(base), hm.anchors_of(base)).save(tmp_path / "hide")
    read, alive = CheckpointReader.read, []
    most = []

    def watched(self, name, out=None):
        tensor = read(self, name, out)
        alive.append(weakref.ref(tensor))
        most.append(sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(CheckpointReader, "read", watched)
    merge_checkpoint(tmp_path / "hide", path, tmp_path / "out", "alpha", progress=False)
    assert len(most) == 21 + 4  # the decoder's linears and the projector, of 79 tensors
    assert max(most[4:]) <= 2


def test_what_cannot_be_merged_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    base = hm.llava_of()
    path = on_disk(tmp_path, base)
    other = on_disk(tmp_path / "other", hm.llama_of())
    hide = HiDeModel(base, hm.experts(base), hm.anchors_of(base)).save(tmp_path / "hide")
    out = tmp_path / "results" / "out"
    with refuses(ValueError, "task"):
        merge_checkpoint(hide, path, out, "none")
    with pytest.raises(ValueError, match="expected a base of class LlavaForConditionalGeneration"):
        merge_checkpoint(hide, other, out)
    with refuses(ValueError, "directory"):
        merge_checkpoint(hide, path, path)
    calls = []

    def failing(weight, update):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return fuse_into(weight, update)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "fuse_into", failing)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(hide, path, out, "beta")
    assert list((tmp_path / "results").iterdir()) == []
    half = on_disk(tmp_path / "half", hm.llava_of(torch.float16))
    large = hm.experts(hm.llava_of(), scale=1e5)
    huge = HiDeModel(hm.llava_of(), large, hm.anchors_of(hm.llava_of())).save(tmp_path / "huge")
    with pytest.raises(NumericalError, match=r"layers\.0.*not finite in torch\.float16"):
        merge_checkpoint(huge, half, out)
    assert list((tmp_path / "results").iterdir()) == []
