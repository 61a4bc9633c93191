"""Projections of a Prefetcher: what they give, on which stream, and the order of all that makes it."""

import pytest
import torch

from engram_kernels import EngramState, NgramCache, Prefetcher, hash_lookup
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.reference.ops.rows import dequantise
from engram_kernels.serving import policy, prefetch
from engram_kernels.testing import tables
from tests.nn.test_engram import FORMS, built
from tests.ops.test_hashing import ragged
from tests.ops.test_registration import same
from tests.serving.test_prefetch import BLOCKS
from tests.support.gpu.prefetching import (
    ORDERS,
    SCHEDULES,
    WIDTH,
    Projecting,
    batches,
    noted,
    projected,
    projections,
    replayed,
    setting,
    weights,
)


@pytest.fixture(params=[True, False], ids=["apart", "together"])
def apart(request, monkeypatch):
    monkeypatch.setattr(prefetch, "layers_apart", lambda *_: request.param)
    return request.param


@pytest.mark.kernel
@pytest.mark.parametrize("ahead", [True, False, None])
def test_projections_are_those_of_the_rows(device, apart, ahead):
    """Packed and batched tokens, fewer and more than before, none; on either stream, and rows beside them."""
    plan, placed = setting(device)
    given = dict(projections=projections(device), kv_width=WIDTH, kv_dtype=torch.float32, ahead=ahead)
    prefetcher = Prefetcher(plan, placed, 19, layers=(1, 14), **given)
    ids, cu, history, dead = (x.to(device) for x in ragged())
    packed = dict(cu_seqlens=cu, history=history, dead=dead)
    for tokens, options in ((ids, packed), (ids[:18].view(3, 6), {}), (ids[:0], {}), (ids[:5].int(), {})):
        prefetcher.start(tokens, **options)
        expected = projected(tokens, plan, placed, **options)
        for index, layer in enumerate((1, 14)):
            kv = prefetcher.kv(layer)
            assert kv.shape == (*tokens.shape, WIDTH) and same(kv, expected[index])
            assert same(prefetcher.rows(layer), hash_lookup(tokens, plan, placed, **options)[index])
            own = prefetcher.kv(layer).data_ptr() != kv.data_ptr()
            assert own == (ahead is False) or not tokens.numel(), "a buffer where the side stream projects"


@pytest.mark.parametrize("form", FORMS)
def test_a_module_takes_what_it_projected_before(form):
    """With a state and without, for either choice of the stream."""
    module, plan, placed = built(form)
    modules = [module] * len(placed)
    hidden, state = torch.randn(7, 2, 24), EngramState(module.config, 2, "cpu", dtype=torch.float32)
    slots, cu = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 4, 7], dtype=torch.int32)
    for ahead in (True, False):
        given = dict(projections=[each.project for each in modules], kv_width=module.wkv.out_features, ahead=ahead)
        prefetcher = Prefetcher(plan, placed, 12, layers=module.config.layers, **given)
        for ids in batches(2, 7):
            step = state.begin(ids, slots, cu_seqlens=cu)
            prefetcher.start(ids, **step.options)
            kv = prefetcher.kv(module.layer)
            assert not kv.requires_grad
            found = module(hidden, kv=kv, state=step)
            assert torch.equal(found, module(hidden, state=step))
            state.reset(slots)
            assert torch.equal(module(hidden, kv=kv, cu_seqlens=cu), module(hidden, ids, cu_seqlens=cu))


def test_the_example_of_the_guide():
    module, plan, placed = built("v41")
    hidden, ids = torch.randn(9, 2, 24), torch.randint(0, 40, (9,))
    cu, history = torch.tensor([0, 4, 9], dtype=torch.int32), torch.randint(0, 40, (2, 2))
    given = dict(Prefetcher=Prefetcher, plan=plan, tables=placed, max_tokens=9, config=module.config, token_ids=ids)
    given |= dict(dtype=torch.float32, cu_seqlens=cu, history=history, embed=lambda ids: hidden, blocks=[torch.sin] * 6)
    engrams = dict.fromkeys(module.config.layers, module)  # the first reads rows of another layer
    exec(BLOCKS[1], given | dict(engrams=engrams), found := {})
    rows = hash_lookup(ids, plan, placed, cu_seqlens=cu, history=history)
    expected = module(hidden.sin(), rows=rows[0], cu_seqlens=cu).sin().sin().sin()
    assert torch.equal(found["hidden"], module(expected, rows=rows[1], cu_seqlens=cu).sin().sin())


