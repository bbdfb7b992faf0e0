"""The settings of the compromise as flags."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from hpa_ext.cli.settings import SettingsParser

if TYPE_CHECKING:
    from hpa_ext.compromise.config import CompromiseConfig

_HELP = {
    "strength": "mu, what a change on the safety set costs against one on the task set; instead of a budget",
    "budget": "share of what tuning changed on the safety set that may be left, for each linear",
    "damping": "added to each Gram, relative to the mean of its diagonal",
    "safety_damping": "the same for the Grams of the safety set and of earlier tasks, where it shall be another",
    "earlier_strength": "nu, what a change on an earlier task's samples costs against one on the task set",
    "tolerance": "how far below its budget a linear may end, as a share of the budget",
    "rescue": "what may be done when the Grams do not factor: damping, precision or none",
}

COMPROMISE_SETTINGS = tuple(_HELP)
"""Names of the settings."""


def add_compromise_settings(settings: SettingsParser, without: tuple[str, ...] = ()) -> None:
    """A flag for each field of CompromiseConfig but those in `without`, which another method's flags have."""
    from hpa_ext.compromise.config import DEFAULT_BUDGET, CompromiseConfig

    for field in dataclasses.fields(CompromiseConfig):
        if field.name in without:
            continue
        text = f"compromise: {_HELP[field.name]}"
        if field.name == "budget":
            text += f" (default: {DEFAULT_BUDGET}, without --strength)"
        kind = str if isinstance(field.default, str) else float
        flag = "--" + field.name.replace("_", "-")
        settings.add(flag, default=field.default, help=text, type=kind, metavar="NAME" if kind is str else "X")


def compromise_config(given: argparse.Namespace) -> CompromiseConfig:
    """The CompromiseConfig of resolved settings; raises what CompromiseConfig raises."""
    from hpa_ext.compromise.config import CompromiseConfig

    return CompromiseConfig(
        **{field.name: getattr(given, field.name) for field in dataclasses.fields(CompromiseConfig)}
    )
