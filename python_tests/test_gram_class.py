"""hpa_ext.Gram: the accumulator, its count of tokens, and H = 2/n sum x^T x."""

from __future__ import annotations

import numpy
import pytest
import torch
from helpers import DTYPES, assert_same_bits, integers, normal, refuses

from hpa_ext import Gram, GramPair, NumericalError, ops


def filled(device="cpu", tokens=40, size=17):
    return Gram(size, device=device).update(integers(tokens, size, device=device))


def test_new(device):
    gram = Gram(17, device=device)
    assert gram.in_features == 17
    assert gram.device.type == device.type
    assert gram.token_count == 0
    assert Gram(3).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (7,), (3, 7), (2, 3, 7)])
def test_matrix_is_twice_the_mean(device, dtype, lead):
    x = integers(*lead, 17, dtype=dtype, device=device)
    gram = Gram(17, device=device)
    assert gram.update(x) is gram
    flat = x.double().reshape(-1, 17)
    assert gram.token_count == len(flat)
    assert isinstance(gram.token_count, int)
    torch.testing.assert_close(gram.matrix().double(), (flat.mT @ flat) * 2 / len(flat), rtol=2e-7, atol=0)
    assert torch.equal(gram.matrix(normalization="sum").double(), 2 * flat.mT @ flat)
    assert gram.matrix().dtype == torch.float32


def test_the_factor_makes_it_the_hessian_of_the_squared_error():
    x = normal(30, 5, dtype=torch.float64)
    weight = torch.zeros(5, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda w: (x @ w).square().mean(), weight)
    torch.testing.assert_close(Gram(5).update(x.float()).matrix().double(), hessian, rtol=1e-5, atol=1e-6)


def test_mask(device):
    x = integers(2, 9, 17, device=device)
    mask = (torch.rand(2, 9) < 0.5).to(device)
    x[~mask] = torch.nan
    gram = Gram(17, device=device).update(x, mask).update(x, token_mask=mask)
    counted = x[mask].double()
    assert gram.token_count == 2 * len(counted)
    assert torch.equal(gram.matrix("sum").double(), 4 * counted.mT @ counted)


def test_masks_of_no_token_count_none(device):
    gram = Gram(5, device=device).update(
        torch.ones(3, 5, device=device), torch.zeros(3, dtype=torch.bool, device=device)
    )
    assert gram.token_count == 0
    with pytest.raises(ValueError, match="counted no tokens"):
        gram.matrix()


def test_updates_add_up(device):
    x = integers(41, 17, device=device)
    whole, parts = Gram(17, device=device).update(x), Gram(17, device=device)
    for part in x.split([1, 0, 30, 10]):
        parts.update(part)
    assert parts.token_count == whole.token_count == 41
    assert_same_bits(parts.matrix(), whole.matrix())


def test_matrix_is_a_new_tensor(device):
    gram = filled(device)
    before = gram.matrix()
    gram.matrix().zero_()
    assert_same_bits(gram.matrix(), before)


def test_activations_with_a_graph(device):
    gram = Gram(5, device=device)
    for dtype in (torch.float32, torch.float64):
        gram.update(normal(9, 5, dtype=dtype, device=device).requires_grad_())
    assert not gram.matrix().requires_grad


# -------------------------------------------------------------------------------------------------- inverse


@pytest.mark.parametrize("normalization", ["mean", "sum"])
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_inverse_diagonal(device, normalization, damping):
    gram = filled(device)
    h = gram.matrix(normalization).double()
    h = h + damping * h.diagonal().mean() * torch.eye(17, device=device, dtype=torch.float64)
    result = gram.inverse_diagonal(damping, normalization=normalization)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), torch.linalg.inv(h).diagonal(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result, ops.inverse_diagonal(gram.matrix(normalization), damping), rtol=1e-5, atol=0)


def test_inverse_diagonal_defaults_to_the_damping_of_hpa(device):
    gram = filled(device)
    assert_same_bits(gram.inverse_diagonal(), gram.inverse_diagonal(damping=0.01))


