"""Grams of several tasks as one: each task counts alike, in memory, in a file, and from the command line."""

from __future__ import annotations

import shutil

import pytest
import torch
from compromise_oracle import activations, gram

import hpa_ext
from hpa_ext import CompromiseConfig, Gram, GramDiagonal, GramFile, NumericalError, save_grams
from hpa_ext.cli.main import main
from hpa_ext.compromise import add_task_, sum_gram_files, sum_of_tasks
from hpa_ext.compromise.gram_sources import GramSources
from hpa_ext.gram import GramCollection

WIDTH = 14


def task(seed, count=20, *, shared=True, width=WIDTH):
    """Q and k with one input, down with another."""
    one, two = gram(activations(count, width, seed)), gram(activations(count, 2 * width, seed + 50))
    return GramCollection(q=one, k=one if shared else gram(activations(count, width, seed + 9)), down=two)


def expected(name, *tasks):
    return sum(one[name].matrix().double() for one in tasks)


def test_each_task_counts_alike_whatever_its_tokens():
    tasks = [task(1, 200), task(2, 7), task(3, 30)]
    total = sum_of_tasks([one["q"] for one in tasks])
    assert total.token_count == 237
    torch.testing.assert_close(total.matrix().double(), expected("q", *tasks), rtol=1e-6, atol=1e-6)
    merged = Gram(WIDTH)
    for one in tasks:
        merged.merge_(one["q"])
    assert (merged.matrix() - total.matrix()).norm() > 0.1 * total.matrix().norm(), "tokens do not count alike here"


def test_a_sum_can_be_added_to_and_shares_what_all_share():
    tasks = [task(1, 200), task(2, 7), task(3, shared=False)]
    kept = {id(one["q"]): one["q"].matrix() for one in tasks}
    earlier = GramCollection()
    for number, one in enumerate(tasks):
        assert add_task_(earlier, one) is earlier
        assert (earlier["q"] is earlier["k"]) == (number < 2)
        for name in ("q", "k", "down"):
            torch.testing.assert_close(
                earlier[name].matrix().double(), expected(name, *tasks[: number + 1]), rtol=2e-6, atol=1e-6
            )
    assert all(torch.equal(kept[id(one["q"])], one["q"].matrix()) for one in tasks), "the tasks' own are left alone"


@pytest.mark.parametrize("settings", [{"strength": 0.5}, {"budget": 0.2}])
def test_one_sum_protects_as_its_tasks_do(settings):
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(6, WIDTH, generator=generator)
    new = old + 0.1 * torch.randn(6, WIDTH, generator=generator)
    pair = gram(activations(9, WIDTH, 21)), gram(activations(60, WIDTH, 22))
    tasks = [gram(activations(count, WIDTH, seed)) for seed, count in ((1, 200), (2, 9), (3, 40))]
    config = CompromiseConfig(**settings, earlier_strength=0.3)
    apart, one = (
        hpa_ext.harmonize(old, new, pair, config=config, earlier=grams, return_report=True)
        for grams in (tasks, [sum_of_tasks(tasks)])
    )
    assert (apart[0] - one[0]).norm() < 1e-5 * (new - old).norm()
    assert one[1].earlier_left == pytest.approx(apart[1].earlier_left, rel=1e-4)


