"""CKA between the experts of ``hide_tasks.py``, layer by layer: on the same samples, and on each task's own.

python benchmarks/hide_layers.py WORK [--seeds 0,1,2] [--samples 50] [--pictures DIRECTORY]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from hide_tasks import TASKS, hide_model

from hpa_ext.data.collate import collate_prompts
from hpa_ext.data.toy_tasks import draw_task
from hpa_ext.hide import expert_cka
from hpa_ext.reporting.cka import plot_cka_curve, plot_cka_heat_maps

_SAMPLE_SEED = 200  # of no training set
_BATCH = 50


def main() -> int:
    """Print the curves and what they suggest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory of hide_tasks.py")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=50, help="of each task (default: 50)")
    parser.add_argument("--pictures", type=Path, help="directory for pictures of the first seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    drawn = {task: draw_task(task, 6 * arguments.samples, _SAMPLE_SEED) for task in TASKS}
    together = [sample for task in TASKS for sample in drawn[task][: arguments.samples]]
    for number, seed in enumerate(map(int, arguments.seeds.split(","))):
        model, processor = hide_model(arguments.work, seed, TASKS)

        def batches(samples: list, processor=processor) -> list:
            return [
                collate_prompts(processor, samples[start : start + _BATCH], padding_side="right")
                for start in range(0, len(samples), _BATCH)
            ]

        own = {task: batches(samples) for task, samples in drawn.items()}
        for name, data in (("same samples", batches(together)), ("own samples", own)):
            for pool in ("mean", "last"):
                found = expert_cka(model, data, pool=pool, progress=False)
                curve = ", ".join(f"{value:.3f}" for value in found.curve().tolist())
                suggestion = found.suggest_top_layers()
                print(f"seed {seed}, {name}, {pool} (n = {found.samples}): {curve}; {suggestion.count}", flush=True)
                if number == 0 and arguments.pictures is not None and name == "same samples":
                    arguments.pictures.mkdir(parents=True, exist_ok=True)
                    title = f"Linear CKA between experts, {pool} token state (n = {found.samples})"
                    plot_cka_curve(found, arguments.pictures / f"cka-curve-{pool}.png", title)
                    plot_cka_heat_maps(found, arguments.pictures / f"cka-heat-maps-{pool}.png", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
