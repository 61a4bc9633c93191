"""EngramState: schedules of chunks, drafts and slots give the bits of one call per text (more: test_schedules.py)."""

import dataclasses
import random

import pytest
import torch

from engram_kernels import EngramConfig, EngramState, Prefetcher, hash_lookup
from tests.nn.test_engram import FORMS as FORMS_OF_MODULES
from tests.nn.test_engram import built
from tests.ops.test_registration import check, compiled
from tests.support.serving_runs import FORMS, Engine, serve


@pytest.mark.kernel
@pytest.mark.parametrize(("dialect", "conv"), FORMS)
def test_kernel_any_schedule_equals_one_call(device, dialect, conv):
    serve(Engine(dialect, conv, device), random.Random(3), texts=2, longest=12)


def form(dialect="pad", conv=3, device="cpu"):
    return Engine(dialect, conv, torch.device(device))


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def taken(engine, text, slot, start=0, end=None):
    """Tokens of a text, into a slot."""
    end = len(text.ids) if end is None else end
    engine.step([(slot, text, start, end - start, 0, end - start)])


@pytest.mark.kernel
@pytest.mark.parametrize("conv", [0, 3])
def test_a_prefix_computed_elsewhere(device, conv):
    """restore() from the last ids and the states of another engine, into slots in use; and by one call of the ops."""
    engine = form(conv=conv, device=device)
    texts = [engine.text(length, torch.zeros(length).bool()) for length in (9, 1)]
    texts[0].dead[6] = True
    texts[0] = engine.text_of(texts[0].ids, texts[0].dead)
    for slot, text in enumerate(texts):
        taken(engine, text, slot, end=min(7, len(text.ids)))
    states = engine.state.conv_states(int32(1, 0, device=device))
    assert len(states) == (2 if conv else 0)
    ids = torch.cat([texts[1].ids, texts[0].ids[2:7]])
    dead, cu = torch.cat([texts[1].dead, texts[0].dead[2:7]]), int32(0, 1, 6, device=device)
    other = engine.state
    other.reset()
    taken(engine, texts[0], 1)
    other.restore(int32(1, 2, device=device), ids, cu_seqlens=cu, dead=dead, conv_states=states if conv else None)
    engine.check_end(1, texts[1])
    taken(engine, texts[0], 2, start=7)
    engine.check_end(2, texts[0])
    whole = [tuple(pair) for pair in texts[0].conv_states] if conv else None
    other.restore(0, texts[0].ids, dead=texts[0].dead, conv_states=whole)
    engine.check_end(0, texts[0])
    engine.check_end(1, texts[1])


@pytest.mark.kernel
def test_padding_leaves_every_slot_alone(device):
    """Sequences of slot -1 and what is behind cu_seqlens: no slot is written, by begin, the forward or commit."""
    engine = form(device=device)
    text = engine.text(5, torch.zeros(5).bool())
    taken(engine, text, 1)
    before = [part.clone() for part in engine.state._tensors()]
    engine.step([(-1, text, 0, 3, 0, 3), (-1, text, 0, 2, 0, 0)], padding=3)
    engine.state.reset(int32(-1, device=device))
    after = engine.state._tensors()
    assert len(after) == 6 and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_candidates_of_one_slot():
    """Without a convolution several continuations of one slot are verified at once, and one of them is taken."""
    engine = form(conv=0)
    text, other = (engine.text(6, torch.zeros(6).bool()) for _ in range(2))
    taken(engine, text, 2, end=3)
    step = engine.state.begin(torch.cat([other.ids[:3], text.ids[3:]]), int32(2, 2), cu_seqlens=int32(0, 3, 6))
    assert torch.equal(step.history[0], text.ids[1:3]) and torch.equal(step.history[1], text.ids[1:3])
    with pytest.raises(ValueError, match="EngramStep.commit: accepted must be 0 in all but one .* of slot 2"):
        step.commit(int32(1, 1))
    step.commit(int32(0, 3))
    engine.check_end(2, text)
    with pytest.raises(ValueError, match=r"^EngramState.begin: slots must be different from each other, got \[1, 1\]"):
        form().state.begin(text.ids[:2, None], int32(1, 1))


