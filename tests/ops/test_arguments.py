"""Every documented constraint of ngram_hash, lookup and hash_lookup: what is refused, in which words, and what is not.

The gates are in tests/ops/test_arguments_gate.py. A foreign device is "meta", which every machine has.
"""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import engram_kernels
from engram_kernels import EngramTable, HashPlan
from engram_kernels.geometry.row_format import FORMATS

I32, I64, META = torch.int32, torch.int64, "meta"
TOKENS, LAYERS, COLUMNS, WIDTH = 6, 2, 4, 32


def plan_of(**options):
    options = {"pad": 0, "vocab_size": 50} | options
    multipliers = torch.tensor([[3, 5, 7], [9, 11, 13]])
    return HashPlan.from_parts(multipliers, torch.tensor([[11, 13, 17, 19], [23, 29, 31, 37]]), **options)


def table_of(rows=120, width=WIDTH, name="float32"):
    fmt, own = FORMATS[name], dict(own_scale=0.5) if name == "nvfp4" else {}
    scale = torch.full((rows, fmt.scale_bytes(width)), 120, dtype=torch.uint8) if fmt.group else None
    bits = torch.arange(rows * fmt.row_bytes(width), dtype=I64).remainder(100).to(torch.uint8)
    scale = 0.5 if name == "e4m3" else scale
    return EngramTable.from_tensors(bits.view(fmt.dtype).view(rows, -1), scale, placement="cpu", **own)


def tables_of(*names, rows=120):
    return [table_of(rows, name=name) for name in names or ("float32", "float32")]


def view_at(shape, dtype, offset):
    """Zeros of ``shape`` that start ``offset`` elements into a buffer."""
    count = torch.Size(shape).numel()
    return (
        torch.zeros(count + offset, dtype=torch.uint8 if dtype.itemsize == 1 else dtype)
        .view(dtype)[offset:]
        .view(shape)
    )


def ids_of(*values, dtype=I64):
    return torch.tensor(values, dtype=dtype)


