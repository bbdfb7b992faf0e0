"""The operations as torch operators: opcheck, compilation, fake tensors, one path through the checks, overhead."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from helpers import DTYPES, assert_same_bits, is_native, normal, refuses
from operator_samples import samples
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hpa_ext import ops

DTYPES_64 = (*DTYPES, torch.float64)

OPERATORS = (
    "gram_accumulate_",
    "inverse_diagonal",
    "column_scores",
    "column_scores_list",
    "column_mask",
    "column_mask_list",
    "project_merge",
    "project_merge_out",
    "project_merge_list",
    "project_merge_list_out",
    "routed_lora",
    "routed_lora_add_",
    "routed_lora_backward",
    "routed_lora_list",
    "low_rank_scores",
    "low_rank_merge",
    "low_rank_merge_out",
    "low_rank_add_out",
)
_OF_SCORES = ("inverse_diagonal", "column_mask", "column_mask_list")
CASES = [
    (operation, dtype)
    for operation in OPERATORS
    for dtype in ((torch.float32, torch.float64) if operation in _OF_SCORES else DTYPES_64)
]


@pytest.mark.parametrize(("operation", "dtype"), CASES)
def test_opcheck(device, operation, dtype):
    for arguments in samples(operation, dtype, device):
        torch.library.opcheck(getattr(torch.ops.hpa_ext, operation).default, arguments)


def test_every_operator_is_checked():
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("hpa_ext::")}
    assert registered == set(OPERATORS)


@pytest.mark.parametrize("operation", OPERATORS)
def test_an_unsupported_dtype_is_refused_by_the_operator_too(operation):
    arguments = list(samples(operation, torch.float32, "cpu")[0])
    place = 1 if operation in ("gram_accumulate_", "routed_lora_add_", "routed_lora_backward") else 0
    wrong = arguments[place]
    arguments[place] = [t.to(torch.int32) for t in wrong] if isinstance(wrong, list) else wrong.to(torch.int32)
    with pytest.raises(TypeError, match=r"expected .*, got a int32 tensor"):
        getattr(torch.ops.hpa_ext, operation)(*arguments)


def test_the_operators_check_as_the_functions_do():
    with refuses(ValueError, "w_new"):
        torch.ops.hpa_ext.column_scores(torch.ones(2, 3), torch.ones(3, 2))
    with refuses(ValueError, "gram"):
        torch.ops.hpa_ext.gram_accumulate_(torch.zeros(2, 2), torch.ones(4, 3))
    with refuses(TypeError, "mask"):
        torch.ops.hpa_ext.project_merge(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(()), "input")
    with refuses(TypeError, "out"):
        out = torch.ones(2, 3).half()
        mask = torch.ones(3, dtype=torch.bool)
        torch.ops.hpa_ext.project_merge_out(torch.ones(2, 3), torch.ones(2, 3), mask, torch.ones(()), "input", out)
    with refuses(ValueError, "h"):
        torch.ops.hpa_ext.inverse_diagonal(torch.ones(2, 3))
    with refuses(ValueError, "rescue"):
        torch.ops.hpa_ext.inverse_diagonal(torch.eye(2), 0.01, "hope", True)
    with refuses(TypeError, "count"):
        torch.ops.hpa_ext.column_mask(torch.ones(2, 3), torch.ones(2))
    with refuses(ValueError, "scaling"):
        tensors = samples("routed_lora", torch.float32, "cpu")[0]
        torch.ops.hpa_ext.routed_lora(*tensors[:4], torch.ones(4))


# ------------------------------------------------------------------------------------------------- compilation


def all_operations(x, token_mask, w_old, w_new, count, a, b, weights, scaling):
    """What a training script might compile: every operation once, results of one feeding the next."""
    gram = ops.gram_accumulate_(torch.zeros(x.shape[-1], x.shape[-1], device=x.device), x, token_mask)
    inverse = ops.inverse_diagonal(gram, 0.01)
    squared_update, inner_product, old_squared_norm = ops.column_scores(w_old, w_new)
    mask = ops.column_mask(squared_update / inverse, count)
    merged = ops.project_merge(w_old, w_new, mask, inner_product / old_squared_norm)
    into = torch.empty_like(w_old)
    ops.project_merge(w_old, w_new, mask, 0.5, out=into)
    return gram, inverse, squared_update, mask, merged, into, ops.routed_lora(x, a, b, weights, scaling)


def inputs_of_all(dtype, device, tokens=19):
    size, rank, tasks = 33, 4, 3
    return (
        normal(2, tokens, size, dtype=dtype, device=device),
        (torch.rand(2, tokens) < 0.7).to(device),
        normal(17, size, dtype=dtype, device=device),
        normal(17, size, dtype=dtype, device=device),
        7,
        normal(tasks, rank, size, dtype=dtype, device=device),
        normal(tasks, 17, rank, dtype=dtype, device=device),
        normal(2, tasks, device=device),
        normal(tasks, device=device),
    )


def check_compiled(function, dtype, device):
    inputs = inputs_of_all(dtype, device)
    for ours, expected in zip(function(*inputs), all_operations(*inputs), strict=True):
        assert_same_bits(ours, expected)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_equals_eager_bit_for_bit(device, dtype):
    check_compiled(torch.compile(all_operations, fullgraph=True, backend="aot_eager"), dtype, device)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_for_any_number_of_tokens(device):
    compiled = torch.compile(all_operations, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (19, 5, 64):
        inputs = inputs_of_all(torch.bfloat16, device, tokens)
        for ours, expected in zip(compiled(*inputs), all_operations(*inputs), strict=True):
            assert_same_bits(ours, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_by_inductor(device):
    check_compiled(torch.compile(all_operations, fullgraph=True), torch.bfloat16, device)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_in_place_on_a_gram_that_lives_on(device):
    x, gram = normal(9, 5, device=device), torch.ones(5, 5, device=device)
    expected = ops.gram_accumulate_(gram.clone(), x)
    compiled = torch.compile(lambda g, t: ops.gram_accumulate_(g, t), fullgraph=True, backend="aot_eager")
    result = compiled(gram, x)
    assert_same_bits(gram, expected)
    assert_same_bits(result, expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_into_the_old_weight(device):
    w_old, w_new = normal(7, 5, device=device), normal(7, 5, device=device)
    mask = torch.tensor([True, False, True, False, False], device=device)
    expected = ops.project_merge(w_old, w_new, mask, 0.5)
    compiled = torch.compile(
        lambda old, new, m: ops.project_merge(old, new, m, 0.5, out=old), fullgraph=True, backend="aot_eager"
    )
    result = compiled(w_old, w_new, mask)
    assert_same_bits(w_old, expected)
    assert_same_bits(result, expected)


@pytest.mark.usefixtures("_fresh_compiler")
def test_gradients_of_the_compiled_routed_lora(device):
    tensors = samples("routed_lora", torch.float32, device)[1]
    expected = torch.autograd.grad(ops.routed_lora(*tensors).square().sum(), tensors)
    compiled = torch.compile(lambda *t: ops.routed_lora(*t).square().sum(), fullgraph=True, backend="aot_eager")
    for ours, gradient in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(ours, gradient)


def step_of_lists(w_old, w_new, outs, count):
    """A step over several layers, results of one operation feeding the next."""
    squares, inner_products, norms = ops.column_scores_list(w_old, w_new)
    masks = ops.column_mask_list(squares, [2, count])
    merged = ops.project_merge_list(w_old, w_new, masks, inner_products / norms)
    ops.project_merge_list(w_old, w_new, masks, inner_products, outs=outs)
    return *squares, *masks, *merged, *outs


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_lists_equal_eager_ones(device, dtype, dynamic):
    compiled = torch.compile(step_of_lists, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (9, 4):
        w_old, w_new = ([normal(rows, n, dtype=dtype, device=device) for n in (5, 33)] for _ in range(2))
        outs = [torch.zeros_like(w) for w in w_old]
        count = torch.tensor(7, device=device)
        expected = [r.clone() for r in step_of_lists(w_old, w_new, [w.clone() for w in outs], count)]
        for ours, theirs in zip(compiled(w_old, w_new, outs, count), expected, strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_into_the_new_weights(device):
    w_old, w_new = ([normal(9, n, device=device) for n in (5, 33)] for _ in range(2))
    masks, coefficients = [w[0] > 0 for w in w_old], torch.tensor([0.5, -1.0], device=device)
    expected = ops.project_merge_list(w_old, w_new, masks, coefficients)
    compiled = torch.compile(
        lambda old, new: ops.project_merge_list(old, new, masks, coefficients, new), fullgraph=True, backend="aot_eager"
    )
    result = compiled(w_old, w_new)
    for new, returned, theirs in zip(w_new, result, expected, strict=True):
        assert_same_bits(new, theirs)
        assert_same_bits(returned, theirs)


# ------------------------------------------------------------------------------------------------- fake tensors


@pytest.mark.parametrize(("operation", "dtype"), CASES)
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(device, operation, dtype):
    operator = getattr(torch.ops.hpa_ext, operation)
    for arguments in samples(operation, dtype, device):
        real = operator(*arguments)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            fake = operator(*fakes)
        for of_real, of_fake in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            if of_real is None:
                assert of_fake is None
                continue
            assert of_fake.shape == of_real.shape
            assert of_fake.dtype == of_real.dtype
            assert of_fake.stride() == of_real.stride()
            assert of_fake.device.type == device.type


def test_functions_take_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 19, 33, dtype=torch.bfloat16)
        results = all_operations(
            x,
            torch.empty(2, 19, dtype=torch.bool),
            torch.empty(17, 33, dtype=torch.bfloat16),
            torch.empty(17, 33, dtype=torch.bfloat16),
            7,
            torch.empty(3, 4, 33, dtype=torch.bfloat16),
            torch.empty(3, 17, 4, dtype=torch.bfloat16),
            torch.empty(2, 3),
            torch.empty(3),
        )
    shapes = [tuple(result.shape) for result in results]
    assert shapes == [(33, 33), (33,), (33,), (33,), (17, 33), (17, 33), (2, 19, 17)]


def test_fake_tensors_are_checked():
    with FakeTensorMode(), refuses(ValueError, "w_new"):
        ops.column_scores(torch.empty(3, 5), torch.empty(5, 3))


def test_parameters_are_plain_tensors(device):
    w_old, w_new = (torch.nn.Parameter(normal(7, 5, device=device)) for _ in range(2))
    for ours, expected in zip(ops.column_scores(w_old, w_new), ops.column_scores(w_old.data, w_new.data), strict=True):
        assert_same_bits(ours, expected)


# ----------------------------------------------------------------------------------------------------- dispatch


def test_backend_of(device):
    for dtype in DTYPES:
        expected = "native" if is_native("gram", device) else "torch"
        assert ops.backend_of("gram", torch.empty(0, dtype=dtype, device=device)) == expected
    assert ops.backend_of("gram", torch.empty(0, dtype=torch.float64, device=device)) == "torch"
    assert ops.backend_of("gram", torch.empty(0, device="meta")) == "torch"


def test_native_cuda_can_be_forbidden_and_is_restored():
    from hpa_ext.ops import _backend

    before = _backend._forced_cuda.get()
    with ops.native_cuda():
        assert _backend._forced_cuda.get() is True
        with ops.native_cuda(False):
            assert _backend._forced_cuda.get() is False
        assert _backend._forced_cuda.get() is True
    assert _backend._forced_cuda.get() is before
    with pytest.raises(RuntimeError), ops.native_cuda():
        raise RuntimeError
    assert _backend._forced_cuda.get() is before


def test_an_eager_call_costs_little(capsys):
    """Far below the 100 microseconds allowed here on an idle machine; torch.library alone would cost most of them."""
    scores = normal(8)
    counts = torch.tensor(3)
    for _ in range(50):
        ops.column_mask(scores, counts)
    times = []
    for _ in range(1000):
        start = time.perf_counter()
        ops.column_mask(scores, counts)
        times.append(time.perf_counter() - start)
    median = 1e6 * statistics.median(times)
    with capsys.disabled():
        print(f"[column_mask of 8 scores: median {median:.1f} us a call]", end=" ")
    if not is_native("column_mask"):
        pytest.skip("the native kernel does not serve column_mask here")
    assert median < 100


@pytest.mark.parametrize(
    ("coefficient", "error", "message"),
    [
        (torch.tensor(0.5, dtype=torch.float64), TypeError, r"coefficient: expected \[\] of dtype float32"),
        (torch.tensor([0.5]), ValueError, r"coefficient: expected shape \[\]"),
        (torch.tensor(0.5, device="meta"), ValueError, "coefficient: expected device cpu"),
    ],
)
def test_the_operator_itself_checks_the_coefficient(coefficient, error, message):
    """The kernel reads one float32 from its address, whoever calls."""
    old, new, mask = torch.randn(3, 4), torch.randn(3, 4), torch.zeros(4, dtype=torch.bool)
    with pytest.raises(error, match=message):
        torch.ops.hpa_ext.project_merge(old, new, mask, coefficient, "input")
    out = torch.full((3, 4), 7.0)
    with pytest.raises(error, match=message):
        torch.ops.hpa_ext.project_merge_out(old, new, mask, coefficient, "input", out)
    assert (out == 7).all()


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_the_operator_itself_checks_the_damping(damping):
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="damping: expected a finite number, at least 0"):
            torch.ops.hpa_ext.inverse_diagonal(torch.eye(3, dtype=dtype), damping)
