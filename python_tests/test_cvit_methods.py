"""Methods from disk to disk: as in memory, for every registered one; state of training-time ones; what is refused."""

from __future__ import annotations

import shutil

import cvit_runs
import harmonize_inputs
import pytest
import tiny_models
import torch
from adapter_models import load
from torch import nn

from hpa_ext.baselines import METHODS, LayerContext, method
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.checkpoints.weights import CheckpointWeights
from hpa_ext.cvit.config import MethodConfig
from hpa_ext.cvit.grams_needed import grams_needed
from hpa_ext.cvit.method import check_against, chosen_method
from hpa_ext.cvit.method_state import load_modules, load_state, save_modules, save_state
from hpa_ext.cvit.method_weights import LayerInputs, apply_method
from hpa_ext.cvit.stage_settings import method_settings
from hpa_ext.cvit.tuning import must_be_finite
from hpa_ext.models.linears import find_linears
from hpa_ext.models.structure import layer_depth

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
OWN = """
from hpa_ext.baselines.registry import post_training
@post_training("own-half", "half", "nobody")
def half(old, new, layer):
    return old + (new - old) / 2
"""
# The others want Grams that a run does not keep, and are refused (below).
POST_TRAINING = [
    name
    for name, found in METHODS.items()
    if found.kind == "post-training" and set(found.needs) <= {"alignment", "history"}
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    made = harmonize_inputs.make_inputs(root, dtype=torch.float32, targets=LANGUAGE)
    other = tiny_models.with_lora(tiny_models.llava(), LANGUAGE, seed=9)
    other.save_pretrained(root / "earlier")
    unaligned = tiny_models.tuned(tiny_models.llava(), seed=4)
    unaligned.save_pretrained(root / "unaligned")
    shutil.rmtree(made.new)
    return made, root


def layer_inputs(made, root, needs):
    return LayerInputs(
        safety=GramFile(made.safety),
        task=GramFile(made.task),
        earlier=[root / "earlier"] if "history" in needs else (),
        aligned=CheckpointWeights(made.old) if "alignment" in needs else None,
        unaligned=CheckpointWeights(root / "unaligned") if "alignment" in needs else None,
        seed=5,
    )


@pytest.mark.parametrize("name", POST_TRAINING)
def test_as_in_memory(name, inputs, tmp_path):
    made, root = inputs
    chosen = chosen_method(MethodConfig(name))
    given = layer_inputs(made, root, chosen.method.needs)
    apply_method(
        made.old, made.adapter, tmp_path / "out", chosen.method, chosen.options, given, fingerprints={}, progress=False
    )
    result = load(tmp_path / "out").state_dict()
    old, tuned = made.models["old"], made.models["adapted"].merge_and_unload(safe_merge=False)
    made.models["adapted"] = tiny_models.with_lora(tiny_models.llava(), LANGUAGE)
    earlier = tiny_models.with_lora(tiny_models.llava(), LANGUAGE, seed=9).merge_and_unload()
    unaligned = load(root / "unaligned")
    looks_back = "history" in chosen.method.needs
    changed = 0
    for module in find_linears(old):
        before, after = (model.get_submodule(module).weight.detach() for model in (old, tuned))
        if torch.equal(before, after):
            assert torch.equal(result[f"{module}.weight"], before)
            continue
        layer = LayerContext(
            name=module,
            depth=layer_depth(old, module),
            safety=made.grams["safety"][module],
            task=made.grams["task"][module],
            initial=before if looks_back else None,
            earlier_updates=(earlier.get_submodule(module).weight.detach() - before,) if looks_back else (),
            alignment=before - unaligned.get_submodule(module).weight.detach(),
            seed=5,
        )
        expected = chosen.method.function(before, after, layer, **chosen.options)
        torch.testing.assert_close(result[f"{module}.weight"], expected, rtol=1e-4, atol=2e-6)
        changed += not torch.equal(result[f"{module}.weight"], before)
    assert changed or name == "safe-lora"
    untouched = {key for key in result if not any(key == f"{module}.weight" for module in find_linears(old))}
    assert all(torch.equal(result[key], old.state_dict()[key]) for key in untouched)


def test_half_the_way_is_rounded_once(tmp_path):
    made = harmonize_inputs.make_inputs(tmp_path, dtype=torch.bfloat16, targets=LANGUAGE)
    found = method("wise-ft")
    apply_method(
        made.old, made.adapter, tmp_path / "out", found, {"share": 0.5}, LayerInputs(), fingerprints={}, progress=False
    )
    result = load(tmp_path / "out").state_dict()
    weights = CheckpointWeights(made.old, [made.adapter])
    adapter = weights.adapters[0]
    for module in adapter.updates:
        old = weights.base_tensor(f"{module}.weight").double()
        update = adapter.updates[module]
        exact = old + 0.5 * update.scaling * update.b.double() @ update.a.double()
        assert result[f"{module}.weight"].dtype == torch.bfloat16
        # The nearest bfloat16, but where float32's own error tips it; rounding the tuned weight first would tip many.
        assert (result[f"{module}.weight"] == exact.bfloat16()).double().mean() > 0.999
        twice = (old + update.scaling * update.b.double() @ update.a.double()).bfloat16().double()
        assert ((0.5 * old + 0.5 * twice).bfloat16() == exact.bfloat16()).double().mean() < 0.95


def test_an_interrupted_method_goes_on_and_another_one_is_refused(tmp_path, monkeypatch):
    made = harmonize_inputs.make_inputs(tmp_path, dtype=torch.float32, targets=LANGUAGE)
    found, out = method("wise-ft"), tmp_path / "out"

    def go(share, to=out):
        apply_method(
            made.old, made.adapter, to, found, {"share": share}, LayerInputs(), fingerprints={}, progress=False
        )

    go(0.5, tmp_path / "straight")
    work, count = found.function, [0]

    def stopping(*args, **kwargs):
        count[0] += 1
        if count[0] == 4:
            raise RuntimeError("stopped")
        return work(*args, **kwargs)

    object.__setattr__(found, "function", stopping)
    try:
        with pytest.raises(RuntimeError, match="stopped"):
            go(0.5)
        with pytest.raises(ValueError, match=r"config.options.share: was 0.5, is 0.6"):
            go(0.6)
        done = count[0]
        go(0.5)
        assert count[0] - done < len(CheckpointWeights(made.old, [made.adapter]).adapters[0].updates)
    finally:
        object.__setattr__(found, "function", work)
    for file in (tmp_path / "straight").glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


def test_only_the_grams_that_a_method_looks_at_are_made():
    found = {name: grams_needed(method(name), dict(method(name).settings)) for name in POST_TRAINING}
    assert found["safe-delta"] == {"safety"} and found["model-tailor"] == {"task"}
    assert found["regmean"] == {"safety", "task"} == found["hpa"]
    assert found["ties"] == found["wise-ft"] == found["safe-lora"] == set()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MethodConfig("hpaa"), "method.name: expected one of"),
        (MethodConfig("l2p"), "method.name: l2p does not work here"),
        (MethodConfig("compromise-budget-earlier"), "method.name: compromise-budget-earlier .* needs earlier-grams"),
        (MethodConfig("compromise-sequential"), "method.name: compromise-sequential .* needs sequential"),
        (MethodConfig("hpa", {"alpha": 1}), "method.options: alpha: HPA has no such setting; it has alpha_min"),
        (MethodConfig("hpa", {"retain_max": 200.0}), "method.options: retain_min, retain_max"),
        (MethodConfig("wise-ft", {"share": 2.0}), "method.options: share: expected a number"),
        (MethodConfig("wise-ft", {"shares": 0.5}), "method.options: shares: wise-ft has no such setting; it has share"),
        (MethodConfig("seqft", {"share": 0.5}), "method.options: share: seqft has no such setting; it has none"),
        (MethodConfig("ewc", {"strength": -1.0}), "method.options: strength"),
    ],
)
def test_options_are_checked_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        chosen_method(settings)


