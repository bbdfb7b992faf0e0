"""The commands calibrate, safety-set and demo --export on the embedded model, and settings from a YAML file."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from hpa_ext import calibrate as calibrate_model
from hpa_ext.checkpoints.gram_file import GramFile
from hpa_ext.cli import calibrate, safety_set
from hpa_ext.cli.settings import SettingsParser, memory_size, positive
from hpa_ext.data.records import load_conversations
from hpa_ext.evaluation.metrics import DEFAULT_REFUSALS
from hpa_ext.export_demo import export_demo
from hpa_ext.models.embedded import embedded_path, load_embedded
from hpa_ext.training.demo_settings import DemoSettings


def call(command, *arguments):
    """Run a command of the command line."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    name = command.__name__.rpartition(".")[2].replace("_", "-")
    args = parser.parse_args([name, *map(str, arguments)])
    return args.run(args)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "out"
    said = []
    settings = DemoSettings(train_count=40, max_steps=3, task_calibration_count=12)
    export_demo(path, settings=settings, say=said.append)
    assert len(said) == 3
    return path


def test_what_is_exported(exported):
    names = {"base", "adapter", "task.json", "task-images", "harmful.json", "harmful-images"}
    assert {path.name for path in exported.iterdir()} == names
    adapter = {path.name for path in (exported / "adapter").iterdir()}
    assert adapter >= {"adapter_config.json", "adapter_model.safetensors"}
    for path in embedded_path().iterdir():
        assert (exported / "base" / path.name).read_bytes() == path.read_bytes()
    harmful = load_conversations(exported / "harmful.json")
    assert {item.risk_class for item in harmful} == {"zorv", "plimt", "drask", "quonth"}
    assert len(load_conversations(exported / "task.json")) == 12
    with pytest.raises(FileExistsError, match="new or empty"):
        export_demo(exported)


def test_from_prompts_to_both_gram_files(exported, tmp_path, capsys):
    safety = tmp_path / "safety.json"
    assert call(safety_set, "--model", exported / "base", "--data", exported / "harmful.json", "--out", safety,
                "--max-new-tokens", 12, "--dtype", "float32") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "8 refusals (2 drask, 2 plimt, 2 quonth, 2 zorv; list hpa-refusals-1)" in said
    assert "thrown out as no refusals: 0 of 8" in said
    found = load_conversations(safety)
    assert len(found) == 8 and all(DEFAULT_REFUSALS.matches(item.turns[1].text) for item in found)

    grams = tmp_path / "safety.safetensors"
    assert call(calibrate, "--model", exported / "base", "--data", safety, "--out", grams, "--dtype", "float32") == 0
    assert "28 modules, 16 Grams" in capsys.readouterr().out
    stored = GramFile(grams)
    model, processor = load_embedded()
    from hpa_ext.data.encoding import ConversationEncoder

    encoder = ConversationEncoder(processor)
    expected = calibrate_model(model, [encoder.batch([item]) for item in found], progress=False)
    for name, gram in expected.items():
        assert torch.equal(stored[name].matrix(), gram.matrix())
    assert stored.provenance["ids"] == [item.id for item in found]

    task = tmp_path / "task.safetensors"
    arguments = ("--model", exported / "base", "--adapter", exported / "adapter", "--data", exported / "task.json")
    assert call(calibrate, *arguments, "--samples", 6, "--seed", 2, "--mode", "layers", "--reduce", "diagonal",
                "--token-mask", "response", "--out", task, "--quiet") == 0  # fmt: skip
    assert capsys.readouterr().out == ""
    stored = GramFile(task)
    assert stored.form == "inverse_diagonal" and len(stored.provenance["ids"]) == 6
    assert stored.provenance["config"]["data"]["seed"] == 2 and len(stored.provenance["inputs"]["adapters"]) == 1
    with pytest.raises(FileExistsError):
        call(calibrate, *arguments, "--out", task)