def test_the_fp8_projection_of_the_guide():
    """Rows of an e4m3 grid are quantised without a loss, so that the result is near the product."""
    plan, placed = setting()
    weight, unit = torch.randn(WIDTH + 8, 64).to(torch.float8_e4m3fn), torch.tensor(1.0)

    def quantise(rows):
        scale = rows.abs().max().float() / 448
        return (rows / scale).to(torch.float8_e4m3fn), scale

    exec(BLOCKS[2], dict(torch=torch, quantise=quantise, weight=weight, weight_scale=unit), found := {})
    options = dict(projections=[found["projection"]] * 2, kv_width=WIDTH + 8, kv_dtype=torch.float32)
    prefetcher = Prefetcher(plan, placed, 16, **options)
    (ids,) = batches(1, 16)
    prefetcher.start(ids)
    packed, scale = quantise(prefetcher.rows(1).flatten(-2))
    exact = packed.double() @ weight.double().T * scale.double()
    torch.testing.assert_close(prefetcher.kv(1).double(), exact, rtol=1e-3, atol=1e-3)


def test_columns_give_parts_of_the_sum():
    """Tensor parallel: each rank projects its columns' rows; the sum over ranks is the whole's, as is each column."""
    plan, placed = setting()
    (ids,) = batches(1, 9)
    found, wide = [], [weight.double().unflatten(0, (4, 16)) for weight in weights()]
    for columns in (range(4), (0, 2), (1, 3)):
        mine = [weight[list(columns)].flatten(0, 1) for weight in wide]

        def projection(weight):
            return lambda rows, out: out.copy_(rows.flatten(-2).double() @ weight)

        prefetcher = Prefetcher(
            plan.select(columns=list(columns)),
            placed,
            9,
            projections=list(map(projection, mine)),
            kv_width=WIDTH,
            kv_dtype=torch.float64,
        )
        prefetcher.start(ids)
        found.append(torch.stack([prefetcher.kv(layer) for layer in range(2)]))
    whole, *parts = found
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(parts[0], whole)


def test_projections_of_cached_rows():
    plan, placed = setting()
    cache = NgramCache(plan, placed, entries=16, min_tokens=4)
    given = dict(projections=projections(), kv_width=WIDTH, kv_dtype=torch.float32, ahead=True, depth=2)
    prefetcher = Prefetcher(plan, placed, 8, cache=cache, **given)
    first, second = batches(2)
    for _ in range(2):  # misses, then hits
        started = [prefetcher.start(ids) for ids in (first, second)]
        for each, ids in zip(started, (first, second), strict=True):
            assert all(same(each.kv(layer), projected(ids, plan, placed)[layer]) for layer in range(2))
            each.release()
    assert cache.stats().hits


def decoded(rows):
    """Values of rows as they are stored."""
    stored, scales = rows
    if scales is None:
        return stored.float()
    if stored.dtype == torch.uint8:
        return dequantise(stored, scales, FORMATS["nvfp4"], tables.TABLE_SCALE)
    if scales.dtype == torch.uint8:
        scales = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    return stored.float() * scales


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["e4m3_ue8m0", "e4m3", "bfloat16", "nvfp4"])
@pytest.mark.parametrize("ahead", [True, False])
def test_stored_rows_and_their_scales(device, name, ahead, apart):
    """An engine's fp8 projection takes what the table holds: rows and scales, of all formats, none and some tokens."""
    plan, placed = setting(device, name, 32)
    wide = [weight.to(device) for weight in weights(width=32)]

    def projection(weight):
        return lambda rows, out: out.copy_(decoded(rows).flatten(-2) @ weight)

    given = dict(projections=list(map(projection, wide)), kv_width=WIDTH, kv_dtype=torch.float32, ahead=ahead)
    prefetcher = Prefetcher(plan, placed, 19, out_format="storage", depth=2, **given)
    ids, cu, history, dead = (x.to(device) for x in ragged())
    for tokens, options in (
        (ids, dict(cu_seqlens=cu, history=history, dead=dead)),
        (ids[:18].view(3, 6), {}),
        (ids[:0], {}),
        (ids[:5], {}),
    ):
        started = prefetcher.start(tokens, **options)
        rows, scales = hash_lookup(tokens, plan, placed, out_format="storage", **options)
        for layer in range(2):
            found = started.rows(layer)
            assert same(found[0], rows[layer])
            assert (found[1] is None) == (scales is None) and (scales is None or same(found[1], scales[layer]))
            kv = started.kv(layer)
            assert kv.shape == (*tokens.shape, WIDTH) and same(kv, decoded(found).flatten(-2) @ wide[layer])
        started.release()


