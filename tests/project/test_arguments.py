"""Bad values for every parameter of every public function: an error that says where, what was expected and what came.

``function.kinds`` declares what a parameter takes (geometry/kinds.py). CALLS has a good call of each function; each
value of POOL is put in the place of each argument in turn. One that is not of the parameter's kind is a TypeError or
ValueError that names function and parameter; one that is may be right, or an error of these classes. Nothing is half
done: after an error the good call goes through, on the same objects.
"""

import math
import re
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import engram_kernels as ek
from tests.ops import test_arguments, test_arguments_gate
from tests.reports.arguments import PAGE, kinds_of, page, parameters, public_functions


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


#: One of each sort that was ever taken for something else.
POOL = (
    None, True, -1, 0, 3, 10**30, -(10**400), 1.5, -0.5, math.nan, math.inf, "text", "", "cpu", "\0", b"bytes", [],
    [None], ["a"], {}, {"a": 1}, (), (0.9,), (1, 2, 3), {1}, object(), Unprintable(), Unprintable, print, np.ones(2),
    np.int64(2), torch.int8, torch.complex64, torch.float32, torch.tensor(3), torch.tensor(0.5), torch.zeros(0),
    torch.zeros(3), torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(4, dtype=torch.bool), torch.arange(3),
    torch.zeros(2, 2, device="meta"), torch.full((2, 2), -7), torch.zeros(3).to_sparse(), torch.device("meta"),
)  # fmt: skip

CONFIG = dict(layers=(1, 3), max_ngram=3, heads=2, row_width=32, table_sizes=(5, 5), hidden_size=8, branches=2)
CONFIG |= dict(raw_vocab_size=50, vocab_size=None, pad_id=2, eos_id=None, window="pad", multiplier_rule="numpy", seed=0)
CONFIG |= dict(row_multiple=1, format="float32", eps=1e-6, projection_bias=False, conv_kernel=2, conv_eps=None)
CONFIG |= dict(norm_offset=0.0, zero_gate="copysign")


def config():
    return ek.EngramConfig(**CONFIG)


def plan():
    return ek.HashPlan.build(config(), torch.arange(50))


def table(layer=0):
    return ek.EngramTable.empty(config().rows_per_layer[layer], 32, "float32", placement="cpu")


def trainable():
    found = ek.EngramTable.from_tensors(torch.ones(7, 8), placement="cpu").requires_row_grad_()
    found.accumulate_row_grad(torch.tensor([1, 2]), torch.ones(2, 8))
    return found


def overlay():
    return table().overlay(torch.tensor([3]), torch.ones(1, 32))


def recording():
    """A table whose record began at version 1."""
    found = table()
    found.write_rows(torch.arange(found.rows), torch.zeros(found.rows, 32))  # what empty() leaves may be anything
    found.record_changes()
    found.rows_changed(torch.tensor([2]))
    return found


def changes_file():
    recording().save_changes("c.safetensors", 1, format="float32")
    return "c.safetensors"


def engram():
    return ek.Engram(config(), 1, plan(), table())


def state():
    return ek.EngramState(config(), 3, "cpu", dtype=torch.float32)


def slots(*numbers):
    return torch.tensor(numbers or (1,), dtype=torch.int32)


def ids():
    return torch.arange(1, 5)[None]


def cache():
    found = plan()
    return ek.NgramCache(found, [table(0), table(1)], entries=8)


def made(kind, **options):
    return kind([trainable()], **options)


def prefetcher():
    return ek.Prefetcher(plan(), [table(0), table(1)], 8, **PROJECTING)


def started():
    found = prefetcher()
    found.start(torch.arange(4))
    return found


def begun():
    return state().begin(ids(), slots())


def sharded(**options):
    weight = torch.ones(config().rows_per_layer[0], 32)
    return ek.ShardedTable.from_tensors(weight, config=config(), layer=1, placement="cpu", **options)