def ends(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def valid(op):
    """Arguments of an op that are all right, so that a case changes one thing."""
    hashing = {"token_ids": ids_of(3, 49, 0, 7, 7, 12), "plan": plan_of()}
    return {
        "ngram_hash": lambda: hashing,
        "hash_lookup": lambda: hashing | {"tables": tables_of()},
        "lookup": lambda: {"table": table_of(), "row_ids": ids_of(0, 5, -1, 7).view(1, 4)},
    }[op]()


def call(op, **changes):
    return getattr(engram_kernels, op)(**(valid(op) | changes))


def closed():
    table = table_of()
    table.close()
    return table


META_PLAN, OPEN_PLAN = plan_of().to(META), plan_of(vocab_size=None)
WIDE = torch.ones(2, 3, dtype=I64)
B3 = ends(0, 2, 2, 5)  # three sequences, one of them empty, and a token of padding
# Constraints on tokens, shared by ngram_hash and hash_lookup: error, words, changes
TOKEN_CASES = [
    (TypeError, "token_ids must be a tensor of int32 or int64, got float32", {"token_ids": torch.zeros(6)}),
    (TypeError, "token_ids must be a tensor of int32 or int64, got int16", {"token_ids": ids_of(1, dtype=torch.int16)}),
    (TypeError, "token_ids must be a tensor of int32 or int64, got list", {"token_ids": [1, 2]}),
    (ValueError, r"token_ids must be contiguous, got strides \[2\]", {"token_ids": ids_of(1, 2, 3, 4)[::2]}),
    (ValueError, r"token_ids must have shape \[T\] or \[B, S\]", {"token_ids": torch.zeros(2, 3, 1).long()}),
    (ValueError, r"token_ids must have shape \[T\] or \[B, S\]", {"token_ids": torch.tensor(5)}),
    (ValueError, r"below 2\^31 ids", {"token_ids": torch.empty(2**31, dtype=I32, device=META), "plan": META_PLAN}),
    (ValueError, r"plan must be on cpu \(plan.to\(...\)\), got meta", {"plan": META_PLAN}),
    (ValueError, "plan must be on meta", {"token_ids": ids_of(1).to(META)}),
    (TypeError, "plan must be a HashPlan, got int", {"plan": 5}),
    (TypeError, "cu_seqlens must be a tensor of int32, got int64", {"cu_seqlens": ends(0, 6, dtype=I64)}),
    (TypeError, "cu_seqlens must be a tensor of int32, got list", {"cu_seqlens": [0, 6]}),
    (ValueError, "cu_seqlens must be on cpu, got meta", {"cu_seqlens": ends(0, 6).to(META)}),
    (ValueError, "cu_seqlens must be contiguous", {"cu_seqlens": ends(0, 9, 6)[::2]}),
    (ValueError, r"cu_seqlens must have shape \[B \+ 1\] with B >= 1, got \[1\]", {"cu_seqlens": ends(0)}),
    (ValueError, r"cu_seqlens must have shape \[B \+ 1\] with B >= 1, got \[0\]", {"cu_seqlens": ends()}),
    (ValueError, r"cu_seqlens must have shape .* got \[1, 2\]", {"cu_seqlens": ends(0, 6)[None]}),
    (ValueError, r"cu_seqlens must rise from 0 to at most T = 6, got \[1, 6\]", {"cu_seqlens": ends(1, 6)}),
    (ValueError, r"cu_seqlens must rise from 0 to at most T = 6, got \[-1, 6\]", {"cu_seqlens": ends(-1, 6)}),
    (ValueError, r"cu_seqlens must rise from 0 .* got \[0, 4, 3, 6\]", {"cu_seqlens": ends(0, 4, 3, 6)}),
    (ValueError, r"cu_seqlens must rise from 0 .* got \[0, 7\]", {"cu_seqlens": ends(0, 7)}),
    (ValueError, r"cu_seqlens must rise .* 0, 0, \.\.\.\]", {"cu_seqlens": ends(*[0] * 20, 7)}),
    (
        ValueError,
        r"cu_seqlens is for packed tokens \[T\]; with \[2, 3\] each row is a sequence",
        {"token_ids": ids_of(*range(6)).view(2, 3), "cu_seqlens": ends(0, 6)},
    ),
    (TypeError, "history must be a tensor of int32 or int64, got float32", {"history": torch.zeros(1, 2)}),
    (ValueError, r"history must have shape \[1, 2\], got \[1, 3\]", {"history": torch.zeros(1, 3).long()}),
    (ValueError, r"history must have shape \[1, 2\], got \[2\]", {"history": torch.zeros(2).long()}),
    (ValueError, r"history must have shape \[3, 2\], got \[1, 2\]", {"history": ids_of(1, 2)[None], "cu_seqlens": B3}),
    (
        ValueError,
        r"history must have shape \[2, 2\], got \[1, 2\]",
        {"token_ids": ids_of(*range(6)).view(2, 3), "history": ids_of(1, 2)[None]},
    ),
    (ValueError, "slots are rows of history, and there is no history", {"slots": ends(0)}),
    (TypeError, "slots must be a tensor of int32, got int64", {"slots": ids_of(0), "history": ids_of(1, 2)[None]}),
    (ValueError, r"slots must have shape \[1\], got \[2\]", {"slots": ends(0, 1), "history": ids_of(1, 2)[None]}),
    (ValueError, r"history must have shape \[2, 2\], got \[2, 3\]", {"slots": ends(0), "history": WIDE}),
    (ValueError, r"history must have shape \[1, 2\], got \[0, 2\]", {"slots": ends(0), "history": WIDE[:0, :2]}),
    (ValueError, r"history must have shape \[2, 2\], got \[2\]", {"slots": ends(0), "history": ids_of(1, 2)}),
    (ValueError, "slots must be on cpu, got meta", {"slots": ends(0).to(META), "history": ids_of(1, 2)[None]}),
    (ValueError, "history must be valid ids, .* got 50", {"slots": ends(1), "history": ids_of(1, 1, 50, 1).view(2, 2)}),
    (ValueError, "history must be on cpu, got meta", {"history": ids_of(1, 2)[None].to(META)}),
    (ValueError, "history must be contiguous", {"history": torch.zeros(2, 3).long().T, "cu_seqlens": B3}),
    (TypeError, "dead must be a tensor of bool, got uint8", {"dead": torch.zeros(6).byte()}),
    (ValueError, r"dead must have shape \[6\], got \[5\]", {"dead": torch.zeros(5).bool()}),
    (
        ValueError,
        r"dead must have shape \[2, 3\], got \[6\]",
        {"token_ids": ids_of(*range(6)).view(2, 3), "dead": torch.zeros(6).bool()},
    ),
    (ValueError, "dead must be on cpu, got meta", {"dead": torch.zeros(6, device=META).bool()}),
    (ValueError, "dead must be contiguous", {"dead": torch.zeros(12).bool()[::2]}),
    (ValueError, "token_ids must be valid ids, 0 <= id < 50, got 50", {"token_ids": ids_of(3, 50)}),
    (ValueError, "token_ids must be valid ids, 0 <= id < 50, got -1", {"token_ids": ids_of(3, -1, 60)}),
    (ValueError, "token_ids must be valid ids, 0 <= id < 50, got 50", {"token_ids": ids_of(3, 50, dtype=I32)}),
    (ValueError, "token_ids must be valid ids, 0 <= id < 50, got 99", {"token_ids": ids_of(1, 2, 3, 99).view(2, 2)}),
    (ValueError, "token_ids must be valid ids, 0 <= id, got -2", {"token_ids": ids_of(-2), "plan": OPEN_PLAN}),
    (
        ValueError,
        "token_ids must be valid ids, 0 <= id < 9, got 9",
        {"token_ids": ids_of(8, 9), "plan": plan_of(token_map=torch.zeros(9).long(), vocab_size=None)},
    ),
    (ValueError, "history must be valid ids, 0 <= id < 50, got 50", {"history": ids_of(50, 1)[None]}),
    (ValueError, "history must be valid ids, 0 <= id < 50, got -2", {"history": ids_of(-1, -2)[None]}),
]  # fmt: skip


def row_out(dtype=torch.float32, shape=(1, 4, WIDTH)):
    return torch.zeros(shape, dtype=dtype)


BYTE = torch.uint8
E4M3 = torch.float8_e4m3fn
PROGRAMS = "programs must be a positive int .*or None, got"
OUT_DTYPE = "out_dtype must be bfloat16, float16.*, got"
# Constraints on reading rows, shared by lookup and hash_lookup. "tables" stands for the table or all of them.
ROW_CASES = [
    (ValueError, "the table is closed", {"tables": closed}),
    (TypeError, "must be an EngramTable, got float32", {"tables": lambda: torch.zeros(120, WIDTH)}),
    (ValueError, "rows must start at a multiple of 16 bytes",
     {"tables": lambda: EngramTable.from_tensors(view_at((120, WIDTH), torch.float32, 1), placement="cpu")}),
    (ValueError, "rows must start at a multiple of 16 bytes",
     {"tables": lambda: EngramTable.from_tensors(view_at((120, WIDTH), torch.bfloat16, 7), placement="cpu")}),
    (ValueError, "scales of 8",
     {"tables": lambda: EngramTable.from_tensors(
         view_at((120, WIDTH), E4M3, 0), view_at((120, 1), BYTE, 1), placement="cpu")}),
    *((ValueError, f"{PROGRAMS} {bad!r}", {"programs": bad}) for bad in (0, -1, True, 1.5, "8")),
    (ValueError, "out_format must be one of 'values', 'storage', got 'raw'", {"out_format": "raw"}),
    (ValueError, "order must be one of 'direct', 'address', 'head' or None, got 'sorted'", {"order": "sorted"}),
    (ValueError, "order must be one of 'direct', 'address', 'head' or None, got True", {"order": True}),
    (TypeError, f"{OUT_DTYPE} torch.float64", {"out_dtype": torch.float64}),
    (TypeError, f"{OUT_DTYPE} torch.int32", {"out_dtype": I32}),
    (TypeError, f"{OUT_DTYPE} torch.float8_e4m3fn", {"tables": lambda: table_of(name="e4m3"), "out_dtype": E4M3}),
    (ValueError, "'storage' keeps the table's own dtype, got out_dtype=torch.float32",
     {"out_format": "storage", "out_dtype": torch.float32}),
]  # fmt: skip


def row_changes(op, changes):
    changes = dict(changes)
    if "tables" in changes:
        made = changes.pop("tables")()
        changes |= {"table": made} if op == "lookup" else {"tables": [made, made]}
    return changes


@pytest.mark.parametrize("op", ["ngram_hash", "hash_lookup", "lookup"])
def test_the_arguments_that_cases_start_from_are_valid(op):
    call(op)


@pytest.mark.parametrize("op", ["ngram_hash", "hash_lookup"])
@pytest.mark.parametrize("error, words, changes", TOKEN_CASES)
def test_tokens(op, error, words, changes):
    with pytest.raises(error, match=f"^{op}: .*{words}"):
        call(op, **changes)


@pytest.mark.parametrize("op", ["lookup", "hash_lookup"])
@pytest.mark.parametrize("error, words, changes", ROW_CASES)
def test_rows(op, error, words, changes):
    with pytest.raises(error, match=f"^{op}: .*{words}"):
        call(op, **row_changes(op, changes))


OUT_SHAPES = {
    "ngram_hash": (TOKENS, LAYERS, COLUMNS),
    "lookup": (1, 4, WIDTH),
    "hash_lookup": (LAYERS, TOKENS, COLUMNS, WIDTH),
}


@pytest.mark.parametrize("op", OUT_SHAPES)
def test_out_of_another_kind(op):
    shape = OUT_SHAPES[op]
    dtype, wrong = (I32, I64) if op == "ngram_hash" else (torch.float32, torch.bfloat16)
    result = call(op, out=(out := torch.zeros(shape, dtype=dtype)))
    assert result is out and torch.equal(out, call(op))
    padded = torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1]
    listed = ", ".join(map(str, shape))
    for error, words, out in (
        (TypeError, f"out must be a tensor of {str(dtype)[6:]}, got {str(wrong)[6:]}", torch.zeros(shape, dtype=wrong)),
        (TypeError, f"out must be a tensor of {str(dtype)[6:]}, got int 5", 5),
        (ValueError, rf"out must have shape \[{listed}\], got \[7, ", torch.zeros(7, *shape[1:], dtype=dtype)),
        (ValueError, "out must be on cpu, got meta", torch.zeros(shape, dtype=dtype, device=META)),
        (ValueError, "out must be contiguous, got strides", padded),
    ):
        with pytest.raises(error, match=f"^{op}: {words}"):
            call(op, out=out)


