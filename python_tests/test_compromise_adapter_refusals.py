"""What `harmonize_adapter` and ``hpa-ext adapter`` refuse: half an adapter, bad patterns, an output in an input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compromise_adapters import FILE, make
from safetensors.torch import load_file, save_file

from hpa_ext import CompromiseConfig, Gram, harmonize_adapter, save_grams
from hpa_ext.checkpoints import CheckpointError
from hpa_ext.cli.main import main
from hpa_ext.compromise.estimate import plan_adapter
from hpa_ext.gram import GramCollection

STRENGTH = CompromiseConfig(strength=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"))


def changed(made, directory, **config):
    copy = shutil.copytree(made.adapter, directory)
    (copy / "adapter_config.json").write_text(json.dumps(made.config() | config))
    return copy


def test_dora_without_its_magnitudes(made, tmp_path):
    """PEFT would make them from the base weights, and the update would be no product B A."""
    adapter = changed(made, tmp_path / "dora", use_dora=True)
    with pytest.raises(CheckpointError, match=r"has DoRA \(use_dora\)"):
        harmonize_adapter(adapter, made.safety, made.task, tmp_path / "out", STRENGTH, progress=False)


def test_a_pattern_that_is_none(made, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"modules: not a regular expression: '\('"):
        harmonize_adapter(made.adapter, made.safety, made.task, tmp_path / "out", STRENGTH, modules="(")
    for name, grams in (("safety", made.safety), ("task", made.task)):
        save_grams(grams, tmp_path / f"{name}.safetensors")
    words = ["--adapter", made.adapter, "--safety", tmp_path / "safety.safetensors", "--out", tmp_path / "out"]
    assert main(["adapter", *map(str, words), "--task", str(tmp_path / "task.safetensors"), "--modules", "("]) == 2
    assert "not a regular expression" in capsys.readouterr().err


@pytest.mark.parametrize("work", [harmonize_adapter, plan_adapter])
def test_an_output_in_the_base(made, tmp_path, work):
    base = shutil.copytree(made.base, tmp_path / "base")
    with pytest.raises(ValueError, match="out: expected a directory outside the inputs"):
        work(made.adapter, made.safety, made.task, base / "out", STRENGTH, base=base)
    assert not (base / "out").exists() and not (base / "out.partial").exists()


@pytest.mark.parametrize("rank", [1, 90])
def test_ranks_of_one_and_above_the_width(made, tmp_path, rank):
    """A update of more rows than there are inputs is one all the same, and keeps its shape."""
    adapter = changed(made, tmp_path / "adapter", r=rank)
    tensors = {}
    for seed, (key, value) in enumerate(sorted(load_file(made.adapter / FILE).items())):
        shape = (rank, value.shape[1]) if "lora_A" in key else (value.shape[0], rank)
        tensors[key] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / rank
    save_file(tensors, adapter / FILE, metadata={"format": "pt"})
    assert rank == 1 or any(rank > one.in_features for one in made.safety.values())
    report = harmonize_adapter(
        adapter, made.safety, made.task, tmp_path / "out", CompromiseConfig(budget=0.1), progress=False
    )
    after = load_file(tmp_path / "out" / FILE)
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in tensors.items()}
    for name, layer in report.layers.items():
        a, b = (after[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        before = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        h = made.safety[name].matrix().double()
        left, whole = (torch.trace(b @ x @ h @ x.mT @ b.mT) for x in (a, before))
        assert 0.098 < left / whole < 0.1001 and layer.safety_left == pytest.approx(float(left / whole), rel=1e-3)


def test_an_adapter_that_overflows_its_dtype(made, tmp_path):
    adapter = changed(made, tmp_path / "adapter")
    tensors = load_file(made.adapter / FILE)
    save_file({key: (value / value.abs().max() * 6.5e4).half() for key, value in tensors.items()}, adapter / FILE)
    with pytest.raises(ArithmeticError, match=r"proj: the new lora_A overflows torch\.float16; save the adapter"):
        harmonize_adapter(adapter, made.safety, made.task, tmp_path / "out", CompromiseConfig(), progress=False)
    assert not (tmp_path / "out").exists()


def test_an_indefinite_gram_and_one_below_zero(made, tmp_path):
    """Damaged files: no activation has such sums."""
    for value, message in ((-1.0, "gram.safety: expected a Gram of activations"), (1.0, "not positive definite")):
        bad = GramCollection()
        for name, one in made.safety.items():
            total = value * torch.eye(one.in_features)
            total[0, 1] = total[1, 0] = 5000.0
            bad[name] = Gram.of_sum(total, 5)
        with pytest.raises(ArithmeticError, match=message) as error:
            harmonize_adapter(made.adapter, bad, made.task, tmp_path / "out", STRENGTH, progress=False)
        assert "proj" in str(error.value)
        shutil.rmtree(tmp_path / "out.partial")