SHARDING = dict(split="rows", format=None, scale=1.0, fill=None, capacity=None, cache_bytes=None)
SHARDING |= dict(node=None, replicas=None)
OPTIMIZER = dict(lr=0.1, eps=1e-8, weight_decay=0.0, state_placement=None, stochastic_rounding=True, seed=0)
OPTIMIZER |= dict(reduce="alone", group=None)
ATTACH = dict(name="x", rows=4, width=32, format="e4m3", scale=None, scales=None, digest=None, timeout=0)
NEW = dict(device=None, name=None, keep=False, scales=None, progress=None, placement="cpu")
PROJECTING = dict(projections=[lambda rows, out: out.zero_()] * 2, kv_width=3, kv_dtype=torch.float32)
TOKENS = dict(cu_seqlens=None, history=None, dead=None, slots=None)
READ = dict(out=None, out_dtype=None, out_format="values", programs=None, order=None)
SHARDED = dict(config=config(), layer=1, group=None, placement="cpu")
GATE = dict(clamp=1e-6, mask=None, zero_gate="sign", residual=True, out=None)

RUN = dict(optimizers=[], schedulers=[])


def run():
    """A module, its table and an optimizer of that."""
    optimizer = made(ek.RowAdam)
    optimizer.zero_grad()
    return dict(module=nn.Linear(2, 2), row_optimizers=[optimizer], tables={"table": optimizer.tables[0]})


def saved_run():
    return ek.save_training("run", **run())


