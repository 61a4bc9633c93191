"""Calls of a signature that came before: checked no more than they may be, and no less; launched as the first was."""

import copy
import dataclasses
import gc

import pytest
import torch

import engram_kernels
from engram_kernels import EngramTable, gate_residual, hash_lookup, lookup
from engram_kernels.ops import gate, gate_conv, hash_rows, hashing, rows
from engram_kernels.ops.call import MOST_KEPT, Op, form_of
from engram_kernels.ops.conv_kernels.slots import ConvSlots
from tests.conftest import launches, recent

from . import test_arguments, test_arguments_gate

CHECKS = {
    "ngram_hash": (hashing, "check_tokens"),
    "lookup": (rows, "check_tables"),
    "hash_lookup": (hash_rows, "check_tokens"),
    "gate_residual": (gate, "check_gate"),
    "gate_conv_residual": (gate_conv, "check_gate"),
}
KERNELS = {name: f"{name}_kernel" for name in CHECKS} | {"gate_conv_residual": "conv_residual_kernel"}


def valid(op):
    return (test_arguments if op in ("ngram_hash", "lookup", "hash_lookup") else test_arguments_gate).valid(op)


def on(device, value):
    """An argument on ``device``; tables stay where a device can read them from."""
    if isinstance(value, EngramTable):
        placement = "device" if device.type == "cuda" else "cpu"
        return EngramTable.from_tensors(value.weight.to(device), placement=placement)
    if isinstance(value, list):
        return [on(device, part) for part in value]
    return value.to(device) if hasattr(value, "to") else value