def test_a_method_of_ones_own_and_its_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    try:
        chosen = chosen_method(MethodConfig("own-half", file=path))
        assert chosen.kind == "post-training" and chosen.grams == frozenset()
        before = method_settings(chosen)
        path.write_text(OWN.replace("2", "4"))
        assert method_settings(chosen_method(MethodConfig("own-half", file=path))) != before  # a stage sees the change
        with pytest.raises(ValueError, match=r"^method.file: .*'own-half' is registered already"):
            chosen_method(MethodConfig("own-half", file=tmp_path / "other.py"))
    finally:
        METHODS.pop("own-half", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine", "def x(:", "method.file: .*SyntaxError"),
        ("mine", "1 / 0", "method.file: .*ZeroDivisionError"),
        ("mine", "import no_such_module", "method.file: .*ModuleNotFoundError"),
        ("mine", "x = 1", "method.file: .*registers no new method"),
        ("hpa", "x = 1", "method.file: .*'hpa' is registered already"),
    ],
)
def test_a_file_that_gives_no_method_is_refused(tmp_path, name, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(ValueError, match=f"^{message}"):
        chosen_method(MethodConfig(name, file=tmp_path / "broken.py"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "hpa"}, "calibration.safety: hpa needs a source"),
        ({"method": "safe-lora"}, "model.unaligned: safe-lora needs the model before its alignment"),
        ({"method": "ties", "tuning__projector_learning_rate": 1e-5}, "tuning.projector_learning_rate: ties adds"),
    ],
)
def test_what_a_method_needs_is_asked_for(tmp_path, changes, message):
    config = cvit_runs.values(folder=tmp_path, **changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        check_against(chosen_method(config.method), config)


def test_state_of_a_method_between_steps(tmp_path):
    before, after = (method("o-lora").function(strength=0.1) for _ in range(2))
    before.earlier = {"a.b": [torch.eye(2), torch.ones(2, 3)], "c": []}
    save_state(before, tmp_path / "state.safetensors")
    after.strength = 7.0
    load_state(after, tmp_path / "state.safetensors", "cpu")
    assert after.strength == 0.1 and after.form == "code" and after.earlier["c"] == []
    assert torch.equal(after.earlier["a.b"][1], torch.ones(2, 3)) and len(after.earlier["a.b"]) == 2
    with pytest.raises(ValueError, match="expected the state of EWC, got that of OLoRA"):
        load_state(method("ewc").function(), tmp_path / "state.safetensors", "cpu")
    before.helper = object()
    with pytest.raises(TypeError, match=r"^helper: expected tensors, numbers and texts"):
        save_state(before, tmp_path / "state.safetensors")


def test_modules_that_a_method_leaves_in_the_model(tmp_path):
    one, two = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)) for _ in range(2))
    for model in (one, two):
        model[0].requires_grad_(False)
    save_modules(one, tmp_path / "modules.safetensors")
    load_modules(two, tmp_path / "modules.safetensors")
    assert torch.equal(one[1].weight, two[1].weight) and not torch.equal(one[0].weight, two[0].weight)
    with pytest.raises(ValueError, match="expected the parameters that the method trains"):
        load_modules(nn.Linear(3, 2), tmp_path / "modules.safetensors")


def test_what_was_trained_must_be_finite():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    model[0].weight.fill_(float("nan"))  # not trained: the model's own affair
    must_be_finite(model)
    with torch.no_grad():
        model[1].bias[1] = float("inf")
    with pytest.raises(FloatingPointError, match=r"1.bias is not finite"):
        must_be_finite(model)
