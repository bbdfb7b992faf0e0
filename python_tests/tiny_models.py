"""Transformers models of a few thousand parameters, built from configurations."""

from __future__ import annotations

import warnings

import torch

VOCABULARY, IMAGE_TOKEN, IMAGE_TOKENS = 100, 99, 16


def llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCABULARY,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return _seeded(LlamaForCausalLM, config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _seeded(GPT2LMHeadModel, config)


def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        },
        text_config={
            "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "vocab_size": VOCABULARY,
        },
        image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    return _seeded(LlavaForConditionalGeneration, config)


def _seeded(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def batches(model, count=3, size=4, tokens=30, seed=0):
    """Left-padded batches with labels on the last five tokens, and an image for each sample of a LLaVA."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY - 2, (size, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[: size // 2, :6] = 0
        labels = ids.clone()
        labels[:, :-5] = -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if hasattr(model.config, "vision_config"):
            batch["input_ids"][:, 8 : 8 + IMAGE_TOKENS] = IMAGE_TOKEN
            batch["pixel_values"] = torch.randn(size, 3, 32, 32, generator=generator)
        result.append(batch)
    return result


def tuned(model, scale=0.02, seed=1):
    """A copy with every matrix moved a little."""
    import copy

    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() == 2:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return result


def with_lora(model, targets, seed=2, **options):
    """A PeftModel around a copy, its B drawn at random so that the update is not zero."""
    import copy

    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval()


def logits(model, batch):
    """Logits of a batch without its labels."""
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def setting(make):
    """A model before and after tuning, and the Grams of both."""
    from hpa_ext import calibrate

    old = make()
    new = tuned(old)
    return (
        old,
        new,
        calibrate(old, batches(old, seed=5), progress=False),
        calibrate(new, batches(new, seed=6), progress=False),
    )


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(before[name])), name
