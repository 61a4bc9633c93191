"""The model of a decode step: its sharing of a GPU, its laws, and the file that documents show."""

import json
from dataclasses import asdict, replace

import pytest

from bench.serving import step_model
from bench.serving.step_model import Machine, Work, predict, speeds, step_works, timeline

#: Nothing is left between kernels or within them, and nothing is lost.
FULL = Machine(launch=0.0, reach=1.0, loss=0.0, trip=0.0)


def test_works_share_what_both_need():
    machine = replace(FULL, sm_bytes=1e15)
    copy, matmul, lookup = Work("", 0, memory=1.0), Work("", 0, arithmetic=1.0), Work("", 0, link=1.0, held=0.25)
    assert speeds([copy], machine) == [1.0] and speeds([copy, copy], machine) == [0.5, 0.5]
    assert speeds([copy, lookup], machine) == [1.0, 1.0]
    assert speeds([matmul, lookup], machine) == [0.75, 1.0], "a lookup holds its multiprocessors"
    assert speeds([copy, matmul], machine) == pytest.approx([1, 1], abs=1e-3)
    assert speeds([matmul, matmul], replace(machine, loss=0.1)) == pytest.approx([0.45, 0.45])
    assert speeds([copy, copy], replace(machine, loss=0.1)) == [0.5, 0.5], "memory is what they lack"
    assert speeds([copy, copy], replace(machine, reach=0.8)) == pytest.approx([0.625, 0.625])
    small = Work("", 0, memory=1.0, arithmetic=4.0)
    assert speeds([copy, small], machine) == pytest.approx([0.8, 0.8], abs=1e-2)
    assert (
        sum(
            speeds(
                [
                    copy,
                    lookup,
                ],
                replace(machine, sm_bytes=machine.hbm / machine.sms),
            )
        )
        == 1.75
    )


def test_streams_run_beside_each_other_and_wait():
    main = [Work("a", 1.0, memory=2.0), Work("b", 1.0, memory=1.0, after=1)]
    left, right = timeline(main, [Work("c", 0.0, memory=3.0)], FULL)
    # c alone for 1, then both at half speed until a ends at 5 and c too.
    assert [tuple(span) for span in left] == [("a", 1.0, pytest.approx(5)), ("b", pytest.approx(6), pytest.approx(7))]
    assert tuple(right[0]) == ("c", 0.0, pytest.approx(5))
    left, _ = timeline(main[1:], [Work("c", 0.0, memory=3.0)], FULL)
    assert left[0].begin == pytest.approx(4), "what a work waits for comes before its launch"


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_a_full_memory_hides_nothing(tokens):
    """What the side stream reads ahead of time the decoder reads later: equal work takes equal time."""
    (point,) = predict(FULL, [tokens])
    weights = 2 * FULL.projection / FULL.hbm
    assert point["exposed"]["rows"] == pytest.approx(weights, rel=0.01)
    assert point["exposed"]["kv"] == pytest.approx(weights, rel=0.01)


def test_an_idle_memory_hides_all():
    (point,) = predict(replace(Machine(), launch=30e-6), [8])
    assert point["exposed"]["rows"] > 2 * (30e-6 + Machine.projection / Machine.hbm)
    assert point["exposed"]["kv"] < 0.15 * point["exposed"]["rows"]


def test_what_a_step_is_made_of():
    machine = Machine()
    for mode, projections in (("ready", (0, 0)), ("rows", (2, 0)), ("kv", (0, 2))):
        for tokens in (4, 2048):
            streams = step_works(mode, tokens, machine)
            assert tuple(sum(work.name == "projection" for work in stream) for stream in streams) == projections
            assert sum(work.name.startswith("layer") for work in streams[0]) == 36 * 8
            lookups = sum(work.name == "lookup" for work in streams[1])
            assert lookups == (0 if mode == "ready" else 1 if tokens == 4 else 2)
    assert machine.projection == 157_286_400 and step_model.ROW_BYTES == 24 * 264
    (point,) = predict(machine, [1])
    decoder = machine.layers * (machine.layer_weights / machine.hbm / machine.reach + 8 * machine.launch)
    assert point["seconds"]["ready"] == pytest.approx(decoder + 2 * machine.launch, rel=1e-3)


def test_the_rule_follows_the_model():
    """kv ahead pays where the rule says so; where it does not, it is a small part of what few tokens gain."""
    points = predict(Machine())
    gains = {point["tokens"]: point["exposed"]["rows"] - point["exposed"]["kv"] for point in points}
    assert all(point["pays"] for point in points if point["rule"]) and not points[-1]["pays"]
    assert {point["tokens"] for point in points if point["rule"]} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert all(gains[tokens] < 0.3 * gains[1] for tokens in gains if tokens > 128)
    assert gains[128] > 0.8 * gains[1]


def test_the_file_is_of_this_model(tmp_path, capsys):
    content = json.loads(step_model.RESULT.read_text())
    assert content["machine"] == asdict(Machine()) and content["drawn"] == step_model.DRAWN
    for point, found in zip(content["points"], predict(Machine()), strict=True):
        assert point["tokens"] == found["tokens"] and point["pays"] == found["pays"] and point["rule"] == found["rule"]
        assert point["seconds"] == pytest.approx(found["seconds"]), "python -m bench step_model --out FILE writes it"
    assert step_model.RESULT.with_suffix(".png").stat().st_size > 10_000
    from bench.__main__ import main

    assert main(["step_model", "--batches", "8", "1024", "--hbm", "3e12", "--launch", "2e-6"]) == 0
    printed = capsys.readouterr().out
    assert "nothing here ran on a GPU" in printed and "1,024" in printed


def test_the_timeline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    step_model.draw(Machine(), 16, tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_merged_kernels_are_a_layer():
    spans = timeline(*step_works("kv", 1, Machine()), Machine())[0]
    layers = [span for span in step_model.merged(spans) if span.name.startswith("layer")]
    assert [span.name for span in layers] == [f"layer {number}" for number in range(36)]
    assert all(before.end <= after.begin for before, after in zip(layers, layers[1:], strict=False))
