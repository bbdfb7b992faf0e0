"""How time and memory grow with width, layers, tokens and rank: counts of work, and rates measured on the machine.

`work` and `memory` are formulas; `rates` turns counted work into seconds by what short samples took; `samples` and
`disk` take these samples. Nothing here knows a model or a checkpoint.
"""

from __future__ import annotations

from hpa_ext.costs.pipeline import Stage, pipeline_seconds
from hpa_ext.costs.rates import Rates
from hpa_ext.costs.work import Work

__all__ = ["Rates", "Stage", "Work", "pipeline_seconds"]
