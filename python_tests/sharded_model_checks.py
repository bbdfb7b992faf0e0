"""Checks of calibrate and harmonize_model under FSDP2; run by test_distributed_model.py in 2 and 4 gloo processes."""

from __future__ import annotations

import copy
from functools import cache

import tiny_models
import torch
import torch.distributed as dist
from process_group import Unsupported, on
from sharded_layer_checks import assert_alike_everywhere, line_mesh, raises_everywhere, without_gathering
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hpa_ext import Gram, HPAConfig, NumericalError, calibrate, harmonize_model
from hpa_ext.gram_reduction import reduce_grams
from hpa_ext.models.remembered import RememberedWeights
from hpa_ext.models.sharding import part_of
from hpa_ext.models.structure import decoder_name, unwrap

# A result moves by float32 roundings of the Grams, of the sums and of the forward in other parts.
WEIGHTS = {"rtol": 0, "atol": 2e-6}


def sharded(model, mesh=None, **options):
    """The model under FSDP2, each decoder layer and then the rest; HSDP with a mesh of two dimensions."""
    need_fsdp2_on_cpu()
    mesh = mesh or line_mesh()
    plain = unwrap(model)
    decoder = plain.get_submodule(decoder_name(plain))
    for layer in getattr(decoder, "layers", None) or decoder.h:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


@cache
def need_fsdp2_on_cpu():
    """Skip the check where torch's FSDP2 runs on accelerators only, as in 2.6."""
    layer = fully_shard(torch.nn.Linear(4, 4), mesh=line_mesh())
    try:
        layer(torch.ones(1, 4)).sum().backward()
    except (AttributeError, RuntimeError) as error:
        raise Unsupported(f"fully_shard of torch {torch.__version__} does not run on the CPU: {error}") from error


def mine(batches):
    return batches[dist.get_rank() :: dist.get_world_size()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_weights(model, expected, **tolerance):
    state = expected.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            whole(value), state[name], **(tolerance or WEIGHTS), msg=lambda text, n=name: n + text
        )


def assert_same_decisions(report, expected):
    assert list(report.layers) == list(expected.layers)
    for name, layer in report.layers.items():
        assert torch.equal(layer.retained, expected[name].retained), name
        assert abs(layer.alpha - expected[name].alpha) < 1e-6
        assert_alike_everywhere(layer.retained)
        numbers = torch.tensor([layer.alpha, layer.projection_coefficient], dtype=torch.float64)
        assert_alike_everywhere(numbers)


def assert_retained_bits(model, old, report, transpose):
    """The retained columns of the sharded result are those of the old model in every bit."""
    before, after = old.state_dict(), model.state_dict()
    for name, layer in report.layers.items():
        w_old, w = before[f"{name}.weight"], whole(after[f"{name}.weight"])
        if transpose:
            w_old, w = w_old.T, w.T
        assert layer.retained.any() and torch.equal(w[:, layer.retained], w_old[:, layer.retained]), name


def grams_of(model, batches, **options):
    return calibrate(model, batches, progress=False, **options)


def whole_and_sharded(make, mesh=None, **options):
    old = make()
    new = tiny_models.tuned(old)
    batches = tiny_models.batches(old, count=4)
    grams = grams_of(old, batches)
    expected = copy.deepcopy(new)
    report = harmonize_model(old, expected, grams, grams, progress=False)
    for kind in ("sharded", "plain", "remembered"):
        model = sharded(copy.deepcopy(new), mesh, **options)
        before = {"sharded": lambda: sharded(copy.deepcopy(old), mesh, **options), "plain": lambda: old}.get(kind)
        if before is None:
            # The model itself before it was tuned, in the place of another model.
            model = sharded(copy.deepcopy(old), mesh, **options)
            before = RememberedWeights.of(model)
            for name, value in model.state_dict().items():
                value.to_local().copy_(new.state_dict()[name][part_of(value)])
        else:
            before = before()
        calls = [before] * isinstance(before, torch.nn.Module) + [model]
        for called in calls:  # a forward leaves the root's weights gathered
            called(**{key: value for key, value in batches[0].items() if key != "labels"})
        with without_gathering():
            ours = harmonize_model(before, model, grams, grams, progress=False)
        assert_same_decisions(ours, report)
        assert_same_weights(model, expected, rtol=0, atol=1e-7)
        assert_retained_bits(model, old, ours, transpose=make is tiny_models.gpt2)
        batch = mine(batches)[0]
        torch.testing.assert_close(tiny_models.logits(model, batch), tiny_models.logits(expected, batch))


