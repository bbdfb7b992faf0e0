"""The embedded model: a small LLaVA in ordinary transformers classes, and its checkpoint that ships with the package.

CLIP of 3 layers of width 64 on 32x32 pixels (16 image tokens), a projector, Llama of 4 layers of width 256, words as
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")

# One turn per message; what an image content stands for is expanded by the processor.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class EmbeddedConfig:
    """Sizes of the model. The text width decides whether there is room to keep safety: 96 breaks at everything."""

    image_side: int = 32  # pixels
    patch_side: int = 8  # pixels
    vision_width: int = 64
    vision_layers: int = 3  # the last one runs and its output is not used, as in LLaVA-1.5
    text_width: int = 256
    text_layers: int = 4
    text_heads: int = 4
    text_mlp_width: int = 512
    max_tokens: int = 128
    seed: int = 0


def build(
    words: Sequence[str], config: EmbeddedConfig | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model in fp32 and its processor, for a vocabulary of ``words``. Raises ValueError on repeated
    words.
    """
    config = config or EmbeddedConfig()
    processor = build_processor(words, config)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        image_size=config.image_side,
        patch_size=config.patch_side,
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        projection_dim=config.vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=config.text_mlp_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        num_key_value_heads=config.text_heads,
        max_position_embeddings=config.max_tokens,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    patches = (config.image_side // config.patch_side) ** 2
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    llava = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token, image_seq_length=patches)
    model = LlavaForConditionalGeneration(llava)
    _initialise(model, config.seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, processor


def embedded_path() -> Path:
    """Directory of the packaged checkpoint. Raises FileNotFoundError, saying how to make it, when it is not
    complete.
    """
    path = Path(str(resources.files("hpa_ext.models") / "embedded_checkpoint"))
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the embedded checkpoint at {path} lacks {', '.join(missing)}: reinstall hpa-ext, "
            "or make it with `python examples/make_embedded_model.py` from a source checkout"
        )
    return path


def load_embedded(dtype: torch.dtype = torch.float32) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The aligned model in ``dtype`` (stored as bf16), in evaluation mode, and its processor; nothing is downloaded."""
    path = embedded_path()
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(path, local_files_only=True)


def build_processor(words: Sequence[str], config: EmbeddedConfig) -> LlavaProcessor:
    """The processor for 32x32 images and one token per word. Raises ValueError on repeated words."""
    if len(set(words)) != len(words):
        raise ValueError(f"words: expected each word once, got {len(words) - len(set(words))} repeated")
    identifiers = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *words))}
    core = Tokenizer(models.WordLevel(identifiers, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", identifiers["<s>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_tokens,
    )
    side = {"height": config.image_side, "width": config.image_side}
    # Images of another size are scaled to 32x32. The PIL form is what every machine has; torchvision is not needed.
    images = CLIPImageProcessorPil(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.patch_side,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLIP's class token, which the "default" strategy drops
    )


def _initialise(model: nn.Module, seed: int) -> None:
    """Weights with std 1/sqrt(fan_in), embeddings with std 0.3. With the default std of 0.02 a model this small
    learns nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(0.0, 0.3, generator=generator)
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("class_embedding"):
                parameter.normal_(0.0, 0.3, generator=generator)
