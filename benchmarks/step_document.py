"""Write the step's table and picture of docs/performance.md: ``python -m benchmarks.step_document [FILE]``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from hpa_ext.reporting.time_line import steps, time_line

from .step_report import report, title

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance" / "step.png"

_TABLE = re.compile(r"<!-- step from ([\w.-]*) -->.*?<!-- end of step -->", flags=re.S)


def updated(text: str, name: str, document: dict[str, Any]) -> str:
    """The text with the last step of a results file between its two marks."""
    ceilings = document["ceilings"]
    lines = [
        f"<!-- step from {name} -->",
        "```",
        f"{title(document)}, torch {document['torch']}, {document['date'][:10]}",
        f"copy {ceilings['copy_gb_s']:.3g} GB/s (read + written), read {ceilings['read_gb_s']:.3g} GB/s, "
        f"GEMM float32 {ceilings['float32_tflop_s']:.3g}, bfloat16 {ceilings['bfloat16_tflop_s']:.3g} TFLOP/s",
        report(steps(document["rows"])[-1]),
        "```",
        "<!-- end of step -->",
    ]
    return _TABLE.sub(lambda match: "\n".join(lines), text)


def source(text: str) -> Path:
    """The results file that the document names.

    Raises:
        ValueError: the marks are missing.
    """
    found = _TABLE.search(text)
    if not found:
        raise ValueError(f"{DOCUMENT.name}: expected the marks <!-- step from FILE --> and <!-- end of step -->")
    return RESULTS / found.group(1)


def main(arguments: list[str]) -> int:
    """Rewrite both, from the file of benchmarks/results/ that is named, or from the one that the document names."""
    text = DOCUMENT.read_text(encoding="utf-8")
    path = RESULTS / Path(arguments[0]).name if arguments else source(text)
    document = json.loads(path.read_text(encoding="utf-8"))
    DOCUMENT.write_text(updated(text, path.name, document), encoding="utf-8")
    PICTURE.parent.mkdir(exist_ok=True)
    time_line(document["rows"], title(document)).savefig(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