@pytest.mark.parametrize("op", ["lookup", "hash_lookup"])
@pytest.mark.parametrize("name", ["e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4", "float32"])
def test_out_of_storage(op, name):
    shape, fmt = OUT_SHAPES[op], FORMATS[name]
    options = row_changes(op, {"tables": lambda: table_of(name=name), "out_format": "storage"})
    rows = torch.zeros(*shape[:-1], fmt.row_items(WIDTH), dtype=fmt.dtype)
    scales = torch.zeros(*shape[:-1], fmt.scale_bytes(WIDTH), dtype=BYTE) if fmt.group else None
    result, expected = call(op, out=(rows, scales), **options), call(op, **options)
    assert result[0] is rows and torch.equal(rows.view(BYTE), expected[0].view(BYTE))
    assert (result[1] is expected[1] is None) or torch.equal(result[1], expected[1])
    cases = [
        (TypeError, r"out must be a pair \(rows, scales\) for 'storage', got Tensor", rows),
        (TypeError, r"out must be a pair \(rows, scales\) for 'storage', got tuple", (rows,)),
        (TypeError, r"out(\[0\])? must be a tensor of \w+, got int8", (rows.view(torch.int8), scales)),
        (TypeError, r"out(\[0\])? must be a tensor of \w+, got NoneType", (None, scales)),
        (ValueError, r"out(\[0\])? must have shape", (rows[:, 1:].clone(), scales)),
        (ValueError, r"out(\[0\])? must be on cpu, got meta", (rows.to(META), scales)),
    ]
    if scales is None:
        words = rf"a table of format {name} has no scales per row, got out\[1\]"
        cases.append((ValueError, words, (rows, torch.zeros(1))))
    else:
        assert result[1] is scales
        cases.append((TypeError, r"out(\[1\])? must be a tensor of uint8, got float32", (rows, scales.float())))
        cases.append((TypeError, r"out(\[1\])? must be a tensor of uint8, got NoneType", (rows, None)))
        cases.append((ValueError, r"out(\[1\])? must have shape", (rows, scales[:, 1:].clone())))
        cases.append((ValueError, r"out(\[1\])? must be contiguous", (rows, scales.repeat_interleave(2, -1)[..., ::2])))
    for error, words, out in cases:
        with pytest.raises(error, match=f"^{op}: {words}"):
            call(op, out=out, **options)


