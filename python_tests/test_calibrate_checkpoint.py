"""calibrate_checkpoint: the Grams of `calibrate`, whole or layer by layer, resumable, refusing mix-ups."""

from __future__ import annotations

import errno
import os

import pytest
import tiny_models
import torch
from torch import nn

from hpa_ext import NumericalError, calibrate
from hpa_ext.calibrating import calibrate_checkpoint, whole
from hpa_ext.calibrating.loading import LoadableModel
from hpa_ext.calibrating.store import GramStore
from hpa_ext.checkpoints import CheckpointError
from hpa_ext.checkpoints.gram_file import GramFile, save_grams
from hpa_ext.data.collate import calibration_batches
from hpa_ext.data.toy_tasks import draw_task
from hpa_ext.models.embedded import embedded_path, load_embedded

LAYER_LINEARS = 7


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_models.llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    adapted = tiny_models.with_lora(tiny_models.llama(), r".*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)")
    adapted.save_pretrained(path, save_embedding_layers=False)
    return path


@pytest.fixture(scope="module")
def batches():
    return tiny_models.batches(tiny_models.llama(), count=4)


def run(model, samples, out, **options):
    return calibrate_checkpoint(model, samples, out, **{"progress": False, **options})


def assert_same_grams(stored, expected):
    assert list(stored) == list(expected)
    for name, gram in expected.items():
        assert torch.equal(stored[name].state_dict()["sum"], gram.state_dict()["sum"]), name
        assert stored[name].token_count == gram.token_count
    leaders = {name for names in stored.groups.values() for name in names[:1]}
    assert leaders == set(expected.distinct())


