"""The commands of README.md and docs/checkpoints.md exist, run in their order, and say what the docs say."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import hpa_ext
from hpa_ext.cli.main import main, parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
TINY = CHECKPOINTS.partition("\n## The same on the tiny model\n")[2].partition("\n## ")[0]

EXPORT = ["hpa-ext", "demo", "--export", "tiny"]
FENCE = re.compile(r"```(sh|python)\n(.*?)```", flags=re.S)


def steps(text):
    """Commands as lists of words, and Python as text, in the order of the document."""
    found = []
    for kind, body in FENCE.findall(text):
        if kind == "python":
            found.append(body)
        else:
            lines = body.replace("\\\n", " ").splitlines()
            found += [shlex.split(line, comments=True) for line in lines if line.strip()]
    return [step for step in found if step]


def commands(text):
    """The ``hpa-ext`` commands, also those under torchrun, without the program's name."""
    lines = [step for step in steps(text) if isinstance(step, list) and "hpa-ext" in step]
    return [line[line.index("hpa-ext") + 1 :] for line in lines]


@pytest.mark.parametrize("document", ["README.md", "docs/checkpoints.md"])
def test_commands_and_flags_exist(document):
    found = commands((ROOT / document).read_text(encoding="utf-8"))
    assert len(found) >= 6
    for words in found:
        args = parser().parse_args(words)  # exits on a command, flag or choice that there is not
        if hasattr(args, "settings"):
            args.settings.resolve(args)  # raises on a missing one


def test_every_command_is_in_the_walk_through_of_the_tiny_model():
    assert {words[0] for words in commands(TINY)} >= {"demo", "safety-set", "calibrate", "harmonize", "verify", "merge"}


@pytest.fixture
def short_export(tmp_path, monkeypatch):
    """What ``hpa-ext demo --export tiny`` makes, but hardly tuned and with less data, in the current directory."""
    from hpa_ext.export_demo import export_demo
    from hpa_ext.training.demo_settings import DemoSettings

    monkeypatch.chdir(tmp_path)
    export_demo("tiny", settings=DemoSettings(train_count=16, max_steps=2, task_calibration_count=8))


def test_readme_commands_run(short_export, capsys):
    found = commands(README)
    assert ["hpa-ext", *found[0]] == EXPORT
    for words in found[1:]:
        assert main(words) == 0, f"{words}: {capsys.readouterr().err}"
    assert "retained columns compared with the old model" in capsys.readouterr().out


def test_walk_through_runs_on_a_hardly_tuned_adapter(short_export, capsys):
    assert steps(TINY)[0] == EXPORT
    walk([step for step in steps(TINY)[1:] if isinstance(step, list) and step[0] == "hpa-ext"], capsys)
    same = [Path("tiny", name, "model.safetensors").read_bytes() for name in ("harmonized", "merged")]
    assert same[0] == same[1]


@pytest.mark.slow
def test_walk_through_runs_as_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    walk(steps(TINY), capsys)
    weights = {Path("tiny", name, "model.safetensors").read_bytes() for name in ("harmonized", "merged", "by-two")}
    assert len(weights) == 1


def walk(found, capsys):
    for step in found:
        if isinstance(step, str):
            exec(compile(step, "docs/checkpoints.md", "exec"), {"__name__": "docs"})
        elif step[0] == "torchrun":
            assert step[3:5] == ["--no-python", "hpa-ext"]
            words = ["-m", "torch.distributed.run", *step[1:3], "-m", "hpa_ext.cli.main", *step[5:]]
            package = str(Path(hpa_ext.__file__).parent.parent)
            environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment
            )
            assert done.returncode == 0, done.stderr
        else:
            assert main(step[1:]) == 0, f"{step}: {capsys.readouterr().err}"


def test_messages_in_the_table_are_those_of_the_code():
    table = CHECKPOINTS.partition("| message | cause | what to do |")[2].partition("\n\n")[0]
    messages = re.findall(r"^\| (.+?) \|", table, flags=re.M)[1:]
    assert len(messages) > 30
    texts = "\n".join(text for path in sorted((ROOT / "hpa_ext").rglob("*.py")) for text in string_texts(path))
    for message in messages:
        for quoted in re.findall(r"`([^`]+)`", message):
            unknown = [phrase for phrase in fixed_phrases(quoted) if phrase not in texts]
            assert not unknown, f"docs/checkpoints.md quotes {unknown}, which no message in the code has"


def string_texts(path):
    """The string literals of a source file, what f-strings insert left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "\0".join(str(value.value) for value in node.values if isinstance(value, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


# What stands for something else in the quoted messages: numbers, quoted names, files, classes, arguments.
EXAMPLE = re.compile(
    r"\.\.\.|'[^']*'|\[.*?\]|\d[\d.]*|[:;,()] ?|\S+\.(?:safetensors|json|partial)\b|->"
    r"|\b(?:got|or|inside|in safety|in Llava\w+|Llava\w+|BF16|F16)\b"
)


def fixed_phrases(message):
    """The pieces of a quoted message between examples, of three words at least."""
    return [piece.strip() for piece in EXAMPLE.split(message) if len(piece.split()) > 2]