@pytest.mark.parametrize(
    "error, words, changes",
    [
        (TypeError, "row_ids must be a tensor of int32 or int64, got float32", {"row_ids": torch.zeros(1, 4)}),
        (TypeError, "row_ids must be a tensor of int32 or int64, got list", {"row_ids": [0]}),
        (
            ValueError,
            r"row_ids must have shape \[..., C\], below 2\^31 ids, got \[\]",
            {"row_ids": torch.tensor(3)},
        ),
        (ValueError, "tensors on meta need a table on meta .* on cpu", {"row_ids": ids_of(1).to(META)}),
    ],
)
def test_lookup_alone(error, words, changes):
    with pytest.raises(error, match=f"^lookup: {words}"):
        call("lookup", **changes)


@pytest.mark.parametrize(
    "error, words, changes",
    [
        (ValueError, "tables must be one per layer of the plan, 2, got 1", {"tables": [table_of()]}),
        (ValueError, "tables must be one per layer of the plan, 2, got 3", {"tables": [table_of()] * 3}),
        (ValueError, "tables must be one per layer of the plan, 2, got 0", {"tables": []}),
        (TypeError, "tables must be a sequence of EngramTable, got EngramTable", {"tables": table_of()}),
        (ValueError, r"tables\[0\] must have at least 60 rows, got 59", {"tables": [table_of(59), table_of()]}),
        (ValueError, r"tables\[1\] must have at least 120 rows, got 119", {"tables": [table_of(), table_of(119)]}),
        (ValueError, "tables must share format and width", {"tables": tables_of("float32", "bfloat16")}),
        (ValueError, "tables must share format and width", {"tables": tables_of("e4m3", "e4m3_ue8m0")}),
        (ValueError, "tables must share format and width", {"tables": [table_of(), table_of(width=64)]}),
        (ValueError, "the table is closed", {"tables": [table_of(), closed()]}),
        (TypeError, "tables\\[1\\] must be an EngramTable, got NoneType", {"tables": [table_of(), None]}),
    ],
)
def test_hash_lookup_alone(error, words, changes):
    with pytest.raises(error, match=f"^hash_lookup: {words}"):
        call("hash_lookup", **changes)


