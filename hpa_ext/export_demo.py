"""What a newcomer needs to try the whole command line on the embedded model: a checkpoint, an adapter, and data."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from hpa_ext.data.collate import collate_training
from hpa_ext.data.conversations import Conversation, from_sample
from hpa_ext.data.llava_json import write_llava_json
from hpa_ext.data.samples import Sample
from hpa_ext.data.toy_tasks import MODALITIES, draw_harmful, draw_task
from hpa_ext.models.embedded import embedded_path, load_embedded
from hpa_ext.training.demo_settings import DemoSettings
from hpa_ext.training.loop import train
from hpa_ext.training.lora import add_lora

_HARMFUL_PER_MODALITY = 32


def export_demo(
    directory: str | os.PathLike[str],
    seed: int = 0,
    settings: DemoSettings | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Write the embedded model and everything around it into a directory.

    Args:
        directory: made if missing, otherwise empty. Gets ``base`` (the aligned checkpoint with its processor),
            ``adapter`` (a PEFT LoRA, tuned on the task as in the demo), ``task.json`` and ``harmful.json`` (LLaVA
            format) with their images.
        seed: of the data and the tuning.
        settings: task, tuning and sample counts; None for those of the demo.
        say: called with a line for each phase.

    Raises:
        FileExistsError: the directory holds something.

    Nothing in ``harmful.json`` is harmful: see `draw_harmful`.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory}: expected a new or empty directory")
    settings = DemoSettings() if settings is None else settings
    directory.mkdir(parents=True, exist_ok=True)
    model, processor = load_embedded()
    samples = draw_task(settings.task, settings.train_count, seed)
    tuned = add_lora(model, settings.lora_rank, settings.lora_alpha, seed=seed)
    log = train(tuned, samples, functools.partial(collate_training, processor), settings.training(seed))
    say(f"fine-tuned on {settings.task!r} with LoRA: {log}")
    shutil.copytree(embedded_path(), directory / "base")
    tuned.peft_config["default"].base_model_name_or_path = "base"
    # Not the embeddings, for which PEFT would look up the base model by its name.
    tuned.save_pretrained(directory / "adapter", save_embedding_layers=False)
    say(f"{directory / 'base'}: the aligned model; {directory / 'adapter'}: the adapter that goes on top")
    harmful = [sample for name in MODALITIES for sample in draw_harmful(name, _HARMFUL_PER_MODALITY, seed)]
    _write(directory / "task.json", samples[: settings.task_calibration_count], "task")
    _write(directory / "harmful.json", harmful, "harmful")
    say(f"{directory / 'task.json'}, {directory / 'harmful.json'}: samples in LLaVA format")


def _write(path: Path, samples: list[Sample], name: str) -> None:
    conversations: list[Conversation] = []
    for number, sample in enumerate(samples):
        found = from_sample(sample, number)
        conversations.append(Conversation(f"{name}-{number:04d}", found.turns, found.where, found.risk_class))
    write_llava_json(path, conversations)