@on(2)
def check_llama():
    whole_and_sharded(tiny_models.llama)


@on(2)
def check_llava():
    whole_and_sharded(tiny_models.llava)


@on(2)
def check_conv1d():
    whole_and_sharded(tiny_models.gpt2)


@on(2)
def check_columns_sharded():
    whole_and_sharded(tiny_models.llama, shard_placement_fn=lambda p: Shard(1 if p.dim() > 1 else 0))


@on(2)
def check_mixed_precision():
    """Activations and gathered weights in bfloat16, shards in float32: what is harmonized is float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    old = tiny_models.llama()
    batches = tiny_models.batches(old, count=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    before, model = (sharded(m, mp_policy=policy) for m in (copy.deepcopy(old), tiny_models.tuned(old)))
    grams = [grams_of(called, mine(batches)).all_reduce_() for called in (before, model)]
    expected = tiny_models.tuned(old)
    report = harmonize_model(old, expected, *grams, progress=False)
    ours = harmonize_model(before, model, *grams, progress=False)
    assert_same_decisions(ours, report)
    assert_same_weights(model, expected, rtol=0, atol=1e-7)


@on(4)
def check_replicated_shards():
    whole_and_sharded(tiny_models.llama, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


@on(2)
def check_output_granularity_and_calibration_of_each_process():
    old = tiny_models.llama()
    new = tiny_models.tuned(old)
    batches = tiny_models.batches(old, count=4)
    config = HPAConfig(granularity="output")
    expected = copy.deepcopy(new)
    report = harmonize_model(old, expected, grams_of(old, batches), grams_of(new, batches), config, progress=False)
    old_sharded, model = sharded(copy.deepcopy(old)), sharded(new)
    grams = [grams_of(called, mine(batches)).all_reduce_() for called in (old_sharded, model)]
    ours = harmonize_model(old_sharded, model, *grams, config, progress=False)
    assert_same_decisions(ours, report)
    assert_same_weights(model, expected)


@on(2)
def check_the_output_head_in_the_root():
    """FSDP2 keeps the root's weights gathered after a forward; what is written to these is lost."""
    for tie in (False, True):
        old = tiny_models.llama(tie=tie)
        new = tiny_models.tuned(old)
        new.tie_weights()
        batches = tiny_models.batches(old)
        grams = grams_of(old, batches, modules="lm_head")
        expected = copy.deepcopy(new)
        report = harmonize_model(old, expected, grams, grams, modules="lm_head", progress=False)
        model = sharded(new)
        tiny_models.logits(model, batches[0])
        assert not isinstance(model.lm_head.weight, DTensor)
        ours = harmonize_model(old, model, grams, grams, modules="lm_head", progress=False)
        assert_same_decisions(ours, report)
        assert ours.warnings == report.warnings and bool(ours.warnings) == tie
        assert isinstance(model.lm_head.weight, DTensor)
        assert_same_weights(model, expected, rtol=0, atol=1e-7)


# -------------------------------------------------------------------------------------------------------------- LoRA


def lora_pair(make=tiny_models.llama, targets=("q_proj", "down_proj"), dtype=torch.float32, **options):
    base = make().to(dtype)
    return base, tiny_models.with_lora(base, list(targets), **options)


@on(2)
def check_pending_lora():
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {"use_rslora": True}),
        (torch.float32, {"r": 4, "lora_alpha": 3}),
    ):
        options.pop("r", None)
        base, adapted = lora_pair(dtype=dtype, **options)
        batches = tiny_models.batches(base, count=2)
        grams = grams_of(base, batches)
        expected = copy.deepcopy(adapted)
        report = harmonize_model(base, expected, grams, grams, progress=False)
        # A plain model takes the factors; of a sharded one the new weight is formed, and rounded once more.
        eps = torch.finfo(dtype).eps
        tolerance = {"rtol": 2 * eps, "atol": max(1e-7, 2e-3 * eps)}
        for kind in ("plain", "own base", "remembered"):
            model = sharded(copy.deepcopy(adapted))
            old = base if kind == "plain" else model.get_base_model()
            if kind == "remembered":
                with model.disable_adapter():
                    old = RememberedWeights.of(model)
                assert 0 < old.nbytes < sum(p.nbytes for p in base.parameters())
            tiny_models.logits(model, batches[0])
            ours = harmonize_model(old, model, grams, grams, progress=False)
            state = expected.state_dict()
            for name, layer in ours.layers.items():
                assert torch.equal(layer.retained, report[name].retained), (name, kind)
                assert_alike_everywhere(layer.retained)
            for name, value in model.state_dict().items():
                if "lora_B" in name:
                    assert not whole(value).any(), name
                torch.testing.assert_close(whole(value), state[name], **tolerance)
            assert len(ours) == (6 if kind == "own base" else len(report))
            torch.testing.assert_close(
                tiny_models.logits(model, batches[0]),
                tiny_models.logits(expected, batches[0]),
                rtol=0.02,
                atol=max(1e-3, eps / 2),
            )


