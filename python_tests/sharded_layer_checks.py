"""Checks of harmonize and Gram on DTensors; run by test_distributed.py in 2 and 4 gloo processes."""

from __future__ import annotations

import dataclasses
import re
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from helpers import assert_same_bits
from process_group import on
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hpa_ext import Gram, GramPair, HPAConfig, NumericalError, harmonize, harmonize_
from hpa_ext.hpa.sharded import ShardedUpdate
from hpa_ext.hpa.update import DenseUpdate

# Sums over rows are formed per process in float32 and then added in float64: the last bits differ from one pass.
SUMS = {"rtol": 2e-6, "atol": 0}


def weights(rows=23, columns=40, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    new = old + 0.05 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return old.to(dtype), new.to(dtype)


def pair(columns=40, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = 0.1 + torch.rand(columns, generator=generator)
    return GramPair(*(Gram(columns).update(torch.randn(300, columns, generator=generator) * scale) for _ in range(2)))


def line_mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),))


@contextmanager
def without_gathering():
    """Within the context nobody may gather or redistribute a DTensor, implicitly neither."""
    originals = DTensor.full_tensor, DTensor.redistribute, dist.all_gather_into_tensor

    def refuse(*arguments, **keywords):
        raise AssertionError("a weight was gathered")

    DTensor.full_tensor = DTensor.redistribute = dist.all_gather_into_tensor = refuse
    try:
        yield
    finally:
        DTensor.full_tensor, DTensor.redistribute, dist.all_gather_into_tensor = originals


def assert_alike_everywhere(tensor):
    """Bit-identical on every process."""
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copy, tensor) for copy in copies)


def compare(mesh, placements, old, new, config):
    """Sharded equals whole: decisions exactly, weights to a rounding of theirs; retained columns in every bit."""
    grams = pair(old.shape[1])
    expected, told = harmonize(old, new, grams, 0.5, config, return_report=True)
    with without_gathering():
        result, report = harmonize(
            distribute_tensor(old, mesh, placements), distribute_tensor(new, mesh, placements), grams, 0.5, config,
            return_report=True,
        )  # fmt: skip
    assert isinstance(result, DTensor) and tuple(result.placements) == tuple(placements)
    assert result.device_mesh == mesh and result.shape == old.shape and result.dtype == old.dtype
    for key in ("retained", "safety_columns", "task_columns"):
        assert torch.equal(getattr(report, key), getattr(told, key)), key
        assert_alike_everywhere(getattr(report, key))
    numbers = torch.tensor([report.alpha, report.projection_coefficient], dtype=torch.float64)
    assert_alike_everywhere(numbers)
    torch.testing.assert_close(
        numbers, torch.tensor([told.alpha, told.projection_coefficient], dtype=torch.float64), rtol=1e-5, atol=1e-9
    )
    whole = result.full_tensor()
    keep = told.retained if config.granularity == "input" else told.retained[:, None]
    assert_same_bits(torch.where(keep, whole, 0), torch.where(keep, old, 0))
    # The coefficient moves by float32 rounding, and with it a result by one step of its dtype.
    torch.testing.assert_close(whole, expected, rtol=2 * torch.finfo(old.dtype).eps, atol=1e-7)


