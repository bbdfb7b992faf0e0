"""Write the README's performance table from the newest results file of a device: ``python benchmarks/readme_table.py``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

_LABELS = {
    "gram_vs_cast_matmul": "`gram` against casting to fp32, full matmul",
    "inverse_diagonal_vs_chain": "`inverse_diagonal` against cholesky → cholesky_inverse → cholesky",
    "column_scores_vs_eager": "`column_scores` against eager torch",
    "column_mask_vs_topk": "`column_mask` against topk",
    "project_merge_vs_eager": "`project_merge` into a new tensor against eager torch",
    "routed_lora_vs_loop": "`routed_lora` against a loop over experts",
    "harmonize_vs_eager": "`harmonize` as a whole against eager torch",
}


def table(document: dict[str, Any]) -> str:
    """The table in Markdown, with the conditions it was measured under."""
    ceilings = document["ceilings"]
    lines = [
        f"{document['device']}, {document['threads']} threads, `{document['instruction_set']}`, torch {document['torch']}, "
        f"{document['date'][:10]}; the machine itself copies {ceilings['copy_gb_s']:.0f} GB/s (read + written) and does "
        f"{ceilings['bfloat16_tflop_s']:.2f} TFLOP/s in a bf16 GEMM.",
        "",
        "| | shape | dtype | ours, ms | peer, ms | ratio | error against fp64 (peer's) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if row["metric"] not in _LABELS:
            continue
        shape = " × ".join(map(str, row["shape"]))
        peer_error = "" if row.get("peer_error") is None else f" ({row['peer_error']:.0e})"
        lines.append(
            f"| {_LABELS[row['metric']]} | {row['dimensions']}: {shape} | {row['dtype']} | {row['ours_ms']:.3g} | {row['peer_ms']:.3g} | "
            f"**{row['ratio']:.1f}** | {row['error']:.0e}{peer_error} |"
        )
    return "\n".join(lines)


def newest() -> Path:
    """The results file written last, by the date inside it."""
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    if not files:
        raise FileNotFoundError("benchmarks/results/ holds no results file; run `hpa-ext bench` first")
    return max(files, key=lambda path: json.loads(path.read_text(encoding="utf-8"))["date"])


def updated(readme: str, document: dict[str, Any]) -> str:
    """The README with the table between its two marks replaced."""
    pattern = re.compile(re.escape(BEGIN) + r".*?" + re.escape(END), flags=re.S)
    if not pattern.search(readme):
        raise ValueError(f"README.md: expected the marks {BEGIN} and {END}")
    return pattern.sub(lambda match: f"{BEGIN}\n{table(document)}\n{END}", readme)


def main() -> int:
    """Rewrite the README."""
    readme, results = ROOT / "README.md", newest()
    document = json.loads(results.read_text(encoding="utf-8"))
    readme.write_text(updated(readme.read_text(encoding="utf-8"), document), encoding="utf-8")
    print(f"README.md: table from {results.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
