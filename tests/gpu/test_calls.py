"""Tests that only a GPU runs, on a CPU where streams do nothing: the order of their calls.

What a call does once only, as compile and copy a table's addresses, takes a second and waits for the GPU. Where a test
sleeps on a stream or forbids waiting, that has to have happened.
"""

import contextlib
import gc
from unittest import mock

import pytest
import torch

from engram_kernels.launching.streams import NoStreams

from . import test_cache, test_kernels, test_prefetch

CPU = torch.device("cpu")


@pytest.fixture
def log(monkeypatch):
    """What torch.cuda and the ops were asked for, in their order."""
    log = []
    stand_ins = dict(
        Stream=mock.Mock,
        current_stream=mock.Mock,
        CUDAGraph=mock.Mock,
        graph=lambda graph: log.append("capture") or contextlib.nullcontext(),
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda: log.append("end"),
        _sleep=lambda cycles: log.append("sleep"),
        set_sync_debug_mode=lambda mode: log.append("no waiting" if mode == "error" else "end"),
    )
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (test_cache, test_kernels, test_prefetch):
        for name in ("hash_lookup", "lookup", "ngram_hash"):
            if call := getattr(module, name, None):
                monkeypatch.setattr(module, name, logged(call, name, log))
        if hasattr(module, "Dropping"):
            monkeypatch.setattr(module, "Dropping", lambda *_: NoStreams())
    return log


def logged(call, name, log):
    def noting(*args, **options):
        log.append(" ".join([name, *sorted(options)]))
        return call(*args, **options)

    return noting


def first_calls_after(log, moment):
    """Forms of calls that come first between ``moment`` and the next wait for all of the GPU."""
    at = log.index(moment)
    return sorted(set(log[at + 1 : log.index("end", at)]) - set(log[:at]) - {moment})


def test_streams_take_turns(log):
    """20 ms of sleep are over when a kernel is compiled meanwhile, and a wait that is dropped is then not missed."""
    test_cache.test_streams_take_turns(CPU, None)
    assert first_calls_after(log, "sleep") == []


def test_launches_follow(log):
    test_kernels.test_launches_follow_the_tensors_device_and_stream(CPU)
    assert first_calls_after(log, "sleep") == []


@pytest.mark.parametrize("order", ["direct", "address"])
def test_no_order_makes_the_host_wait(log, order):
    test_prefetch.test_no_order_makes_the_host_wait(CPU, order)
    assert first_calls_after(log, "no waiting") == []


def test_the_host_does_not_wait(log):
    test_cache.test_the_host_does_not_wait(CPU, "head")
    assert first_calls_after(log, "no waiting") == []


def test_garbage_goes_before_a_capture(log, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: log.append("collected"))
    assert test_kernels.graph_of(lambda: log.append("step"), warm_up=2)[0] is not None
    assert log == ["step", "step", "collected", "capture", "step"]
