"""The picture of how cost grows, and the options of `hpa-ext bench` that go with it."""

from __future__ import annotations

import argparse
import importlib

import pytest

from hpa_ext.cli import bench
from hpa_ext.reporting.bench_plot import growth


def row(metric, shape, dimensions, ours=1.0, dtype="bfloat16"):
    return {
        "metric": metric, "shape": shape, "dimensions": dimensions, "dtype": dtype, "peer": "the peer",
        "ours_ms": ours, "peer_ms": 3 * ours, "ratio": 3.0,
    }  # fmt: skip


def test_a_panel_for_each_metric_and_size_that_varies():
    rows = [row("gram", [tokens, size], "tokens, in", tokens * size**2) for tokens in (64, 128) for size in (512, 1024)]
    rows += [row("inverse", [size, size], "in, in", size**3) for size in (1024, 256, 512)]
    rows += [row("mask", [1, 4096], "batch, columns")]
    panels = [axes for axes in growth(rows, "title").axes if axes.get_visible()]
    assert [(axes.get_title().split("\n")[0], axes.get_xlabel()) for axes in panels] == [
        ("gram", "tokens"), ("gram", "features"), ("inverse", "features"),
    ]  # fmt: skip
    assert [line.get_label() for line in panels[0].lines[::2]] == ["bfloat16, 512 features", "bfloat16, 1024 features"]
    ours, peer = panels[2].lines
    assert list(ours.get_xdata()) == [256, 512, 1024] and list(ours.get_ydata()) == [256**3, 512**3, 1024**3]
    assert list(peer.get_ydata()) == [3 * size**3 for size in (256, 512, 1024)]
    assert [text.get_text() for text in panels[2].texts] == ["3.0x"] * 3


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="rows: expected a metric at two sizes"):
        growth([row("gram", [64, 512], "tokens, in")], "title")


def run(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(
        ["bench", "--threads", "1", "--quick", "--no-save", "--repeats", "1", *map(str, arguments)]
    )
    return args.run(args)


def test_the_command_says_when_there_is_nothing_to_draw(tmp_path, capsys):
    assert run("gram", "--plot", tmp_path / "new" / "cost.png") == 0
    assert "no picture" in capsys.readouterr().err and not (tmp_path / "new" / "cost.png").exists()


def test_the_command_draws(tmp_path, monkeypatch):
    name = f"{bench.load_benchmarks().__name__}.bench_inverse_diagonal"
    monkeypatch.setattr(importlib.import_module(name), "sizes", lambda setting: [32, 64])
    assert run("inverse_diagonal", "--plot", tmp_path / "cost.png", "--instruction-set", "portable") == 0
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_costs_no_numbers(tmp_path, monkeypatch, capsys):
    """The disk may be full by then."""
    document = {"device": "one", "threads": 1, "instruction_set": "x", "load_average": 0.0}
    document["rows"] = [row("gram", [tokens, 64], "tokens, in") for tokens in (64, 128)]
    assert bench._plot(document, tmp_path / "gone" / "cost.png") == 1
    assert "--plot:" in capsys.readouterr().err

    def draw(document, path):
        assert (tmp_path / "numbers.json").exists()
        return 1

    monkeypatch.setattr(bench, "_plot", draw)
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    options = ["--quick", "--threads", "1", "--repeats", "1", "--out", str(tmp_path / "numbers.json")]
    args = parser.parse_args(["bench", "column_mask", *options, "--plot", str(tmp_path / "cost.png")])
    assert args.run(args) == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--plot", "folder.png", "--plot: expected a file .png"),
        ("--plot", "cost.txt", "--plot: expected a file .png"),
        ("--instruction-set", "quantum", "--instruction-set: expected one of portable"),
    ],
)
def test_bad_options_are_refused(option, value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert run("gram", option, value) == 2
    assert message in capsys.readouterr().err
