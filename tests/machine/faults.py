"""What the executor finds: reports, which let a launch go on, and faults, which end it."""

from typing import NamedTuple


class Report(NamedTuple):
    """``kind`` is one of KINDS; ``location`` the line of the kernel's source, with the PTX line behind it."""

    kind: str
    text: str
    location: str


KINDS = (
    "undefined",  # a value that nobody has written reaches an address, a predicate or a store
    "race",  # two threads touch a byte, one of them writes, and nothing orders them
    "read only",  # a store to memory that the launch may only read
    "barrier",  # threads of a CTA part at a barrier
    "divergent",  # an instruction of a whole warp is executed by a part of it
    "dependence",  # a launch with launch_pdl touches global memory, or ends, before it waits for the one before
    "misaligned",
    "out of bounds",
    "deadlock",
    "trap",
    "unknown",  # an instruction, or a form of it, that the executor does not know
)


class Fault(Exception):
    """The launch cannot go on; ``report`` says why, ``reports`` is all that was found up to here."""

    def __init__(self, kind, text, location=""):
        self.report = Report(kind, text, location)
        self.reports = [self.report]
        super().__init__(f"{kind}: {text}" + (f" at {location}" if location else ""))
