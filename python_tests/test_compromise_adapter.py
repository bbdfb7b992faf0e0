"""A PEFT adapter in, a PEFT adapter out: exact, complete, and loaded by PEFT where there is no hpa_ext."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import adapter_models
import pytest
import tiny_models
import torch
from checkpoint_files import contents
from compromise_adapters import FILE, PREFIX, grams, make, normalised
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file

import hpa_ext
from hpa_ext import CheckpointError, CompromiseConfig, Gram, GramDiagonal, HPAConfig, NumericalError, harmonize_adapter
from hpa_ext.checkpoints.adapter_config import scaling_of
from hpa_ext.checkpoints.gram_file import save_grams
from hpa_ext.compromise import solution
from hpa_ext.compromise.adapter import AdapterJob
from hpa_ext.compromise.factor import factorize
from hpa_ext.gram import GramCollection

STRENGTH = CompromiseConfig(strength=0.5)
KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 5},
    "patterns": {"rank_pattern": {"down_proj": 6, "layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 32}},
    "bf16": {"dtype": torch.bfloat16},
    "gpt2": {"kind": "gpt2", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param.replace(" ", "-")), **KINDS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"))


def run(made, out, config=STRENGTH, **options):
    return harmonize_adapter(made.adapter, made.safety, made.task, out, config, progress=False, **options)


def test_a_alone_changes_and_to_the_closed_form(made, tmp_path):
    report = run(made, tmp_path / "out")
    before, after = made.tensors(), made.tensors(tmp_path / "out")
    assert list(before) == list(after) and len(report) * 2 == len(before)
    assert made.config(tmp_path / "out") == made.config()
    for name in report.layers:
        a, b = (f"{PREFIX}{name}.lora_{half}.weight" for half in "AB")
        assert_same_bits(after[b], before[b])
        safety, task = normalised(made.safety[name]), normalised(made.task[name])
        exact = torch.linalg.solve(task + 0.5 * safety, task @ before[a].double().mT).mT
        error = (after[a].double() - exact).abs().max() / exact.abs().max()
        assert error < (2e-5 if after[a].dtype == torch.float32 else 0.51 * 2**-7)
        assert after[a].dtype == before[a].dtype
        # Whatever B and the scaling are: the update is B A of the closed form for the whole update.
        assert report[name].strength == 0.5 and report[name].earlier_count == 0


def test_a_budget_counts_b_and_is_held_for_each_module(made, tmp_path):
    report = run(made, tmp_path / "out", CompromiseConfig(budget=0.1))
    before, after = made.tensors(), made.tensors(tmp_path / "out")
    for name, layer in report.layers.items():
        a, b = (f"{PREFIX}{name}.lora_{half}.weight" for half in "AB")
        safety = made.safety[name].matrix().double()
        new, old = (before[b].double() @ tensors[a].double() for tensors in (after, before))
        left = torch.trace(new @ safety @ new.mT) / torch.trace(old @ safety @ old.mT)
        assert layer.safety_left == pytest.approx(float(left), rel=2e-2 if before[a].dtype == torch.bfloat16 else 1e-4)
        assert 0.099 <= layer.safety_left <= 0.1
        scaling = scaling_of(made.config(), name)
        assert layer.update_norm == pytest.approx(float(old.norm()) * scaling, rel=1e-4)


def test_adapter_and_merged_output_are_the_same_model(made, tmp_path):
    """PEFT's merge of the adapter, and the compromise of the merged weights: the same to rounding."""
    config = CompromiseConfig(strength=2.0)
    run(made, tmp_path / "out", config)
    ours = adapter_models.merged_by_peft(made.base, tmp_path / "out")
    old, tuned = adapter_models.load(made.base), adapter_models.load(made.base)
    tuned.load_state_dict(adapter_models.merged_by_peft(made.base, made.adapter))
    names = [key.removesuffix(".lora_A.weight").removeprefix(PREFIX) for key in made.tensors() if "lora_A" in key]
    hpa_ext.harmonize_model(old, tuned, made.safety, made.task, config, modules=names, progress=False)
    for name, value in tuned.state_dict().items():
        scale = (value - old.state_dict()[name]).abs().max()
        tolerance = 2e-2 if made.config().get("r") and "bf16" in str(made.base) else 2e-4
        assert (ours[name] - value).abs().max() <= tolerance * scale, name