def test_an_interrupt_says_how_to_go_on(exported, tmp_path, monkeypatch):
    from hpa_ext.calibrating.store import GramStore

    out = tmp_path / "g.safetensors"
    arguments = ("--model", exported / "base", "--data", exported / "task.json", "--out", out, "--samples", 2)
    with monkeypatch.context() as patch:
        patch.setattr(GramStore, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt, match=r"g\.safetensors\.partial is unfinished.*--resume"):
            call(calibrate, *arguments)
    assert call(calibrate, *arguments, "--resume", "--quiet") == 0 and out.exists()


def test_prompts_that_are_not_refused_are_replaced_or_missing(exported, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("this zorv request\nthis plimt request\n")
    records = [r for r in json.loads((exported / "harmful.json").read_text()) if "image" not in r]
    for record in records:
        record.pop("risk_class")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(records))
    arguments = ("--model", exported / "base", "--data", prompts, "--refusals", words, "--max-new-tokens", 12)
    assert call(safety_set, *arguments, "--out", tmp_path / "s.json", "--size", 4) == 0
    said = capsys.readouterr().out
    assert "4 refusals (4 harmful; list words.txt)" in said and "thrown out as no refusals: 0" not in said
    assert len(load_conversations(tmp_path / "s.json")) == 4
    with pytest.raises(FileExistsError, match="--force"):
        call(safety_set, *arguments, "--out", tmp_path / "s.json")
    with pytest.raises(RuntimeError, match=r"'harmful' has \d+ of 16 refusals"):
        call(safety_set, *arguments, "--out", tmp_path / "t.json", "--size", 16)
    assert not (tmp_path / "t.json").exists()


def parsed(tmp_path, arguments, contents=None):
    parser = argparse.ArgumentParser()
    settings = SettingsParser(parser)
    settings.add("--model", required=True, help="m")
    settings.add("--batch-size", type=positive, default=4, help="b")
    settings.add("--adapter", action="append", default=[], dest="adapters", help="a")
    settings.add("--mode", choices=("one", "two"), default="one", help="c")
    settings.add("--quiet", action="store_true", default=False, help="q")
    if contents is not None:
        (tmp_path / "s.yaml").write_text(contents)
        arguments = [*arguments, "--config", str(tmp_path / "s.yaml")]
    return vars(settings.resolve(parser.parse_args(arguments)))


def test_a_flag_goes_before_the_file_and_the_file_before_the_default(tmp_path):
    contents = "model: m\nbatch-size: 2\nadapter: [x, y]\nmode: two\nquiet: true\n"
    assert parsed(tmp_path, [], contents) == {
        "model": "m", "batch_size": 2, "adapters": ["x", "y"], "mode": "two", "quiet": True}  # fmt: skip
    found = parsed(tmp_path, ["--batch-size", "4", "--adapter", "z"], contents)
    assert found["batch_size"] == 4 and found["adapters"] == ["z"]
    assert parsed(tmp_path, ["--model", "k"]) == {
        "model": "k", "batch_size": 4, "adapters": [], "mode": "one", "quiet": False}  # fmt: skip
    assert parsed(tmp_path, ["--model", "k"], "batch_size: 3\n")["batch_size"] == 3
    assert parsed(tmp_path, ["--model", "k"], "")["mode"] == "one"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("mdel: x", "'mdel': no such setting; expected some of model, batch-size"),
        ("model: m\nbatch-size: 0", "batch-size: expected a whole number"),
        ("model: m\nbatch-size: [1]", "batch-size: expected a single value"),
        ("model: m\nmode: three", "mode: expected one of one, two"),
        ("model: m\nquiet: maybe", "quiet: expected true or false"),
        ("- model", "expected settings by name, got list"),
        ("model: [", "not YAML"),
        ("mode: one", "--model: expected as a flag, or under 'model'"),
        ("model: !!python/object:os.system x", "not YAML"),
    ],
)
def test_settings_that_are_off(tmp_path, contents, message):
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, [], contents)


def test_sizes():
    assert [memory_size(text) for text in ("5", "2K", "1.5M", "4GiB", "1 tb")] == [5, 2048, 1572864, 4 << 30, 1 << 40]
    for text in ("", "G", "-1", "4X", "0"):
        with pytest.raises(argparse.ArgumentTypeError):
            memory_size(text)