def test_projections_are_inference_and_of_tokens():
    """Of weights that train too; none is called for no tokens, which a kernel of an engine's may refuse."""
    plan, placed = setting()
    wide, called = [weight.requires_grad_() for weight in weights()], []

    def projection(weight):
        return lambda rows, out: called.append(len(rows)) or out.copy_(rows.flatten(-2).float() @ weight)

    for ahead in (True, False):
        given = dict(projections=list(map(projection, wide)), kv_width=WIDTH, kv_dtype=torch.float32, ahead=ahead)
        prefetcher = Prefetcher(plan, placed, 8, **given)
        for tokens in (0, 3):
            prefetcher.start(torch.arange(tokens))
            kv = [prefetcher.kv(layer) for layer in range(2)]
            assert not any(each.requires_grad for each in kv) and kv[1].shape == (tokens, WIDTH)
    assert called == [3] * 4


def test_the_rule():
    assert policy.projects_ahead(1) and policy.projects_ahead(128) and not policy.projects_ahead(129)


def test_the_rule_chooses_the_stream_and_the_user_overrides_it(monkeypatch):
    """Where work was given, by streams whose work has not run yet; and the room that each choice takes."""
    for module in (policy, prefetch):
        monkeypatch.setattr(module, "AHEAD_TOKENS", 4)
    for ahead, tokens, stream in ((None, 4, "side"), (None, 5, "model"), (True, 5, "side"), (False, 4, "model")):
        model, on = Projecting(ahead=ahead), []
        projecting = model.prefetcher._side.project
        monkeypatch.setattr(
            model.prefetcher._side,
            "project",
            lambda *given, model=model, on=on, projecting=projecting: (on.append(model.running), projecting(*given)),
        )
        noted(model)
        model.ids = torch.zeros(tokens, dtype=torch.int64)
        model.step(batches(1, tokens)[0])
        assert model.right(batches(1, tokens), ["side", "main", "model"])
        assert on == [stream, stream]
    plan, placed = setting()

    def room(**options):
        given = dict(projections=projections(), kv_width=WIDTH, kv_dtype=torch.float32) if options else {}
        return Prefetcher(plan, placed, 8, **given, **options).nbytes

    alone = room()
    tokens = 8 * 8 + 48 + 8 * 2 * 8 + 16  # ids, 9 ends, history, 8 flags, each in whole 16 bytes
    assert alone == tokens + 2 * 8 * 4 * 16 * 2
    assert room(ahead=False) == alone
    assert room(ahead=None) == alone + 2 * 4 * WIDTH * 4
    assert room(ahead=True) == alone + 2 * 8 * WIDTH * 4
    assert room(ahead=True, depth=3) == 3 * room(ahead=True)
    plan, placed = setting(name="e4m3_ue8m0", width=32)
    values, stored = (Prefetcher(plan, placed, 8, out_format=each).nbytes for each in ("values", "storage"))
    assert values - stored == 2 * 8 * 4 * (2 * 32 - 33)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("reading", ["model", "main"])
def test_every_order_of_work_gives_the_projections(apart, ahead, reading):
    for schedule in SCHEDULES:
        model, given = Projecting(reading=reading, ahead=ahead), batches(3)
        for batch in given:
            model.step(batch)
        assert model.right(given, schedule), schedule


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("dropped", ORDERS.values(), ids=ORDERS)
def test_without_one_of_the_orders_projections_are_wrong(apart, ahead, dropped):
    results = []
    for schedule in SCHEDULES:
        model, given = Projecting(dropped, ahead=ahead), batches(3)
        for batch in given:
            model.step(batch)
        results.append(model.right(given, schedule))
    assert not all(results)


class Early:
    """In the place of a projection's mark: that of the rows."""

    def __init__(self, ready):
        self.set, self.wait = lambda *_: None, ready.wait


@pytest.mark.parametrize("layer", [0, 1])
def test_a_reader_of_projections_waits_for_more_than_rows(layer):
    results = []
    for schedule in SCHEDULES:
        model, given = Projecting(ahead=True), batches(2)
        (taken,) = model.prefetcher._taken
        taken.projected[layer] = Early(taken.ready[layer])
        for batch in given:
            model.step(batch)
        results.append(model.right(given, schedule))
    assert not all(results)


