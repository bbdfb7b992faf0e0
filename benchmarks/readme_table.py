"""Write the README's performance table from a results file: ``python benchmarks/readme_table.py [FILE]``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# The first mark names the file, so that a newer measurement of somebody's own does not make the README wrong.
_TABLE = re.compile(r"<!-- benchmarks from ([\w.-]*) -->.*?<!-- end of benchmarks -->", flags=re.S)

_LABELS = {
    "gram_vs_cast_matmul": "`gram` against casting to fp32, full matmul",
    "inverse_diagonal_vs_chain": "`inverse_diagonal` against cholesky → cholesky_inverse → cholesky",
    "column_scores_vs_copy_bandwidth": "`column_scores` against copying as many bytes",
    "column_scores_vs_eager": "`column_scores` against eager torch",
    "column_scores_list_vs_copy_bandwidth": "`column_scores_list`, of a decoder layer, against copying as many bytes",
    "column_scores_list_vs_eager": "`column_scores_list` against eager torch",
    "column_mask_vs_topk": "`column_mask` against topk",
    "project_merge_vs_copy_bandwidth": "`project_merge` into a given tensor against copying as many bytes",
    "project_merge_vs_eager": "`project_merge` into a new tensor against eager torch",
    "project_merge_list_vs_copy_bandwidth": "`project_merge_list` in place against copying as many bytes",
    "project_merge_list_vs_eager": "`project_merge_list` into new tensors against eager torch",
    "low_rank_vs_full_weights": "`low_rank_scores`, `low_rank_merge` against forming the new weight first",
    "low_rank_vs_formed_weights": "the same where the new weight is there already",
    "routed_lora_vs_loop": "`routed_lora` against a loop over experts",
    "routed_lora_list_vs_loop": "`routed_lora_list`, q/k/v or gate/up, against loops over experts",
    "routed_lora_list_vs_loop_with_gradients": "the same with gradients",
    "harmonize_vs_eager": "`harmonize` as a whole against eager torch",
    "step_vs_torch_fp32": "the step as a whole against eager torch in fp32",
    "step_vs_torch_tf32": "the step as a whole against eager torch with TF32",
}


def table(document: dict[str, Any]) -> str:
    """The table in Markdown, with the conditions it was measured under."""
    ceilings = document["ceilings"]
    copy, gemm = _copy_rates(document), ceilings["bfloat16_tflop_s"]
    lines = [
        f"{document['device']}, {document['threads']} threads, `{document['instruction_set']}`, "
        f"torch {document['torch']}, {document['date'][:10]}; "
        f"the machine itself copies {copy} GB/s (read + written) and does {gemm:.2f} TFLOP/s in a bf16 GEMM.",
        "",
        "| | shape | dtype | ours, ms | peer, ms | ratio | error against fp64 (peer's) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if row["metric"] not in _LABELS:
            continue
        shape = " × ".join(map(str, row["shape"]))
        peer_error = "" if row.get("peer_error") is None else f" ({row['peer_error']:.0e})"
        cells = (
            _LABELS[row["metric"]],
            f"{row['dimensions']}: {shape}",
            row["dtype"],
            _milliseconds(row["ours_ms"]),
            _milliseconds(row["peer_ms"]),
            f"**{row['ratio']:.1f}**",
            f"{row['error']:.0e}{peer_error}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _copy_rates(document: dict[str, Any]) -> str:
    """What copying reached before the rows and beside them: a shared machine is not equally fast at all times."""
    rates = [document["ceilings"]["copy_gb_s"]]
    for row in document["rows"]:
        if row["metric"].endswith("_vs_copy_bandwidth"):
            rates.append(row["counted"] / row["peer_ms"] / 1e6)
    low, high = f"{min(rates):.0f}", f"{max(rates):.0f}"
    return low if low == high else f"{low} to {high}"


def _milliseconds(value: float) -> str:
    """Three significant digits, and all of them above a hundred."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def source(readme: str) -> Path:
    """The results file that the README names."""
    found = _TABLE.search(readme)
    if not found:
        raise ValueError("README.md: expected the marks <!-- benchmarks from FILE --> and <!-- end of benchmarks -->")
    return RESULTS / found.group(1)


def updated(readme: str, name: str, document: dict[str, Any]) -> str:
    """The README with the table between its two marks replaced."""
    return _TABLE.sub(
        lambda match: f"<!-- benchmarks from {name} -->\n{table(document)}\n<!-- end of benchmarks -->", readme
    )


def main(arguments: list[str]) -> int:
    """Rewrite the README, from the file given or from the one that it names."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    path = RESULTS / Path(arguments[0]).name if arguments else source(text)
    readme.write_text(updated(text, path.name, json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"README.md: table from {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
