"""Time and memory of `harmonize_checkpoint` at LLaVA-1.5-7B's shapes, beside copying files of the same bytes.

    python -m hpa_ext.benchmarks.checkpoint_at_scale --directory /some/disk/with/60/GB --out results.json

Makes random checkpoints (and a random adapter) of that shape once and keeps them in the directory. Every run is a
process of its own, whose peak memory the system reports; the copy runs before and after each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_PROVENANCE = {"made": "at random"}

_CHILD = """
import json, resource, sys, time
import torch
import hpa_ext
from hpa_ext.hpa.checkpoint import harmonize_checkpoint
import hpa_ext.checkpoints.weights, transformers
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))
arguments = json.loads(sys.argv[1])
torch.set_num_threads(arguments.pop("threads"))
before = status("VmRSS")
start = time.perf_counter()
report = harmonize_checkpoint(**arguments, progress=False)
seconds = time.perf_counter() - start
found = {"seconds": seconds, "peak_bytes": status("VmHWM"), "interpreter_bytes": before, "layers": len(report)}
print(json.dumps(found))
"""


def main(argv: list[str] | None = None) -> int:
    """Make the inputs, run, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the checkpoints are made")
    parser.add_argument("--layers", type=int, default=32, help="decoder layers; 32 is LLaVA-1.5-7B (default)")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter; LLaVA's own setting is 128 (default)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--grams", choices=("diagonal", "full"), default="diagonal", help="what the Gram files hold")
    parser.add_argument("--runs", default="checkpoint,adapter,adapter-output", help="comma-separated")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    inputs = make_inputs(args.directory, args.layers, args.rank, args.grams == "full")
    rows = []
    for name in args.runs.split(","):
        rows.append(measure(name, args.directory, inputs, args.threads))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"layers": args.layers, "threads": args.threads, "rows": rows}, indent=1) + "\n")
    return 0


