"""A pytest plugin for the gpu lane: what one test does to the GPU is that test's own failure, and no other's."""

import faulthandler
import os
from contextlib import contextmanager

import pytest
import torch
import triton

#: Exit code of a process whose GPU is lost to it.
LOST = 70
#: Seconds for each of a test's set-up, call and teardown, a cold compilation included.
PATIENCE = 90
#: Seconds of a test marked alone: a run of the benchmarks.
LONG_PATIENCE = 480


class Watch:
    """Looks at the GPU after every test, and ends a process for which the GPU answers no more, or that hangs."""

    def __init__(self, patience=PATIENCE):
        self.patience, self._lost = patience, False
        self._stacks = os.dup(2)  # standard error itself: within a test pytest keeps what is written there
        self._compiled = dict(variants=0, seconds=0.0)
        triton.knobs.compilation.listener = self._count

    def _count(self, *, times, cache_hit, **_):
        if not cache_hit:
            self._compiled["variants"] += 1
            self._compiled["seconds"] += times.total / 1e6

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        """What was compiled goes with each report: a process that is lost has told what it did so far."""
        report = yield
        report.compiled, self._compiled = self._compiled, dict(variants=0, seconds=0.0)
        return report

    @contextmanager
    def _patient(self, item):
        """Ends the process where this takes longer, by a thread of C: no signal interrupts a wait for the GPU."""
        seconds = LONG_PATIENCE if item.get_closest_marker("alone") else self.patience
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item):
        with self._patient(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item):
        with self._patient(item):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item):
        """Errors come late: without a wait here the next test would have the blame."""
        with self._patient(item):
            try:
                return (yield)
            finally:
                error = gpu_error()
                if error is not None:
                    self._lost = gpu_error() is not None  # a fault in a kernel stays; a refused call is reported once
                    pytest.fail(f"after this test the GPU reports an error: {error}", pytrace=False)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        """Once the outcome is on its way: pytest-xdist, or who started this process, starts another."""
        if self._lost and report.when == "teardown":
            os._exit(LOST)


def gpu_error():
    """What waiting for the GPU raises, in words; None where it answers, or nothing has used it."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).strip()
    return None
