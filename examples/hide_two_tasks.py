"""HiDe from start to end on the embedded model: two experts trained, put together, routed, saved, read back.

    python examples/hide_two_tasks.py [--out DIRECTORY] [--steps 120]

About a minute on two cores.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from pathlib import Path

from hpa_ext.data.collate import collate_prompts, collate_training
from hpa_ext.data.toy_tasks import draw_task
from hpa_ext.evaluation.generate import generate_answers
from hpa_ext.evaluation.metrics import accuracy
from hpa_ext.hide import Anchors, HiDeConfig, HiDeModel, own_features
from hpa_ext.models.embedded import load_embedded
from hpa_ext.training.hide_expert import ExpertSchedule, save_expert, train_expert

TASKS = ("compass", "sentence")


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to keep adapters and model (default: nowhere)")
    parser.add_argument("--steps", type=int, default=120, help="training steps of each expert (default: 120)")
    arguments = parser.parse_args()
    if arguments.out is not None:
        return run(arguments.out, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), arguments.steps)


def run(out: Path, steps: int) -> int:
    """Train, build, show, save, load."""
    # The rates are for a model of 3 M parameters; for LLaVA leave them out.
    schedule = ExpertSchedule(learning_rate=1e-3, projector_learning_rate=1e-4, batch_size=16, max_steps=steps)
    adapters, anchors = {}, Anchors()
    for task in TASKS:
        base, processor = load_embedded()
        features = own_features(base, processor.tokenizer)
        own = Anchors(features.describe())
        collate = functools.partial(collate_training, processor)
        expert = train_expert(base, task, draw_task(task, 1500, 0), collate, schedule, own, features)
        adapters[task] = save_expert(expert, out / task, own)  # an ordinary PEFT adapter
        anchors.merge_(own)
        print(f"{task}: {expert.log}")

    base, processor = load_embedded()
    features = own_features(base, processor.tokenizer)
    # A model of 4 layers has no layer to spare for fusing: all of them route here. With 32, one is enough.
    config = HiDeConfig(top_layers=4, projector="routed")
    model = HiDeModel(base, adapters, anchors, config, features=features)
    samples = [sample for task in TASKS for sample in draw_task(task, 50, 1, "test")]
    answers = generate_answers(model, processor, samples)  # one batch, two tasks
    for number, task in enumerate(TASKS):
        rows = slice(50 * number, 50 * number + 50)
        score = accuracy(answers[rows], [sample.answer for sample in samples[rows]])
        weights = model.routing(**collate_prompts(processor, samples[rows][:1]))[0].tolist()
        shown = ", ".join(f"{name} {weight:.2f}" for name, weight in zip(model.tasks, weights, strict=True))
        print(f"{task}: {score:.0f} % right; {samples[rows][0].instruction!r} is routed to {shown}")

    model.save(out / "hide")
    again = HiDeModel.load(out / "hide", load_embedded()[0])
    same = generate_answers(again, processor, samples) == answers
    print(f"saved, read back, the same answers: {same}")
    model.remove("sentence")
    print(f"without 'sentence': {model.tasks}; the base is restored bit for bit by unload()")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
