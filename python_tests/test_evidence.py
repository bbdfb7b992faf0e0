"""The tables of docs/evidence.md are those of the rows beside it."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest

from hpa_ext.cli import bench

bench.load_benchmarks()
evidence_tables = importlib.import_module("hpa_ext.benchmarks.evidence_tables")
DOCUMENT, updated = evidence_tables.DOCUMENT, evidence_tables.updated
FOLDER = DOCUMENT.parent / "evidence"


def test_the_tables_are_those_of_the_rows(tmp_path) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert updated(text, FOLDER) == text, "run `python benchmarks/evidence_tables.py`"
    copied = shutil.copytree(FOLDER, tmp_path / "evidence")
    for path in copied.glob("original-*.json"):
        rows = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps([{**row, "AP": row["AP"] + 1} for row in rows]), encoding="utf-8")
    assert updated(text, copied) != text


@pytest.mark.parametrize(
    ("label", "method"),
    [("plain tuning", "seqft"), ("HPA, the paper", "hpa"), ("the compromise, defaults", "compromise-budget-earlier")],
)
def test_the_table_of_the_readme_is_that_of_the_rows(label: str, method: str) -> None:
    readme = (DOCUMENT.parent.parent / "README.md").read_text(encoding="utf-8")
    line = next(line for line in readme.splitlines() if line.startswith(f"| {label}"))
    shown = [text.strip().replace("\N{MINUS SIGN}", "-") for text in line.split("|")[2:8]]
    means = []
    for condition in ("original", "injected"):
        rows = json.loads((FOLDER / f"{condition}-1.json").read_text(encoding="utf-8"))
        mine = [row for row in rows if row["method"] == method]
        assert len(mine) == 5
        means += [f"{sum(row[key] for row in mine) / 5:.1f}" for key in ("AP", "BWT", "MASR")]
    assert shown == means


def test_every_kind_of_table_stands_in_the_document() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f" {kind} -->" in text for kind in evidence_tables.KINDS)


def test_scaling_that_leaves_as_much_is_the_comparison() -> None:
    step = {"safety_left": 0.64, "task_lost": 0.3}
    _, lines = evidence_tables.output_change_lines(
        [{"method": "hpa", "steps": [step, step], "learning": 90.0, "MASR": 20.0}]
    )
    # Scaling by 0.8 leaves 0.64 of the change, and takes back (1 - 0.8)^2 of the task's.
    assert lines == [["HPA", "64", "30", "4", "90.0", "20.0"]]


def test_the_rank_correlation_is_that_of_the_ranks() -> None:
    rows = [
        {"method": name, "steps": [{"safety_left": left, "task_lost": 0.1 * place}], "learning": masr, "MASR": masr}
        for place, (name, left, masr) in enumerate((("hpa", 0.9, 10.0), ("dare", 0.8, 30.0), ("wise-ft", 0.1, 20.0)))
    ]
    text = evidence_tables.output_change(rows)
    # Ranks of MASR 0, 2, 1; of what is left 2, 1, 0: 1 - 6 * (4 + 1 + 1) / (3 * 8) = -0.5.
    assert "safety change left -0.50, task change taken back +0.50, learning +1.00." in text


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*-*.json")), ids=lambda path: path.stem)
def test_the_rows_are_of_the_present_regime_and_strengths(path) -> None:
    """Rows of an earlier regime would be tables that the command does not reproduce."""
    from hpa_ext.continual.cells import Cell
    from hpa_ext.continual.settings import ContinualSettings

    rows = json.loads(path.read_text(encoding="utf-8"))
    condition, _, order = path.stem.rpartition("-")
    for row in rows:
        assert (row["condition"], row["order"]) == (condition, int(order))
        assert row["digest"] == Cell(row["method"], row["seed"], condition, int(order)).digest(ContinualSettings())


def test_the_strengths_are_those_that_tuning_chose() -> None:
    from hpa_ext.continual.strengths import STRENGTHS

    found = json.loads((FOLDER / "tuning.json").read_text(encoding="utf-8"))
    assert {name: entry["chosen"] for name, entry in found.items()} == {
        name: list(value) if isinstance(value, tuple) else value for name, value in STRENGTHS.items()
    }
