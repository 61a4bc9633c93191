"""Streams of a test's own, in place of a GPU's."""

from contextlib import ExitStack, contextmanager
from unittest import mock

from engram_kernels.cache import store
from engram_kernels.serving import prefetch


@contextmanager
def ordered_by(streams):
    """Within the context a new Prefetcher or NgramCache orders its work with ``streams``."""
    with ExitStack() as stack:
        for module in (store, prefetch):
            stack.enter_context(mock.patch.object(module, "streams_of", lambda device: streams))
        yield
