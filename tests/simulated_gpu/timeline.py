"""Work of all streams by the time of its end, and the captures that keep some for later.

Work is done at its end: what it reads may have been overwritten until then, and nobody sees what it writes before.
"""

import ctypes
import heapq
import itertools
import threading

import torch
from torch.utils._python_dispatch import _disable_current_modes

from . import library

SLEPT = 2000  # cycles of a sleep in a unit of time

_lock = threading.RLock()
_given = itertools.count()
_waiting = []  # a heap of (end, number, work)
_errors = []
_capture = None  # steps of the capture that is made
_real = {name: getattr(torch.cuda.CUDAGraph, name) for name in ("capture_begin", "capture_end", "replay")}


def submit(work, cost=1.0):
    """Give work to the current stream, or to its capture."""
    stream = torch.cuda.current_stream().cuda_stream
    if torch.cuda.is_current_stream_capturing():
        _capture.append((None, stream, work, cost))
    else:
        _push(library.submit(stream, cost), work)


def wait_for_stream():
    """The host waits for the current stream."""
    library.wait(library.now(torch.cuda.current_stream().cuda_stream))
    raise_errors()


def run_until(time):
    """Run what ends by then. What it raises comes out where the host next waits."""
    with _lock:
        while _waiting and _waiting[0][0] <= time:
            work = heapq.heappop(_waiting)[2]
            try:
                with _disable_current_modes(), torch.inference_mode():  # of whatever mode the call was
                    work()
            except BaseException as error:
                _errors.append(error)


def raise_errors():
    with _lock:
        errors, _errors[:] = _errors.copy(), []
    if errors:
        raise errors[0]


def _push(end, work):
    with _lock:
        heapq.heappush(_waiting, (end, next(_given), work))


@library.TOLD
def _told(what, stream, to, source, count, time):
    if what == library.UNTIL:
        run_until(time)
    elif _capture is None:
        _errors.append(RuntimeError("work for a capture that torch has not begun"))
    elif what == library.COPY:
        _capture.append((None, stream, lambda: ctypes.memmove(to, source, count), 1.0))
    elif what == library.SET:
        _capture.append((None, stream, lambda: ctypes.memset(to, source or 0, count), 1.0))
    else:
        _capture.append((what, stream, to, 0.0))


class _Graph:
    """Methods of torch.cuda.CUDAGraph that keep what is captured, and give it to the streams again."""

    def capture_begin(self, *args, **kwargs):
        global _capture
        _capture = []
        try:
            return _real["capture_begin"](self, *args, **kwargs)
        except BaseException:
            _capture = None
            raise

    def capture_end(self):
        global _capture
        self.simulated_steps, _capture = _capture, None
        _real["capture_end"](self)

    def replay(self):
        _real["replay"](self)
        origin = torch.cuda.current_stream().cuda_stream
        start = library.submit(origin, 0.0)
        clocks, events = {}, {}
        for what, stream, detail, cost in self.simulated_steps:
            at = clocks.get(stream, start)
            if what is None:
                at += cost
                _push(at, detail)
            elif what == library.RECORD:
                events[detail] = at
            elif what == library.WAIT:
                at = max(at, events.get(detail, start))
            elif what == library.RECORD_OUTSIDE:
                library.set_event(detail, at)
            elif what == library.WAIT_OUTSIDE:
                at = max(at, library.event(detail))
            clocks[stream] = at
        library.set_until(origin, max([start, *clocks.values()]))


def _raising(function):
    def waits(*args, **kwargs):
        result = function(*args, **kwargs)
        raise_errors()
        return result

    return waits


def install():
    library.set_callback(_told)
    for name in _real:
        setattr(torch.cuda.CUDAGraph, name, vars(_Graph)[name])
    torch.cuda._sleep = lambda cycles: submit(lambda: None, cycles / SLEPT)
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        owner.synchronize = _raising(owner.synchronize)