@pytest.mark.parametrize("name", FORMS_OF_MODULES)
def test_a_module_takes_a_step(name):
    """Engram.forward(state=step), with rows that a Prefetcher looked up and without, over chunks and padding."""
    module, plan, placed = built(name)
    config = module.config
    module, (hidden, ids) = module.double(), (torch.randn(9, 2, 24).double(), torch.randint(0, 40, (9,)))
    state = EngramState(config, 2, "cpu", dtype=torch.float64)
    prefetcher = Prefetcher(plan, placed, 16, layers=config.layers)
    cu, slots = torch.tensor([0, 2, 4], dtype=torch.int32), int32(-1, 1)
    with torch.no_grad():
        expected, parts = module(hidden, ids), []
        for first in range(0, 8, 2):
            here = slice(first, first + 2)
            step = state.begin(torch.cat([ids[-2:], ids[here], ids[:1]]), slots, cu_seqlens=cu)
            prefetcher.start(step.token_ids, **step.options)
            tokens = torch.cat([hidden[-2:], hidden[here], hidden[:1]])
            out = module(tokens, rows=prefetcher.rows(module.layer), state=step)
            assert torch.equal(module(tokens, state=step), out) and torch.equal(out[4:], hidden[:1])
            parts.append(out[2:4])
            step.commit()
        step = state.begin(ids[8:].view(1, 1), int32(1))
        parts.append(module(hidden[8:, None], state=step)[0])
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-6, atol=1e-6)  # of float32 rows through a matmul
    with pytest.raises(ValueError, match="^Engram.forward: state stands for token_ids, dead too, got both"):
        module(hidden, ids, dead=torch.zeros(9).bool(), state=step)


def test_sizes():
    """V4.1: three ids a slot. The paper's 27B: per layer a ring of two windows of 9 and 8 drafts, and a cursor."""
    state = EngramState(EngramConfig.deepseek_v41_flash(), 256, "meta")
    assert state.nbytes == 256 * 3 * 8 and state.device.type == "meta"
    state = EngramState(EngramConfig.engram_27b(), 256, "meta")
    assert state.nbytes == 256 * (2 * 8 + 4 + 2 * 26 * (2560 * 2 + 4 * 4))


def test_errors():
    engine = form()
    state, config = engine.state, engine.config
    ids, slots, cu = torch.arange(12), int32(0, 2), int32(0, 1, 12)
    step = state.begin(ids, slots, cu_seqlens=cu)
    good = state.conv_states(slots)
    for error, words, call in (
        (TypeError, "^EngramState: config must be an EngramConfig, got int", lambda: EngramState(3, 2, "cpu")),
        (ValueError, "slots must be a positive int, got 0", lambda: EngramState(config, 0, "cpu")),
        (ValueError, "max_drafts must be .* 0, got -1", lambda: EngramState(config, 1, "cpu", max_drafts=-1)),
        (
            TypeError,
            "dtype must be bfloat16, .* got",
            lambda: EngramState(config, 1, "cpu", dtype=torch.int8),
        ),
        (TypeError, "begin: token_ids must be a tensor of int32 or int64", lambda: state.begin([1], slots)),
        (ValueError, r"begin: slots must have shape \[1\], got \[2\]", lambda: state.begin(ids, slots)),
        (TypeError, "begin: slots must be a tensor of int32, got int64", lambda: state.begin(ids[:1], ids[:1])),
        (ValueError, r"begin: slots must be within -1..2, got \[3\]", lambda: state.begin(ids, int32(3))),
        (ValueError, r"begin: token_ids must have shape \[T\]", lambda: state.begin(ids.view(2, 3, 2), slots)),
        (ValueError, r"begin: dead must have shape", lambda: state.begin(ids, int32(0), dead=ids[:3] > 1)),
        (ValueError, r"commit: accepted must have shape \[2\]", lambda: step.commit(int32(1))),
        (ValueError, r"commit: accepted must be within 0..1, .* got 2", lambda: step.commit(int32(2, 1))),
        (ValueError, "accepted must leave out at most max_drafts = 2 of 11", lambda: step.commit(int32(1, 8))),
        (ValueError, "^EngramState: layer must be one of .*, got 3", lambda: step.conv_state(3)),
        (ValueError, "reset: slots must be within", lambda: state.reset(int32(-2))),
        (ValueError, "restore: conv_states must be one pair per layer", lambda: state.restore(0, ids)),
        (ValueError, "restore: conv_states must be None", lambda: form(conv=0).state.restore(0, ids, conv_states=good)),
        (ValueError, "conv_states must be 2 pairs", lambda: state.restore(0, ids, conv_states=good[:1])),
        (TypeError, r"conv_states\[0\] must be a pair", lambda: state.restore(0, ids, conv_states=[1, 2])),
        (ValueError, r"conv_states\[0\] must have shape \[1, 6", lambda: state.restore(0, ids, conv_states=good)),
    ):
        with pytest.raises(error, match=words):
            call()
    step.commit(int32(1, 9))  # none of the errors has changed anything
    assert state.begin(ids[:2, None], slots).history.tolist() == [[-1, 0], [8, 9]]


@pytest.mark.parametrize("conv", [0, 3])
def test_a_step_is_committed_once(conv):
    """Whatever the first commit took; one that was refused is none. Replays of a captured step have a commit each."""
    engine = form(conv=conv)
    state, ids = engine.state, torch.arange(1, 5)[None]
    for accepted in (None, int32(0), int32(2)):
        step = state.begin(ids, int32(1))
        with pytest.raises(ValueError, match="accepted must be within"):
            step.commit(int32(9))
        step.commit(accepted)
        before = [part.clone() for part in state._tensors()]
        for again in (None, int32(0), int32(1)):
            with pytest.raises(ValueError, match=r"^EngramStep.commit: expected a step .* got one committed before"):
                step.commit(again)
        assert all(torch.equal(a, b) for a, b in zip(state._tensors(), before, strict=True))
    step = dataclasses.replace(state.begin(ids, int32(1)), captured=True)
    step.commit()
    step.commit()
    assert state.begin(ids, int32(1)).history.tolist() == [[3, 4]]