def test_inverse_diagonal_is_kept(device, monkeypatch):
    gram = filled(device)
    original, calls = ops.inverse_diagonal, []

    def counting(*arguments, **keywords):
        calls.append(arguments)
        return original(*arguments, **keywords)

    monkeypatch.setattr(ops, "inverse_diagonal", counting)
    first = gram.inverse_diagonal(0.01)
    assert_same_bits(gram.inverse_diagonal(0.01), first)
    assert len(calls) == 1
    gram.inverse_diagonal(0.02)
    gram.inverse_diagonal(0.01, normalization="sum")
    gram.inverse_diagonal_report(0.01, rescue="none")
    assert len(calls) == 4
    gram.inverse_diagonal(0.02)
    assert len(calls) == 4


@pytest.mark.parametrize("change", ["update", "masked update", "merge_", "spoilt update"])
def test_inverse_diagonal_is_forgotten_when_the_gram_changes(device, change):
    gram = filled(device)
    gram.inverse_diagonal()
    x = 3 * integers(20, 17, device=device)
    if change == "update":
        gram.update(x)
    elif change == "masked update":
        gram.update(x, torch.arange(20, device=device) < 10)
    elif change == "merge_":
        gram.merge_(Gram(17, device=device).update(x))
    else:
        x[3, 3] = torch.nan
        try:
            gram.update(x)
        except NumericalError:
            assert device.type == "cpu"
        with pytest.raises(NumericalError):
            gram.inverse_diagonal()
        return
    torch.testing.assert_close(gram.inverse_diagonal(), ops.inverse_diagonal(gram.matrix(), 0.01), rtol=1e-5, atol=0)


def test_inverse_diagonal_report(device):
    report = filled(device).inverse_diagonal_report(0.02)
    assert float(report.damping_used) == 0.02
    assert int(report.precision_bits) == 32
    assert int(report.failed_minor) == 0


def test_rescue_can_be_forbidden(device):
    gram = Gram(5, device=device).update(torch.ones(1, 5, device=device))
    with pytest.raises(NumericalError, match="not positive definite"):
        gram.inverse_diagonal_report(0.0, rescue="none")
    report = gram.inverse_diagonal_report(0.0)
    assert float(report.damping_used) > 0


def test_bad_damping_and_normalization():
    gram = filled()
    with refuses(ValueError, "damping"):
        gram.inverse_diagonal(-0.01)
    with refuses(ValueError, "normalization"):
        gram.inverse_diagonal(normalization="median")
    with refuses(ValueError, "normalization"):
        gram.matrix("median")


def test_dead_columns(device):
    x = integers(30, 17, device=device)
    x[:, [2, 16]] = 0
    x[0, 5] = 1
    gram = Gram(17, device=device).update(x)
    assert gram.dead_columns().dtype == torch.bool
    assert gram.dead_columns()[[2, 16]].all()
    assert torch.equal(gram.dead_columns(), ~x.any(0))


# ------------------------------------------------------------------------------------------- refusals, errors


@pytest.mark.parametrize("size", [0, -1, 1.0, "5", None, True, (5,), torch.tensor(5)])
def test_bad_in_features(size):
    with refuses(ValueError, "in_features"):
        Gram(size)


def test_no_tokens(device):
    for gram in (Gram(5, device=device), Gram(5, device=device).update(torch.zeros(0, 5, device=device))):
        for ask in (gram.matrix, gram.inverse_diagonal):
            with pytest.raises(ValueError, match="counted no tokens"):
                ask()