@on(2)
def check_lora_can_be_trained_further():
    base, adapted = lora_pair()
    grams = grams_of(base, tiny_models.batches(base))
    model = sharded(adapted)
    harmonize_model(base, model, grams, grams, progress=False)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**tiny_models.batches(base)[0]).loss.backward()
    optimizer.step()
    assert any(whole(p.detach()).any() for name, p in model.named_parameters() if "lora_B" in name)


# ------------------------------------------------------------------------------------------------------- calibration


@on(2)
def check_calibration_adds_up_to_that_of_one_process():
    model = tiny_models.llava()
    batches = tiny_models.batches(model, count=5)  # three for one process, two for the other
    expected = grams_of(model, batches, modules=r".*language_model\..*|.*vision.*fc1")
    calls = []
    spread = sharded(copy.deepcopy(model))
    spread.model.language_model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    grams = grams_of(spread, iter(mine(batches)), modules=r".*language_model\..*|.*vision.*fc1")
    assert len(calls) == 3, "the process with fewer batches takes part in the forwards of the others"
    assert all(isinstance(parameter, DTensor) for parameter in spread.parameters()), "the root is sharded again"
    assert grams.all_reduce_() is grams
    assert list(grams) == list(expected) and list(grams.distinct()) == list(expected.distinct())
    for name, gram in grams.distinct().items():
        assert gram.token_count == expected[name].token_count
        scale = expected[name].matrix().abs().max()
        torch.testing.assert_close(gram.matrix() / scale, expected[name].matrix() / scale, rtol=0, atol=2e-6)
        assert_alike_everywhere(gram.matrix())


@on(2)
def check_calibration_under_ddp():
    model = tiny_models.llama()
    batches = tiny_models.batches(model, count=3)
    wrapped = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    grams = grams_of(wrapped, mine(batches)).all_reduce_()
    for name, gram in grams_of(model, batches).distinct().items():
        assert grams[name].token_count == gram.token_count
        torch.testing.assert_close(grams[name].matrix(), gram.matrix(), rtol=1e-4, atol=1e-5)


@on(2)
def check_calibration_errors_reach_all():
    plain = tiny_models.llama()
    model = sharded(copy.deepcopy(plain))
    batches = tiny_models.batches(plain, count=2)
    first = dist.get_rank() == 0
    with raises_everywhere(
        ValueError, r"batches: expected at least one batch, got none \(process 1\)" if first else "got none"
    ):
        grams_of(model, batches if first else [])
    with raises_everywhere(TypeError, "batches: expected mappings, tensors or tuples"):
        grams_of(model, batches if first else [batches[0], "no"])
    short = {**batches[0], "attention_mask": batches[0]["attention_mask"], "labels": batches[0]["labels"][:, :3]}
    with raises_everywhere((ValueError, RuntimeError), "size of tensor|token_mask"):
        grams_of(model, batches if first else [short], token_mask="response")
    poisoned = {**batches[1], "inputs_embeds": plain.model.embed_tokens(batches[1]["input_ids"]).detach()}
    del poisoned["input_ids"]
    if not first:
        poisoned["inputs_embeds"][1, 9, 3] = torch.nan
    with raises_everywhere(NumericalError, r"activations hold NaN"):
        grams_of(model, [batches[0], poisoned])
    grams = grams_of(model, batches)  # the hooks are gone and the processes in step
    if not first:
        grams.pop(next(reversed(grams)))
    with raises_everywhere(ValueError, "every process must calibrate the same modules"):
        grams.all_reduce_()