@pytest.mark.parametrize("op", ["lookup", "hash_lookup"])
def test_tables_that_a_gpu_cannot_read(op, monkeypatch):
    """Refused before anything is launched: fake tensors say where they would be."""

    def fake(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # nothing is registered
    start = valid(op)
    host = EngramTable.empty(120, WIDTH, "float32", placement="host")
    for table, words in (
        (host, "a registered host table, got EngramTable.* host, .* on cpu"),
        (table_of(), "a table on cuda:0 or a registered host table, got EngramTable.* cpu, .* on cpu"),
        (closed(), "the table is closed"),
    ):
        given = row_changes(op, {"tables": lambda table=table: table})
        with FakeTensorMode():
            if op == "lookup":
                given |= {"row_ids": fake(start["row_ids"])}
            else:
                moved = {name: fake(x) for name, x in vars(start["plan"]).items() if isinstance(x, torch.Tensor)}
                given |= {"token_ids": fake(start["token_ids"]), "plan": dataclasses.replace(start["plan"], **moved)}
            with pytest.raises(ValueError, match=f"^{op}: .*{words}"):
                getattr(engram_kernels, op)(**given)


@pytest.mark.parametrize("op", ["ngram_hash", "hash_lookup"])
def test_what_is_never_read_may_hold_anything(op):
    """Dead tokens, padding, and history -1: no error, and nothing else changes with what they hold."""
    dead = torch.tensor([False, False, True, False, False, False])
    options = {"cu_seqlens": ends(0, 3, 5), "dead": dead, "history": ids_of(4, 5, -1, 6).view(2, 2)}
    calm = call(op, token_ids=ids_of(3, 49, 0, 7, 7, 12), **options)
    for wild in (-1, 50, 2**62, -(2**63)):
        assert torch.equal(call(op, token_ids=ids_of(3, 49, wild, 7, 7, wild), **options), calm)
    rows = ids_of(*range(6)).view(2, 3)
    dead = torch.tensor([[False, True, False], [True, False, False]])
    calm = call(op, token_ids=rows, dead=dead)
    assert torch.equal(call(op, token_ids=rows.masked_fill(dead, 999), dead=dead), calm)
    assert call(op, history=torch.full((1, 2), -1)).equal(call(op))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (0, 0)])
