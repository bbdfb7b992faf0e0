"""``hpa-ext adapter``: flags, a YAML file, exit codes, and what is printed."""

from __future__ import annotations

import json

import pytest
from compromise_adapters import FILE, make

from hpa_ext import CompromiseConfig, harmonize_adapter
from hpa_ext.checkpoints.gram_file import save_grams
from hpa_ext.cli.main import main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    made = make(root)
    save_grams(made.safety, root / "safety.safetensors")
    save_grams(made.task, root / "task.safetensors")
    return made, root


def words(root, out, *more):
    names = {
        "--adapter": root / "adapter",
        "--safety": root / "safety.safetensors",
        "--task": root / "task.safetensors",
    }
    return ["adapter", *(str(word) for pair in names.items() for word in pair), "--out", str(out), *more]


def test_it_does_what_the_function_does(files, tmp_path, capsys):
    made, root = files
    options = ["--strength", "0.3", "--damping", "0.02", "--modules", r".*down_proj", "--base", str(root / "base")]
    earlier = ["--earlier", str(root / "task.safetensors")]
    assert main(words(root, tmp_path / "out", *options, *earlier, "--json", str(tmp_path / "report.json"))) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].startswith("module") and shown.endswith(f"written: {tmp_path / 'out'}\n")
    report = harmonize_adapter(
        made.adapter, made.safety, made.task, tmp_path / "same", CompromiseConfig(strength=0.3, damping=0.02),
        earlier=[made.task], modules=r".*down_proj", progress=False,
    )  # fmt: skip
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / "same" / FILE).read_bytes()
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_settings_from_a_file_and_a_finished_output(files, tmp_path, capsys):
    _, root = files
    (tmp_path / "settings.yaml").write_text("budget: 0.2\ntolerance: 0.02\n")
    command = words(root, tmp_path / "out", "--config", str(tmp_path / "settings.yaml"), "--quiet", "--json", "-")
    assert main(command) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"]["budget"] == 0.2 and values["config"]["tolerance"] == 0.02
    assert all(0.196 <= layer["safety_left"] <= 0.2 for layer in values["layers"].values())
    assert main(command) == 2 and "new or empty directory" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert json.loads(capsys.readouterr().out) == values


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strength", "1", "--budget", "0.1"], "strength, budget: expected one of them"),
        (["--budget", "2"], "budget: expected a share"),
        (["--rescue", "hope"], "rescue: expected one of"),
        (["--modules", "no_such"], "matches none of the modules"),
        (["--json", "/no/such/file"], "--json: expected the name of a file"),
        (["--safety", "/no/such/file"], "No such file"),
    ],
)
def test_wrong_input_is_exit_code_2(files, tmp_path, capsys, more, message):
    assert main(words(files[1], tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_of_the_documentation_exist():
    from test_docs import ROOT, commands

    from hpa_ext.cli.main import parser

    found = commands((ROOT / "docs" / "compromise.md").read_text(encoding="utf-8"))
    assert [words[0] for words in found] == ["calibrate", "calibrate", "adapter", "grams", "harmonize"]
    for line in found:
        args = parser().parse_args(line)
        if line[0] != "grams":  # which has no settings file
            args.settings.resolve(args)


def test_the_plan_of_an_adapter(files, tmp_path, capsys):
    made, root = files
    assert main(words(root, tmp_path / "out", "--plan")) == 0
    assert "to harmonize" in capsys.readouterr().out and not (tmp_path / "out").exists()
    earlier = ["--earlier", str(root / "task.safetensors")]
    plans = []
    for more in (["--strength", "1"], [], earlier, ["--budget", "1"]):
        assert main(words(root, tmp_path / "out", "--plan", "--json", "-", *more)) == 0
        plans.append(json.loads(capsys.readouterr().out))
    fixed, budget, protected, free = plans
    size = sum(tensor.nbytes for tensor in made.tensors().values())
    assert all(plan["write_bytes"] == size for plan in plans)
    assert fixed["modules"] == budget["modules"] and protected["grams"] == 1.5 * budget["grams"]
    assert protected["memory_bytes"] > budget["memory_bytes"] == fixed["memory_bytes"]
    assert free["seconds"]["factor"] == 0 < fixed["seconds"]["factor"]
    assert main(words(root, tmp_path / "out", "--plan", "--modules", "no_such")) == 2
    capsys.readouterr()
    assert main(words(root, tmp_path / "out", "--quiet", "--json", "-")) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == budget["modules"]
    assert main(words(root, tmp_path / "out", "--plan")) == 2, "the output is there already"