@on(2)
def check_reduced_grams():
    model = tiny_models.llama()
    batches = tiny_models.batches(model, count=4)
    expected = grams_of(model, batches)
    grams = grams_of(model, mine(batches))
    distinct = len(grams.distinct())
    diagonals = reduce_grams(grams, 0.02)
    assert not grams and list(diagonals) == list(expected)
    assert len({id(one) for one in diagonals.values()}) == distinct
    for name, one in diagonals.items():
        assert one.token_count == expected[name].token_count and one.precision_bits == 32
        torch.testing.assert_close(one.inverse_diagonal(0.02), expected[name].inverse_diagonal(0.02), rtol=2e-4, atol=0)
        assert_alike_everywhere(one.sum_inverse)
        assert torch.equal(one.dead, expected[name].dead_columns())
    old, new = sharded(copy.deepcopy(model)), sharded(tiny_models.tuned(model))
    harmonize_model(old, new, diagonals, diagonals, HPAConfig(damping=0.02), progress=False)
    grams = grams_of(model, mine(batches))
    if dist.get_rank() == 1:
        grams["model.layers.1.mlp.down_proj"]._sum[3, 3] = torch.nan
    with raises_everywhere(NumericalError, r"model.layers.1.mlp.down_proj: activations hold NaN"):
        reduce_grams(grams)


# ------------------------------------------------------------------------------------------------------------- errors


@on(2)
def check_errors_reach_all_and_nothing_is_written():
    old = tiny_models.llama()
    new = tiny_models.tuned(old)
    grams = grams_of(old, tiny_models.batches(old))
    first = dist.get_rank() == 0
    model = sharded(copy.deepcopy(new))
    name = "model.layers.1.mlp.up_proj"
    before = {key: value.to_local().clone() for key, value in model.state_dict().items()}

    def refuse(kind, message, model_old=old, model_new=model, safety=grams, **options):
        with raises_everywhere(kind, message):
            harmonize_model(model_old, model_new, safety, grams, progress=False, **options)

    refuse(
        ValueError,
        f"{name}: no Gram in safety",
        safety=grams if first else {k: v for k, v in grams.items() if k != name},
    )
    refuse(
        ValueError, f"{name}: its Gram in safety has counted no", safety=grams if first else {**grams, name: Gram(32)}
    )
    refuse(
        ValueError,
        f"{name}: gram.safety: expected the same Gram on every process",
        safety=grams if first else {**grams, name: Gram(32).update(torch.randn(40, 32))},
    )
    refuse(ValueError, "modules, config: expected the same", modules=".*up_proj" if first else ".*down_proj")
    refuse(ValueError, "no linear layer of .* matches", modules=".*up_proj" if first else "nothing")
    half = copy.deepcopy(old)
    half.get_submodule(name).weight.data = half.get_submodule(name).weight.data.half()
    refuse(TypeError, f"{name}: w_new: expected dtype torch.float16", model_old=old if first else half)
    poisoned = sharded(copy.deepcopy(new))
    if not first:
        poisoned.get_submodule(name).weight.detach().to_local()[2, 2] = torch.nan
    refuse(NumericalError, f"{name}: layer_new: the part .* of process 1 holds 1 NaN", model_new=poisoned)
    refuse(
        ValueError, "model_old: expected the same kind of tensor as model_new, a plain", model_old=model, model_new=new
    )
    columns = sharded(copy.deepcopy(old), shard_placement_fn=lambda p: Shard(1 if p.dim() > 1 else 0))
    refuse(ValueError, r"model_old: expected mesh \(2,\) with placements .* like model_new", model_old=columns)
    refuse(ValueError, "share this weight", model_old=model)
    for key, value in model.state_dict().items():
        assert torch.equal(value.to_local(), before[key]), key


@on(2)
def check_fsdp1_is_refused_by_name():
    from torch.distributed.fsdp import FullyShardedDataParallel

    old = tiny_models.llama()
    grams = grams_of(old, tiny_models.batches(old))
    wrapped = FullyShardedDataParallel(copy.deepcopy(old), device_id=torch.device("cpu"))
    with raises_everywhere(ValueError, r"model_new: .* FullyShardedDataParallel \(FSDP1\).*fsdp_version=2"):
        harmonize_model(old, wrapped, grams, grams, progress=False)
