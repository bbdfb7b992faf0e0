"""Tiny checkpoints and PEFT adapters on disk, of every kind and generation, and what PEFT makes of them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"


def save(model, directory, dtype=torch.float32):
    """Save a copy in `dtype`; embeddings too, biases and norms moved so that no tensor is zero or one."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(directory)
    return Path(directory)


def load(directory, dtype="auto"):
    """The model as transformers loads it."""
    import transformers

    name = json.loads((Path(directory) / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, dtype=dtype).eval()


def adapter(model, directory, *, seed=3, r=4, dtype=torch.float32, **options):
    """A PEFT adapter on `model` (changed in place), everything trainable drawn at random, saved to `directory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft = get_peft_model(model, LoraConfig(r=r, **options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                trained = "lora_" in name or "modules_to_save" in name
                trained |= options.get("bias", "none") != "none" and name.endswith("bias") and parameter.requires_grad
                if trained:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                    if "magnitude" in name:
                        parameter.mul_(1 + 0.1 * noise)
                    else:
                        parameter.add_(0.1 * noise)
        peft.to(dtype).save_pretrained(directory) if dtype != torch.float32 else peft.save_pretrained(directory)
    return Path(directory)


def merged_by_peft(base, *adapters):
    """``state_dict`` after loading with transformers and PEFT and merging the adapters in order."""
    model = load(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in adapters:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    return {name: value.detach() for name, value in model.state_dict().items()}


def assert_equal_to_rounding(ours, theirs, name=""):
    """fp32: 1e-6 relative to the tensor; narrower: at most one unit in the last place, and hardly any of those."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
    if ours.dtype == torch.float32:
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max(), name
        return
    integers = [value.contiguous().view(torch.int16).int() for value in (ours, theirs)]
    steps = (integers[0] - integers[1]).abs()
    assert steps.max() <= 1, name
    assert (steps > 0).float().mean() < 0.01, name


def rewrite(source, target, rename, config=None):
    """A copy of a one-file checkpoint with other tensor names (`rename` may drop one by None), and another config."""
    source, target = Path(source), Path(target)
    shutil.copytree(source, target, dirs_exist_ok=True)
    file = next(path for path in target.iterdir() if path.suffix == ".safetensors")
    tensors = {rename(name): value for name, value in load_file(file).items()}
    save_file({name: value for name, value in tensors.items() if name is not None}, file, metadata={"format": "pt"})
    if config is not None:
        (target / "config.json").write_text(json.dumps(config))
    return target


def to_canonical(name):
    """The name of transformers 5 for what its ``save_pretrained`` writes for LLaVA."""
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model", "model.language_model", name)
    name = re.sub(r"^image_newline$", "model.image_newline", name)
    name = re.sub(r"^(vision_tower|multi_modal_projector)", r"model.\1", name)
    return re.sub(r"^model\.vision_tower\.vision_model", "model.vision_tower", name)


def to_legacy(name):
    """What transformers 4.3x to 4.51 wrote: three models side by side, CLIP with its ``vision_model``."""
    name = to_canonical(name)
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    name = re.sub(r"^model\.language_model", "language_model.model", name)
    name = re.sub(r"^model\.vision_tower", "vision_tower.vision_model", name)
    return re.sub(r"^model\.multi_modal", "multi_modal", name)


def to_transition(name):
    """What transformers 4.52 to 4.57 held in memory: today's names, CLIP with its ``vision_model``."""
    return re.sub(r"^model\.vision_tower", "model.vision_tower.vision_model", to_canonical(name))


def to_original(name):
    """What haotian-liu/LLaVA writes."""
    name = to_canonical(name)
    name = re.sub(r"^model\.language_model", "model", name)
    name = re.sub(r"^model\.vision_tower", "model.vision_tower.vision_tower.vision_model", name)
    name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
    return name.replace("multi_modal_projector.linear_2", "mm_projector.2")


def original_config(model, tower):
    """The ``config.json`` of haotian-liu/LLaVA for `model`; `tower` is a folder with the vision tower's config."""
    tower.mkdir(parents=True, exist_ok=True)
    (tower / "config.json").write_text(json.dumps(model.config.vision_config.to_dict()))
    text = model.config.text_config.to_dict()
    return {
        **{key: text[key] for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "rms_norm_eps", "max_position_embeddings", "hidden_act", "bos_token_id", "eos_token_id",
        )},
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "torch_dtype": "float16",
        "tie_word_embeddings": False, "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_vision_tower": str(tower), "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad", "freeze_mm_mlp_adapter": False, "tune_mm_mlp_adapter": False,
        "tokenizer_model_max_length": 2048, "tokenizer_padding_side": "right", "unfreeze_mm_vision_tower": True,
        "use_mm_proj": True, "use_cache": True, "pad_token_id": 0, "pretraining_tp": 1,
    }  # fmt: skip


def llava_next():
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config=tiny_models.llava().config.vision_config.to_dict(),
        text_config=tiny_models.llava().config.text_config.to_dict(),
        image_token_index=tiny_models.IMAGE_TOKEN, image_grid_pinpoints=[[32, 64], [64, 32]],
    )  # fmt: skip
    return tiny_models._seeded(LlavaNextForConditionalGeneration, config)


def qwen2(tie=False):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tiny_models.VOCABULARY, tie_word_embeddings=tie, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tiny_models._seeded(Qwen2ForCausalLM, config)


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 8},
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": tiny_models.VOCABULARY, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return tiny_models._seeded(Qwen2VLForConditionalGeneration, config)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=tiny_models.VOCABULARY, num_local_experts=3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tiny_models._seeded(MixtralForCausalLM, config)
