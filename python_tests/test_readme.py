"""The README's Python examples run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_example_runs(index, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[index], f"README.md, example {index + 1}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out, "an example shows something"


def test_performance_table_is_that_of_the_results_file():
    import importlib.util
    import json

    path = README.parent / "benchmarks" / "readme_table.py"
    spec = importlib.util.spec_from_file_location("readme_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = README.read_text(encoding="utf-8")
    path = module.source(readme)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert module.updated(readme, path.name, document) == readme, "run `python benchmarks/readme_table.py`"
    faster = {**document, "rows": [{**row, "ratio": row["ratio"] + 1} for row in document["rows"]]}
    assert module.updated(readme, path.name, faster) != readme
