"""HiDe on a device, its benchmark and its example: that they run, and are right."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import hide_models as hm
import pytest
import torch

from hpa_ext.cli import bench
from hpa_ext.hide import HiDeConfig, HiDeModel

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "hide_two_tasks.py"


def on(device, batch):
    return {key: value.to(device) for key, value in batch.items()}


@pytest.mark.parametrize("config", [HiDeConfig(), HiDeConfig(top_layers=3, projector="routed")], ids=["paper", "all"])
def test_a_model_on_a_device(device, config):
    here = hm.hide(config=config)
    base = hm.llava_of().to(device)
    there = HiDeModel(base, hm.experts(hm.llava_of()), hm.anchors_of(hm.llava_of()), config)
    batch = hm.prompts((1, 0, 2, 1))
    weights = there.routing(**on(device, batch))
    assert weights.device.type == torch.device(device).type
    torch.testing.assert_close(weights.cpu(), here.routing(**batch), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there(**on(device, batch)).logits.cpu(), here(**batch).logits, rtol=1e-3, atol=1e-3)
    state = hm.state_of(base)
    there.remove("beta")
    there.add("beta", hm.experts(hm.llava_of())["beta"], hm.anchors_of(hm.llava_of()))
    there.remove("beta")
    assert there.tasks == ["alpha", "gamma"]
    assert {value.device for value in there.state_dict().values()} == {value.device for value in state.values()}
    tokens = there.generate(**on(device, batch), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert tokens.shape[0] == 4
    restored = there.unload()
    for name, value in hm.llava_of().state_dict().items():
        assert torch.equal(restored.state_dict()[name].cpu(), value), name


def test_the_benchmark_is_right():
    benchmarks = bench.load_benchmarks()
    module = importlib.import_module(f"{benchmarks.__name__}.bench_hide")
    setting = benchmarks.Setting(torch.device("cpu"), True, False, 2, seed=1)
    setting.measure_ceilings()
    rows = list(module.rows(setting))
    metrics = [row.metric for row in rows]
    assert metrics == [
        "hide_layer_vs_loop", "hide_layer_vs_authors", "hide_layer_vs_base", "hide_fused_vs_authors", "hide_prefill",
        "hide_decode",
    ]  # fmt: skip
    assert all(row.correct for row in rows)
    # The authors' factors are not the sum of the experts.
    fused = rows[metrics.index("hide_fused_vs_authors")]
    assert fused.peer_error > 100 * fused.error


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="examples/ is not installed with the package")
def test_the_example_runs(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("hide_two_tasks", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.run(tmp_path, steps=2) == 0
    assert "the same answers: True" in capsys.readouterr().out
    assert (tmp_path / "compass" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "hide" / "hide.json").is_file()
