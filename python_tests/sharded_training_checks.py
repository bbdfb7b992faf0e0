"""Checks of HarmonizeCallback under DDP and FSDP2; run by test_distributed_callback.py in 2 gloo processes."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import tiny_models
import torch
import torch.distributed as dist
from process_group import on
from sharded_layer_checks import assert_alike_everywhere
from sharded_model_checks import mine, need_fsdp2_on_cpu, sharded, whole
from torch.distributed.tensor import DTensor

from hpa_ext import calibrate, harmonize_model
from hpa_ext.training.callback import HarmonizeCallback

TARGETS = ["q_proj", "down_proj"]


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))


def callback(model, **options):
    """Each process its share of the batches."""
    return HarmonizeCallback(
        mine(tiny_models.batches(model, count=4, seed=5)), mine(tiny_models.batches(model, count=3, seed=6)),
        progress=False, **options,
    )  # fmt: skip


def train_a_little(model, steps=3):
    """The same on every process, so that one process can do it alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.3)
    model.train()
    for batch in tiny_models.batches(tiny_models.llama(), count=steps, seed=8):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def alone(prepare):
    """Harmonized on one process with all batches."""
    old = tiny_models.llama()
    model = prepare(copy.deepcopy(old))
    names = None if prepare is not lora else ".*(q_proj|down_proj)"
    safety = calibrate(old, tiny_models.batches(old, count=4, seed=5), names, progress=False)
    train_a_little(model)
    task = calibrate(model, tiny_models.batches(old, count=3, seed=6), names, progress=False)
    report = harmonize_model(old, model, safety, task, modules=names, progress=False)
    return model, report


def assert_same(model, report, expected, told, tolerance=2e-5):
    assert list(report.layers) == list(told.layers)
    for name, layer in report.layers.items():
        assert torch.equal(layer.retained, told[name].retained), name
        assert_alike_everywhere(layer.retained)
    state = expected.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(whole(value), state[name], rtol=0, atol=tolerance, msg=lambda t, n=name: f"{n}: {t}")


@on(2)
def check_fully_shard_by_hand():
    for prepare in (lambda model: model, lora):
        expected, told = alone(prepare)
        model = sharded(prepare(tiny_models.llama()))
        harmonizing = callback(tiny_models.llama(), passes=2)
        harmonizing.before_task(model)
        if prepare is lora:
            assert harmonizing._task.old is None
        else:
            parts = sum(p.to_local().nbytes for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
            assert harmonizing._task.old.nbytes == parts
        train_a_little(model)
        report = harmonizing.after_task(model)
        assert_same(model, report, expected, told)


@on(2)
def check_lora_that_resumes_under_fsdp():
    """What before_task does to leave the adapters away must not keep FSDP2 from training them."""
    expected, told = alone(lora)
    model = sharded(lora(tiny_models.llama()))
    harmonizing = callback(tiny_models.llama())
    harmonizing.before_task(model, adapters_were_zero=True)
    train_a_little(model)
    assert_same(model, harmonizing.after_task(model), expected, told)


@on(2)
def check_ddp_by_hand():
    expected, told = alone(lora)
    model = lora(tiny_models.llama())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    harmonizing = callback(tiny_models.llama())
    harmonizing.before_task(wrapped)
    train_a_little(wrapped)
    assert_same(model, harmonizing.after_task(wrapped), expected, told)


def use_fsdp2(accelerator):
    """Accelerate shards on GPUs only and leaves a CPU run unsharded without a word, though its own code works there."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    need_fsdp2_on_cpu()
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2


def accelerated(**options):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    return Accelerator(cpu=True, **options)


@on(2)
def check_accelerate_with_fsdp2():
    for prepare in (lambda model: model, lora):
        accelerator = accelerated()
        use_fsdp2(accelerator)
        expected, told = alone(prepare)
        model = prepare(tiny_models.llama())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        harmonizing = callback(tiny_models.llama())
        harmonizing.before_task(model)
        model.train()
        for batch in tiny_models.batches(tiny_models.llama(), seed=8):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        assert_same(model, harmonizing.after_task(model), expected, told)


def directory():
    """One for all processes."""
    path = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(path)
    return Path(path[0])


def run_trainer(model, callbacks, kind, path, **options):
    from accelerate.state import AcceleratorState, PartialState
    from trainer_models import trainer

    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517")
    run = trainer(model, path, callbacks, kind, ddp_backend="gloo", steps=2, save_strategy="no", **options)
    run.train()
    return run


def trained_by_trainer_alone(prepare, kind, path):
    """The tuned model without the callback, gathered, harmonized on each process with all batches."""
    model = prepare(tiny_models.llama())
    run_trainer(model, [], kind, path)
    state = {name: whole(value).clone() for name, value in model.state_dict().items()}
    expected, old = prepare(tiny_models.llama()), tiny_models.llama()
    expected.load_state_dict(state)
    names = None if prepare is not lora else ".*(q_proj|down_proj)"
    safety = calibrate(old, tiny_models.batches(old, count=4, seed=5), names, progress=False)
    task = calibrate(expected, tiny_models.batches(old, count=3, seed=6), names, progress=False)
    report = harmonize_model(old, expected, safety, task, modules=names, progress=False)
    return expected, report


@on(2)
def check_trainer_under_ddp():
    from transformers import Trainer

    path = directory()
    expected, told = trained_by_trainer_alone(lora, Trainer, path)
    model, harmonizing = lora(tiny_models.llama()), callback(tiny_models.llama())
    run = run_trainer(model, [harmonizing], Trainer, path)
    assert run.args.world_size == 2 and run.accelerator.distributed_type.value == "MULTI_CPU"
    assert_same(model, harmonizing.reports[0], expected, told)


@on(2)
def check_trainer_under_fsdp2():
    from transformers import Trainer

    class ShardingTrainer(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            use_fsdp2(self.accelerator)
            self.is_fsdp_enabled = True

    path = directory()
    for prepare in (lambda model: model, lora):
        expected, told = trained_by_trainer_alone(prepare, ShardingTrainer, path)
        model, harmonizing = prepare(tiny_models.llama()), callback(tiny_models.llama())
        run = run_trainer(model, [harmonizing], ShardingTrainer, path)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert run.state.log_history[-1]["hpa_layers"] == len(told)
        assert_same(model, harmonizing.reports[0], expected, told)


@on(2)
def check_errors_reach_all():
    from sharded_layer_checks import raises_everywhere

    first = dist.get_rank() == 0
    batches = tiny_models.batches(tiny_models.llama())
    for prepare in (sharded, lambda model: model):
        model = prepare(tiny_models.llama())
        with raises_everywhere(ValueError, "batches: expected at least one batch, got none"):
            HarmonizeCallback(batches if first else [], batches, progress=False).before_task(model)
        with raises_everywhere(ValueError, "none of the 21 linears that are covered is trained"):
            HarmonizeCallback(batches, batches, progress=False).before_task(model.requires_grad_(not first or False))
            dist.barrier()
        model.requires_grad_(True)
