"""L2P (Wang et al., CVPR 2022): a frozen model, and a pool of prompts of which each sample picks some by a key."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hpa_ext.token_masks import IGNORED_LABEL

from .registry import training
from .tuning_step import StepContext, TrainingMethod, tensor_bytes


class PromptPool(nn.Module):
    """A model that answers with prompts of its pool in front.

    The query is the mean of the prompt's embeddings; the ``top`` keys nearest to it by cosine choose the prompts.
    """

    def __init__(self, model: nn.Module, pool: int, length: int, top: int, seed: int) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        table = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(seed)
        # Prompts start at words: from noise of another scale a frozen model learns nothing.
        words = torch.randint(len(table), (pool * length,), generator=generator)
        self.prompts = nn.Parameter(table[words].detach().view(pool, length, -1).clone())
        self.keys = nn.Parameter(torch.randn(pool, table.shape[1], generator=generator).to(table))
        self.top = top
        self.cosine: Tensor | None = None  # of the prompts that the last forward chose, mean over them

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor, **options: Any) -> Any:
        """As the model's forward, with logits of the given tokens alone."""
        is_prompt = (labels == IGNORED_LABEL) & attention_mask.bool()
        added, mask = self._added(inputs_embeds, is_prompt), attention_mask
        count = added.shape[1]
        outputs = self.model(
            inputs_embeds=torch.cat([added, inputs_embeds], 1),
            attention_mask=torch.cat([mask.new_ones(len(mask), count), mask], 1),
            labels=torch.cat([labels.new_full((len(labels), count), IGNORED_LABEL), labels], 1),
            **options,
        )
        return SimpleNamespace(loss=outputs.loss, logits=outputs.logits[:, count:])

    def generate(self, inputs_embeds: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """As the model's generate. The prompts stand before the padding, at the same distance for a whole batch."""
        added = self._added(inputs_embeds, attention_mask.bool())
        # Behind the padding, so that positions are those of training.
        rows = []
        for row, mask, prompts in zip(inputs_embeds, attention_mask.bool(), added, strict=True):
            rows.append(torch.cat([row[~mask], prompts, row[mask]]))
        mask = torch.cat([attention_mask, attention_mask.new_ones(len(added), added.shape[1])], 1)
        return self.model.generate(inputs_embeds=torch.stack(rows), attention_mask=mask, **options)

    def _added(self, embeddings: Tensor, is_prompt: Tensor) -> Tensor:
        weights = is_prompt.to(embeddings)
        query = (embeddings * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        cosine = nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(self.keys, dim=-1).mT
        nearest = cosine.topk(self.top, dim=1)
        self.cosine = nearest.values.mean()
        return self.prompts[nearest.indices].flatten(1, 2).to(embeddings)


class L2P(TrainingMethod):
    """Adds ``-pull * cos`` so that chosen keys come nearer to the queries; one pool for all tasks."""

    plain_first_step = False

    def __init__(self, pool: int, length: int, top: int, pull: float, learning_rate_factor: float = 1.0) -> None:
        if not learning_rate_factor > 0:
            raise ValueError(f"learning_rate_factor: expected a positive number, got {learning_rate_factor}")
        if length < 1 or not 1 <= top <= pool:
            raise ValueError(f"pool, length, top: expected 1 <= top <= pool, length >= 1, got {pool}, {length}, {top}")
        self.pool, self.length, self.top, self.pull = pool, length, top, pull
        self.learning_rate_factor = learning_rate_factor
        self.module: PromptPool | None = None

    def attach(self, model: nn.Module, step: StepContext) -> nn.Module:
        """The pool, made at the first step."""
        if self.module is None:
            self.module = PromptPool(model, self.pool, self.length, self.top, step.seed)
        return self.module

    def penalty(self, model: nn.Module, inputs, outputs) -> Tensor | None:
        """The distance of the chosen keys."""
        return -self.pull * model.cosine

    def finish(self, model: nn.Module, step: StepContext) -> nn.Module:
        """The model with its pool."""
        return model

    def state_bytes(self) -> int:
        """Prompts and keys."""
        return tensor_bytes([self.module.prompts, self.module.keys]) if self.module is not None else 0


@training("l2p", "L2P", "CVPR 2022", strength="learning_rate_factor", grid=(1.0, 10.0, 30.0))
def l2p(*, pool: int = 10, length: int = 5, top: int = 5, pull: float = 0.1, learning_rate_factor: float = 30.0) -> L2P:
    """L2P with its sizes; prompts want a rate of their own (0.03 in the source)."""
    return L2P(pool, length, top, pull, learning_rate_factor)