def stop_at(monkeypatch, count, error=KeyboardInterrupt):
    """Let the store take `count` pieces, and fail at the next one."""
    taken = []
    add = GramStore.add

    def counting(store, key, grams):
        if len(taken) == count:
            raise error
        add(store, key, grams)
        taken.append(key)

    monkeypatch.setattr(GramStore, "add", counting)
    return taken


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_llava_from_samples_is_calibrate(tmp_path, mode):
    samples = draw_task("material", 10, 0)
    model, processor = load_embedded()
    expected = calibrate(model, calibration_batches(processor, samples, 4), progress=False)
    stored = run(embedded_path(), samples, tmp_path / "g.safetensors", mode=mode, batch_size=4, dtype=torch.float32)
    assert_same_grams(stored, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.safetensors"]


@pytest.mark.parametrize("make", [tiny_models.gpt2, tiny_models.llava, lambda: tiny_models.llama(tie=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_are_calibrate_for_other_models(tmp_path, make, dtype):
    make().to(dtype).save_pretrained(tmp_path / "model")
    # Not the model in memory: to(dtype) rounds the rotary frequencies, which loading keeps in float32.
    model = type(make()).from_pretrained(tmp_path / "model", dtype=dtype)
    batches = tiny_models.batches(model, count=2)
    expected = calibrate(
        model, [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches], progress=False
    )
    for mode in ("whole", "layers"):
        assert_same_grams(run(tmp_path / "model", batches, tmp_path / f"{mode}.safetensors", mode=mode), expected)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "layers.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_adapters_count(tmp_path, llama_path, adapter_path, batches, mode):
    adapted = tiny_models.with_lora(tiny_models.llama(), r".*layers\.\d+\.(self_attn\.q_proj|mlp\.down_proj)")
    expected = calibrate(adapted.merge_and_unload(), batches, progress=False)
    plain = calibrate(tiny_models.llama(), batches, progress=False)
    stored = run(llama_path, batches, tmp_path / "g.safetensors", adapters=[adapter_path], mode=mode)
    name = "model.layers.2.mlp.down_proj"
    assert not torch.allclose(plain[name].matrix(), expected[name].matrix(), rtol=1e-2)
    for name, gram in expected.items():
        torch.testing.assert_close(stored[name].matrix(), gram.matrix(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("token_mask", ["all", "response", lambda batch: batch["input_ids"] < 50])
def test_token_masks(tmp_path, llama_path, batches, mode, token_mask):
    expected = calibrate(tiny_models.llama(), batches, token_mask=token_mask, progress=False)
    stored = run(llama_path, batches, tmp_path / "g.safetensors", mode=mode, token_mask=token_mask)
    assert_same_grams(stored, expected)


def test_diagonals_are_those_of_the_grams(tmp_path, llama_path, batches):
    save_grams(calibrate(tiny_models.llama(), batches, progress=False), tmp_path / "e.safetensors", reduce="diagonal")
    expected = GramFile(tmp_path / "e.safetensors")
    for mode in ("whole", "layers"):
        stored = run(llama_path, batches, tmp_path / f"{mode}.safetensors", mode=mode, reduce="diagonal")
        assert stored.form == "inverse_diagonal" and list(stored) == list(expected)
        for name in expected:
            assert torch.equal(stored[name].sum_inverse, expected[name].sum_inverse)


def test_grams_beyond_the_memory_take_more_passes(tmp_path, llama_path, batches, monkeypatch):
    passes = []
    run_pass = whole._run_pass
    monkeypatch.setattr(whole, "_run_pass", lambda run, collector, *rest: (
        passes.append(len(collector.leaders())), run_pass(run, collector, *rest)))  # fmt: skip
    expected = calibrate(tiny_models.llama(), batches, progress=False)
    one_layer = 4 * (6 * 32**2 + 48**2)
    for memory, counts in ((1, [7, 7, 7]), (2 * one_layer, [14, 7]), (None, [21])):
        passes.clear()
        stored = run(llama_path, batches, tmp_path / f"{memory}.safetensors", mode="whole", gram_memory=memory)
        assert passes == counts
        assert_same_grams(stored, expected)


def test_only_one_layer_is_in_memory(tmp_path, llama_path, batches, monkeypatch):
    most = []
    forward = nn.Linear.forward

    def watching(module, x):
        loaded = {name.split(".")[2] for name, p in watched[0].named_parameters()
                  if ".layers." in name and p.device.type != "meta"}  # fmt: skip
        most.append(len(loaded))
        return forward(module, x)

    watched = []
    load = LoadableModel.load
    monkeypatch.setattr(LoadableModel, "load", lambda self, wanted: (watched.append(self.module), load(self, wanted)))
    monkeypatch.setattr(nn.Linear, "forward", watching)
    run(llama_path, batches, tmp_path / "g.safetensors", mode="layers")
    assert len(most) == 3 * LAYER_LINEARS * len(batches) and set(most) == {1}


def test_auto_takes_layers_where_the_model_does_not_fit(tmp_path, llama_path, batches, monkeypatch):
    from hpa_ext.calibrating import checkpoint

    taken = []
    for name in ("layers", "whole"):
        real = getattr(checkpoint, f"calibrate_{name}")
        fake = lambda *a, name=name, real=real: (taken.append(name), real(*a))  # noqa: E731
        monkeypatch.setattr(checkpoint, f"calibrate_{name}", fake)
    run(llama_path, batches, tmp_path / "a.safetensors")
    monkeypatch.setattr(checkpoint, "in_device_memory", lambda device: 50_000)
    run(llama_path, batches, tmp_path / "b.safetensors")
    assert taken == ["whole", "layers"]


@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, llama_path, batches, monkeypatch, mode, count):
    options = {"mode": mode, "gram_memory": 1}
    run(llama_path, batches, tmp_path / "straight.safetensors", **options)
    out = tmp_path / "g.safetensors"
    with monkeypatch.context() as patch:
        stop_at(patch, count)
        with pytest.raises(KeyboardInterrupt):
            run(llama_path, batches, out, **options)
    assert not out.exists() and (tmp_path / "g.safetensors.partial").is_dir()
    with pytest.raises(FileExistsError, match="resume"):
        run(llama_path, batches, out, **options)
    with monkeypatch.context() as patch:
        taken = stop_at(patch, 99)
        run(llama_path, batches, out, resume=True, **options)
    assert len(taken) == 3 - count
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.safetensors", "straight.safetensors"]


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_hidden_states_that_are_lost_are_made_again(tmp_path, llama_path, batches, monkeypatch, damage):
    run(llama_path, batches, tmp_path / "straight.safetensors", mode="layers")
    out = tmp_path / "g.safetensors"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(llama_path, batches, out, mode="layers")
    for path in (tmp_path / "g.safetensors.partial").glob("hidden-states-*.bin"):
        path.unlink() if damage == "lost" else path.write_bytes(bytes(path.stat().st_size))
    run(llama_path, batches, out, mode="layers", resume=True)
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_a_run_may_go_on_in_the_other_mode(tmp_path, llama_path, batches, monkeypatch):
    run(llama_path, batches, tmp_path / "straight.safetensors")
    out = tmp_path / "g.safetensors"
    for mode, count in (("layers", 1), ("whole", 1)):
        with monkeypatch.context() as patch:
            stop_at(patch, count)
            with pytest.raises(KeyboardInterrupt):
                run(llama_path, batches, out, mode=mode, gram_memory=1, resume=True)
    run(llama_path, batches, out, mode="layers", resume=True)
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_a_full_disk_leaves_a_run_that_goes_on(tmp_path, llama_path, batches, monkeypatch):
    run(llama_path, batches, tmp_path / "straight.safetensors")
    out = tmp_path / "g.safetensors"
    pwrite, written = os.pwrite, [0]

    def full(descriptor, contents, offset):
        written[0] += len(contents)
        if written[0] > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, contents, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"the Gram of model\.layers\..*No space left"):
            run(llama_path, batches, out, mode="whole", gram_memory=1)
    assert not out.exists()
    run(llama_path, batches, out, mode="whole", gram_memory=1, resume=True)
    assert out.read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


def test_going_on_with_anything_else_is_refused(tmp_path, llama_path, adapter_path, batches, monkeypatch):
    out = tmp_path / "g.safetensors"
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(llama_path, batches, out, reduce="diagonal", gram_memory=1)
    other = tmp_path / "other"
    tiny_models.tuned(tiny_models.llama()).save_pretrained(other)
    changed = [{**batches[0], "input_ids": batches[0]["input_ids"] + 1}, *batches[1:]]
    for arguments, key in (
        ({"model": other}, "inputs.model"),
        ({"adapters": [adapter_path]}, "inputs.adapters"),
        ({"samples": changed}, "config.data.digest"),
        ({"token_mask": "all"}, "config.token_mask"),
        ({"modules": r".*q_proj"}, "config.modules"),
        ({"damping": 0.1}, "config.damping"),
        ({"reduce": None}, "config.form"),
        ({"dtype": torch.bfloat16}, "config.dtype"),
    ):
        given = {"model": llama_path, "samples": batches, "reduce": "diagonal", **arguments}
        with pytest.raises(CheckpointError, match=key):
            run(given.pop("model"), given.pop("samples"), out, resume=True, **given)
    run(llama_path, batches, out, reduce="diagonal", resume=True)
    run(llama_path, batches, out, reduce="diagonal", resume=True)  # finished: nothing to do
    with pytest.raises(CheckpointError, match=r"config\.damping"):
        run(llama_path, batches, out, reduce="diagonal", damping=0.5, resume=True)
    with pytest.raises(FileExistsError, match="expected a new file"):
        run(llama_path, batches, out, reduce="diagonal")


def test_a_decoder_that_touches_its_hidden_states_is_refused(tmp_path, llama_path, batches, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    def forward(self, input_ids=None, attention_mask=None, **options):
        states = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(states, torch.arange(states.shape[1])[None])
        for layer in self.layers:
            states = layer(states, position_embeddings=rotary) * 1.5
        raise AssertionError("the layers' output must not be used")

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(ValueError, match=r"changed between layers 0 and 1.*mode='whole'"):
        run(llama_path, batches, tmp_path / "g.safetensors", mode="layers")


def test_modules_outside_of_the_layers_need_the_whole_model(tmp_path):
    model = tiny_models.llava()
    model.save_pretrained(tmp_path / "model")
    batches = tiny_models.batches(model, count=1)
    modules = r"lm_head|model\.vision_tower\..*fc1|.*layers\.2\.mlp\.up_proj"
    with pytest.raises(ValueError, match="mode='whole'"):
        run(tmp_path / "model", batches, tmp_path / "a.safetensors", modules=modules, mode="layers")
    stored = run(tmp_path / "model", batches, tmp_path / "g.safetensors", modules=modules)
    assert_same_grams(stored, calibrate(model, batches, modules, progress=False))


@pytest.mark.parametrize("mode", ["whole", "layers"])
def test_bad_numbers_are_named(tmp_path, mode):
    model = tiny_models.llama()
    model.model.layers[1].mlp.gate_proj.weight.data[3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(NumericalError, match=r"^model\.layers\.1\.mlp\.down_proj: "):
        run(tmp_path / "model", tiny_models.batches(model), tmp_path / "g.safetensors", mode=mode)
    assert not (tmp_path / "g.safetensors").exists()


def test_bad_arguments_are_refused_before_work(tmp_path, llama_path, batches):
    out = tmp_path / "g.safetensors"
    for arguments, message in (
        ({"mode": "half"}, "mode: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"dtype": torch.float64}, "dtype: expected"),
        ({"gram_memory": 0}, "gram_memory: expected"),
        ({"reduce": "all"}, "reduce: expected"),
        ({"token_mask": "some"}, "token_mask: expected"),
        ({"modules": "nothing"}, "modules: no linear"),
    ):
        with pytest.raises(ValueError, match=message):
            run(llama_path, batches, out, **arguments)
    with pytest.raises(ValueError, match="samples: expected"):
        run(embedded_path(), [], out)
    with pytest.raises(ValueError, match="processor: none can be loaded"):
        run(llama_path, draw_task("material", 2, 0), out)
    with pytest.raises(ValueError, match=r"path: expected .*\.safetensors"):
        run(llama_path, batches, tmp_path / "g.gram")
    with pytest.raises(OSError, match=r"absent|No such|no such"):
        run(tmp_path / "absent", batches, out)
    assert list(tmp_path.iterdir()) == []


def test_the_file_says_what_it_was_made_from(tmp_path):
    samples = draw_task("material", 3, 0)
    stored = run(embedded_path(), samples, tmp_path / "g.safetensors", reduce="diagonal")
    provenance = stored.provenance
    assert provenance["kind"] == "grams" and provenance["ids"] == ["0", "1", "2"]
    assert len(provenance["inputs"]["model"]) == 64 and provenance["config"]["token_mask"] == "attended"
    assert {"hpa_ext", "torch", "transformers"} <= set(provenance["versions"])
