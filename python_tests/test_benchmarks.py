"""The benchmarks run, check what they time, and write what the contract says."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time

import pytest
import torch

from hpa_ext import ops
from hpa_ext.cli import bench

benchmarks = bench.load_benchmarks()
results, timing = (importlib.import_module(f"hpa_ext.benchmarks.{name}") for name in ("results", "timing"))

METRICS = {
    "gram_vs_cast_matmul",
    "inverse_diagonal_vs_chain",
    "inverse_diagonal_of_rows_vs_sum",
    "column_scores_vs_copy_bandwidth",
    "column_scores_vs_eager",
    "column_scores_list_vs_copy_bandwidth",
    "column_scores_list_vs_single",
    "column_scores_list_vs_eager",
    "column_mask_vs_topk",
    "project_merge_vs_copy_bandwidth",
    "project_merge_vs_eager",
    "project_merge_list_vs_copy_bandwidth",
    "project_merge_list_vs_single",
    "project_merge_list_vs_eager",
    "routed_lora_vs_loop",
    "routed_lora_list_vs_loop",
    "routed_lora_list_vs_single",
    "routed_lora_list_vs_loop_with_gradients",
    "low_rank_vs_full_weights",
    "low_rank_vs_formed_weights",
    "low_rank_vs_blocks",
    "harmonize_vs_eager",
    "step_vs_torch_fp32",
    "cholesky_vs_torch",
    "compromise_vs_eager",
    "hide_layer_vs_loop",
    "hide_layer_vs_authors",
    "hide_layer_vs_base",
    "hide_fused_vs_authors",
    "hide_prefill",
    "hide_decode",
}


def run(*arguments: object) -> int:
    """``hpa-ext bench`` in this process, on one thread."""
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["bench", "--threads", "1", *map(str, arguments)])
    return args.run(args)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    path = tmp_path_factory.mktemp("bench") / "new" / "results.json"
    assert run("--quick", "--repeats", 2, "--out", path) == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]
    return json.loads(path.read_text())


def test_file_has_what_the_contract_names(document):
    assert {"device", "driver", "torch", "cuda", "commit", "threads", "instruction_set", "rows"} <= document.keys()
    assert document["torch"] == torch.__version__
    assert document["threads"] == 1
    assert document["quick"] is True
    assert document["device"] and document["commit"]
    assert all(rate > 0 for rate in document["ceilings"].values())


def test_every_metric_has_a_row(document):
    assert {row["metric"] for row in document["rows"]} == METRICS
    for row in document["rows"]:
        assert {"metric", "shape", "dtype", "ours_ms", "peer", "peer_ms", "ratio"} <= row.keys()
        assert len(row["shape"]) == len(row["dimensions"].split(", "))
        assert row["ours_ms"] > 0 and row["peer_ms"] > 0 and row["repeats"] == 2


def test_ratio_is_peer_over_ours(document):
    for row in document["rows"]:
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"], rel=1e-12), row["metric"]
        assert row["ratio_quartiles"][0] <= row["ratio_quartiles"][1]


def test_results_and_peers_are_right(document):
    for row in document["rows"]:
        assert row["correct"] is True, row["metric"]
        assert row["error"] <= row["error_limit"], row["metric"]
        # The authors' HiDe computes something else: cross terms, one routing weight for the whole batch.
        if row["peer_error"] is not None and not row["metric"].endswith("_vs_authors"):
            assert row["peer_error"] <= max(10 * row["error_limit"], 1e-6), row["metric"]


def test_rates_count_the_least_work(document):
    row = next(row for row in document["rows"] if row["metric"] == "project_merge_vs_eager")
    height, width = row["shape"]
    assert row["counted"] == 3 * height * width * 2 and row["counted_unit"] == "B"
    assert row["rate"] == pytest.approx(row["counted"] / row["ours_ms"] / 1e6)
    assert row["share_of_ceiling"] == pytest.approx(row["rate"] / document["ceilings"]["copy_gb_s"])


def test_names_agree():
    assert set(bench.NAMES) == set(benchmarks.BENCHMARKS)


@pytest.mark.parametrize("spoil", [lambda sums: sums * 1.01, lambda sums: sums * torch.nan])
def test_a_wrong_result_fails_the_run(monkeypatch, tmp_path, capsys, spoil):
    true = ops.column_scores

    def wrong(old, new):
        squared_update, inner_product, old_squared_norm = true(old, new)
        return spoil(squared_update), inner_product, old_squared_norm

    monkeypatch.setattr(ops, "column_scores", wrong)
    out = tmp_path / "results.json"
    assert run("column_scores", "--quick", "--repeats", 1, "--out", out) == 1
    printed = capsys.readouterr()
    assert printed.out.count("WRONG") == 2 and "WRONG" in printed.err
    assert not out.exists()


def test_a_changed_retained_column_is_wrong(monkeypatch):
    true = ops.project_merge

    def wrong(old, new, mask, coefficient, out=None):
        merged = true(old, new, mask, coefficient, out)
        column = int(mask.nonzero()[0])
        merged[:1, column] = torch.nextafter(merged[:1, column], merged.new_full((1,), torch.inf))
        return merged

    monkeypatch.setattr(ops, "project_merge", wrong)
    assert run("project_merge", "--quick", "--repeats", 1, "--no-save") == 1


def test_unknown_operation_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("gram", "gramm", "--quick") == 2
    printed = capsys.readouterr()
    assert "'gramm'" in printed.err and "inverse_diagonal" in printed.err and printed.out == ""
    with pytest.raises(ValueError, match="'gramm'"):
        benchmarks.run(["gramm"], benchmarks.Setting(torch.device("cpu"), quick=True))


@pytest.mark.parametrize(
    "arguments", [("--repeats", "0"), ("--repeats", "x"), ("--quick", "--full"), ("--out", "x.json", "--no-save")]
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run("gram", *arguments)
    assert stop.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_device_is_refused(capsys):
    assert run("gram", "--device", "cuda") == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert run("gram", "--native-cuda") == 2


def test_quick_numbers_are_not_saved_unasked(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "source_root", lambda: None)
    threads = torch.get_num_threads()
    assert run("column_mask", "--quick", "--repeats", 1) == 0
    printed = capsys.readouterr()
    assert list(tmp_path.iterdir()) == []
    assert "column_mask_vs_topk" in printed.out and printed.err == ""
    assert torch.get_num_threads() == threads


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "source_root", lambda: None)
    document = {"device": "NVIDIA H100 80GB/HBM3 (x)", "rows": []}
    first, second = results.save(document), results.save(document)
    assert first.parent == tmp_path / "hpa-ext-benchmarks"
    assert first.name.startswith("nvidia-h100-80gb-hbm3-x-20") and first.suffix == ".json"
    assert second != first and second.stem == f"{first.stem}-2"
    monkeypatch.setattr(results, "source_root", lambda: tmp_path)
    assert results.default_path("x").parent == tmp_path / "benchmarks" / "results"
    assert results.sanitised("../..") == "unknown"


def test_a_failed_save_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "results.json"
    results.save({"device": "x"}, path)
    with pytest.raises(TypeError):
        results.save({"device": object()}, path)
    assert json.loads(path.read_text()) == {"device": "x"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_pairs_take_turns_on_rotating_buffers():
    calls: list[tuple[str, int]] = []

    def side(name: str):
        def call(index: int) -> None:
            calls.append((name, index))
            spin(3e-4)

        return call

    paired = timing.measure_pair(side("ours"), side("peer"), torch.device("cpu"), repeats=4)
    timed = calls[6:]  # after three calls of each to warm up
    assert [name for name, _ in timed] == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]
    assert [index for _, index in calls] == list(range(len(calls)))
    assert paired.repeats == 4 and paired.ratio == paired.peer_ms / paired.ours_ms
    assert paired.ours_ms >= 0.3
    doubled = paired.with_peer_scaled(2.0)
    assert doubled.ratio == pytest.approx(2 * paired.ratio)
    assert doubled.ratio_quartiles == pytest.approx([2 * value for value in paired.ratio_quartiles])


def spin(seconds: float) -> None:
    """Spin, because sleeping is only as fine as the scheduler."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_enough_buffers_to_leave_the_cache():
    device = torch.device("cpu")
    cache = timing.cache_bytes(device)
    assert cache >= 1 << 18
    assert timing.buffer_sets(10 * cache, device) == 2
    assert timing.buffer_sets(cache, device) * cache > 2 * cache
    assert timing.buffer_sets(1, device) == 8
    assert timing.quartiles([3.0]) == (3.0, 3.0)
    assert math.isclose(timing.quartiles([1.0, 2.0, 3.0])[0], 1.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_quick(tmp_path):
    out = tmp_path / "cuda.json"
    assert run("--quick", "--repeats", 2, "--device", "cuda", "--out", out) == 0
    document = json.loads(out.read_text())
    assert document["driver"] and document["cuda"]
    assert {row["metric"] for row in document["rows"]} >= METRICS


def test_a_target_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").touch()
    for target in (tmp_path, tmp_path / "file" / "results.json"):
        assert run("column_mask", "--out", target) == 2
        assert "--out: expected a file that can be written" in capsys.readouterr().err


def test_accuracy_table_is_as_good_as_torch():
    accuracy = importlib.import_module(f"{benchmarks.__name__}.accuracy")
    rows = list(accuracy.errors())
    assert len(rows) == 3 * 6 + 2
    for operation, dtype, ours, peer in rows:
        # One sum of a million terms may come out well by chance, so beside twice torch's error stand a few roundings.
        assert ours <= 2 * peer + 4e-7, f"{operation} in {dtype}: {ours:.1e} against torch's {peer:.1e}"
    assert all(microseconds > 0 for _, microseconds in accuracy.overheads())