#: {public callable: a good call of it, as (function, arguments)}, made anew for each parameter.
CALLS = {
    "EngramConfig": lambda: (ek.EngramConfig, dict(CONFIG)),
    "HashPlan": lambda: (ek.HashPlan, {name: getattr(plan(), name) for name in parameters(ek.HashPlan)}),
    "HashPlan.build": lambda: (ek.HashPlan.build, dict(config=config(), token_map=torch.arange(50))),
    "HashPlan.from_parts": lambda: (
        ek.HashPlan.from_parts,
        dict(multipliers=torch.ones(1, 2).long(), primes=torch.tensor([[5]]), pad=0, token_map=None, eos=None,
             vocab_size=9),
    ),
    "HashPlan.select": lambda: (plan().select, dict(layers=[0], columns=None)),
    "HashPlan.to": lambda: (plan().to, dict(device="cpu")),
    "EngramTable": lambda: (
        ek.EngramTable,
        dict(weight=torch.ones(4, 32), scale=None, format=table().format, placement="cpu", mapping=None, scales=None),
    ),
    "EngramTable.empty": lambda: (ek.EngramTable.empty, NEW | dict(rows=4, width=32, format="float32", scale=1.0)),
    "EngramTable.from_tensors": lambda: (ek.EngramTable.from_tensors, NEW | dict(weight=torch.ones(4, 32), scale=None)),
    "EngramTable.requires_row_grad_": lambda: (trainable().requires_row_grad_, dict(requires=True)),
    "EngramTable.accumulate_row_grad": lambda: (
        trainable().accumulate_row_grad, dict(row_ids=torch.tensor([1]), grad=torch.ones(1, 8))
    ),
    "RowAdagrad": lambda: (ek.RowAdagrad, OPTIMIZER | dict(tables=trainable())),
    "RowSinkhorn": lambda: (
        ek.RowSinkhorn,
        {name: value for name, value in OPTIMIZER.items() if name not in ("weight_decay", "group")}
        | dict(tables=[trainable()], momentum=0.9, update_rms=0.2, threshold=0.01, balancings=3),
    ),
    "RowSinkhorn.step": lambda: (made(ek.RowSinkhorn).step, dict(closure=None)),
    "EngramTable.take_moves": lambda: (trainable().take_moves, dict(row_ids=torch.tensor([1]))),
    "RowAdam": lambda: (ek.RowAdam, OPTIMIZER | dict(tables=[trainable()], betas=(0.9, 0.99))),
    "RowAdam.step": lambda: (made(ek.RowAdam).step, dict(closure=None)),
    "RowAdam.states": lambda: (made(ek.RowAdam).states, dict(index=0)),
    "RowAdam.zero_grad": lambda: (made(ek.RowAdam).zero_grad, dict(set_to_none=True)),
    "RowAdam.load_state_dict": lambda: (
        made(ek.RowAdam).load_state_dict, dict(state_dict=made(ek.RowAdam).state_dict())
    ),
    "NgramCache": lambda: (
        ek.NgramCache, dict(plan=plan(), tables=[table(0), table(1)], bytes=None, entries=8, ways=4, min_tokens=None)
    ),
    "NgramCache.warm": lambda: (cache().warm, dict(token_ids=torch.arange(9), progress=None)),
    "EngramState": lambda: (
        ek.EngramState, dict(config=config(), slots=2, device="cpu", dtype=torch.float32, max_drafts=0)
    ),
    "EngramState.begin": lambda: (state().begin, dict(token_ids=ids(), slots=slots(), cu_seqlens=None, dead=None)),
    "EngramState.reset": lambda: (state().reset, dict(slots=1)),
    "EngramState.restore": lambda: (
        state().restore,
        dict(slots=1, token_ids=ids(), cu_seqlens=None, dead=None, conv_states=state().conv_states(1)),
    ),
    "EngramState.conv_states": lambda: (state().conv_states, dict(slots=1)),
    "EngramStep.commit": lambda: (begun().commit, dict(accepted=None)),
    "Prefetcher": lambda: (
        ek.Prefetcher,
        dict(plan=plan(), tables=[table(0), table(1)], max_tokens=8, programs=None, order=None, out_dtype=None,
             max_sequences=None, layers=None, cache=None, **PROJECTING, ahead=None, depth=2,
             out_format="values"),
    ),
    "Prefetcher.start": lambda: (prefetcher().start, dict(token_ids=torch.arange(4), **TOKENS)),
    "Prefetcher.launches": lambda: (prefetcher().launches, dict(num_tokens=4)),
    "Engram.build": lambda: (
        ek.Engram.build,
        dict(config=config(), layer=1, tokenizer=torch.arange(50), placement="cpu", name=None, init=0.1, seed=0,
             trainable=False, residual=True, device=None, dtype=None, progress=None),
    ),
    "Engram": lambda: (
        ek.Engram, dict(config=config(), layer=1, plan=plan(), table=table(), residual=True, device=None, dtype=None)
    ),
    "Engram.forward": lambda: (
        engram(),
        dict(hidden=torch.ones(4, 2, 8), token_ids=torch.arange(4), rows=None, kv=None, conv_state=None, state=None)
        | TOKENS,
    ),
    "Engram.rows": lambda: (engram().rows, dict(token_ids=torch.arange(4), **TOKENS)),
    "Engram.project": lambda: (engram().project, dict(rows=engram().rows(torch.arange(4)), out=torch.empty(4, 24))),
    "Engram.new_conv_state": lambda: (engram().new_conv_state, dict(batch=2)),
    "Engram.load_checkpoint": lambda: (engram().load_checkpoint, dict(tensors=engram().state_dict(), prefix="")),
    "replace_engram": lambda: (
        ek.replace_engram, dict(model=nn.Sequential(), placement="cpu", tables=None, optimizer=None)
    ),
    "export_state": lambda: (ek.export_state, dict(model=nn.Sequential(engram()))),
    "warmup": lambda: (
        ek.warmup,
        dict(engrams=[engram()], max_tokens=4, prefetcher=None, state=None, dead=False, id_dtype=torch.int64),
    ),
    "set_dependent_launch": lambda: (ek.set_dependent_launch, dict(enabled=True)),
    "set_ranges": lambda: (ek.set_ranges, dict(enabled=False)),
    "MetricsCollector": lambda: (ek.MetricsCollector, dict(sources={"a": table(), "b": {0: cache()}})),
    "save_training": lambda: (ek.save_training, RUN | run() | dict(folder="run", step=3, extra=None)),
    "load_training": lambda: (ek.load_training, RUN | dict(folder=saved_run()) | run()),
    "EngramConfig.from_hf": lambda: (ek.EngramConfig.from_hf, dict(config=None)),
    "EngramTable.from_safetensors": lambda: (
        ek.EngramTable.from_safetensors,
        dict(paths=table().save_safetensors("t.safetensors"), placement="cpu", config=None, layer=None, prefix=None,
             mapped=False, keep=False, threads=1, progress=None),
    ),
    "EngramTable.save_safetensors": lambda: (
        table().save_safetensors, dict(path="t.safetensors", prefix="", shard_bytes=None, metadata=None, progress=None)
    ),
    "EngramTable.overlay": lambda: (
        table().overlay, dict(ids=torch.tensor([1, 2]), rows=torch.ones(2, 32), scales=None)
    ),
    "EngramTable.write_rows": lambda: (
        table().write_rows, dict(ids=torch.tensor([1, 2]), rows=torch.ones(2, 32), scales=None)
    ),
    "EngramTable.load_overlay": lambda: (table().load_overlay, dict(path=overlay().save_safetensors("r.safetensors"))),
    "EngramTable.prefetch": lambda: (table().prefetch, dict(row_ids=torch.tensor([1]))),
    "EngramTable.rows_changed": lambda: (table().rows_changed, dict(ids=torch.tensor([1]))),
    "EngramTable.record_changes": lambda: (table().record_changes, dict(on=True)),
    "EngramTable.changed_since": lambda: (recording().changed_since, dict(version=0)),
    "EngramTable.update_from": lambda: (table().update_from, dict(master=recording(), since=1, clip=False)),
    "EngramTable.save_changes": lambda: (
        recording().save_changes,
        dict(path="c.safetensors", since=1, format="e4m3", scale=0.5, clip=False, metadata=None),
    ),
    "EngramTable.load_changes": lambda: (table().load_changes, dict(path=changes_file(), since=1)),
    "RowOverlay.save_safetensors": lambda: (overlay().save_safetensors, dict(path="r.safetensors", metadata=None)),
    "EngramTable.attach": lambda: (ek.EngramTable.attach, ATTACH),
    "EngramTable.free": lambda: (ek.EngramTable.free, dict(name="x")),
    "EngramTable.publish": lambda: (table().publish, dict(progress=None)),
    "RowAdam.save_safetensors": lambda: (
        made(ek.RowAdam).save_safetensors, dict(path="o.safetensors", metadata=None, progress=None)
    ),
    "RowAdam.load_safetensors": lambda: (
        made(ek.RowAdam).load_safetensors,
        dict(path=made(ek.RowAdam).save_safetensors("o.safetensors"), threads=1, progress=None),
    ),
    "RowAdam.add_param_group": lambda: (
        made(ek.RowAdam).add_param_group, dict(param_group=dict(params=trainable(), lr=0.2))
    ),
    "NgramCache.save": lambda: (cache().save, dict(path="keys.npz")),
    "NgramCache.load": lambda: (cache().load, dict(path=cache().save("keys.npz"))),
    "NgramCache.takes": lambda: (cache().takes, dict(num_tokens=3)),
    "EngramState.layer_slots": lambda: (state().layer_slots, dict(layer=1, slots=slots())),
    "EngramStep.conv_state": lambda: (begun().conv_state, dict(layer=1)),
    "Prefetcher.rows": lambda: (started().rows, dict(layer=0)),
    "Prefetcher.kv": lambda: (started().kv, dict(layer=0)),
    "Started.rows": lambda: (started().start(torch.arange(4)).rows, dict(layer=0)),
    "Started.kv": lambda: (started().start(torch.arange(4)).kv, dict(layer=0)),
    "ShardedTable": lambda: (ek.ShardedTable, SHARDED | SHARDING),
    "ShardedTable.from_tensors": lambda: (
        ek.ShardedTable.from_tensors, SHARDED | dict(weight=torch.ones(config().rows_per_layer[0], 32), scale=None)
    ),
    "ShardedTable.from_safetensors": lambda: (
        ek.ShardedTable.from_safetensors,
        SHARDED | dict(paths=table().save_safetensors("t.safetensors"), prefix=None, threads=1, progress=None),
    ),
    "ShardedTable.save_safetensors": lambda: (
        sharded().save_safetensors, dict(path="s.safetensors", prefix="", shard_bytes=None, metadata=None)
    ),
    "ShardedTable.node_groups": lambda: (
        ek.ShardedTable.node_groups, dict(group=None, node=None, timeout=timedelta(seconds=9))
    ),
    "ShardedTable.lookup": lambda: (
        sharded().lookup, dict(row_ids=torch.ones(3, 4).long(), out=None, out_dtype=None, out_format="values")
    ),
    "ShardedTable.hash_lookup": lambda: (
        sharded().hash_lookup,
        dict(token_ids=torch.arange(4), plan=plan(), out=None, out_dtype=None, out_format="values", **TOKENS),
    ),
    "ShardedTable.requires_row_grad_": lambda: (sharded().requires_row_grad_, dict(requires=True)),
    "ShardedTable.accumulate_row_grad": lambda: (
        sharded().requires_row_grad_().accumulate_row_grad, dict(row_ids=torch.tensor([1]), grad=torch.ones(1, 32))
    ),
    "ShardedTable.overlay": lambda: (
        sharded().overlay, dict(ids=torch.tensor([3]), rows=torch.ones(1, 32), scales=None)
    ),
    "ShardedTable.load_overlay": lambda: (
        sharded().load_overlay, dict(path=overlay().save_safetensors("edit.safetensors"))
    ),
    "build_token_map": lambda: (ek.build_token_map, dict(tokenizer=None)),
    "ngram_hash": lambda: (ek.ngram_hash, test_arguments.valid("ngram_hash") | TOKENS | dict(out=None)),
    "lookup": lambda: (ek.lookup, test_arguments.valid("lookup") | READ),
    "hash_lookup": lambda: (ek.hash_lookup, test_arguments.valid("hash_lookup") | TOKENS | READ | dict(cache=None)),
    "split_kv": lambda: (ek.split_kv, dict(kv=torch.ones(5, 24), branches=2, hidden_size=8)),
    "gate_residual": lambda: (ek.gate_residual, test_arguments_gate.valid("gate_residual") | GATE),
    "gate_conv_residual": lambda: (
        ek.gate_conv_residual,
        test_arguments_gate.valid("gate_conv_residual") | GATE | dict(cu_seqlens=None, conv_state=None),
    ),
}  # fmt: skip