def measure(name: str, directory: Path, inputs: dict[str, Path], threads: int) -> dict[str, object]:
    """One run between two copies of the files that it reads or writes most of."""
    from hpa_ext.checkpoints import partial_directory

    out = directory / "out"
    arguments = {
        "old": str(inputs["old"]),
        "new": str(inputs["new" if name == "checkpoint" else "adapter"]),
        "safety": str(inputs["safety"]),
        "task": str(inputs["task"]),
        "out": str(out),
        "output": "adapter" if name == "adapter-output" else "checkpoint",
        "threads": threads,
    }
    copies = [copy_seconds(inputs["old"], directory / "copy")]
    for leftover in (out, partial_directory(out)):
        shutil.rmtree(leftover, ignore_errors=True)
    done = subprocess.run([sys.executable, "-c", _CHILD, json.dumps(arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    written = size_of(out)
    shutil.rmtree(out)
    copies.append(copy_seconds(inputs["old"], directory / "copy"))
    read = size_of(inputs["old"]) + (size_of(inputs["new"]) if name == "checkpoint" else size_of(inputs["adapter"]))
    copied = size_of(inputs["old"])
    return {
        "run": name,
        "seconds": round(found["seconds"], 2),
        "read_gb": round(read / 1e9, 2),
        "written_gb": round(written / 1e9, 3),
        "peak_mib_beyond_interpreter": round((found["peak_bytes"] - found["interpreter_bytes"]) / 2**20),
        "interpreter_mib": round(found["interpreter_bytes"] / 2**20),
        "layers": found["layers"],
        "cp_gb": round(copied / 1e9, 2),
        "cp_seconds": [round(value, 2) for value in copies],
        "ratio_to_cp": round(found["seconds"] / (sum(copies) / 2), 2),
    }


def copy_seconds(source: Path, target: Path) -> float:
    """``cp -r`` and ``sync`` of a directory, so that both sides end on the disk."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    # Plain read and write: a copy that only shares blocks would not move the bytes.
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    for path in [*target.rglob("*"), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def size_of(path: Path) -> int:
    """Bytes of a file or of everything below a directory."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def make_inputs(directory: Path, layers: int, rank: int, full_grams: bool) -> dict[str, Path]:
    """Random checkpoints, adapter and Gram files of LLaVA-1.5-7B's shapes; what is there already is kept."""
    from hpa_ext.checkpoints.shard_files import INDEX_FILE

    directory.mkdir(parents=True, exist_ok=True)
    kind = "full" if full_grams else "diagonal"
    paths = {
        "old": directory / f"old-{layers}", "new": directory / f"new-{layers}",
        "adapter": directory / f"adapter-{layers}-r{rank}",
        "safety": directory / f"safety-{layers}-{kind}.safetensors",
        "task": directory / f"task-{layers}-{kind}.safetensors",
    }  # fmt: skip
    if not (paths["old"] / INDEX_FILE).exists():
        _write_config(paths["old"], layers)
        _write_weights(paths["old"], seed=0, update=False)
    if not (paths["new"] / INDEX_FILE).exists():
        _write_config(paths["new"], layers)
        _write_weights(paths["new"], seed=0, update=True)
    if not paths["adapter"].exists():
        _write_adapter(paths["adapter"], paths["old"], rank)
    for seed, name in enumerate(("safety", "task")):
        if not paths[name].exists():
            _write_grams(paths[name], paths["old"], full_grams, seed)
    return paths


def _write_config(directory: Path, layers: int) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, architectures=["LlavaForConditionalGeneration"], image_token_index=32000
    )
    config.save_pretrained(directory)


def _disk_name(canonical: str) -> str:
    """As transformers writes it: three models side by side."""
    for start, written in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if canonical.startswith(start):
            return written + canonical.removeprefix(start)
    return canonical


def _write_weights(directory: Path, seed: int, update: bool, drawn: int = 1 << 24) -> None:
    """Shards of 5 GB; the same numbers for the same seed, with a small change on top if `update`; `drawn` differ."""
    import torch

    from hpa_ext.checkpoints.shard_plan import ShardPlan, index_of
    from hpa_ext.checkpoints.writer import ShardedWriter
    from hpa_ext.models.skeleton import skeleton

    parameters = {_disk_name(name): tuple(p.shape) for name, p in skeleton(directory).named_parameters()}
    groups: list[list[str]] = [[]]
    size = 0
    for name in sorted(parameters):
        nbytes = 2 * torch.Size(parameters[name]).numel()
        if size + nbytes > 5_000_000_000:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    plans = [
        ShardPlan(
            f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors",
            {"format": "pt"},
            [(name, "BF16", parameters[name]) for name in names],
        )
        for i, names in enumerate(groups)
    ]
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(drawn, generator=generator).mul_(0.02).bfloat16()
    change = torch.randn(drawn, generator=generator).mul_(0.002)
    with ShardedWriter(directory, plans, index_of(plans)) as writer:
        writer.create(replace=True)
        for number, name in enumerate(sorted(parameters)):
            shape = torch.Size(parameters[name])
            # Random numbers are drawn once and shifted: drawing 6.7e9 of them would take longer than the benchmark.
            values = _tiled(block, 7919 * number, shape.numel())
            if update:
                values = (values.float() + _tiled(change, 104729 * number, shape.numel())).bfloat16()
            writer.write(name, values.view(shape))
        writer.finish()


def _tiled(block: object, shift: int, count: int) -> object:
    repeats = -(-(count + shift % len(block)) // len(block))
    return block.repeat(repeats)[shift % len(block) :][:count]


def _write_adapter(directory: Path, old: Path, rank: int) -> None:
    import torch
    from safetensors.torch import save_file

    from hpa_ext.models.linears import find_linears
    from hpa_ext.models.skeleton import skeleton

    torch.manual_seed(3)
    tensors = {}
    for name, linear in find_linears(skeleton(old)).items():
        out_features, in_features = linear.base_weight().shape
        key = f"base_model.model.{_disk_name(name + '.')[:-1]}"
        tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, in_features) / rank).bfloat16()
        tensors[f"{key}.lora_B.weight"] = (0.01 * torch.randn(out_features, rank)).bfloat16()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": r".*language_model.*_proj"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def _write_grams(path: Path, old: Path, full: bool, seed: int) -> None:
    """Grams of random activations with decaying scales; q/k/v share one, gate/up share one."""
    import torch

    from hpa_ext import Gram
    from hpa_ext.checkpoints.gram_file import reduced
    from hpa_ext.checkpoints.gram_writer import GramWriter, header_room
    from hpa_ext.models.linears import find_linears
    from hpa_ext.models.skeleton import skeleton

    generator = torch.Generator().manual_seed(100 + seed)
    groups: dict[str, list[str]] = {}
    for name in find_linears(skeleton(old)):
        parent, leaf = name.rsplit(".", 1)
        leader = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(leaf, leaf)
        groups.setdefault(f"{parent}.{leader}", []).append(name)
    form = "triangle" if full else "inverse_diagonal"
    room = header_room([name for names in groups.values() for name in names], _PROVENANCE)
    made: dict[int, Gram] = {}
    with GramWriter(path.with_suffix(".partial"), form, room) as writer:
        for leader, names in groups.items():
            width = 11008 if leader.endswith("down_proj") else 4096
            if width not in made:  # one of each width: what is measured does not depend on the numbers
                scales = torch.logspace(0, -1.5, width)
                tokens = torch.randn(2048, width, generator=generator) * scales
                made[width] = Gram(width).update(tokens.bfloat16())
            writer.add(names, reduced(leader, made[width], form, 0.01))
        writer.finish(_PROVENANCE)
    os.rename(path.with_suffix(".partial"), path)


if __name__ == "__main__":
    sys.exit(main())