def other_content(given):
    """Arguments of the same form with other content."""
    return {name: x.flip(-1) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.fixture
def counted(monkeypatch):
    """Calls of each op's checks; nothing is prepared before the test."""
    calls = dict.fromkeys(CHECKS, 0)
    for op, (module, name) in CHECKS.items():
        original = getattr(module, name)

        def check(*args, op=op, original=original, **options):
            calls[op] += 1
            return original(*args, **options)

        monkeypatch.setattr(module, name, check)
    for op in (gate.GATE, gate_conv.GATE_CONV):
        op.forget()
    return calls


def test_forms():
    """Whatever differs between two tensors but their content makes another form."""
    x = torch.zeros(4, 6)
    same = [torch.ones(4, 6), torch.zeros(5, 6)[1:]]
    others = [x[:3], x.T, torch.zeros(6, 4).T, x.double(), x.to("meta"), x[None], None]
    assert all(form_of(x) == form_of(y) and hash(form_of(x)) == hash(form_of(y)) for y in same)
    assert len({form_of(x), *(form_of(y) for y in others)}) == 1 + len(others)
    assert len({form_of(x, None), form_of(None, x), form_of(x), form_of(x, x)}) == 4
    assert form_of(x, [1.0]) is form_of(3) is None


class Owner:
    """What launches are kept for."""


class Doubled(Op):
    """A call is (owner, number); what is done is noted."""

    name = "doubled"

    def __init__(self):
        super().__init__()
        self.done = []

    def owner(self, call):
        return call[0]

    def signature(self, call, out):
        return call[1]

    def check(self, call, out):
        self.done.append("check")

    def on_kernels(self, call):
        return True

    def reference(self, call, out):
        raise AssertionError

    def inputs(self, call):
        return ()

    compiled = allocate = reference

    def apart(self, call, out):
        return lambda outs, inputs: None

    def launcher(self, call, out):
        self.done.append("prepare")
        return lambda call, out: out.append(2 * call[1])


def test_launches_are_kept_for_their_owner():
    op, owner, out = Doubled(), Owner(), []
    assert op((owner, 3), out) is op((owner, 3), out) is out == [6, 6] and op.done == ["check", "prepare"]
    op((Owner(), 3), out)
    assert op.done == ["check", "prepare"] * 2 and len(op._kept) == 1, "the other owner is gone, and its launches"
    op((owner, 4), out)
    assert op.done == ["check", "prepare"] * 3
    for number in range(5000):
        op((owner, number), out)
        assert len(op._kept[owner]) <= MOST_KEPT
    op.forget()
    del op.done[:]
    op((owner, 4999), out)
    assert op.done == ["check", "prepare"]


def test_calls_without_a_signature_are_prepared_every_time():
    op, owner, out = Doubled(), Owner(), []
    op.signature = lambda call, out: None
    for _ in range(2):
        op((owner, 3), out)
    assert op.done == ["check", "prepare"] * 2
    op.signature = lambda call, out: [call[1]]  # cannot be hashed, which checks are to refuse
    with pytest.raises(TypeError, match="unhashable"):
        op((owner, 3), out)


@pytest.mark.kernel
@pytest.mark.parametrize("op", CHECKS)
def test_a_form_is_checked_once(op, device, counted):
    """The second call skips the checks and has the result of a call of its own, of other content included."""
    call, given = getattr(engram_kernels, op), {name: on(device, x) for name, x in valid(op).items()}
    first, calls = call(**given), counted[op]
    before = launches[KERNELS[op]]
    assert torch.equal(call(**given), first)
    assert counted[op] == calls > 0 and launches[KERNELS[op]] == before + 1
    changed = other_content(given)
    result = call(**changed)
    assert counted[op] == calls and not torch.equal(result, first)
    assert torch.equal(result, call(**changed, out=torch.zeros_like(result)))  # another form
    assert counted[op] == calls + 1
    if "eps" in given:
        assert not torch.equal(call(**(given | {"eps": 0.5})), first) and counted[op] == calls + 2


@pytest.mark.kernel
@pytest.mark.parametrize("op", CHECKS)
def test_what_is_refused_is_refused_after_a_good_call(op, device, counted):
    """Every case of the tests of arguments, between two calls that are all right."""
    if device.type != "cpu":
        pytest.skip("the cases are of CPU tensors")
    call, given = getattr(engram_kernels, op), valid(op)
    if op in ("gate_residual", "gate_conv_residual"):
        cases = test_arguments_gate.GATE_CASES + test_arguments_gate.CONV_CASES * (op == "gate_conv_residual")
        cases = [case for case in cases if "tokens" not in case[2]]
    else:
        cases = test_arguments.TOKEN_CASES * (op != "lookup")
        for error, words, changes in test_arguments.ROW_CASES * (op != "ngram_hash"):
            cases = [*cases, (error, words, test_arguments.row_changes(op, changes))]
    expected = call(**given)
    for error, words, changes in cases:
        start = given
        cu = changes.get("cu_seqlens")
        if isinstance(cu, torch.Tensor) and cu.dim() == 1 and len(cu) > 1 and "history" not in changes:
            start = given | {"cu_seqlens": torch.zeros(len(cu), dtype=torch.int32)}  # the same form, of padding alone
            call(**start)
        with pytest.raises(error, match=f"^{op}: .*{words}"):
            call(**(start | changes))
    calls = counted[op]
    assert torch.equal(call(**given), expected) and counted[op] == calls


class LostFile:
    """A file that a table is mapped from, and that has shrunk."""

    def check(self, where):
        raise OSError(f"{where}: lost")

    def close(self):
        pass


@pytest.mark.kernel
def test_tables_that_change(device):
    given = {name: on(device, x) for name, x in test_arguments.valid("hash_lookup").items()}
    plan, tables, ids = given["plan"], given["tables"], torch.arange(4, device=device)
    for _ in range(2):
        first, whole = lookup(tables[1], ids), hash_lookup(**given)
    assert not whole.requires_grad
    tables[1].requires_row_grad_()
    assert lookup(tables[1], ids).requires_grad and hash_lookup(**given).requires_grad
    with pytest.raises(ValueError, match="out must be None for a trainable table"):
        lookup(tables[1], ids, out=torch.empty_like(first))
    tables[1].requires_row_grad_(False)
    with torch.no_grad():
        tables[1].weight[0] += 1
    assert torch.equal(lookup(tables[1], ids)[0], first[0] + 1)
    calls = (lambda: lookup(tables[1], ids), lambda: hash_lookup(**given))
    tables[1].files = [LostFile()]
    for call in calls:
        with pytest.raises(OSError, match="lookup: lost"):
            call()
    tables[1].files = []
    tables[1].close()
    for call in calls:
        with pytest.raises(ValueError, match="the table is closed"):
            call()
    given["tables"] = [tables[0], on(device, test_arguments.table_of())]
    kept = hash_rows.HASH_LOOKUP._kept
    assert torch.equal(hash_lookup(**given), whole) and len(kept[plan]) == 2
    assert dataclasses.replace(plan) not in kept and copy.deepcopy(plan) not in kept


@pytest.mark.kernel
def test_launches_go_with_what_they_are_for(device):
    kept = hash_rows.HASH_LOOKUP._kept, rows.LOOKUP._kept
    gc.collect()
    before = [len(launches_of) for launches_of in kept]
    given = {name: on(device, x) for name, x in test_arguments.valid("hash_lookup").items()}
    hash_lookup(**given)
    lookup(given["tables"][0], torch.arange(4, device=device))
    assert [len(launches_of) for launches_of in kept] == [count + 1 for count in before]
    del given
    gc.collect()
    assert [len(launches_of) for launches_of in kept] == before


@pytest.mark.kernel
@pytest.mark.parametrize(
    "op, kernel, names",
    [
        ("gate_residual", "gate_residual_kernel", ("hidden", "key", "value", "out")),
        ("gate_conv_residual", "gate_scale_kernel", ("hidden", "key", "value")),
    ],
)
def test_addresses_are_looked_at_in_every_call(op, kernel, names, device):
    """Tensors of one form start at multiples of 16 bytes or not."""
    call, given = getattr(engram_kernels, op), {name: on(device, x) for name, x in valid(op).items()}
    expected = call(**given)
    given["out"] = torch.zeros_like(expected)
    for name in names:
        for aligned in (True, False, True):
            buffer = torch.zeros(given[name].numel() + 4, device=device)[0 if aligned else 1 :]
            moved = buffer[: given[name].numel()].view(given[name].shape).copy_(given[name])
            assert torch.equal(call(**(given | {name: moved})), expected)
            assert recent[kernel]["ALIGNED"] is aligned


@pytest.mark.kernel
def test_hidden_as_its_own_output(device, counted):
    """It may have any strides then, which no other output may."""
    given = {name: on(device, x) for name, x in test_arguments_gate.valid("gate_residual").items()}
    expected = gate_residual(**given)

    def strided():
        buffer = torch.zeros(*expected.shape[:-1], expected.shape[-1] + 8, device=device)[..., : expected.shape[-1]]
        return buffer.copy_(given["hidden"])

    for _ in range(2):
        hidden = strided()
        assert torch.equal(gate_residual(**(given | {"hidden": hidden}), out=hidden), expected)
        with pytest.raises(ValueError, match="out must be contiguous"):
            gate_residual(**(given | {"hidden": strided()}), out=strided())


@pytest.mark.kernel
def test_slots_of_a_state(device, counted):
    """The ring's entries of other sequences, by the prepared launches."""
    given = {name: on(device, x) for name, x in test_arguments_gate.valid("gate_conv_residual").items()}
    _, branches, width = given["hidden"].shape

    def ring(slot):
        value = torch.randn(3, 9, width, generator=torch.Generator().manual_seed(1)).to(device)
        parts = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([5, 4, 7], [slot]))
        return ConvSlots(value, value[..., :branches].abs().contiguous(), *parts)

    results, without = [], engram_kernels.gate_conv_residual(**given)
    for slot in (0, 1, 0):
        out, after = engram_kernels.gate_conv_residual(**given, conv_state=ring(slot))
        results.append((out, after.value))
    assert counted["gate_conv_residual"] == 2 and not torch.equal(results[0][0], without)
    gate_conv.GATE_CONV.forget()
    for slot, (out, value) in zip((0, 1), results, strict=False):
        fresh, after = engram_kernels.gate_conv_residual(**given, conv_state=ring(slot))
        assert torch.equal(fresh, out) and torch.equal(after.value, value)
        gate_conv.GATE_CONV.forget()
    assert torch.equal(results[0][0], results[2][0]) and not torch.equal(results[0][0], results[1][0])
