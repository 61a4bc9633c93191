"""A pytest plugin: options that name implementations, fixtures for them, and a summary of what was tested.

    pytest --pyargs engram_kernels.testing --implementation my_module    loads it by itself
    pytest -p engram_kernels.testing.plugin --implementation my_module   for a suite of one's own

Fixture ``implementation_case``: an :class:`ImplementationCase`, of each case of each implementation in turn. Fixture
``implementation``: each implementation, for tests of one's own. Without ``--implementation`` these are our ops.
"""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest
import torch

from . import Untested, cases
from .implementations import Implementation, find_implementations, our_ops
from .ops.call import Case

PLACEMENTS = {"cpu": ("cpu", "host"), "cuda": ("device", "host")}
CHOSEN = pytest.StashKey()
_PROPERTY, _WHY = "engram_implementation", "engram_untested"


@dataclass(frozen=True)
class Chosen:
    """What the options say."""

    implementations: list[Implementation]
    device: str
    placement: str


@dataclass(frozen=True)
class ImplementationCase:
    """A case of an implementation, to be called; a test is skipped where it says nothing of it."""

    case: Case
    implementation: Implementation
    device: str
    placement: str
    node: pytest.Item

    def __call__(self) -> None:
        implementation = self.implementation
        self.node.user_properties.append((_PROPERTY, f"{implementation.op}={implementation.name}"))
        try:
            self.case.check(implementation, self.device, self.placement)
        except Untested as why:
            self.node.user_properties.append((_WHY, str(why)))
            pytest.skip(f"{implementation.name} {why}")
        except AssertionError as wrong:
            pytest.fail(f"{implementation.name}, {self.case.name}: {wrong}", pytrace=False)


def pytest_addoption(parser):
    group = parser.getgroup("engram_kernels")
    group.addoption(
        "--implementation",
        action="append",
        default=[],
        metavar="[OP=]MODULE[:NAME]",
        help="what is tested in the place of an op of engram_kernels; may be repeated",
    )
    group.addoption("--device", help="cpu or cuda: where tensors are; a GPU by default where there is one")
    group.addoption("--placement", help="of tables: cpu (or device on a GPU), which is the default, or host")


def pytest_configure(config):
    """Ends with 2 where an option is wrong."""
    folder = str(config.invocation_params.dir)
    if folder not in sys.path:  # as `python -m` has it, so that a module beside the user is found
        sys.path.insert(0, folder)
    try:
        config.stash[CHOSEN] = chosen(*map(config.getoption, ("--implementation", "--device", "--placement")))
    except ValueError as error:
        pytest.exit(str(error), returncode=2)
    if not hasattr(config, "workerinput"):  # a process of pytest-xdist sends its reports to the one that started it
        config.pluginmanager.register(Summary(), "engram_implementations")


def chosen(names: list[str], device: str | None, placement: str | None) -> Chosen:
    """What options say; ValueError where one is wrong."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in PLACEMENTS:
        raise ValueError(f"--device must be one of {', '.join(PLACEMENTS)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU, and torch finds none")
    placement = placement or PLACEMENTS[device][0]
    if placement not in PLACEMENTS[device]:
        wanted = " or ".join(PLACEMENTS[device])
        raise ValueError(f"--placement must be {wanted} with --device {device}, got {placement!r}")
    return Chosen(find_implementations(names) if names else our_ops(), device, placement)


def pytest_generate_tests(metafunc):
    implementations = metafunc.config.stash[CHOSEN].implementations
    if "implementation_case" in metafunc.fixturenames:
        several = Counter(each.op for each in implementations)
        pairs = [(case, each) for each in implementations for case in cases(each.op)]
        names = [f"{case.name}/{each.name}" if several[case.op] > 1 else case.name for case, each in pairs]
        metafunc.parametrize("implementation_case", pairs, ids=names, indirect=True)
    if "implementation" in metafunc.fixturenames:
        names = [f"{each.op}/{each.name}" for each in implementations]
        metafunc.parametrize("implementation", implementations, ids=names, indirect=True)


@pytest.fixture
def implementation_case(request):
    """A case of an implementation; call it."""
    options = request.config.stash[CHOSEN]
    return ImplementationCase(*request.param, options.device, options.placement, request.node)


@pytest.fixture
def implementation(request):
    """An implementation of one op: ``op``, ``name``, and a call as the op's."""
    return request.param


class Summary:
    """What ran of each implementation and what was skipped, told at the end. One of which nothing ran is a failure."""

    def __init__(self):
        self._ran: Counter = Counter()
        self._untested: dict[str, Counter] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if report.when != "call" or _PROPERTY not in properties:
            return
        name, why = properties[_PROPERTY], properties.get(_WHY)
        self._untested[name].update([] if why is None else [why])
        self._ran[name] += why is None

    @property
    def _idle(self) -> list[str]:
        return [name for name in self._untested if not self._ran[name]]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self._idle and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self._untested:
            terminalreporter.section("implementations")
        for name, reasons in self._untested.items():
            words = "; ".join(f"{count} as it {why}" for why, count in reasons.most_common())
            skipped = f", {reasons.total()} skipped: {words}" if words else ""
            terminalreporter.write_line(f"{name}: {self._ran[name]} cases ran{skipped}")
        for name in self._idle:
            terminalreporter.write_line(f"FAILED: no case of {name} ran", red=True)
