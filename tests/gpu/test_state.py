"""EngramState on a GPU: a captured step, replayed over any schedule, and no wait for the GPU in an eager one."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest
import torch

from engram_kernels import warmup
from tests.conftest import package_kernels
from tests.nn.test_warmup import MAX_TOKENS, parts_of, steps
from tests.serving.test_state import int32
from tests.support.serving_runs import FORMS, MAX_DRAFTS, Engine, serve

from .test_kernels import graph_of

pytestmark = pytest.mark.gpu
SLOTS, TOKENS, SEQUENCES = 3, 80, 4


@pytest.mark.parametrize(("dialect", "conv"), FORMS)
@pytest.mark.parametrize("commit_inside", [True, False])
def test_a_captured_step(device, dialect, conv, commit_inside):
    """begin, forward and commit in one graph, or commit after each replay: ids, lengths, slots and counts change."""
    engine = Engine(dialect, conv, device, SLOTS)
    ids, dead = torch.zeros(TOKENS, dtype=torch.int64, device=device), torch.zeros(TOKENS, device=device).bool()
    slots = torch.full((SEQUENCES,), -1, dtype=torch.int32, device=device)
    accepted = torch.zeros_like(slots)
    cu = torch.zeros(SEQUENCES + 1, dtype=torch.int32, device=device)
    heads, size = engine.config.branches, engine.config.hidden_size
    shapes = ((TOKENS, heads, size), (TOKENS, heads, size), (TOKENS, size))
    inputs = [[torch.zeros(shape, device=device) for shape in shapes] for _ in engine.config.layers]

    def captured_step():
        step, *results = engine.forward(ids, dead, inputs, slots, cu)
        if commit_inside:
            step.commit(accepted)
        return step, results

    graph, (step, results) = graph_of(captured_step)

    def replay(pieces, padding):
        given_ids, given_dead, given, lengths = engine.pack(pieces, padding)
        count, missing = len(given_ids), SEQUENCES - len(pieces)
        ids[:count], dead[:count] = given_ids, given_dead
        for buffers, parts in zip(inputs, given, strict=True):
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[:count] = part
        slots.copy_(int32(*(piece[0] for piece in pieces), *[-1] * missing))
        accepted.copy_(int32(*(piece[5] for piece in pieces), *[0] * missing))
        cu.copy_(torch.tensor([0, *lengths, *[0] * missing]).cumsum(0))
        graph.replay()
        engine.check(pieces, lengths, *results)
        if not commit_inside:
            step.commit(accepted)

    serve(engine, random.Random(5), texts=8, longest=TOKENS // SEQUENCES - MAX_DRAFTS - 2, step=replay)


def test_the_serving_example(capsys):
    """examples/serve.py with graphs and float32, whose sums over more tokens change few bits."""
    spec = importlib.util.spec_from_file_location("serve", Path(__file__).parents[2] / "examples" / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    sys.modules["serve"] = serve  # where its dataclass looks
    spec.loader.exec_module(serve)
    vars(serve)["DTYPE"] = torch.float32
    serve.main()
    assert "one-shot generation: 7 of 7 requests" in capsys.readouterr().out


def test_no_call_waits_for_the_gpu(device):
    engine = Engine("pad", 3, device)
    text, slots = engine.text(5, torch.zeros(5).bool()), int32(1, device=device)
    states = [tuple(pair) for pair in text.conv_states]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step, *_ = engine.forward(text.ids, text.dead, text.inputs, slots, cu_seqlens_of_five(device))
        step.commit(slots)
        engine.forward(text.ids, text.dead, text.inputs, slots, cu_seqlens_of_five(device))[0].commit()
        engine.state.reset(slots)
        engine.state.restore(slots, text.ids, conv_states=states)
        engine.state.conv_states(slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["v41", "paper"])
def test_nothing_is_compiled_or_asked_for_after_warming_up(device, form):
    """Steps of all lengths compile no kernel and leave the driver's memory as it was."""
    module, prefetcher, state = parts_of(form, device)
    warmup([module], MAX_TOKENS, prefetcher=prefetcher, state=state)
    torch.cuda.synchronize()
    kernels, reserved = compiled_kernels(), torch.cuda.memory_reserved()
    assert kernels > 0
    steps(module, prefetcher, state, device, range(1, MAX_TOKENS + 1))
    torch.cuda.synchronize()
    assert compiled_kernels() == kernels
    assert torch.cuda.memory_reserved() == reserved


def compiled_kernels():
    """Variants of all kernels in this process."""
    return sum(len(cache[0]) for kernel in package_kernels().values() for cache in kernel.device_caches.values())


def cu_seqlens_of_five(device):
    """Of five tokens, made on the device."""
    return 5 * torch.arange(2, dtype=torch.int32, device=device)
