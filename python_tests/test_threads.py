"""Results depend neither on the number of threads nor on who else is calling; every instruction set agrees."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_same_bits, is_native, normal

from hpa_ext import _C, build_info, ops

pytestmark = pytest.mark.skipif(
    not hasattr(_C.cpu, "set_instruction_set"), reason="the native module is not built (hpa_ext/_C.py stands in for it)"
)

ROWS, COLUMNS = 700, 1030


@pytest.fixture(autouse=True)
def _native_kernels():
    if not is_native("gram"):
        pytest.skip("the native kernels do not serve the CPU here")


def gram(dtype):
    x = normal(ROWS, COLUMNS, dtype=dtype)
    mask = torch.rand(ROWS) < 0.8
    return lambda: (
        ops.gram_accumulate_(torch.zeros(COLUMNS, COLUMNS), x),
        ops.gram_accumulate_(torch.zeros(COLUMNS, COLUMNS), x, mask),
    )


def inverse_diagonal(dtype):
    x = normal(2, 300, 515, dtype=dtype).float()
    h = (x.mT @ x).mul_(2 / 300)
    h = (h + h.mT) / 2
    # 1e-5 leaves float32 too few digits, so the second call takes the float64 kernel.
    return lambda: (ops.inverse_diagonal(h, 0.01), ops.inverse_diagonal(h[0], 1e-5, rescue="precision"))


def column_scores(dtype):
    w_old, w_new = normal(ROWS, COLUMNS, dtype=dtype), normal(ROWS, COLUMNS, dtype=dtype)
    return lambda: ops.column_scores(w_old, w_new)


def column_mask(dtype):
    scores = normal(ROWS, COLUMNS, dtype=dtype).float()
    counts = torch.randint(0, COLUMNS, (ROWS,))
    return lambda: (ops.column_mask(scores, counts), ops.column_mask(scores.reshape(-1), 100_000))


def project_merge(dtype):
    w_old, w_new = normal(ROWS, COLUMNS, dtype=dtype), normal(ROWS, COLUMNS, dtype=dtype)
    mask = torch.rand(COLUMNS) < 0.2
    rows = torch.rand(ROWS) < 0.2
    return lambda: (
        ops.project_merge(w_old, w_new, mask, 0.137),
        ops.project_merge(w_old, w_new, rows, 0.137, axis="output"),
    )


def routed_lora(dtype):
    x = normal(3, 233, COLUMNS, dtype=dtype)
    a, b = normal(4, 8, COLUMNS, dtype=dtype), normal(4, ROWS, 8, dtype=dtype)
    weights, scaling = normal(3, 4), normal(4)
    return lambda: (ops.routed_lora(x, a, b, weights, scaling),)


def routed_lora_gradients(dtype):
    x = normal(3, 233, COLUMNS, dtype=dtype)
    a, b = normal(4, 8, COLUMNS, dtype=dtype), normal(4, ROWS, 8, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, a, b, normal(3, 4), normal(4))]
    upstream = normal(3, 233, ROWS, dtype=dtype)

    def run():
        return torch.autograd.grad(ops.routed_lora(*leaves), leaves, upstream)

    return run


def low_rank(dtype):
    a, b = normal(9, COLUMNS, dtype=dtype), normal(ROWS, 9, dtype=dtype)
    # Along the update, so that the inner product does not cancel to a number as small as its rounding.
    weight = (normal(ROWS, COLUMNS) + b.float() @ a.float()).to(dtype)
    mask = torch.rand(COLUMNS) < 0.2
    return lambda: (
        *ops.low_rank_scores(weight, a, b, 0.5),
        ops.low_rank_merge(weight, a, b, 0.5, mask, 0.137),
    )


OPERATIONS = [gram, inverse_diagonal, column_scores, column_mask, project_merge, routed_lora]
OPERATIONS += [routed_lora_gradients, low_rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_do_not_depend_on_the_number_of_threads(operation, dtype):
    run = operation(dtype)
    torch.set_num_threads(1)
    expected = run()
    assert _C.cpu.thread_count() == 1
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(2):
            for result, wanted in zip(run(), expected, strict=True):
                assert_same_bits(result, wanted)
        assert _C.cpu.thread_count() == threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_threads_calling_at_once(dtype):
    runs = [operation(dtype) for operation in OPERATIONS]
    expected = [run() for run in runs]

    def check(order):
        for _ in range(2):
            for index in order:
                for result, wanted in zip(runs[index](), expected[index], strict=True):
                    assert_same_bits(result, wanted)

    forward = range(len(runs))
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(check, forward), pool.submit(check, reversed(forward))]:
            future.result(timeout=120)


def test_the_number_of_threads_may_change_while_an_operation_runs():
    """As when another Python thread has a setting of its own. In a process of its own: what goes wrong is memory."""
    script = textwrap.dedent(
        """
        import sys, threading
        import test_threads
        from hpa_ext import _C
        from helpers import assert_same_bits

        runs = [operation(test_threads.torch.bfloat16) for operation in test_threads.OPERATIONS]
        test_threads.torch.set_num_threads(1)
        expected = [run() for run in runs]
        done = False

        def change():
            while not done:
                for count in (1, 12):
                    _C.cpu.set_thread_count(count)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(12):
                for run, wanted in zip(runs, expected, strict=True):
                    for result, value in zip(run(), wanted, strict=True):
                        assert_same_bits(result, value)
        finally:
            done = True
            thread.join()
        """
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert process.returncode == 0, f"exit {process.returncode}: {process.stderr}"


@pytest.fixture
def _restore_instruction_set():
    before = _C.cpu.instruction_set()
    yield
    _C.cpu.set_instruction_set(before)


@pytest.mark.usefixtures("_restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_instruction_sets_agree(operation, dtype):
    run = operation(dtype)
    names = build_info()["instruction_sets"]
    assert names[0] == "portable"
    _C.cpu.set_instruction_set("portable")
    expected = run()
    for name in names[1:]:
        _C.cpu.set_instruction_set(name)
        assert _C.cpu.instruction_set() == name
        for result, wanted in zip(run(), expected, strict=True):
            if wanted.dtype == torch.bool:
                assert torch.equal(result, wanted)
                continue
            # Sums are cut differently; rounding to half precision can then fall to the other neighbour.
            scale = wanted.double().abs().max()
            eps = torch.finfo(wanted.dtype).eps
            # The inverse magnifies rounding by the condition number of the damped matrix.
            bound = 200 * eps if operation is inverse_diagonal else max(eps, 32 * torch.finfo(torch.float32).eps)
            assert float(((result.double() - wanted.double()).abs() / scale).max()) <= bound


@pytest.mark.usefixtures("_restore_instruction_set")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_project_merge_rounds_alike_in_every_instruction_set(dtype):
    run = project_merge(dtype)
    _C.cpu.set_instruction_set("portable")
    expected = run()
    for name in build_info()["instruction_sets"]:
        _C.cpu.set_instruction_set(name)
        for result, wanted in zip(run(), expected, strict=True):
            assert_same_bits(result, wanted)


@pytest.mark.usefixtures("_restore_instruction_set")
def test_an_unknown_instruction_set_is_refused():
    before = _C.cpu.instruction_set()
    with pytest.raises((ValueError, RuntimeError)):
        _C.cpu.set_instruction_set("mmx")
    assert _C.cpu.instruction_set() == before


def test_an_instruction_set_for_a_while():
    before = _C.cpu.instruction_set()
    with ops.instruction_set("portable"):
        assert build_info()["instruction_set"] == "portable"
    assert _C.cpu.instruction_set() == before
    with pytest.raises(RuntimeError, match=r"name: expected one of portable.* got 'mmx'"), ops.instruction_set("mmx"):
        pass
    assert _C.cpu.instruction_set() == before


@pytest.mark.parametrize(("name", "said"), [("portable", "portable"), ("mmx", "HPA_EXT_INSTRUCTION_SET: expected")])
def test_an_instruction_set_from_the_environment(name, said):
    code = "import hpa_ext; print(hpa_ext.build_info()['instruction_set'])"
    environment = {**os.environ, "HPA_EXT_INSTRUCTION_SET": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if name == "portable" else 1)
    assert said in done.stdout + done.stderr


def test_a_forked_process_works():
    """A data loader forks a process whose pool of threads does not come along."""
    script = textwrap.dedent(
        """
        import os, signal, torch
        from hpa_ext import ops

        torch.set_num_threads(2)
        w_old, w_new, x = (torch.randn(700, 1030) for _ in range(3))
        mask, coefficient = torch.rand(1030) < 0.3, torch.tensor(0.3)
        gram, again, out, out_again = (torch.zeros(s) for s in ((1030, 1030), (1030, 1030), (700, 1030), (700, 1030)))
        ops.gram_accumulate_(gram, x)
        ops.project_merge(w_old, w_new, mask, coefficient, out=out)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            try:
                ops.gram_accumulate_(again, x)
                ops.project_merge(w_old, w_new, mask, coefficient, out=out_again)
                same = again.numpy().tobytes() == gram.numpy().tobytes()
                os._exit(0 if same and out_again.numpy().tobytes() == out.numpy().tobytes() else 3)
            except BaseException:
                os._exit(4)
        status = os.waitpid(child, 0)[1]
        ops.gram_accumulate_(again, x)
        assert torch.equal(again, gram)
        raise SystemExit(os.waitstatus_to_exitcode(status))
        """
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, f"exit {process.returncode}: {process.stderr}"
