"""Small training runs with transformers' Trainer, for the tests of HarmonizeCallback."""

from __future__ import annotations

import warnings

import tiny_models
import torch
from transformers import Trainer, TrainingArguments


class Samples(torch.utils.data.Dataset):
    """The samples of tiny_models.batches, one at a time."""

    def __init__(self, model, count=8, seed=11):
        batch = tiny_models.batches(model, count=1, size=count, seed=seed)[0]
        self.samples = [{key: value[index] for key, value in batch.items()} for index in range(count)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def trainer(model, directory, callbacks=(), kind=Trainer, steps=4, **options):
    """A Trainer of a few steps of AdamW on the CPU, with checkpoints every two."""
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, "seed": 3,
        "report_to": "none", "disable_tqdm": True, "save_steps": 2, "logging_steps": 2, "dataloader_pin_memory": False,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(output_dir=str(directory), **{**defaults, **options})
        return kind(model=model, args=arguments, train_dataset=Samples(model), callbacks=list(callbacks))