def test_a_layer_waits_for_its_own_projection_alone(apart):
    """Each layer is projected as soon as its rows are there; the first is read before the last is projected."""
    model, ran = Projecting(ahead=True), []
    noted(model)
    projecting = model.prefetcher._side.project

    def project(index, *given):
        ran.append(f"project {index}")
        projecting(index, *given)

    model.prefetcher._side.project = project
    model.step(batches(1)[0])
    clone, seen = model.seen.append, model.seen
    model.seen = type("Seen", (list,), dict(append=lambda self, each: (ran.append(f"read {each[0]}"), clone(each))))()
    model.streams.drain(["main", "model", "side"])
    assert ran == ["project 0", "read 0", "project 1", "read 1"] and len(seen) == 2


@pytest.mark.parametrize("ahead", [True, False])
def test_a_capture_of_the_whole_step(apart, ahead):
    for schedule in SCHEDULES:
        model, given = Projecting(reading="main", ahead=ahead), batches(3)
        model.step(given[0])
        model.streams.drain(schedule)
        with model.streams.capture("main") as replay:
            model.prefetcher.start(model.ids)
            for layer in range(2):
                model.read(layer)
        if not ahead:  # a projection of a capture has memory of its own
            model.streams.drain(schedule)
        assert replayed(model, given, [(replay, "main")], schedule), schedule
        model.seen.clear()
        for batch in given:  # and eagerly again
            model.step(batch)
        assert model.right(given, schedule)


@pytest.mark.parametrize("dropped", [("side", "main"), ("main", "side")])
def test_a_capture_needs_both_of_its_orders(apart, dropped):
    results = []
    for schedule in SCHEDULES:
        model, given = Projecting(dropped, reading="main", ahead=True), batches(3)
        try:
            with model.streams.capture("main") as replay:
                model.prefetcher.start(model.ids)
                for layer in range(2):
                    model.read(layer)
        except RuntimeError as error:
            results.append("joined" not in str(error))
        else:
            results.append(replayed(model, given, [(replay, "main")], schedule))
    assert not all(results)


def test_a_capture_joins_projections():
    """Rows of all layers are not all of a start's work."""
    for ahead, end in ((True, None), (True, "release"), (False, None)):
        model = Projecting(reading="main", ahead=ahead)
        model.reads = "rows"
        try:
            with model.streams.capture("main"):
                model.prefetcher.start(model.ids)
                model.read(0)
                model.read(1)
                if end:
                    model.prefetcher.release()
        except RuntimeError as error:
            assert "before work of ['side'] has joined" in str(error) and ahead and end is None
        else:
            assert not ahead or end


def test_errors():
    plan, placed = setting()
    given = dict(projections=projections(), kv_width=WIDTH)

    def made(**options):
        return Prefetcher(plan, placed, 8, **options)

    of_none = "^Prefetcher: kv_width, kv_dtype and ahead are of projections, and there are none"
    for error, words, call in (
        (ValueError, of_none, lambda: made(kv_width=3)),
        (ValueError, of_none, lambda: made(ahead=False)),
        (ValueError, of_none, lambda: made(kv_dtype=torch.float32)),
        (
            ValueError,
            "projections must be 2, .* with kv_width, got 2 and kv_width None",
            lambda: made(**given | dict(kv_width=None)),
        ),
        (
            ValueError,
            "projections must be 2, one per layer",
            lambda: made(**given | dict(projections=projections()[:1])),
        ),
        (TypeError, "projections must be a sequence of function", lambda: made(**given | dict(projections=weights()))),
        (ValueError, "out_format must be one of", lambda: made(out_format="fp8")),
        (ValueError, "out_format 'storage' keeps", lambda: made(out_format="storage", out_dtype=torch.float32)),
        (ValueError, "kv_width must be a positive int", lambda: made(**given | dict(kv_width=0))),
        (TypeError, "kv_dtype must be", lambda: made(**given, kv_dtype=torch.int8)),
        (ValueError, "depth must be a positive int", lambda: made(depth=0)),
        (ValueError, r"^Prefetcher.kv: no start\(\) came before kv\(1\)", lambda: made(**given).kv(1)),
        (ValueError, r"^Prefetcher.kv: layer must be one of \[0, 1\], got 2", lambda: made(**given).kv(2)),
        (ValueError, r"^Started.kv: layer must be one of", lambda: made(**given).start(batches(1)[0]).kv(2)),
        (ValueError, r"^Started.kv: expected a Prefetcher with projections", lambda: made().start(batches(1)[0]).kv(0)),
    ):
        with pytest.raises(error, match=words):
            call()
