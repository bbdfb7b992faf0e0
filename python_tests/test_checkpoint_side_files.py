"""What comes along beside the weights, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpa_ext.checkpoints import (
    CheckpointError,
    copy_side_files,
)
from hpa_ext.checkpoints.side_files import side_files


def test_side_files(tmp_path: Path) -> None:
    wanted = [
        "LICENSE", "LICENSE.txt", "NOTICE", "README.md", "USE_POLICY.md", "added_tokens.json", "chat_template.jinja",
        "chat_template.json", "config.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
        "processor_config.json", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
    ]  # fmt: skip
    unwanted = [
        ".gitattributes", ".config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
        "pytorch_model.bin.index.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin",
        "trainer_state.json", "hpa_manifest.json", "hpa_masks.safetensors", "modeling_custom.py", "x.pkl",
        "adapter_config.json", "config.json.partial", "picture.png", "model.gguf",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (tmp_path / name).write_text("{}")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "dangling.json").symlink_to("nowhere")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{}")
    files = side_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in files] == [*wanted, "additional_chat_templates/tool_use.jinja"]
    target = tmp_path / "target"
    target.mkdir()
    for _ in range(2):
        copies = copy_side_files(files, tmp_path, target)
    assert [path.relative_to(target) for path in copies] == [path.relative_to(tmp_path) for path in files]
    assert all(copy.read_bytes() == path.read_bytes() for copy, path in zip(copies, files, strict=True))
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: expected the file itself, got a Git LFS pointer"):
        copy_side_files(files, tmp_path, target)
