"""Lanes, and the count of kernel launches.

``--lane cpu`` (default) runs what needs no kernel, ``interpret`` every test marked ``kernel`` in Triton's interpreter
on CPU tensors, ``machine`` the same tests on the machine code that Triton emits for ``--target``, executed on CPU
tensors, ``compile`` what compiles offline, ``gpu`` the kernel tests and those marked ``gpu`` on a GPU. Kernel tests
marked ``graphs`` are about torch.compile and torch.export, not about machine code: lane ``machine`` leaves them out.
``--cases few`` is what every commit runs: of a parametrized test each value of each parameter; in lane ``interpret``
the first case, since lane ``machine`` runs the same tests. Each lane checks that it runs in the mode it was asked for.
A kernel test that launches none fails, and so does a whole lane in which some kernel of the package never ran. Time
fails nothing: what takes longer than its budget is a warning, and build/lane_times.json keeps the times.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton

from engram_kernels.launching.launch import Launch
from engram_kernels.testing import golden
from tests.support.cases import chosen as chosen_cases
from tests.support.gpu import results as gpu_results
from tests.support.gpu.watch import PATIENCE, Watch
from tests.support.processes import sharing
from tests.support.processes.peers import Peer

TIMES = Path(__file__).parents[1] / "build" / "lane_times.json"
LANES = {
    "cpu": (),
    "interpret": ("kernel",),
    "machine": ("kernel",),
    "compile": ("compile",),
    "gpu": ("kernel", "gpu"),
}
KERNEL_ROOMS = ("ops", "tables", "cache", "serving", "training")  # of the package: where kernels are
LAUNCHING = ("interpret", "machine", "gpu")  # lanes in which every kernel has to run
BUDGETS = {"cpu": 420, "interpret": 420, "machine": 300, "compile": 240}  # seconds, on two cores with no other work
PARTS = {  # of the cpu lane's: the wheel and the demo, one after the other; real processes under Gloo
    ("tests/project/test_packaging.py", "tests/commands/test_demo.py"): 120,
    ("tests/ranks/test_sharded.py", "tests/ranks/test_checkpoint.py", "tests/ranks/test_faults.py"): 120,
}
STARTED, MACHINE = pytest.StashKey(), pytest.StashKey()
launches = Counter()  # kernel name -> launches in this process
executed = Counter()  # what lane machine ran: kernels, launches, programs, runs
benign = Counter()  # reports of lane machine that are let through
durations = Counter()  # file -> seconds of its tests
recent = {}  # kernel name -> the grid and the keyword arguments of its last launch, tensors left out


def pytest_addoption(parser):
    parser.addoption("--lane", choices=tuple(LANES), default="cpu", help="which lane of tests to run")
    parser.addoption("--target", choices=("sm_80", "sm_90"), default="sm_90", help="what lane machine compiles for")
    parser.addoption("--out", default=str(gpu_results.RESULTS.parent), help="where lane gpu writes its results")
    parser.addoption(
        "--alone", action="store_true", help="of lane gpu the tests that need it for themselves, no others"
    )
    parser.addoption("--go-on", action="store_true", help="lane gpu, in one process: keep results, run what has none")
    parser.addoption("--patience", type=float, default=PATIENCE, help="seconds until lane gpu takes a test for hung")
    text = "all cases of a parametrized test, a few (each value of each parameter), or the first one alone"
    parser.addoption("--cases", choices=("all", "few", "one"), default="all", help=text)


def pytest_configure(config):
    lane, interpreting = config.getoption("--lane"), triton.knobs.runtime.interpret
    if interpreting != (lane == "interpret"):
        wanted = "with TRITON_INTERPRET=1" if lane == "interpret" else "without TRITON_INTERPRET"
        raise pytest.UsageError(f"lane {lane!r} runs {wanted}, set before Triton is imported")
    if lane == "gpu" and not torch.cuda.is_available() and not config.option.collectonly:
        raise pytest.UsageError("lane 'gpu' needs a GPU, and torch finds none")
    if lane == "machine" and not config.option.collectonly:
        from tests.machine.gpu import standing_in

        stack = contextlib.ExitStack()
        config.stash[MACHINE] = stack.enter_context(standing_in(config.getoption("--target")))
        config.add_cleanup(stack.close)
    if lane in LAUNCHING:
        _count_launches()
    if lane == "gpu" and torch.cuda.is_available():
        if not hasattr(config, "workerinput"):  # what processes of pytest-xdist report comes to the one that writes
            keep = config.getoption("--alone") or config.getoption("--go-on")
            recorder = gpu_results.Recorder(config.getoption("--out"), keep)
            config.pluginmanager.register(recorder, "gpu_results")
        config.pluginmanager.register(Watch(config.getoption("--patience")), "watch")


def pytest_ignore_collect(collection_path, config):
    """Files without tests of the lane stay closed: they take time, and import what a GPU machine need not have."""
    marks = LANES[config.getoption("--lane")]
    if marks and collection_path.match("test_*.py"):
        text = collection_path.read_text()
        return None if any(f"mark.{mark}" in text for mark in marks) else True
    return None


def pytest_make_parametrize_id(val):
    """A text as -k takes it: expected messages are parameters, with spaces, `=` and brackets in them."""
    return re.sub(r"\W+", "_", val).strip("_") if isinstance(val, str) and re.search(r"[^\w:+./-]", val) else None


def pytest_collection_modifyitems(config, items):
    wanted = set(LANES[config.getoption("--lane")])
    special = {mark for marks in LANES.values() for mark in marks}
    kept = [item for item in items if _belongs(special & {mark.name for mark in item.iter_markers()}, wanted)]
    if config.getoption("--lane") == "gpu":
        alone = config.getoption("--alone")
        kept = [item for item in kept if (item.get_closest_marker("alone") is not None) == alone]
        if config.getoption("--go-on") and (recorder := config.pluginmanager.getplugin("gpu_results")):
            kept = [item for item in kept if item.nodeid not in recorder.content["tests"]]
    lane, cases = config.getoption("--lane"), config.getoption("--cases")
    if lane == "machine":
        kept = [item for item in kept if item.get_closest_marker("graphs") is None]
    kept = chosen_cases(kept, "one" if (lane, cases) == ("interpret", "few") else cases)
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept


def pytest_collection_finish(session):
    """Collections of garbage leave out what was imported so far: with it they take 0.4 s each."""
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()  # or Triton's library says at the end that it leaks


def _belongs(marks, wanted):
    return bool(marks & wanted) if wanted else not marks


def package_kernels():
    """Every kernel of the package that a launcher starts: functions named ``*_kernel``."""
    kernels = {}
    for room in KERNEL_ROOMS:
        package = importlib.import_module(f"engram_kernels.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            names = vars(importlib.import_module(module.name))
            kernels.update({name: value for name, value in names.items() if name.endswith("_kernel")})
    return kernels


def _count_launches():
    kinds = {type(kernel) for kernel in package_kernels().values()}
    for kind in kinds:
        run = kind.run

        @functools.wraps(run)
        def counted(self, *args, _run=run, **kwargs):
            launches[self.fn.__name__] += 1
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            recent[self.fn.__name__] = {k: v for k, v in given.items() if not isinstance(v, torch.Tensor)}
            return _run(self, *args, **kwargs)

        kind.run = counted
    again = Launch.again

    @functools.wraps(again)
    def counted_again(self, compiled, values):
        name = self.kernel.fn.__name__
        launches[name] += 1
        known = dict(zip(self.kernel.arg_names, values, strict=True), grid=self.grid)
        recent[name] = {k: v for k, v in known.items() if not isinstance(v, torch.Tensor)}
        again(self, compiled, values)

    Launch.again = counted_again


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = launches.total()
    result = yield
    if item.get_closest_marker("kernel") and launches.total() == before:
        pytest.fail("this kernel test launched no kernel of the package", pytrace=False)
    return result


def pytest_sessionstart(session):
    session.config.stash[STARTED] = time.monotonic()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist reports to the one that started it
        config.workeroutput["launches"] = dict(launches)
        if MACHINE in config.stash:
            machine = config.stash[MACHINE]
            config.workeroutput.update(executed=dict(machine.ran), benign=dict(machine.benign))
        return
    partial = config.option.keyword or config.getoption("--alone") or config.getoption("--go-on")
    whole_lane = not partial and all("::" not in arg and ".py" not in arg for arg in config.args)
    if not whole_lane or config.option.collectonly:
        return
    lane, took = config.getoption("--lane"), time.monotonic() - config.stash[STARTED]
    write = config.pluginmanager.getplugin("terminalreporter").write_line
    if all(Path(arg).resolve() == Path(__file__).parent for arg in config.args):
        target = config.getoption("--target") if lane == "machine" else ""
        write_times(TIMES, " ".join(filter(None, (lane, target, f"Triton {triton.__version__}"))), lane, took)
    if lane == "machine":
        executed.update(config.stash[MACHINE].ran)
        benign.update(config.stash[MACHINE].benign)
        write("machine code: " + ", ".join(f"{count:,} {name}" for name, count in executed.items()))
    for slow in lane_delays(lane, took):
        write(f"WARNING: {slow}", yellow=True)
    for fault in lane_faults(lane, config.getoption("--cases") == "all") if exitstatus == 0 else ():
        write(f"FAILED: {fault}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def lane_faults(lane, every_case=True):
    """What is wrong with a lane of which every test passed."""
    idle = sorted(set(package_kernels()) - set(launches))
    if lane in LAUNCHING and idle:
        yield f"kernels that no test of this lane launched: {', '.join(idle)}"
    if lane == "machine" and every_case:
        from tests.machine.gpu import BENIGN

        unseen = [known.name for known in BENIGN if known.name not in benign]
        if unseen:
            yield f"BENIGN in tests/machine/gpu.py lists what no launch reports: {', '.join(unseen)}"


def lane_delays(lane, took):
    """Where a lane took longer than its budget; a machine may be busy with others."""
    if took > BUDGETS.get(lane, took):
        yield f"lane {lane!r} took {took:.0f} s, its budget is {BUDGETS[lane]} s"
    for files, budget in PARTS.items():
        spent = sum(durations[file] for file in files)
        if spent > budget:
            yield f"{' and '.join(files)} took {spent:.0f} s, their budget is {budget} s"


def write_times(path, name, lane, took):
    """Keep the seconds of a lane and of its files, beside those of other lanes."""
    times = json.loads(path.read_text()) if path.exists() else {}
    files = {file: round(seconds, 1) for file, seconds in durations.most_common()}
    times[name] = dict(seconds=round(took, 1), budget=BUDGETS.get(lane), files=files)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(times, indent=1) + "\n")
    part.replace(path)


def pytest_runtest_logreport(report):
    durations[report.nodeid.split("::")[0]] += report.duration


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    output = getattr(node, "workeroutput", {})
    launches.update(output.get("launches", {}))
    executed.update(output.get("executed", {}))
    benign.update(output.get("benign", {}))


@pytest.fixture
def device(request):
    """Where a kernel test keeps its tensors: the CPU for the interpreter, the GPU in the gpu lane."""
    return torch.device("cuda", 0) if request.config.getoption("--lane") == "gpu" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_numbers_every_run():
    torch.manual_seed(20260112)


@pytest.fixture(scope="session")
def v41_token_map():
    """The token map of the V4-series tokenizer, kept as data so that a GPU machine needs no tokenizer."""
    return golden.v41_token_map()


@pytest.fixture(scope="session")
def v41_plan():
    return golden.v41_plan()


@pytest.fixture(scope="session")
def peers():
    """Two other processes for all tests that need some: importing takes seconds."""
    both = [Peer(), Peer()]
    yield [peer.wait_ready() for peer in both]
    for peer in both:
        peer.end()


@pytest.fixture
def shared_name(request):
    """A name for a shared table, whose file must be gone in the end."""
    name = f"test-{os.getpid()}-{abs(hash(request.node.name))}"
    yield name
    gc.collect()
    left = sharing.file_of(name).exists()
    sharing.file_of(name).unlink(missing_ok=True)
    assert not left, "the file is still there"