MASK = torch.ones(3, dtype=torch.bool)
BAD = {
    "x is a list": (([[1.0] * 17],), TypeError, "x"),
    "x is an array": ((numpy.ones((3, 17), dtype="float32"),), TypeError, "x"),
    "x is None": ((None,), TypeError, "x"),
    "x is of integers": ((torch.ones(3, 17, dtype=torch.int64),), TypeError, "x"),
    "x is too wide": ((torch.ones(3, 18),), ValueError, "gram"),
    "x is elsewhere": ((torch.ones(3, 17, device="meta"),), ValueError, "x"),
    "mask is of floats": ((torch.ones(3, 17), MASK.float()), TypeError, "token_mask"),
    "mask is too long": ((torch.ones(4, 17), MASK), ValueError, "token_mask"),
    "mask is a list": ((torch.ones(3, 17), [True] * 3), TypeError, "token_mask"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_refused_update_changes_nothing(bad):
    arguments, exception, name = BAD[bad]
    gram = filled()
    before = gram.matrix()
    with refuses(exception, name):
        gram.update(*arguments)
    assert gram.token_count == 40
    assert_same_bits(gram.matrix(), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_activations_that_are_not_finite(value):
    x = normal(9, 17)
    x[4, [3, 8]] = value
    gram = Gram(17)
    with pytest.raises(NumericalError, match=r"NaN, Inf or values too large.* 2 of 17 features \(3, 8\)") as caught:
        gram.update(x)
    assert caught.value.failing_minor == -1
    assert not bool(gram.is_finite())
    for ask in (gram.matrix, gram.inverse_diagonal, gram.check_finite):
        with pytest.raises(NumericalError, match="NaN, Inf"):
            ask()
    with pytest.raises(NumericalError):
        gram.update(normal(9, 17))


def test_finite(device):
    gram = filled(device)
    assert bool(gram.is_finite())
    gram.check_finite()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_activations_that_are_not_finite_on_a_device():
    x = normal(9, 17, device="cuda")
    x[4, 3] = torch.nan
    gram = Gram(17, device="cuda").update(x)  # found when it is asked, so that nothing synchronises before
    with pytest.raises(NumericalError, match="NaN, Inf"):
        gram.matrix()


# ----------------------------------------------------------------------------------------------- merge, state


def test_merge(device):
    x, y = integers(20, 17, device=device), integers(30, 17, device=device)
    both = Gram(17, device=device).update(x).update(y)
    gram, other = Gram(17, device=device).update(x), Gram(17, device=device).update(y)
    assert gram.merge_(other) is gram
    assert gram.token_count == 50
    assert other.token_count == 30
    assert_same_bits(gram.matrix(), both.matrix())
    gram.merge_(Gram(17, device=device))
    assert_same_bits(gram.matrix(), both.matrix())
    gram.merge_(gram)
    assert gram.token_count == 100
    assert_same_bits(gram.matrix(), both.matrix())


def test_bad_merge():
    gram = filled()
    before = gram.matrix()
    for other, exception in [
        (gram.matrix(), TypeError),
        (None, TypeError),
        (Gram(18), ValueError),
        (Gram(17, device="meta"), ValueError),
    ]:
        with refuses(exception, "other"):
            gram.merge_(other)
    assert_same_bits(gram.matrix(), before)


def test_state_round_trip(device, tmp_path):
    gram = filled(device)
    state = gram.state_dict()
    assert set(state) == {"sum", "token_count"}
    assert state["sum"].dtype == torch.float32
    assert state["token_count"].dtype == torch.int64
    torch.save(state, tmp_path / "gram.pt")
    restored = Gram.from_state_dict(torch.load(tmp_path / "gram.pt"))
    assert restored.token_count == 40
    assert restored.device.type == device.type
    assert_same_bits(restored.matrix(), gram.matrix())
    restored.update(integers(5, 17, device=device))
    assert gram.token_count == 40
    assert restored.token_count == 45


def test_restored_gram_owns_its_sum():
    gram = filled()
    before, restored = gram.matrix(), Gram.from_state_dict(gram.state_dict())
    restored.update(torch.ones(1, 17))
    assert_same_bits(gram.matrix(), before)


def test_state_of_an_empty_gram():
    restored = Gram.from_state_dict(Gram(5).state_dict())
    assert restored.token_count == 0
    assert restored.in_features == 5


GOOD = {"sum": torch.eye(5), "token_count": torch.tensor(3)}


BAD_STATES = {
    "is None": None,
    "is empty": {},
    "has no count": {"sum": torch.eye(5)},
    "has no sum": {"token_count": torch.tensor(3)},
    "has a sum in float64": {**GOOD, "sum": torch.eye(5, dtype=torch.float64)},
    "has a vector": {**GOOD, "sum": torch.ones(5)},
    "has a rectangle": {**GOOD, "sum": torch.ones(5, 4)},
    "has a batch": {**GOOD, "sum": torch.ones(1, 5, 5)},
    "has no features": {**GOOD, "sum": torch.ones(0, 0)},
    "has a list": {**GOOD, "sum": [[1.0]]},
    "has None": {**GOOD, "sum": None},
    "has a negative count": {**GOOD, "token_count": torch.tensor(-1)},
    "has a negative int": {**GOOD, "token_count": -1},
    "has two counts": {**GOOD, "token_count": torch.tensor([3, 4])},
    "has a word for a count": {**GOOD, "token_count": "many"},
    "has None for a count": {**GOOD, "token_count": None},
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_bad_state(bad):
    with pytest.raises((ValueError, TypeError), match=r"^(state.*|in_features): expected .+, got .+"):
        Gram.from_state_dict(BAD_STATES[bad])


def test_repr(device):
    text = repr(filled(device))
    assert text == f"Gram(in_features=17, device='{filled(device).device}', token_count=40)"


def test_pair():
    pair = GramPair(safety=filled(), task=torch.eye(17))
    assert pair.safety is pair[0]
    assert pair.task is pair[1]


# ------------------------------------------------------------------------------------------------ distributed


def _worker(rank, world, rendezvous, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        gram = Gram(17).update(share_of(rank))
        gram.inverse_diagonal()
        assert gram.all_reduce_() is gram
        torch.save((gram.state_dict(), gram.inverse_diagonal()), f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def share_of(rank):
    """What the process of this rank has seen: other tokens, and another number of them."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-4, 5, (40 + 10 * rank, 17), generator=generator).float()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_all_reduce_of_two_processes(tmp_path):
    torch.multiprocessing.spawn(_worker, (2, tmp_path / "rendezvous", tmp_path), nprocs=2)
    total = Gram(17).update(share_of(0)).update(share_of(1))
    for rank in range(2):
        state, inverse = torch.load(tmp_path / f"{rank}.pt")
        restored = Gram.from_state_dict(state)
        assert restored.token_count == 90
        assert_same_bits(restored.matrix(), total.matrix())
        torch.testing.assert_close(inverse, total.inverse_diagonal(), rtol=1e-5, atol=0)


def test_all_reduce_without_a_process_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        filled().all_reduce_()


def test_the_kept_inverse_diagonal_is_safe_from_callers():
    gram = Gram(4).update(torch.randn(20, 4))
    first = gram.inverse_diagonal()
    expected = first.clone()
    first.zero_()
    assert torch.equal(gram.inverse_diagonal(), expected)


def test_made_in_inference_mode_and_used_outside():
    x = torch.randn(5, 4)
    with torch.inference_mode():
        gram = Gram(4).update(x)
    gram.merge_(Gram(4).update(x))
    assert gram.token_count == 10


def test_autocast_does_not_round_the_torch_path(monkeypatch):
    monkeypatch.setattr("hpa_ext.ops.gram.backend_of", lambda name, tensor: "torch")
    x = torch.randn(50, 8)
    expected = Gram(8).update(x).matrix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Gram(8).update(x).matrix(), expected)


def test_a_collection_counts_shared_grams_once():
    from hpa_ext import GramCollection

    def collection(seed):
        generator = torch.Generator().manual_seed(seed)
        shared = Gram(4).update(torch.randn(6, 4, generator=generator))
        own = Gram(4).update(torch.randn(6, 4, generator=generator))
        return GramCollection(q=shared, k=shared, o=own)

    first, second = collection(0), collection(1)
    expected = first["q"]._sum + second["q"]._sum
    assert first.merge_(second) is first
    assert [gram.token_count for gram in first.values()] == [12, 12, 12]
    torch.testing.assert_close(first["k"]._sum, expected)
    assert first["q"] is first["k"] and list(first.distinct()) == ["q", "o"]
    unshared = GramCollection(q=Gram(4), k=Gram(4), o=Gram(4))
    with pytest.raises(ValueError, match="same inputs shared"):
        first.merge_(unshared)
    with pytest.raises(TypeError, match="other: expected a GramCollection, got dict"):
        first.merge_(dict(second))
    assert first["q"].token_count == 12


def test_a_restored_sum_must_be_symmetric():
    total = torch.eye(4)
    total[0, 3] = 0.5
    with pytest.raises(ValueError, match=r"state\['sum'\]: h: expected symmetric matrices"):
        Gram.from_state_dict({"sum": total, "token_count": torch.tensor(3)})
