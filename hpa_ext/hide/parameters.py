"""How many parameters experts cost, counted as the paper's table 3 counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpa_ext.hide.assembly import Assignment
from hpa_ext.hide.experts import Expert

# [out, in] of the linears of one decoder layer of LLaVA-1.5-7B (Llama-2-7B).
LLAVA_7B_LAYER = (*((4096, 4096),) * 4, (11008, 4096), (11008, 4096), (4096, 11008))
LLAVA_7B_LAYERS = 32

# Table 3 of the paper, in millions.
PAPER_MILLIONS = {
    "HiDe": 44.27,
    "merge all": 38.27,
    "merge 1-31": 44.27,
    "expand all": 229.62,
    "expand 1-31": 222.42,
}


@dataclass(frozen=True)
class TableRow:
    """One row of table 3: experts kept (one per layer where they are fused), and parameters in millions."""

    name: str
    experts: int
    millions: float
    paper_millions: float


def expert_parameters(experts: Sequence[Expert], assignments: Mapping[str, Assignment]) -> dict[str, int]:
    """Numbers that the experts add to the base.

    "routed": all experts of the layers that route. "fused": in the other layers the largest expert of each, as the
    paper counts (what is merged into the weights costs nothing, and an exact sum kept beside them has all ranks
    together: "fused_ranks"). "total": routed and fused.
    """
    routed = fused = ranks = 0
    for name, assignment in assignments.items():
        counts = [expert.updates[name].parameter_count for expert in experts if name in expert.updates]
        if assignment.kind == "routed":
            routed += sum(counts)
        else:
            fused += max(counts)
            ranks += sum(counts)
    return {"routed": routed, "fused": fused, "fused_ranks": ranks, "total": routed + fused}


def layer_parameters(rank: int, shapes: Sequence[tuple[int, int]] = LLAVA_7B_LAYER) -> int:
    """Parameters of one expert of `rank` in one decoder layer: ``sum r (out + in)``."""
    return sum(rank * (rows + columns) for rows, columns in shapes)


def table_3(tasks: int = 6, rank: int = 8, layers: int = LLAVA_7B_LAYERS) -> list[TableRow]:
    """The parameter column of table 3 for LLaVA-1.5-7B, beside the paper's.

    The paper's ratios are those of the numbers of experts (37 : 32 : 192 : 186); its 44.27 M for "merge 1-31" is a
    slip, as its own factor of 0.84 says. But an expert of its is 1.196 M, and one of rank 8 has 0.625 M in a layer: the
    absolute numbers do not fit rank 8.
    """
    experts = {
        "HiDe": layers - 1 + tasks,
        "merge all": layers,
        "merge 1-31": layers - 1,
        "expand all": layers * tasks,
        "expand 1-31": (layers - 1) * tasks,
    }
    size = layer_parameters(rank)
    return [TableRow(name, count, count * size / 1e6, PAPER_MILLIONS[name]) for name, count in experts.items()]