def test_ends(made, tmp_path):
    run(made, tmp_path / "one", CompromiseConfig(budget=1))
    assert (tmp_path / "one" / FILE).read_bytes() == (made.adapter / FILE).read_bytes()
    report = run(made, tmp_path / "zero", CompromiseConfig(budget=0))
    assert all((value == 0).all() for key, value in made.tensors(tmp_path / "zero").items() if "lora_A" in key)
    assert json.loads((tmp_path / "zero" / "hpa_manifest.json").read_text())["report"]["layers"][0]["strength"] == "inf"
    assert "inf" in str(report)


PROGRAM = """
import json, sys, warnings
sys.modules["hpa_ext"] = None  # importing it raises
import torch, transformers
from peft import PeftModel
for root in sys.argv[1:]:
    name = json.load(open(root + "/base/config.json"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(root + "/base").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # "Found missing adapter keys"
        model = PeftModel.from_pretrained(model, root + "/out")
    batch = torch.load(root + "/batch.pt", weights_only=True)
    with torch.no_grad():
        logits = [model(**batch).logits, model.merge_and_unload()(**batch).logits]
    torch.save(logits, root + "/logits.pt")
assert not any(name.partition(".")[0] == "hpa_ext" and module for name, module in sys.modules.items())
"""


def test_peft_loads_it_where_there_is_no_hpa_ext(tmp_path):
    roots = {kind: tmp_path / kind for kind in ("patterns", "bf16", "gpt2")}
    found = {}
    for kind, root in roots.items():
        root.mkdir()
        found[kind] = make(root, **KINDS[kind], **({"use_rslora": True} if kind == "patterns" else {}))
        run(found[kind], root / "out")
        batch = tiny_models.batches(adapter_models.load(root / "base"), 1)[0]
        torch.save({key: value for key, value in batch.items() if key != "labels"}, root / "batch.pt")
    words = [sys.executable, "-I", "-c", PROGRAM, *map(str, roots.values())]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    for root in roots.values():
        logits, merged = torch.load(root / "logits.pt", weights_only=True)
        batch = torch.load(root / "batch.pt", weights_only=True)
        assert torch.allclose(logits, merged, atol=1e-5)
        expected = adapter_models.load(root / "base")
        assert (tiny_models.logits(expected, batch) - logits).abs().max() > 1e-4  # the adapter acts
        expected.load_state_dict(adapter_models.merged_by_peft(root / "base", root / "out"))
        assert torch.allclose(tiny_models.logits(expected, batch), logits, atol=1e-5)


