"""The commands harmonize and merge: flags and YAML reach the library, exit codes, what is printed and what is left."""

from __future__ import annotations

import json
import os

import pytest
from checkpoint_files import contents
from harmonize_inputs import make_inputs

import hpa_ext
from hpa_ext.cli.main import main
from hpa_ext.hpa.checkpoint import harmonize_checkpoint, merge, merge_checkpoint


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def harmonize(inputs, out, *more, new="new"):
    flags = [text for name, path in inputs.arguments(new).items() for text in (f"--{name}", str(path))]
    return main(["harmonize", *flags, "--out", str(out), *map(str, more)])


def test_flags_and_yaml_reach_the_result(inputs, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(
        "retain_max: 30\ndamping: 2e-2\northogonal: false\nmodules: '.*language_model.*v_proj'\n"
    )
    out, report = tmp_path / "an out ü", tmp_path / "report.json"
    options = ["--config", tmp_path / "settings.yaml", "--damping", "0.05", "--json", report]
    assert harmonize(inputs, out, *options) == 0
    shown = capsys.readouterr()
    assert "v_proj" in shown.out and f"written: {out}" in shown.out and shown.err == ""
    config = hpa_ext.HPAConfig(retain_max=30.0, damping=0.05, orthogonal=False)
    harmonize_checkpoint(
        **inputs.arguments(), out=tmp_path / "same", config=config, modules=r".*language_model.*v_proj", progress=False
    )
    assert contents(out) == contents(tmp_path / "same")
    values = json.loads(report.read_text())
    assert values["config"] == config.to_dict() and len(values["layers"]) == 3
    assert harmonize(inputs, out, "--resume", "--quiet", *options) == 0
    assert capsys.readouterr().out == f"written: {out}\n"


def test_plan_only_says(inputs, tmp_path, capsys):
    assert harmonize(inputs, tmp_path / "out", "--plan", "--json", "-", "--output", "adapter", new="adapter") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["output"] == "adapter" and values["modules"] == 9 and values["fits"]
    assert list(tmp_path.iterdir()) == []


def test_adapters_in_their_order(inputs, tmp_path, capsys):
    assert harmonize(inputs, tmp_path / "step", "--output", "adapter", new="adapter") == 0
    assert harmonize(inputs, tmp_path / "two", "--old-adapter", tmp_path / "step", new="adapter") == 0
    options = {"old_adapters": [tmp_path / "step"], "progress": False}
    harmonize_checkpoint(**inputs.arguments("adapter"), out=tmp_path / "same", **options)
    assert contents(tmp_path / "two") == contents(tmp_path / "same")
    pair = [inputs.adapter, tmp_path / "step"]
    flags = [text for path in pair for text in ("--adapter", str(path))]
    assert main(["merge", "--base", str(inputs.old), *flags, "--out", str(tmp_path / "merged")]) == 0
    merge_checkpoint(inputs.old, pair, tmp_path / "also", progress=False)
    merge_checkpoint(inputs.old, pair[::-1], tmp_path / "other", progress=False)
    merged, also, other = (contents(tmp_path / name) for name in ("merged", "also", "other"))
    assert merged == also != other


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--json", "/nonexistent/report.json"], "--json: expected the name of a file"),
        (["--json", "/"], "--json: expected the name of a file"),
        (["--device", "meta"], "device: 'meta' cannot be used here"),
        (["--modules", "("], "modules: not a regular expression"),
        (["--granularity", "rows"], "granularity: expected one of input, output"),
        (["--old-adapter", "nowhere"], "nowhere"),
        (["--output", "adapter"], 'output: "adapter" needs a LoRA adapter'),
        (["--config", "/nonexistent.yaml"], "nonexistent.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_told_before_work(inputs, tmp_path, capsys, more, said):
    assert harmonize(inputs, tmp_path / "out", *more) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_may_not_be_written_is_refused(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert harmonize(inputs, tmp_path / "out", "--json", tmp_path / "report.json") == 2
    assert "allowed to write" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_interrupted_with_its_own_exit_code(inputs, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "plan_modules", interrupt)
    assert harmonize(inputs, tmp_path / "out") == 130
    assert "go on with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert harmonize(inputs, tmp_path / "out") == 2
    assert harmonize(inputs, tmp_path / "out", "--resume") == 0


def test_progress_is_for_terminals_alone(inputs, tmp_path, monkeypatch, capsys):
    assert harmonize(inputs, tmp_path / "out") == 0
    assert capsys.readouterr().err == ""