def shown(value) -> str:
    try:
        return f"{type(value).__name__} {value!r:.40}"
    except Exception:
        return type(value).__name__


@pytest.fixture
def group():
    """A world of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", CALLS)
def test_bad_values(name, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "MetricsCollector":
        pytest.importorskip("prometheus_client", reason="of the extra metrics")
    if name.startswith("ShardedTable"):
        request.getfixturevalue("group")
    faults = []
    for parameter in CALLS[name]()[1]:
        function = arguments = None
        for value in POOL:
            function, arguments = (function, arguments) if function else CALLS[name]()
            kind = kinds_of(function)[parameter]
            if value is Unprintable and kind.fits(print):
                continue  # something to call
            if parameter == "timeout" and kind.fits(value):
                continue  # it would be waited for
            fits, came = kind.fits(value), f"{parameter} = {shown(value)}"
            try:
                function(**arguments | {parameter: value})
                if not fits:
                    faults.append(f"{came}: taken")
                function = None  # what it was called with may be spent
            except (TypeError, ValueError) as error:
                clear = re.match(rf"{re.escape(name)}: .*\b{parameter}\b.* got ", str(error), re.S)
                if not clear and not (fits and re.match(r"\w+(\.\w+)?: ", str(error))):
                    faults.append(f"{came}: {error}")
            except OSError as error:  # a path where nothing is
                if not fits or not str(error).startswith(f"{name}: "):
                    faults.append(f"{came}: {error}")
            except Exception as error:
                faults.append(f"{came}: {type(error).__name__} {error}")
        if function and name not in REFUSED:
            function(**arguments)  # as if nothing had been refused
    assert not faults, f"{len(faults)} of {name}:\n" + "\n".join(faults)


#: Functions whose call in CALLS is no good one: it takes packages, large models, or another process.
REFUSED = ("build_token_map", "replace_engram", "EngramTable.attach", "EngramTable.free",
           "EngramTable.publish", "EngramConfig.from_hf")  # fmt: skip
FUNCTIONS = dict(public_functions())


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_parameter_is_declared(name):
    names = parameters(FUNCTIONS[name]).keys()
    assert kinds_of(FUNCTIONS[name]).keys() == names
    if names:
        assert name in CALLS or FUNCTIONS[name] in {FUNCTIONS.get(other) for other in CALLS}


def test_the_document_is_that_of_the_kinds():
    assert PAGE.read_text() == page(), "python -m tests.reports.arguments writes it"
