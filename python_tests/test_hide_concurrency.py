"""One HiDe model in several threads, copied, pickled, compiled, and beside an assistant."""

from __future__ import annotations

import copy
import io
import threading

import hide_models as hm
import pytest
import torch

GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IMAGES = (1, 0, 2, 1)


def in_threads(work, count=4):
    """Run ``work(number)`` in so many threads at once; raise what one of them raised."""
    failures = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_do_not_see_each_others_prompts():
    model = hm.hide()
    batches = [hm.prompts(IMAGES, seed=seed) for seed in range(4)]
    logits = [model(**batch).logits.detach() for batch in batches]
    tokens = [model.generate(**batch, **GREEDY) for batch in batches]
    together = threading.Barrier(4)

    def work(number):
        for _ in range(3):
            together.wait(60)
            with torch.no_grad():
                assert torch.equal(model(**batches[number]).logits, logits[number])
            assert torch.equal(model.generate(**batches[number], **GREEDY), tokens[number])

    in_threads(work)


def test_a_prompt_is_that_of_its_thread_while_another_generates():
    """Without threads of chance: one thread stands still within generate while the other runs whole forwards."""
    model = hm.hide()
    batches = [hm.prompts(IMAGES, seed=seed) for seed in (0, 1)]
    expected = [model.generate(**batch, **GREEDY) for batch in batches]
    inside, done = threading.Event(), threading.Event()
    steps = []

    def pause(module, args, output):
        if threading.current_thread().name == "first" and not steps:
            steps.append(1)
            inside.set()
            assert done.wait(60)

    model.model.model.language_model.layers[0].register_forward_hook(pause)
    results = {}
    first = threading.Thread(target=lambda: results.update(first=model.generate(**batches[0], **GREEDY)), name="first")
    first.start()
    assert inside.wait(60)
    results["second"] = model.generate(**batches[1], **GREEDY)
    done.set()
    first.join()
    assert torch.equal(results["first"], expected[0])
    assert torch.equal(results["second"], expected[1])


def test_given_weights_hold_in_threads_too():
    """As with a streamer, whose generate runs in a thread of its own."""
    model = hm.hide()
    batch = hm.prompts(IMAGES)
    results = []
    with model.routed("beta"):
        expected = model.generate(**batch, **GREEDY)
        in_threads(lambda number: results.append(model.generate(**batch, **GREEDY)), 1)
    assert torch.equal(results[0], expected)
    assert not torch.equal(model(**batch).logits, hm.hide()(**hm.prompts(IMAGES, seed=1)).logits)


def test_a_layer_that_is_computed_again_in_another_thread_finds_the_prompts():
    """Autograd recomputes checkpointed layers in a thread of its own on a GPU."""
    model = hm.hide()
    weights = model.routing(**hm.prompts(IMAGES))
    model(**hm.prompts(IMAGES))
    seen = []
    in_threads(lambda number: seen.append(model.state.weights_for(4)), 1)
    assert torch.equal(seen[0], weights)


def test_a_model_can_be_pickled():
    model = hm.hide()
    batch = hm.prompts(IMAGES)
    file = io.BytesIO()
    torch.save(model, file)  # before any forward: transformers then adds hooks that no pickle takes
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**batch, **GREEDY), model.generate(**batch, **GREEDY))


def test_a_copy_made_while_a_cache_is_alive_is_on_its_own():
    model = hm.hide()
    batch = hm.prompts(IMAGES)
    output = model(**batch, use_cache=True)
    twin = copy.deepcopy(model)
    twin.remove("beta")
    assert model.tasks == list(hm.TASKS)
    assert torch.equal(model(**batch).logits, output.logits)
    assert twin.routing(**batch).shape == (4, 2)


@pytest.mark.parametrize("options", [{"assistant": True}, {"prompt_lookup_num_tokens": 3}], ids=["assistant", "lookup"])
def test_assisted_generation_keeps_the_weights(options):
    model = hm.hide()
    batch = hm.prompts((1,), (9,))
    expected = model.generate(**batch, **GREEDY)
    if options.pop("assistant", False):
        options["assistant_model"] = hm.llava_of()
    assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)


def test_an_assistant_may_be_a_hide_model():
    model, assistant = hm.hide(), hm.hide()
    batch = hm.prompts((1,), (9,))
    expected = model.generate(**batch, **GREEDY)
    with assistant.routed(model.routing(**batch)):  # transformers does not hand the pixels on to it
        assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=assistant.model), expected)


def test_a_static_cache_and_inference_mode():
    model = hm.hide()
    batch = hm.prompts(IMAGES)
    expected = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), expected)
    with torch.inference_mode():
        assert torch.equal(model.generate(**batch, **GREEDY), expected)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.slow
def test_a_compiled_model_routes_each_batch_anew():
    torch._dynamo.reset()
    model = hm.hide(hm.llama_of)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for seed in (0, 1):
            batch = hm.prompts((0, 0), (9, 9), seed=seed)
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
