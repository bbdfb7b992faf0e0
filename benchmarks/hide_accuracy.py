"""How exact a HiDe model is: layers against a float64 sum over experts, and rows of a mixed batch against rows alone.

    python benchmarks/hide_accuracy.py WORK [--seed 0]

WORK is that of ``hide_tasks.py``, whose experts are used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from hide_tasks import TASKS, load_experts, test_set, train_experts

from hpa_ext.data.collate import collate_prompts
from hpa_ext.hide import HiDeConfig, HiDeModel, own_features
from hpa_ext.hide.layers import RoutedLinear
from hpa_ext.models.embedded import load_embedded


@torch.no_grad()
def layer_errors(model: HiDeModel, base: torch.nn.Module) -> dict[str, float]:
    """Largest error of a fused weight and of a routed output, relative to the largest magnitude of the exact one."""
    experts = model.experts
    errors = {"fused weight": 0.0, "routed output": 0.0}
    weights = torch.softmax(torch.randn(4, len(experts)), 1)
    for name, assignment in model.assignments().items():
        start = base.get_submodule(name).weight
        deltas = [e.updates[name].scaling * e.updates[name].b.double() @ e.updates[name].a.double() for e in experts]
        module = model.model.get_submodule(name)
        if assignment.kind == "fused":
            exact = start.double() + sum(deltas)
            error = (module.weight.double() - exact).abs().max() / exact.abs().max()
            errors["fused weight"] = max(errors["fused weight"], float(error))
            continue
        assert isinstance(module, RoutedLinear)
        x = torch.randn(4, 24, start.shape[1]).to(start.dtype)
        with model.routed(weights):
            output = module(x)
        mixed = start.double() + torch.einsum("bc,coi->boi", weights.double(), torch.stack(deltas))
        exact = torch.einsum("bti,boi->bto", x.double(), mixed)
        error = (output.double() - exact).abs().max() / exact.abs().max()
        errors["routed output"] = max(errors["routed output"], float(error))
    return errors


@torch.no_grad()
def row_differences(model: HiDeModel, processor: object, seed: int, rows: int = 10) -> dict[str, float]:
    """Prompts of all tasks in one batch against each alone: answers that differ, and the largest difference of weights
    and of the last logits, the latter relative to the largest logit.
    """
    samples = [sample for row in range(rows) for task in TASKS for sample in test_set(task, seed)[row : row + 1]]
    batch = collate_prompts(processor, samples)
    dtype = model.dtype
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    options = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    together = model.generate(**batch, **options)
    weights = model.routing(**batch)
    width = batch["input_ids"].shape[1]
    found = {"rows": float(len(samples)), "answers that differ": 0.0, "weights": 0.0, "logits": 0.0}
    for row, sample in enumerate(samples):
        alone = collate_prompts(processor, [sample])
        alone["pixel_values"] = alone["pixel_values"].to(dtype)
        one = model.generate(**alone, **options)
        mine = processor.batch_decode(one.sequences[:, alone["input_ids"].shape[1] :], skip_special_tokens=True)
        theirs = processor.batch_decode(together.sequences[row : row + 1, width:], skip_special_tokens=True)
        found["answers that differ"] += mine != theirs
        found["weights"] = max(found["weights"], float((model.routing(**alone)[0] - weights[row]).abs().max()))
        first, second = one.logits[0][0].float(), together.logits[0][row].float()
        found["logits"] = max(found["logits"], float((first - second).abs().max() / first.abs().max()))
    return found


def main() -> int:
    """Print the figures for float32 and bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="directory of hide_tasks.py")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_experts(arguments.work, arguments.seed, print)
    adapters, anchors = load_experts(arguments.work, arguments.seed, TASKS)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base, processor = load_embedded(dtype)
        untouched, _ = load_embedded(dtype)
        features = own_features(base, processor.tokenizer)
        for name, config in (
            ("HiDe", HiDeConfig()),
            ("expand all, projector routed", HiDeConfig(top_layers=4, projector="routed")),
        ):
            model = HiDeModel(base, adapters, anchors, config, features=features)
            print(
                f"{dtype} {name}: {layer_errors(model, untouched)} {row_differences(model, processor, arguments.seed)}"
            )
            base = model.unload()
            same = all(torch.equal(value, untouched.state_dict()[key]) for key, value in base.state_dict().items())
            print(f"{dtype} {name}: base restored bit for bit: {same}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
