"""The models and prompts of the step as a whole: LLaVA from a configuration, random weights, and a tuned copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpa_ext.models.linears import find_linears

UPDATE_SCALE = 0.02
"""How large the update is beside the old weight, as a share of its norm (about)."""

_SMALL_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 64,
}  # fmt: skip
_CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
_PARAMETER_BYTES, _GRAM_BYTES = 2, 4


@dataclass(frozen=True)
class StepShape:
    """Sizes of a step.

    Attributes:
        layers, width, inner, heads: of the language model; `inner` is the width of the MLP.
        safety_samples, task_samples: prompts of each set.
        tokens: of each prompt, those of its image included; none is padding.
        batch_samples: prompts that one call of the model takes.
        vocabulary: ids; the last one stands for an image token.
        clip_large: the vision tower of LLaVA-1.5 (576 tokens an image) instead of a tiny one (16 tokens an image).
    """

    layers: int
    width: int
    inner: int
    heads: int
    safety_samples: int
    task_samples: int
    tokens: int
    batch_samples: int
    vocabulary: int = 32064
    clip_large: bool = False

    @property
    def samples(self) -> tuple[int, int]:
        """Of the safety and the task set."""
        return self.safety_samples, self.task_samples

    @property
    def layer_parameters(self) -> int:
        """Elements of one decoder layer's linears."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def gram_widths(self) -> tuple[int, int, int, int]:
        """Widths of a layer's distinct inputs: of q/k/v, of o, of gate/up, of down."""
        return self.width, self.width, self.width, self.inner

    @property
    def vision(self) -> dict:
        """Configuration of the vision tower."""
        return _CLIP_LARGE if self.clip_large else _SMALL_VISION

    @property
    def image_tokens(self) -> int:
        """Tokens that an image takes in a prompt."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    def words(self) -> str:
        """For people."""
        return (
            f"{self.layers} decoder layer{'s' if self.layers != 1 else ''} of width {self.width}, MLP {self.inner}; "
            f"{self.safety_samples} safety and {self.task_samples} task prompts of {self.tokens} tokens, "
            f"{self.image_tokens} of them an image's"
        )


def memory_plan(shape: StepShape) -> dict[str, int]:
    """Bytes on the device by what holds them: the two models, and the Grams of one set (ours, the peer's).

    The tuned copy has linears of its own and shares all other parameters. Each side reduces a set of Grams to diagonals
    before the next set. Ours holds a Gram for each distinct input, the peer one for each linear. `work` is for
    activations, a factorisation's copies of the largest Gram (in float64 should float32 not do) and float32 weights.
    """
    others = 2 * shape.vocabulary * shape.width + (310_000_000 if shape.clip_large else 1_000_000)
    tokens = shape.batch_samples * shape.tokens
    return {
        "models": _PARAMETER_BYTES * (2 * shape.layers * shape.layer_parameters + others),
        "grams_ours": _GRAM_BYTES * shape.layers * sum(width**2 for width in shape.gram_widths),
        "grams_peer": _GRAM_BYTES * shape.layers * (6 * shape.width**2 + shape.inner**2),
        "work": 16 * shape.inner**2 + 4 * 8 * tokens * shape.inner,
    }


def needed_bytes(shape: StepShape) -> int:
    """The most that the device holds at a time, by the plan."""
    plan = memory_plan(shape)
    return plan["models"] + plan["work"] + max(plan["grams_ours"], plan["grams_peer"])


def build(shape: StepShape, device: torch.device, seed: int) -> nn.Module:
    """LLaVA of transformers in bfloat16 with random weights, made on the device; nothing is read from disk or network.

    The gains of the norms are log-normal, so that features differ in size as those of trained models do.
    """
    from transformers import AutoModelForImageTextToText, LlavaConfig

    config = LlavaConfig(
        vision_config=shape.vision,
        text_config={
            "model_type": "llama", "hidden_size": shape.width, "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "vocab_size": shape.vocabulary,
        },
        image_token_index=shape.vocabulary - 1,
    )  # fmt: skip
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device, torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        for module in model.get_decoder().modules():
            if "RMSNorm" in type(module).__name__:
                module.weight.copy_(torch.randn(module.weight.shape).mul_(0.5).exp_())
    return model.requires_grad_(False)


def tuned_copy(old: nn.Module) -> nn.Module:
    """A model with decoder linears of its own, still those of `old`, and every other parameter in common with it."""
    own = {id(linear.module.weight) for linear in find_linears(old).values()}
    shared = {id(value): value for value in (*old.parameters(), *old.buffers()) if id(value) not in own}
    return copy.deepcopy(old, shared)


def retune(old: nn.Module, new: nn.Module, seed: int) -> float:
    """Set the linears of `new` to those of `old` and a random update, the same one for a seed; its Frobenius norm.

    The update has columns of log-normal size, and a part along the old weight for the projection to take away.
    """
    after, norms = linear_weights(new), []
    for index, (name, weight) in enumerate(linear_weights(old).items()):
        generator = torch.Generator(weight.device).manual_seed(seed + index)
        columns = torch.randn(weight.shape[1], generator=generator, device=weight.device).mul_(0.5).exp_()
        update = torch.randn(weight.shape, generator=generator, device=weight.device).mul_(columns)
        update.mul_(UPDATE_SCALE * weight.norm() / update.norm()).add_(weight, alpha=UPDATE_SCALE / 4)
        after[name].copy_(update.add_(weight))
        norms.append(update.copy_(after[name]).sub_(weight).norm())  # as it is once rounded
    return float(torch.stack(norms).norm())


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights ``[out, in]`` of the decoder's linears by module name, in the model's order."""
    return {name: linear.module.weight.detach() for name, linear in find_linears(model).items()}


def layer_of(name: str) -> int:
    """Which decoder layer, from 0, a linear of this name is in."""
    return int(name.rpartition(".layers.")[2].partition(".")[0])


def prompts(shape: StepShape, samples: int, seed: int) -> list[Mapping[str, Tensor]]:
    """Batches of random token ids, each with an image of noise, as a processor gives them: on the host."""
    generator = torch.Generator().manual_seed(seed)
    return list(_batches(shape, samples, generator))


def _batches(shape: StepShape, samples: int, generator: torch.Generator) -> Iterator[Mapping[str, Tensor]]:
    image = slice(1, 1 + shape.image_tokens)
    side = shape.vision["image_size"]
    for start in range(0, samples, shape.batch_samples):
        count = min(shape.batch_samples, samples - start)
        ids = torch.randint(3, shape.vocabulary - 1, (count, shape.tokens), generator=generator)
        ids[:, image] = shape.vocabulary - 1
        pixels = torch.randn(count, 3, side, side, generator=generator).bfloat16()
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
