"""The stand-in runtime's functions for Python; the loader has put it under torch."""

import ctypes

from .build import RUNTIME

TOLD = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_double,
)
UNTIL, RECORD, WAIT, RECORD_OUTSIDE, WAIT_OUTSIDE, COPY, SET = range(7)  # what it tells

_library = ctypes.CDLL(RUNTIME)


def _function(name, result, *arguments):
    found = getattr(_library, name)
    found.restype, found.argtypes = result, arguments
    return found


_pointer, _double, _size = ctypes.c_void_p, ctypes.c_double, ctypes.c_size_t
set_callback = _function("simulated_set_callback", None, TOLD)
submit = _function("simulated_submit", _double, _pointer, _double)
now = _function("simulated_now", _double, _pointer)
set_until = _function("simulated_set_until", None, _pointer, _double)
wait = _function("simulated_wait", None, _double)
event = _function("simulated_event", _double, _pointer)
set_event = _function("simulated_set_event", None, _pointer, _double)
kind = _function("simulated_kind", ctypes.c_int, _pointer)
leaves_registration = _function("simulated_leaves_registration", ctypes.c_int, _pointer, _size)
last_error = _function("cudaGetLastError", ctypes.c_int)
_host_ranges = _function("simulated_host_ranges", ctypes.c_long, ctypes.POINTER(ctypes.c_ulonglong), ctypes.c_long)


def host_ranges():
    """(first address, bytes) of host memory that is pinned or registered."""
    count = _host_ranges(None, 0)
    found = (ctypes.c_ulonglong * (2 * count))()
    _host_ranges(found, count)
    return [(found[2 * each], found[2 * each + 1]) for each in range(count)]
