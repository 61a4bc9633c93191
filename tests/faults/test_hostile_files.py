"""Checkpoints, cache files and shared memory from strangers: one clear error, in bounded time and memory."""

import io
import json
import os
import socket
import stat
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram_kernels import EngramTable, HashPlan, NgramCache, RowAdagrad
from engram_kernels.checkpoints.files import INDEX_SUFFIX, Checkpoint
from engram_kernels.checkpoints.opening import CheckpointError
from engram_kernels.tables.memory import shared_protocol
from tests.support.checkpoints import V41

MOST = 32 << 20  # bytes of Python's memory that a refusal may take


def table(rows=64):
    return EngramTable.from_tensors(torch.randn(rows, 32), placement="cpu")


def load(path):
    return EngramTable.from_safetensors(path, placement="cpu")


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def indexed(tmp_path):
    """A folder "a" whose index a test changes, beside a folder "b" with a table in three files."""
    for name in "ab":
        (tmp_path / name).mkdir()
        table().save_safetensors(tmp_path / name, shard_bytes=3000)
    return tmp_path


def rename(folder, change):
    """Pass the files' names in the folder's index through ``change``."""
    path = folder / f"model{INDEX_SUFFIX}"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: change(file) for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


OUTSIDE = {
    "above": lambda root: lambda file: f"../b/{file}",
    "absolute": lambda root: lambda file: str(root / "b" / file),
    "down and up": lambda root: lambda file: f"x/../../b/{file}",
    "nothing": lambda root: lambda file: "",
    "a folder": lambda root: lambda file: ".",
    "a NUL": lambda root: lambda file: f"{file}\0",
}


@pytest.mark.parametrize("change", OUTSIDE.values(), ids=OUTSIDE)
def test_an_index_names_files_of_its_own_folder(indexed, change):
    other = next(indexed.glob("b/*.safetensors")).name[:15]
    files = sorted(os.listdir(indexed / "b"))
    rename(indexed / "a", lambda file: change(indexed)(other + file[15:]))
    for action in (lambda: load(indexed / "a"), lambda: table().save_safetensors(indexed / "a")):
        with pytest.raises(ValueError, match="must name files of its own folder|must be a regular file"):
            action()
    assert sorted(os.listdir(indexed / "b")) == files
    load(indexed / "b").close()