def test_files(tmp_path, capsys):
    tasks = [task(1, 200), task(2, 7), task(3, 30)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for one, path in zip(tasks, paths, strict=True):
        save_grams(one, path, {"task": path.stem})
    words = ["grams", "sum", *map(str, paths[:2]), "--out", str(tmp_path / "two.safetensors")]
    assert main(words) == 0
    assert "3 modules, 2 Grams" in capsys.readouterr().out
    assert main(words) == 2 and "expected a new file" in capsys.readouterr().err
    with sum_gram_files([tmp_path / "two.safetensors", paths[2]], tmp_path / "three.safetensors") as written:
        assert written["q"] is written["k"] and written.token_count("q") == 237
        for name in ("q", "down"):
            torch.testing.assert_close(written[name].matrix().double(), expected(name, *tasks), rtol=2e-6, atol=1e-6)
        origin = written.provenance["sum_of_tasks"]
        assert [one["file"] for one in origin] == ["two.safetensors", "2.safetensors"]
        assert [one["provenance"]["task"] for one in origin[0]["provenance"]["sum_of_tasks"]] == ["0", "1"]
        assert not list(written.problems())
    assert add_task_(GramCollection(), GramFile(tmp_path / "two.safetensors"))["k"].token_count == 207


def test_what_does_not_fit(tmp_path):
    good = task(1)
    for bad, error, message in (
        (GramCollection(q=good["q"]), ValueError, "down: no Gram in task"),
        (task(2) | {"more": good["q"]}, ValueError, "more: no Gram in earlier"),
        (task(2, width=8), ValueError, r"q: expected a Gram of 14 features in task, got 8"),
        (GramCollection({**task(2), "q": Gram(WIDTH)}), ValueError, "q: its Gram in task has counted no tokens"),
        (GramCollection({**task(2), "q": good["q"].matrix()}), TypeError, "q: expected a Gram in task, got a matrix"),
        (GramCollection({**task(2), "down": Gram(28)}), ValueError, "down: its Gram in task has counted no tokens"),
    ):
        earlier = GramCollection(good)
        with pytest.raises(error, match=message):
            add_task_(earlier, bad)
        assert all(earlier[name] is good[name] for name in good), "nothing was added before it was refused"
    for bad, error, message in (
        (GramCollection(q=Gram(WIDTH)), ValueError, "q: its Gram in task has counted no tokens"),
        ({"q": GramDiagonal.of(good["q"])}, TypeError, "q: task: a GramDiagonal holds the diagonal"),
    ):
        with pytest.raises(error, match=message):
            add_task_(GramCollection(), bad)
    with pytest.raises(ValueError, match=r"grams\[1\]: expected 14 features on cpu like the first one, got 8"):
        sum_of_tasks([good["q"], task(2, width=8)["q"]])
    with pytest.raises(TypeError, match="earlier: expected a GramCollection, got dict"):
        add_task_({}, good)
    with pytest.raises(ValueError, match="grams: expected at least one"):
        sum_of_tasks([])
    spoilt = task(2)
    spoilt["down"].state_dict()["sum"][0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"down: .*NaN"):
        add_task_(GramCollection(good), spoilt)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_grams(good, paths[0])
    save_grams(good, paths[1], reduce="diagonal")
    for files, error, message in (
        (paths[:1], ValueError, "files: expected at least two"),
        (str(paths[0]), ValueError, "files: expected at least two"),
        (paths, TypeError, "b.safetensors: holds diagonals"),
    ):
        with pytest.raises(error, match=message):
            sum_gram_files(files, tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_task_does_not_count_twice(tmp_path):
    """Named twice, copied, or within a sum."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        save_grams(task(number + 1), path)
    shutil.copy(paths[0], tmp_path / "copy.safetensors")
    sum_gram_files(paths[:2], tmp_path / "sum.safetensors").close()
    sum_gram_files([tmp_path / "sum.safetensors", paths[2]], tmp_path / "all.safetensors").close()
    for files in (
        [paths[0], paths[0]],
        [paths[0], tmp_path / "copy.safetensors"],
        [tmp_path / "sum.safetensors", paths[1]],
        [paths[0], tmp_path / "all.safetensors"],
    ):
        message = f"{files[1].name}: holds a task that is in .*{files[0].name} already, and would count twice"
        with pytest.raises(ValueError, match=message):
            sum_gram_files(files, tmp_path / "out.safetensors")
        with pytest.raises(ValueError, match=message):
            GramSources.open(paths[2], paths[2], files)
        assert not (tmp_path / "out.safetensors").exists()