def test_gram_files_and_mappings_give_the_same_bytes(plain, tmp_path):
    for name in ("safety", "task"):
        save_grams(getattr(plain, name), tmp_path / f"{name}.safetensors")
    other = grams(adapter_models.load(plain.base), 5)
    save_grams(other, tmp_path / "other.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("safety", "task", "other")]
    one = harmonize_adapter(plain.adapter, *files[:2], tmp_path / "a", earlier=[files[2]], progress=False)
    two = run(plain, tmp_path / "b", None, earlier=[other])
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert one.layers == two.layers and all(layer.earlier_count == 1 for layer in one.layers.values())
    assert all(0.099 <= layer.safety_left <= 0.1 for layer in one.layers.values())


def test_modules_with_one_input_share_a_factor(plain, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(solution, "factorize", lambda *given: made.append(1) or factorize(*given))
    report = run(plain, tmp_path / "out")
    assert (len(report), len(made)) == (9, 6)  # of q, v and down in each of three layers q and v have one input
    assert [layer.evaluations for layer in report.layers.values()] == [1] * 9


def test_names_of_other_generations_need_the_base(plain, tmp_path):
    def rename(name):
        return name.replace("model.model.language_model", "model.language_model.model")

    old = shutil.copytree(plain.adapter, tmp_path / "old")
    tensors = {rename(key): value for key, value in plain.tensors().items()}
    assert set(tensors) != set(plain.tensors())
    save_file(tensors, old / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the Grams name none of the modules .* pass base="):
        harmonize_adapter(old, plain.safety, plain.task, tmp_path / "out", STRENGTH)
    run(plain, tmp_path / "new")
    for number, base in enumerate((plain.base, adapter_models.load(plain.base))):
        out = tmp_path / f"out{number}"
        harmonize_adapter(old, plain.safety, plain.task, out, STRENGTH, base=base, progress=False)
        expected = {rename(key): value for key, value in plain.tensors(tmp_path / "new").items()}
        found = plain.tensors(out)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(CheckpointError, match="belongs to nothing in LlamaForCausalLM"):
        harmonize_adapter(old, plain.safety, plain.task, tmp_path / "no", STRENGTH, base=tiny_models.llama())
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()


def test_the_base_is_never_read(plain, tmp_path):
    lonely = shutil.copytree(plain.adapter, tmp_path / "lonely")
    config = plain.config() | {"base_model_name_or_path": "/nowhere/at/all"}
    (lonely / "adapter_config.json").write_text(json.dumps(config))
    harmonize_adapter(lonely, plain.safety, plain.task, tmp_path / "out", STRENGTH, progress=False)
    run(plain, tmp_path / "same")
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "same" / FILE).read_bytes()


def test_what_has_no_gram_stays_and_is_named(plain, tmp_path):
    chosen = [name for name in plain.safety if "layers.1" not in name]
    few = [GramCollection({name: one[name] for name in chosen}) for one in (plain.safety, plain.task)]
    report = harmonize_adapter(plain.adapter, *few, tmp_path / "out", STRENGTH, progress=False)
    assert report.not_covered and all("layers.1" in name for name in report.not_covered)
    assert f"{len(report.not_covered)} modules of the adapter stay as the tuning made them" in report.warnings[-1]
    before, after = plain.tensors(), plain.tensors(tmp_path / "out")
    for name in report.not_covered:
        assert_same_bits(after[f"{PREFIX}{name}.lora_A.weight"], before[f"{PREFIX}{name}.lora_A.weight"])
    by_name = run(plain, tmp_path / "by-name", modules=r"(?!.*layers\.1).*")
    assert by_name.layers == report.layers
    with pytest.raises(ValueError, match=r"layers\.1\..*: no Gram in task"):
        harmonize_adapter(plain.adapter, plain.safety, few[1], tmp_path / "no", STRENGTH)


def test_files_beside_it_and_verification(plain, tmp_path):
    source = shutil.copytree(plain.adapter, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "optimizer.pt").write_bytes(b"no")
    extra = {"model.mm_projector.0.bias": torch.ones(3)}
    save_file(extra, source / "non_lora_trainables.safetensors")
    harmonize_adapter(source, plain.safety, plain.task, tmp_path / "out", STRENGTH, progress=False)
    held = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "non_lora_trainables.safetensors", "hpa_manifest.json"} <= held
    assert "optimizer.pt" not in held
    assert hpa_ext.verify_checkpoint(tmp_path / "out", progress=False).ok
    manifest = json.loads((tmp_path / "out" / "hpa_manifest.json").read_text())
    assert manifest["kind"] == "adapter" and set(manifest["inputs"]) == {"adapter", "safety", "task"}
    assert manifest["config"]["method"] == "compromise" and manifest["config"]["strength"] == 0.5
    assert len(manifest["report"]["layers"]) == len(plain.tensors()) // 2


REFUSED = {
    "DoRA": ({"use_dora": True}, CheckpointError, r"has DoRA \(use_dora\).*harmonize_checkpoint"),
    "lora_bias": ({"kind": "gpt2", "target_modules": ["c_attn"], "lora_bias": True}, CheckpointError, "has lora_bias"),
    "bias": ({"kind": "gpt2", "target_modules": ["c_attn"], "bias": "lora_only"}, CheckpointError, "bias was trained"),
    "modules_to_save": ({"modules_to_save": ["k_proj"]}, CheckpointError, "k_proj is in modules_to_save"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_cannot_express_is_refused_by_name(kind, tmp_path):
    options, error, message = REFUSED[kind]
    made = make(tmp_path, **options)
    with pytest.raises(error, match=message):
        run(made, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_saved_module_elsewhere_comes_along(tmp_path):
    made = make(tmp_path, modules_to_save=["multi_modal_projector"])
    report = run(made, tmp_path / "out")
    before, after = made.tensors(), made.tensors(tmp_path / "out")
    others = [key for key in before if "multi_modal_projector" in key]
    assert others and all(torch.equal(before[key], after[key]) for key in others)
    assert sum("multi_modal_projector" in name for name in report.not_covered) == len(others)


def with_tensors(made, directory, change):
    copy = shutil.copytree(made.adapter, directory)
    tensors = load_file(copy / FILE)
    change(tensors, next(key for key in tensors if "q_proj.lora_A" in key))
    save_file(tensors, copy / FILE, metadata={"format": "pt"})
    return copy


def test_bad_tensors(plain, tmp_path):
    cases = {
        "nan": (lambda t, k: t[k].__setitem__((0, 0), torch.nan), NumericalError, r"q_proj: lora_A: .*holds 1 NaN"),
        "half": (lambda t, k: t.pop(k), CheckpointError, "has lora_B without the other half"),
        "rank": (lambda t, k: t.update({k: t[k][:2].contiguous()}), CheckpointError, r"expected A \[4, in\]"),
        "width": (lambda t, k: t.update({k: t[k][:, :5].contiguous()}), ValueError, "expected a Gram of 5 features"),
        "dtype": (lambda t, k: t.update({k: t[k].to(torch.int8)}), CheckpointError, "expected 16 bits or more"),
        "unknown": (
            lambda t, k: t.update({k.replace("lora_A.weight", "lora_C.weight"): t[k].clone()}),
            CheckpointError, "is no part of a LoRA",
        ),
    }  # fmt: skip
    for name, (change, error, message) in cases.items():
        bad = with_tensors(plain, tmp_path / name, change)
        with pytest.raises(error, match=message):
            harmonize_adapter(bad, plain.safety, plain.task, tmp_path / f"{name}-out", STRENGTH, progress=False)
        assert not (tmp_path / f"{name}-out").exists()


def test_bad_arguments(plain, tmp_path):
    diagonal = {name: GramDiagonal.of(one) for name, one in plain.safety.items()}
    empty = {name: Gram(one.in_features) for name, one in plain.task.items()}
    zero = {name: Gram(one.in_features).update(torch.zeros(3, one.in_features)) for name, one in plain.task.items()}
    save_grams(plain.safety, tmp_path / "diagonal.safetensors", reduce="diagonal")
    hpa = shutil.copytree(plain.adapter, tmp_path / "hpa")
    (hpa / "hpa_gain.safetensors").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    default = {"adapter": plain.adapter, "safety": plain.safety, "task": plain.task, "out": tmp_path / "out"}
    cases = [
        ({"safety": diagonal}, TypeError, "safety: a GramDiagonal holds the diagonal"),
        ({"safety": tmp_path / "diagonal.safetensors"}, TypeError, "safety: .*diagonals of inverses"),
        ({"task": empty}, ValueError, "counted no tokens"),
        ({"task": zero}, NumericalError, "proj: gram.task: the matrix is zero"),
        ({"task": 3}, TypeError, "task: expected the path of a Gram file or a mapping"),
        ({"task": {}}, ValueError, "no Gram in task"),
        ({"safety": {}, "task": {}}, ValueError, "the Grams are empty"),
        ({"earlier": plain.task}, TypeError, "earlier: expected a sequence"),
        ({"earlier": [{}]}, ValueError, r"no Gram in earlier\[0\]"),
        ({"config": HPAConfig()}, TypeError, "config: expected a CompromiseConfig, got an HPAConfig, whose result"),
        ({"config": {"strength": 1}}, TypeError, "config: expected a CompromiseConfig, got dict"),
        ({"modules": "no_such"}, ValueError, "modules='no_such' matches none"),
        ({"modules": ["no_such"]}, ValueError, "modules: the adapter has no LoRA on 'no_such'"),
        ({"out": plain.adapter}, FileExistsError, "new or empty directory"),
        ({"out": plain.adapter / "inside"}, ValueError, "outside the inputs"),
        ({"out": tmp_path / "full"}, FileExistsError, "holds 'file'"),
        ({"adapter": tmp_path / "nowhere"}, FileNotFoundError, "adapter_config.json"),
        ({"adapter": hpa}, CheckpointError, "was harmonized with HPA already"),
        ({"adapter": 7}, TypeError, "adapter: expected a path"),
        ({"device": "warp"}, ValueError, "device: 'warp' cannot be used here"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            harmonize_adapter(**default | changed, progress=False)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


class Stop(Exception):
    pass


@pytest.mark.parametrize("config", [STRENGTH, CompromiseConfig(budget=0.07)])
def test_it_goes_on_after_any_module_with_the_same_bytes(plain, tmp_path, monkeypatch, config):
    expected = run(plain, tmp_path / "whole", config)
    solved = AdapterJob._module
    for stop in (0, 1, 4):
        out, count = tmp_path / f"out{stop}", 0

        def interrupted(self, *arguments, stop=stop):
            nonlocal count
            if count == stop:
                raise KeyboardInterrupt
            count += 1
            return solved(self, *arguments)

        monkeypatch.setattr(AdapterJob, "_module", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"out\d.partial: go on with --resume"):
            run(plain, out, config)
        assert not out.exists() and Path(f"{out}.partial").is_dir()
        monkeypatch.setattr(AdapterJob, "_module", solved)
        with pytest.raises(FileExistsError, match="unfinished output"):
            run(plain, out, config)
        with pytest.raises(CheckpointError, match=r"config\.damping: was 0.01, is 0.02"):
            run(plain, out, CompromiseConfig(config.strength, config.budget, 0.02), resume=True)
        report = run(plain, out, config, resume=True)
        assert report.layers == expected.layers
        assert contents(out) == contents(tmp_path / "whole")
        assert not Path(f"{out}.partial").exists()
        again = run(plain, out, config, resume=True)
        assert again.layers == report.layers


def test_on_a_quantised_base_it_acts_as_on_the_dequantised_one(plain, tmp_path):
    """The update does not depend on the base: on an int8 base outputs change by the same B A x as on its float one."""
    from peft import PeftModel
    from test_quantised_base import Int8Linear, quantised

    run(plain, tmp_path / "out")
    eight = quantised(plain.base)
    exact = adapter_models.load(plain.base)
    for name, module in eight.named_modules():
        if isinstance(module, Int8Linear):
            exact.get_submodule(name).weight.data = module.dequantised()
    batch = tiny_models.batches(exact, 1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (PeftModel.from_pretrained(model, tmp_path / "out") for model in (eight, exact))
    assert torch.allclose(tiny_models.logits(ours, batch), tiny_models.logits(theirs, batch), atol=1e-5)


def test_names_in_messages_are_those_of_the_model(plain):
    assert all(re.match(r"model\.language_model\.layers\.\d", name) for name in plain.safety)


def test_a_mapping_may_make_its_grams_when_they_are_asked_for(plain, tmp_path):
    """New objects every time share no input, and none is taken for another that is gone."""

    class Made(Mapping):
        def __init__(self, grams):
            self.grams = grams

        def __getitem__(self, name):
            return Gram.from_state_dict(self.grams[name].state_dict())

        def __iter__(self):
            return iter(self.grams)

        def __len__(self):
            return len(self.grams)

    for out, pair in (("stored", (plain.safety, plain.task)), ("made", (Made(plain.safety), Made(plain.task)))):
        harmonize_adapter(plain.adapter, *pair, tmp_path / out, CompromiseConfig(strength=0.5), progress=False)
    assert (tmp_path / "made" / FILE).read_bytes() == (tmp_path / "stored" / FILE).read_bytes()