@pytest.mark.parametrize("conv", [0, 3])
def test_steps_of_a_slot_follow_each_other(conv):
    """What moved a slot since a step began makes its commit an error, which changes nothing; other slots do not."""
    state, ids = form(conv=conv).state, torch.arange(1, 7)[None]
    restored = dict(token_ids=ids, conv_states=state.conv_states(0) if conv else None)
    for move in (
        lambda newer: newer.commit(),
        lambda newer: newer.commit(int32(2)),
        lambda newer: state.reset(1),
        lambda newer: state.reset(int32(0, -1, 1)),
        lambda newer: state.reset(),
        lambda newer: state.restore(1, **restored),
    ):
        older, newer = (state.begin(ids.repeat(2, 1), int32(0, 1)), state.begin(ids, int32(1)))
        move(newer)
        before = [part.clone() for part in state._tensors()]
        with pytest.raises(ValueError, match="^EngramStep.commit: accepted must be 0 for slot [01], which "):
            older.commit()
        assert all(torch.equal(a, b) for a, b in zip(state._tensors(), before, strict=True))
        older.commit(int32(0, 0))
    older, newer = state.begin(ids, int32(1)), state.begin(ids, int32(2))
    state.begin(ids, int32(1)).commit(int32(0))  # which moves nothing
    newer.commit()
    state.reset(0)
    older.commit()
    assert state.begin(ids.repeat(2, 1), int32(1, 2)).history.tolist() == [[5, 6]] * 2


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("ids", [[-1, -1], [-1, 7], [5, -1], [5, 7]])
def test_no_token_in_a_restored_history(ids, id_dtype):
    """-1 as in the history that begin() gives; what is restored from that is the same."""
    state = form(conv=0).state
    given = torch.tensor([ids, [3, 4]], dtype=id_dtype)
    state.restore(int32(1, 2), given)
    tokens = torch.ones(2, 1, dtype=torch.int64)
    history = state.begin(tokens, int32(1, 2)).history
    assert history.tolist() == given.tolist()
    packed = torch.cat([given[0], given[1]])
    state.restore(int32(2, 0), packed, cu_seqlens=int32(0, 2, 4), dead=packed == 4)
    assert state.begin(tokens, int32(2, 0)).history.tolist() == [ids, [3, -1]]
    for wrong in (-2, state.config.raw_vocab_size):
        with pytest.raises(ValueError, match=f"^EngramState.restore: token_ids must be -1 for none, .* got {wrong}$"):
            state.restore(int32(1, 2), torch.where(given == 3, wrong, given))
    assert state.begin(tokens, int32(2, 0)).history.tolist() == [ids, [3, -1]]
    state.restore(0, torch.tensor([1, 2, -9], dtype=id_dtype), cu_seqlens=int32(0, 2))
    assert state.begin(tokens[:1], int32(0)).history.tolist() == [[1, 2]]


@pytest.mark.kernel
def test_registered_ops(device):
    """torch's checks of the ops' schemas and fakes, and a whole step compiled without a break: the same bits."""
    engine = form(device=device)
    history, slots = torch.arange(6, device=device).view(3, 2), int32(2, 0, device=device)
    cursor, ids = int32(3, 4, 5, device=device), torch.arange(4, device=device)
    check("commit_history", history, cursor, slots, ids, int32(0, 1, 4, device=device), ids > 1, slots, 14, 6, None)
    ring = engine.state.layer_slots(1, slots)
    inputs = engine.text(4, torch.zeros(4).bool()).inputs[0]
    norms, weight = engine.norms[0], engine.weights[0]
    options = (3, 1e-6, 1e-5, 1e-6, None, "sign", True, int32(0, 1, 4, device=device), *ring)
    check("gate_conv_residual_slots", *inputs, *norms, weight, *options)

    def step(ids, accepted, hidden, key, value):
        step = engine.state.begin(ids, slots, cu_seqlens=int32_at)
        rows = hash_lookup(ids, engine.plan, engine.tables, **step.options)
        dead = torch.zeros_like(ids, dtype=torch.bool)
        tokens = dict(cu_seqlens=int32_at, conv_state=step.conv_state(1))
        out = engine.gate(0, (hidden, key, value), dead, **tokens)[0]
        step.commit(accepted)
        return rows, out

    int32_at, accepted = int32(0, 1, 4, device=device), int32(1, 2, device=device)
    eager = [step(ids, accepted, *inputs) for _ in range(2)][1]
    engine.state.reset()
    run = compiled(step)
    result = [run(ids, accepted, *inputs) for _ in range(2)][1]
    assert all(torch.equal(a, b) for a, b in zip(result, eager, strict=True))