def test_zero_tokens(shape):
    ids, history = torch.zeros(shape, dtype=I64), torch.zeros(shape[0] if len(shape) == 2 else 1, 2, dtype=I64)
    options = {"history": history, "dead": torch.zeros(shape, dtype=torch.bool)}
    for given in ({}, options):
        result = call("ngram_hash", token_ids=ids, **given)
        assert result.shape == (*shape, LAYERS, COLUMNS) and result.dtype == I32
        result = call("hash_lookup", token_ids=ids, **given)
        assert result.shape == (LAYERS, *shape, COLUMNS, WIDTH) and result.dtype == torch.float32
        tables = tables_of("e4m3_ue8m0", "e4m3_ue8m0")
        rows, scales = call("hash_lookup", token_ids=ids, tables=tables, out_format="storage", **given)
        assert rows.shape == (LAYERS, *shape, COLUMNS, WIDTH) and scales.shape == (LAYERS, *shape, COLUMNS, 1)
    assert call("lookup", row_ids=ids).shape == (*shape, WIDTH)
    rows, scales = call("lookup", row_ids=ids, table=table_of(name="e4m3_ue8m0"), out_format="storage")
    assert rows.shape == (*shape, WIDTH) and scales.shape == (*shape, 1)


@pytest.mark.parametrize("op", ["ngram_hash", "hash_lookup"])
def test_empty_sequences(op):
    history = ids_of(4, 5, 6, 7, 8, 9).view(3, 2)
    none = call(op, token_ids=ids_of(), cu_seqlens=ends(0, 0, 0, 0), history=history)
    assert 0 in none.shape
    assert torch.equal(call(op, cu_seqlens=ends(0, 0, 6, 6), history=history), call(op, history=history[1:2]))
    only_padding = call(op, cu_seqlens=ends(0, 0))
    assert (only_padding == (-1 if op == "ngram_hash" else 0)).all()


def test_ids_of_either_width_and_rows_of_any_stride():
    for op in ("ngram_hash", "hash_lookup"):
        narrow = call(op, token_ids=valid(op)["token_ids"].int(), history=ids_of(4, 5, dtype=I32)[None])
        assert torch.equal(narrow, call(op, history=ids_of(4, 5)[None]))
    ids = ids_of(*range(24)).view(4, 6)
    for view in (ids.T, ids[:, ::2], ids[::2, 1:], ids.int(), ids[0], ids.view(2, 2, 6)):
        assert torch.equal(call("lookup", row_ids=view), call("lookup", row_ids=view.contiguous()))