def test_links_out_of_a_folder(indexed):
    """Refused, but those of the Hugging Face cache: snapshots/<revision>/<file> -> ../../blobs/<digest>."""
    for file in (indexed / "a").glob("*.safetensors"):
        file.rename(indexed / file.name)
        file.symlink_to(indexed / file.name)
    with pytest.raises(CheckpointError, match="is a link out of it"):
        load(indexed / "a")
    snapshot, blobs = indexed / "snapshots" / "main", indexed / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted((indexed / "b").iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load(snapshot).close()


def fifo(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def device(path):
    """A link to a device that answers reads with zeros, and writes with an error; not a device of its own."""
    path.symlink_to("/dev/full")


@pytest.mark.parametrize("make", [fifo, unix_socket, device, Path.mkdir])
def test_only_regular_files_are_opened_and_replaced(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    path = tmp_path / "model.safetensors"
    make(path)
    kind = stat.S_IFMT(path.lstat().st_mode)
    optimizer = RowAdagrad([table().requires_row_grad_()], lr=1e-3)
    plan = HashPlan.build(V41, torch.arange(40))
    tables = [EngramTable.from_tensors(torch.randn(rows, 64), placement="cpu") for rows in plan.rows_per_layer]
    cache = NgramCache(plan, tables, entries=64)
    actions = [lambda: cache.save(path), lambda: cache.load(path)]
    if make is not Path.mkdir:  # of a folder the file in it is meant
        actions += [lambda: load(path), lambda: table().save_safetensors(path)]
        actions += [lambda: optimizer.save_safetensors(path), lambda: optimizer.load_safetensors(path)]
    for action in actions:
        with pytest.raises(
            (ValueError, OSError), match="must be a regular file, got (a FIFO|a socket|a device|a folder)"
        ):
            action()
    assert stat.S_IFMT(path.lstat().st_mode) == kind and len(os.listdir(tmp_path)) == 1


def bounded(action, errors=(ValueError, OSError)):
    """The error of ``action``, which took little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(errors) as raised:
            action()
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    text = str(raised.value)
    assert len(text) < 2000 and "\n" not in text
    return text


DEEP = b"[" * 100_000
HEADERS = {
    "deep": b'{"a":' + DEEP,
    "a long number": b'{"weight":{"dtype":"F32","shape":[' + b"9" * 5000 + b',4],"data_offsets":[0,16]}}',
    "a far shard": {"shard_1000000000.weight": dict(dtype="F32", shape=[1, 4], data_offsets=[0, 16])},
    "a huge shape": dict(weight=dict(dtype="F32", shape=[2**40, 2**20], data_offsets=[0, 16])),
    "negative": dict(weight=dict(dtype="F32", shape=[-1, -4], data_offsets=[0, 16])),
    "a deep text": {
        "__metadata__": {"engram_table": DEEP.decode()},
        "weight": dict(dtype="F32", shape=[1, 4], data_offsets=[0, 16]),
    },
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(header, bytes(16)))
    assert "model.safetensors" in (text := bounded(lambda: load(path))) or "shard_" in text
    if (
        not isinstance(header, dict) or "__metadata__" not in header
    ):  # else it is a table, if one with strange words beside it
        bounded(lambda: table().save_safetensors(path))
        assert path.read_bytes() == file_of(header, bytes(16)), "replaced"


@pytest.mark.parametrize(
    "content", [DEEP, b'{"weight_map":' + DEEP, b'{"weight_map":{"a":' + b"9" * 5000 + b"}}", b"\xff", b"[]", b""]
)
def test_indices(tmp_path, content):
    path = tmp_path / f"model{INDEX_SUFFIX}"
    path.write_bytes(content)
    for action in (lambda: load(tmp_path), lambda: table().save_safetensors(tmp_path)):
        assert str(path) in bounded(action)
    assert path.read_bytes() == content


names = st.sampled_from(["weight", "shard_0.weight", "shard_1.weight", "scale", "weight_scale", "shard_0.scale", "x"])
numbers = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**63, 2**64, 10**30]), st.none(), st.text(max_size=3))
entries = st.fixed_dictionaries(
    dict(
        dtype=st.sampled_from(["F32", "BF16", "F8_E4M3", "F8_E8M0", "U8", "I64", "nothing", 7]),
        shape=st.lists(numbers, max_size=3),
        data_offsets=st.lists(numbers, min_size=1, max_size=3),
    )
)
headers = st.dictionaries(names, st.one_of(entries, st.none(), st.integers()), max_size=4)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=headers, data=st.binary(max_size=80), cut=st.integers(0, 20))
def test_files_by_the_format(tmp_path_factory, header, data, cut):
    """Whatever a file says, a table comes of it or a CheckpointError."""
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    content = file_of(header, data)
    path.write_bytes(content[: len(content) - cut])
    try:
        load(path).close()
    except ValueError:
        pass
    try:
        with Checkpoint(path, "test") as checkpoint:
            for name in checkpoint.names:
                checkpoint.tensor(name)
    except CheckpointError:
        pass


def cache_of():
    plan = HashPlan.build(V41, torch.arange(40))
    tables = [EngramTable.from_tensors(torch.randn(rows, 64), placement="cpu") for rows in plan.rows_per_layer]
    cache = NgramCache(plan, tables, entries=64, min_tokens=0)
    cache.warm(torch.arange(30))
    return cache


def state_of(cache):
    return [part.clone() for part in cache.state if isinstance(part, torch.Tensor)]


def arrays_in(path):
    with np.load(path) as file:
        return dict(file)


CHANGES = {
    "clock": lambda a: a.update(clock=np.array([2**63 - 1])),
    "a clock before its stamps": lambda a: a.update(clock=np.array([0])),
    "stamps": lambda a: a.update(stamp=-a["stamp"]),
    "groups": lambda a: a.update(group=a["group"] - 1),
    "groups beyond": lambda a: a.update(group=a["group"] + 100),
    "lengths": lambda a: a.update(key=a["key"][:-1]),
    "dimensions": lambda a: a.update(key=a["key"][None]),
    "types": lambda a: a.update(key=a["key"].astype(float)),
    "objects": lambda a: a.update(key=np.array([{}] * len(a["key"]))),
    "twice": lambda a: a.update({name: np.concatenate([a[name]] * 2) for name in ("group", "key", "stamp")}),
    "missing": lambda a: a.pop("stamp"),
    "format": lambda a: a.update(format=np.array(99)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_values_of_a_cache_file(tmp_path, change):
    cache = cache_of()
    path = cache.save(tmp_path / "hot.npz")
    arrays = arrays_in(path)
    change(arrays)
    np.savez(path, **arrays)
    before = state_of(cache)
    assert str(path) in bounded(lambda: cache.load(path))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(cache), strict=True)), "the cache has changed"


def test_damaged_cache_files(tmp_path):
    """Cut anywhere, a byte flipped anywhere, or telling of an array of 64 GiB: the cache stays as it was."""
    cache = cache_of()
    path = cache.save(tmp_path / "hot.npz")
    content, before = path.read_bytes(), state_of(cache)
    damaged = [content[:end] for end in range(0, len(content), 97)]
    for place in range(0, len(content), 61):
        damaged.append(content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :])
    huge = io.BytesIO()
    with zipfile.ZipFile(huge, "w") as archive:
        for name, array in arrays_in(path).items():
            part = io.BytesIO()
            np.lib.format.write_array(part, array)
            text = part.getvalue()
            if name == "key":
                shape = str(array.shape).encode()
                text = text.replace(shape, b"(8589934592,)").replace(b" " * (13 - len(shape)), b"", 1)
            archive.writestr(f"{name}.npy", text)
    for each in [*damaged, huge.getvalue()]:
        path.write_bytes(each)
        try:
            cache.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        assert torch.equal(
            before[0][before[1] > 0].sort().values, state_of(cache)[0][cache.state.stamps > 0].sort().values
        )
    path.write_bytes(b"a letter")
    bounded(lambda: cache.save(path))
    assert path.read_bytes() == b"a letter", "another kind of file was replaced"


@pytest.mark.parametrize("name", ["metadata", "prefix"])
def test_text_that_no_file_can_hold(tmp_path, name):
    for value in ("\ud800", "a\udfff."):
        given = {name: {"note": value} if name == "metadata" else value}
        with pytest.raises(ValueError, match=f"{name} must be text that UTF-8 can write"):
            table().save_safetensors(tmp_path, **given)
    assert not os.listdir(tmp_path)


@pytest.fixture
def shm(monkeypatch):
    """A folder of /dev/shm that stands for all of it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setattr(shared_protocol, "_folders", lambda: [Path(folder)])
        monkeypatch.setattr(shared_protocol, "_SHM", Path(folder))
        yield Path(folder)


def another_user(path):
    path.write_bytes(shared_protocol._MAGIC + bytes(4096))
    path.chmod(0o666)
    os.chown(path, 12345, 12345)


NEIGHBOURS = {
    "a FIFO": fifo,
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("/etc/hostname"),
    "a broken link": lambda path: path.symlink_to("/nothing"),
    "unreadable": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
    "another user's": another_user,
    "short": lambda path: path.write_bytes(b"x"),
}


@pytest.mark.parametrize("make", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_in_shared_memory(shm, make):
    """Whatever others put beside them, tables are made; under their name, the error says so."""
    if make is another_user and os.geteuid() != 0:
        pytest.skip("only root makes files of other users")
    make(shm / "engram-stranger")
    before = sorted(os.listdir(shm))
    options = dict(placement="shared", name="mine")
    with EngramTable.empty(8, 16, "float32", **options) as made:
        made.publish()
        with EngramTable.attach("mine", 8, 16, "float32", timeout=5):
            pass
    assert sorted(os.listdir(shm)) == before
    with pytest.raises(FileExistsError, match="engram-stranger exists"):
        EngramTable.empty(8, 16, "float32", placement="shared", name="stranger")
    with pytest.raises((ValueError, TimeoutError), match="no table of engram_kernels|cannot be opened"):
        EngramTable.attach("stranger", 8, 16, "float32", timeout=0)


def test_two_hundred_tables_leave_nothing():
    """Made, refused and loaded: as many descriptors and mappings as before."""

    def count():
        with open("/proc/self/maps") as lines:
            return len(os.listdir("/proc/self/fd")), sum(1 for _ in lines)

    def once(folder):
        with table() as one:
            one.save_safetensors(folder)
        load(folder).close()
        EngramTable.from_safetensors(folder, placement="cpu", mapped=True).close()
        with pytest.raises(ValueError):
            EngramTable.from_safetensors(folder, placement="cpu", prefix="other")
        with pytest.raises(ValueError):
            EngramTable.empty(8, 16, "float31", placement="cpu")

    with tempfile.TemporaryDirectory() as folder:
        for _ in range(20):
            once(folder)
        before = count()
        for _ in range(200):
            once(folder)
        after = count()
    assert after[0] == before[0] and after[1] <= before[1] + 5, (before, after)
