"""A GPU's streams, and the events by which one waits for another. On a CPU none: work is done where it is called."""

import contextlib
from collections.abc import Hashable, Sequence

import torch
from triton.runtime import driver


class CudaStreams:
    """The side stream of one GPU, and the events by which it and others wait for each other."""

    def __init__(self, device: torch.device):
        self._device = device
        self.side = torch.cuda.Stream(device)
        #: Whether a capture can wait for an event of another one; ROCm's can since 7.0.
        self.external = torch.version.hip is None or int(torch.version.hip.split(".")[0]) >= 7

    def current(self) -> Hashable:
        return torch.cuda.current_stream(self._device)

    def on(self, stream) -> contextlib.AbstractContextManager:
        """The context in which ``stream`` is the current one; entering another costs the host several us."""
        if (
            torch.cuda.current_device() == self._device.index
            and driver.active.get_current_stream(self._device.index) == stream.cuda_stream
        ):
            return contextlib.nullcontext()
        return torch.cuda.stream(stream)

    def capturing(self, stream) -> bool:
        with self.on(stream):
            return torch.cuda.is_current_stream_capturing()

    def event(self, external: bool = False):
        return torch.cuda.Event(external=external and self.external)

    def record(self, event, stream) -> None:
        with self.on(stream):  # an event goes by the capture of the current stream
            event.record(stream)

    def wait(self, stream, event) -> None:
        with self.on(stream):
            event.wait(stream)

    def run(self, stream, work) -> None:
        with self.on(stream):
            work()

    def keep(self, tensors: Sequence[torch.Tensor], stream) -> None:
        """Freed tensors are not reused before ``stream`` is done with what it was given until then."""
        for tensor in tensors:
            tensor.record_stream(stream)


class NoStreams:
    """On a CPU: everything happens where it is called."""

    side, external = None, False

    def current(self) -> None:
        return None

    def on(self, stream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def capturing(self, stream) -> bool:
        return False

    def event(self, external: bool = False) -> None:
        return None

    def record(self, event, stream) -> None:
        pass

    def wait(self, stream, event) -> None:
        pass

    def run(self, stream, work) -> None:
        work()

    def keep(self, tensors, stream) -> None:
        pass


def streams_of(device: torch.device) -> CudaStreams | NoStreams:
    """Streams and events of ``device``. Tests put their own here."""
    return CudaStreams(device) if device.type == "cuda" else NoStreams()