def all_placements(config, dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    mesh = line_mesh()
    for dtype in dtypes:
        for rows in (24, 23, 1) if dtype == torch.float32 else (23,):  # even, uneven, processes without rows
            old, new = weights(rows, dtype=dtype)
            for placement in (Shard(0), Shard(1), Replicate()):
                compare(mesh, [placement], old, new, config)
        old, new = weights(9, 41, dtype)
        compare(mesh, [Shard(1)], old, new, config)


@on(2)
def check_input_granularity():
    all_placements(HPAConfig())


@on(2)
def check_output_granularity():
    all_placements(HPAConfig(granularity="output"), (torch.float32,))
    all_placements(HPAConfig(granularity="output", importance="product", orthogonal=False), (torch.float32,))


@on(4)
def check_four_processes():
    all_placements(HPAConfig(), (torch.float32,))
    all_placements(HPAConfig(granularity="output"), (torch.float32,))


@on(4)
def check_meshes_of_two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for config in (HPAConfig(), HPAConfig(granularity="output")):
        for rows in (23, 3, 1):
            old, new = weights(rows)
            for placements in (
                (Replicate(), Shard(0)), (Replicate(), Shard(1)), (Shard(0), Replicate()), (Shard(0), Shard(1)),
                (Shard(0), Shard(0)),
            ):  # fmt: skip
                compare(mesh, placements, old, new, config)


def count_collectives(work):
    """The shapes that `work` hands to all_reduce."""
    original, shapes = dist.all_reduce, []

    def counting(tensor, *arguments, **keywords):
        shapes.append(tuple(tensor.shape))
        return original(tensor, *arguments, **keywords)

    dist.all_reduce = counting
    try:
        result = work()
    finally:
        dist.all_reduce = original
    return result, shapes


@on(2)
def check_one_all_reduce_of_a_vector_and_two_scalars():
    old, new = weights()
    expected = DenseUpdate(old, new).column_sums()
    for placement in (Shard(0), Shard(1), Replicate()):
        update = ShardedUpdate(*(distribute_tensor(w, line_mesh(), [placement]) for w in (old, new)))
        sums, shapes = count_collectives(update.column_sums)
        assert shapes == ([] if placement.is_replicate() else [(40 + 2,)])
        for ours, whole in zip(sums, expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=2e-6, atol=1e-5)
            assert_alike_everywhere(ours)
        weight = torch.rand(40)
        rows, shapes = count_collectives(lambda update=update, weight=weight: update.row_sums([weight, 2 * weight]))
        assert shapes == ([] if placement.is_replicate() else [(2, 23)])
        torch.testing.assert_close(torch.stack(rows)[0], DenseUpdate(old, new).row_sums([weight])[0], **SUMS)


@on(4)
def check_replicas_exchange_no_sums():
    mesh = init_device_mesh("cpu", (2, 2))
    update = ShardedUpdate(*(distribute_tensor(w, mesh, [Replicate(), Shard(0)]) for w in weights()))
    original, groups = dist.all_reduce, []

    def counting(tensor, *arguments, group=None, **keywords):
        groups.append(dist.get_process_group_ranks(group))
        return original(tensor, *arguments, group=group, **keywords)

    dist.all_reduce = counting
    try:
        update.column_sums()
    finally:
        dist.all_reduce = original
    first = dist.get_rank() // 2 * 2
    assert groups == [[first, first + 1]]


@on(2)
def check_the_first_process_decides():
    """Machines that round otherwise may choose otherwise: all take the first one's mask, alpha and coefficient."""
    from hpa_ext.hpa import plan

    original = plan.select

    def otherwise(groups, config):
        ((chosen,),) = original(groups, config)
        if dist.get_rank() == 0:
            return [[chosen]]
        return [[dataclasses.replace(chosen, retained=chosen.retained.roll(1), alpha=chosen.alpha + 0.1)]]

    old, new = weights()
    expected, told = harmonize(old, new, pair(), return_report=True)
    plan.select = otherwise
    try:
        sharded = [distribute_tensor(w, line_mesh(), [Shard(0)]) for w in (old, new)]
        result, report = harmonize(*sharded, pair(), return_report=True)
    finally:
        plan.select = original
    assert torch.equal(report.retained, told.retained) and report.alpha == told.alpha
    torch.testing.assert_close(result.full_tensor(), expected, rtol=2e-7, atol=1e-7)


@on(2)
def check_any_error_is_told():
    from hpa_ext.agreement import Agreement

    processes = Agreement.of_meshes([line_mesh()])
    first = dist.get_rank() == 0
    with processes.together():
        pass
    for error, kind in (
        (ValueError("größer " * 2000), ValueError),
        (KeyError("missing"), RuntimeError),
        (OSError("disk"), RuntimeError),
        (NumericalError("odd", module="a.b", failing_minor=3, damping=0.5), NumericalError),
    ):
        try:
            with processes.together():
                if not first:
                    raise error
        except Exception as raised:
            told = raised
        else:
            raise AssertionError(f"{error!r} was not told")
        if not first:
            assert told is error
            continue
        assert type(told) is kind and str(error)[:5] in str(told)
        if kind is NumericalError:
            assert (told.module, told.failing_minor, told.damping) == ("a.b", 3, 0.5)
            assert told.message == "odd (process 1)"


@on(2)
def check_in_place_and_modules():
    from transformers.pytorch_utils import Conv1D

    old, new = weights(24)
    expected = harmonize(old, new, pair())
    for kind in ("tensor", "Linear", "Conv1D"):
        transpose = kind == "Conv1D"
        sharded = [
            distribute_tensor(w.T.contiguous() if transpose else w.clone(), line_mesh(), [Shard(0)]) for w in (old, new)
        ]
        layers = sharded
        if kind != "tensor":
            layers = [Conv1D(24, 40) if transpose else torch.nn.Linear(40, 24, bias=False) for _ in sharded]
            for layer, weight in zip(layers, sharded, strict=True):
                layer.weight = torch.nn.Parameter(weight)
        result = harmonize(*layers, pair())
        assert tuple(result.placements) == (Shard(0),)
        before = sharded[1].to_local().data_ptr()
        report = harmonize_(*layers, pair())
        written = layers[1] if kind == "tensor" else layers[1].weight.detach()
        assert written.to_local().data_ptr() == before and report.retained_count == 4
        for value in (result, written):
            whole = value.full_tensor()
            torch.testing.assert_close(whole.T if transpose else whole, expected, rtol=2e-7, atol=1e-7)


@contextmanager
def raises_everywhere(kind, message):
    try:
        yield
    except kind as error:
        assert isinstance(error, kind), type(error)
        assert re.search(message, str(error)), f"{message!r} is not in {str(error)!r}"
    else:
        raise AssertionError(f"expected {kind.__name__}: {message}")


@on(2)
def check_what_is_wrong_on_one_process_raises_on_all():
    first = dist.get_rank() == 0
    old, new = weights()
    mesh = line_mesh()
    sharded = lambda w: distribute_tensor(w.clone(), mesh, [Shard(0)])  # noqa: E731
    before = sharded(new)
    for value in (torch.nan, torch.inf):
        poisoned = sharded(new)
        if not first:
            poisoned.to_local()[0, 3] = value
        with raises_everywhere(NumericalError, r"layer_new: the part \[11, 40\] of process 1 holds 1 NaN or Inf"):
            harmonize_(sharded(old), poisoned, pair())
    with raises_everywhere(NumericalError, "too large: their squares overflow"):
        harmonize(sharded(old * 1e25), sharded(new * 1e25), pair())
    good, target = pair(), sharded(new)
    cases = {
        r"gram.task: expected \[40, 40\]": (ValueError, GramPair(good.safety, Gram(7).update(torch.ones(3, 7)))),
        "gram.safety: expected a Gram or a matrix": (TypeError, GramPair("no", good.task)),
        "the gram has counted no tokens|the Gram has counted no tokens": (ValueError, GramPair(Gram(40), good.task)),
        "not positive definite": (NumericalError, GramPair(-torch.eye(40), good.task)),
        "expected a GramPair": (TypeError, 3),
    }
    for message, (kind, wrong) in cases.items():
        with raises_everywhere(kind, message):
            harmonize_(sharded(old), target, good if first else wrong)
    with raises_everywhere(ValueError, r"gram.task: expected the same Gram on every process.*all_reduce_"):
        harmonize_(sharded(old), target, GramPair(good.safety, good.task if first else pair(seed=7).task))
    with raises_everywhere(ValueError, r"config: expected the same"):
        harmonize_(sharded(old), target, good, config=HPAConfig(alpha_max=0.8 if first else 0.9))
    with raises_everywhere(ValueError, "depth: expected a number"):
        harmonize_(sharded(old), target, good, 0.5 if first else 2.0)
    with raises_everywhere(ValueError, "is the same memory as layer_old"):
        harmonize_(target, target, good)
    assert torch.equal(target.to_local(), before.to_local())


@on(2)
def check_other_ways_of_dividing_are_refused():
    from torch.distributed.tensor.placement_types import _StridedShard

    old, new = weights(24)
    mesh, grams = line_mesh(), pair()
    rows = [distribute_tensor(w, mesh, [Shard(0)]) for w in (old, new)]
    partial = [DTensor.from_local(w, mesh, [Partial()]) for w in (old, new)]
    with raises_everywhere(ValueError, r"layer_old: expected a DTensor with the placements Shard\(0\), .* got mesh"):
        harmonize(*partial, grams)
    plane = init_device_mesh("cpu", (1, 2))
    strided = [
        DTensor.from_local(rows[0].to_local(), plane, [_StridedShard(0, split_factor=2), Shard(0)], run_check=False)
    ] * 2
    with raises_everywhere(ValueError, r"expected a DTensor with the placements Shard\(0\)"):
        harmonize(*strided, grams)
    with raises_everywhere(ValueError, r"layer_old: expected the same kind of tensor as layer_new"):
        harmonize(old, rows[1], grams)
    with raises_everywhere(ValueError, r"layer_old: expected the same kind of tensor as layer_new, a plain tensor"):
        harmonize(rows[0], new, grams)
    columns = distribute_tensor(new, mesh, [Shard(1)])
    with raises_everywhere(ValueError, r"layer_old: expected mesh \(2,\) with placements .*like layer_new.*redistrib"):
        harmonize(rows[0], columns, grams)
    with raises_everywhere(ValueError, r"w_new: expected shape \[24, 40\]"):
        harmonize(rows[0], distribute_tensor(new[:22], mesh, [Shard(0)]), grams)
    with raises_everywhere(TypeError, r"w_new: expected dtype"):
        harmonize(rows[0], distribute_tensor(new.half(), mesh, [Shard(0)]), grams)


# ------------------------------------------------------------------------------------------------------------ Grams


def own_part(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


@on(2)
def check_grams_of_all_processes_equal_one():
    from hpa_ext import gram_exchange as module

    x = torch.randn(400, 70)
    whole = Gram(70).update(x)
    for rows in (512, 16):  # in one strip, in several
        module._ROWS_AT_A_TIME, kept = rows, module._ROWS_AT_A_TIME
        gram = Gram(70).update(own_part(x))
        gram.inverse_diagonal()
        assert gram.all_reduce_() is gram and gram.token_count == 400
        module._ROWS_AT_A_TIME = kept
        # Float32 sums of other groupings of tokens.
        torch.testing.assert_close(gram.matrix(), whole.matrix(), rtol=0, atol=2e-6)
        assert torch.equal(gram.matrix(), gram.matrix().T)
        assert_alike_everywhere(gram.matrix())
        torch.testing.assert_close(gram.inverse_diagonal(), whole.inverse_diagonal(), rtol=1e-5, atol=0)
    spoilt = Gram(70).update(own_part(x))
    if dist.get_rank() == 1:
        with suppress(NumericalError):
            spoilt.update(torch.full((1, 70), torch.nan))
    with raises_everywhere(NumericalError, "activations hold NaN"):
        spoilt.all_reduce_().matrix()


@on(2)
def check_activations_as_dtensors():
    mesh = line_mesh()
    x = torch.randn(6, 5, 16)
    mask = torch.rand(6, 5) < 0.7
    whole = Gram(16).update(x, mask)
    for dimension in (0, 1):
        spread = distribute_tensor(x, mesh, [Shard(dimension)])
        gram = Gram(16).update(spread, distribute_tensor(mask, mesh, [Shard(dimension)]))
        assert gram.token_count < whole.token_count
        torch.testing.assert_close(gram.all_reduce_(mesh.get_group()).matrix(), whole.matrix(), rtol=1e-5, atol=1e-6)
        assert gram.token_count == whole.token_count
    plain_mask = Gram(16).update(distribute_tensor(x, mesh, [Shard(0)]), own_part(mask)).all_reduce_()
    assert plain_mask.token_count == whole.token_count
    same = Gram(16).update(distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(mask, mesh, [Replicate()]))
    assert torch.equal(same.matrix(), whole.matrix())
    gram = Gram(16)
    for placement in (Shard(2), Partial()):
        wrong = DTensor.from_local(x, mesh, [placement])
        with raises_everywhere(ValueError, r"x: expected a DTensor that is replicated or sharded over tokens"):
            gram.update(wrong)
    with raises_everywhere(ValueError, r"token_mask: expected mesh .* like x"):
        gram.update(distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(mask, mesh, [Replicate()]))
    with raises_everywhere(ValueError, r"token_mask: expected a plain tensor"):
        gram.update(x, distribute_tensor(mask, mesh, [Replicate()]))
    assert gram.token_count == 0
