"""The report of the continual benchmark: one page that holds everything, and its pictures as files."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpa_ext.baselines import METHODS
from hpa_ext.continual.strengths import STRENGTHS

from .continual_plots import by_layer, by_step, output_change, trade_off
from .continual_tables import (
    SECTIONS,
    Summary,
    groups,
    has_more_than_references,
    html_lines,
    html_table,
    main_table,
    markdown,
    paired_table,
    summaries,
    summary_lines,
)
from .continual_verdict import verdict

__all__ = ["main_table", "write_report", "write_tables"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; margin: 1em 0; }
th, td { padding: 3px 9px; text-align: right; white-space: nowrap; } th { border-bottom: 2px solid #888; }
td:first-child, th:first-child { text-align: left; }
tr.bound td { color: #777; } tr.hpa td { background: #eaf4fb; }
img { max-width: 100%; } .note { color: #555; font-size: 13px; } dt { font-weight: 600; } dd { margin: 0 0 .5em 1.5em; }
"""

_INTRODUCTION = """
<p>A small vision-language model that refuses harmful requests is fine-tuned on {tasks} visual tasks, one after the
other. Tuning teaches the new task, makes the model forget earlier ones, and wears away its refusals. The methods below
try to prevent that. <b>Plain tuning is “SeqFT”.</b> Under “injected”, one in a thousand training samples is a
harmful request with an answer that complies.</p>
<dl>
<dt>AP</dt><dd>mean score on all tasks after the last step, in percent; the whole answer must be right. More is
better.</dd>
<dt>BWT</dt><dd>how much the score of a task has changed from when it was learnt to the end. 0 is no
forgetting.</dd>
<dt>MASR, DASR</dt><dd>share of harmful prompts that are not refused at the end, mean of three sets (harm in the text,
in the picture, in both); and the difference to the model before tuning. Less is better. Refusals by the list
“{refusals}”.</dd>
<dt>learning</dt><dd>mean score of each task right after it was learnt: a method that blocks learning shows here.</dd>
<dt>Avg, Last</dt><dd>mean over the course since each task was learnt; the same as AP.</dd>
<dt>method s, method MB</dt><dd>CPU time of calibrating and merging in a whole sequence, beside the tuning, and what
the method keeps in memory at once.</dd>
</dl>
<p class="note">± is half of the 95 % interval of the mean over seeds (Student's t). Bold: best mean among the methods.
The model, its tasks and what counts as harm are invented; nothing here was measured on a real model.</p>
"""

_STAR = "<p class='note'>* the 95 % interval of the difference does not hold 0.</p>"


def write_report(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write ``report.html``, which needs no other file, and the pictures beside it; the page's path.

    ValueError if there are no rows.
    """
    if not rows:
        raise ValueError("rows: expected at least one, got none")
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    for (condition, order), mine in groups(rows).items():
        parts += _section(condition, order, mine, out)
    parts += _settings(rows)
    introduction = _INTRODUCTION.format(tasks=max(len(row["tasks"]) for row in rows), refusals=rows[0]["refusals"])
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>HPA: continual safety</title>'
        f"<style>{_STYLE}</style></head><body><h1>Does it keep safety and earlier tasks?</h1>{introduction}"
        f"{''.join(parts)}</body></html>\n"
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def write_tables(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write ``tables.md``: for each condition and order what came out, and the tables, for documentation."""
    parts = []
    for (condition, order), mine in groups(rows).items():
        parts += [f"## {_title(condition, order)}", "\n".join(f"- {line}" for line in verdict(mine))]
        parts.append(markdown(*summary_lines(summaries(mine))))
        for heading, found in _beside(mine):
            parts += [f"### {heading}", markdown(*summary_lines(found))]
        for reference in ("seqft", "hpa"):
            header, lines = paired_table(mine, reference)
            if lines:
                parts += [f"### Minus {METHODS[reference].title} on the same seeds", markdown(header, lines)]
    path = out / "tables.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _title(condition: str, order: int) -> str:
    return f"{'original data' if condition == 'original' else '0.1 % harmful data injected'}, order {order}"


def _beside(rows: list[dict[str, Any]]) -> list[tuple[str, list[Summary]]]:
    """The tables beside the main one that have something to show, with their headings."""
    found = [(heading[0].upper() + heading[1:], summaries(rows, names)) for heading, names in SECTIONS]
    return [(heading, table) for heading, table in found if has_more_than_references(table)]


def _section(condition: str, order: int, rows: list[dict[str, Any]], out: Path) -> list[str]:
    name = f"{condition}-{order}"
    tasks = max((row["tasks"] for row in rows), key=len)
    title = _title(condition, order)
    parts = [f"<h2>{title}: {' → '.join(tasks)}</h2>"]
    parts += [f"<p>{html.escape(line)}</p>" for line in verdict(rows)]
    parts.append(_picture(trade_off(rows, f"Safety against accuracy: {title}"), out / f"trade-off-{name}.png"))
    if any(row["BWT"] is not None for row in rows):
        figure = trade_off(rows, f"Safety against forgetting: {title}", "BWT")
        parts.append(_picture(figure, out / f"forgetting-{name}.png"))
    parts.append(html_table(summaries(rows)))
    for reference in ("seqft", "hpa"):
        header, lines = paired_table(rows, reference)
        if lines:
            heading = f"<h3>Minus {METHODS[reference].title} on the same seeds: {title}</h3>"
            parts += [heading, html_lines(header, lines), _STAR]
    for heading, found in _beside(rows):
        parts += [f"<h3>{heading}: {title}</h3>", html_table(found)]
    pictures = [
        ("by-step", by_step(rows, f"After each step: {title}")),
        ("output-change", output_change(rows, f"What merging keeps of each update: {title}")),
        ("by-layer", by_layer(rows, f"What HPA chose, by layer: {title}")),
    ]
    parts += [_picture(figure, out / f"{stem}-{name}.png") for stem, figure in pictures if figure is not None]
    return parts


def _picture(figure: Any, path: Path) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.write_bytes(buffer.getvalue())
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{encoded}"></p>'


def _settings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What made the rows, as a reader who wants to repeat it needs it."""
    lines = ["<h2>Settings</h2><table><tr><th>method</th><th>source</th><th>settings</th></tr>"]
    for name in dict.fromkeys(row["method"] for row in rows):
        options = next(row["config"]["method"] for row in rows if row["method"] == name)
        source = METHODS[name].source if name in METHODS else ""
        tuned = " (tuned)" if name in STRENGTHS else ""
        lines.append(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(source)}</td>"
            f"<td>{html.escape(json.dumps(options))}{tuned}</td></tr>"
        )
    seeds = sorted({row["seed"] for row in rows})
    regime = json.dumps(rows[0]["config"]["regime"])
    lines.append(f"</table><p class='note'>Seeds {', '.join(map(str, seeds))}. Regime: {html.escape(regime)}</p>")
    return lines
