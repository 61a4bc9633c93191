"""Shared tables that are kept: they outlive their processes, are told by their digest, and go when they are freed."""

import os
import shutil
import time
import types

import pytest
import torch

from engram_kernels import EngramTable, RowAdagrad, lookup
from engram_kernels.tables import engram as tables_engram
from engram_kernels.tables.memory import kept, shared_protocol
from tests.support.checkpoints import save
from tests.support.documents import Document
from tests.support.patience import HANG
from tests.support.processes.peers import Peer
from tests.support.processes.sharing import SHM, attach, file_of, forked_writer, made

ROWS, WIDTH = 20_000, 64
SHAPE = (ROWS, WIDTH, "float32")
#: What a peer runs to fill only once a file is there.
SLOW = """
import os, time
from engram_kernels.tables import engram
fill = engram.fill_table
def slow(*arguments, **options):
    while not os.path.exists({gate!r}):
        time.sleep(0.01)
    fill(*arguments, **options)
engram.fill_table = slow
"""


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shared_protocol, "_free_huge_pages", lambda: 0)


@pytest.fixture
def name(shared_name):
    yield shared_name
    for left in SHM.glob(f"engram-{shared_name}*"):
        left.unlink()


@pytest.fixture
def path(tmp_path):
    weight = torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH)
    return save(tmp_path / "a.safetensors", {"embed.weight": weight})


def start(path, name, **options):
    """What every server's start is."""
    return EngramTable.from_safetensors(path, placement="shared", name=name, keep=True, **options)


def starting(path, name):
    """The same, for a peer; whether it attached."""
    call = f"EngramTable.from_safetensors({str(path)!r}, placement='shared', name={name!r}, keep=True)"
    return f"t = {call}; result = t.attached"


def filling(name):
    """Wait until somebody fills the table."""
    until = time.monotonic() + HANG
    while not any(table.name == name and table.state == "filling" for table in kept.list_shared()):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_survives_its_server_and_is_attached_without_reading_rows(path, name, monkeypatch):
    """The server is killed; the next start reads headers alone, and touches no page of the rows."""
    server = Peer().wait_ready()
    assert server.run(starting(path, name)) is False
    digest = server.run("result = t.digest")
    server.end(kill=True)
    made(f"{name}-other").close()  # sweeps what nobody holds
    monkeypatch.setattr(tables_engram, "fill_table", None)

    def bytes_read():
        with open("/proc/self/io") as lines:
            return int(next(lines).split()[1])

    before = bytes_read()
    with start(path, name) as table:
        assert table.attached and table.digest == digest and len(digest) == 64
        assert bytes_read() - before < ROWS * WIDTH
        assert table.memory_report().resident == 0
        assert lookup(table, torch.tensor([ROWS - 1]))[0, -1] == ROWS * WIDTH - 1
        with pytest.raises(ValueError, match="was attached, and only the process that published it may write rows"):
            table.write_rows(torch.tensor([0]), torch.zeros(1, WIDTH))
    assert file_of(name).exists()
    EngramTable.free(name)
    assert not file_of(name).exists()


def test_of_several_starters_one_loads(path, name, peers, tmp_path):
    gate = tmp_path / "gate"
    for peer in peers:
        peer.run(SLOW.format(gate=str(gate)))
        peer.start(starting(path, name))
    filling(name)
    gate.touch()
    assert sorted(peer.answer() for peer in peers) == [False, True]
    read = "result = t.weight[-1, -1].item(); t.close()"
    assert [peer.run(read) for peer in peers] == [ROWS * WIDTH - 1] * 2


def test_where_the_loading_one_dies_another_loads(path, name, peers, tmp_path):
    first = Peer().wait_ready()
    first.run(SLOW.format(gate=str(tmp_path / "never")))
    first.start(starting(path, name))
    filling(name)
    peers[0].start(starting(path, name))
    time.sleep(0.1)
    first.end(kill=True)
    assert peers[0].answer() is False
    peers[0].run("t.close()")
    with start(path, name) as table:
        assert table.attached


def test_a_kept_table_whose_writer_died_is_swept(path, name):
    """It was never published; by the next table of another name, and by the next start of this one."""
    for sweep in (lambda: made(f"{name}-other"), lambda: start(path, name)):
        with forked_writer(name, keep=True):
            pass
        assert [table.state for table in kept.list_shared() if table.name == name] == ["dead"]
        with sweep() as table:
            assert table.attached is False
    assert file_of(name).exists()


def test_another_checkpoint_is_an_error_that_names_both(path, name):
    start(path, name).close()
    with start(path, name) as table:
        old = table.digest
    os.utime(path, ns=(5, 5))
    with pytest.raises(ValueError) as error:
        start(path, name)
    text = str(error.value)
    assert text.startswith("EngramTable.from_safetensors: expected digest ") and old in text
    new = text.split()[3].rstrip(",")
    assert f"shared --free {name})" in text and "a name of its own" in text and new != old
    with start(path, f"{name}-v2") as other:  # both at once, as a rolling upgrade has them
        assert not other.attached and other.digest == new
    EngramTable.free(f"{name}-v2")
    EngramTable.free(name)
    with start(path, name) as table:
        assert not table.attached and table.digest == new


def test_the_digest_is_of_files_and_tensors(path, tmp_path):
    """Of their times, sizes, names and shapes; not of where they are."""

    def digest(path):
        with EngramTable.from_safetensors(path, placement="shared", name=f"digest-{os.getpid()}") as table:
            return table.digest

    found = digest(path)
    (tmp_path / "moved").mkdir()
    copied = shutil.copy2(path, tmp_path / "moved" / "b.safetensors")
    assert digest(copied) == found
    weight, at = torch.ones(ROWS, WIDTH), os.stat(path).st_mtime_ns
    for tensors in ({"table.weight": weight}, {"embed.weight": weight.view(-1, 2 * WIDTH)}):
        other = save(tmp_path / "c.safetensors", tensors)
        os.utime(other, ns=(at, at))
        assert digest(other) != found
    os.utime(path, ns=(at, at + 1))
    assert digest(path) != found


def take_a_step(table):
    table.requires_row_grad_()
    optimizer = RowAdagrad([table], lr=0.1)
    lookup(table, torch.tensor([3])).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "write",
    [
        lambda table: table.write_rows(torch.tensor([3]), torch.zeros(1, WIDTH)),
        lambda table: table.overlay(torch.tensor([3]), torch.zeros(1, WIDTH)),
        lambda table: table.update_from(EngramTable.from_tensors(torch.ones(ROWS, WIDTH), placement="cpu")),
        lambda table: (table.weight.zero_(), table.rows_changed()),
        take_a_step,
    ],
    ids=["write_rows", "overlay", "update_from", "rows_changed", "optimizer"],
)
def test_edited_rows_are_not_taken_for_the_checkpoints(path, name, write):
    with start(path, name) as table:
        digest = table.digest
        with attach(name, SHAPE, digest=digest) as reader:
            reader.rows_changed()  # what a reader says of its caches
            assert reader.digest == table.digest == digest
            with pytest.raises(ValueError, match="the table is published already"):
                table.publish()
            assert table.digest == digest
            write(table)
            assert table.digest is reader.digest is None
    with pytest.raises(ValueError, match="is a table without a digest: its rows were written since"):
        start(path, name)
    with pytest.raises(ValueError, match=f"^EngramTable.attach: expected digest {digest}"):
        attach(name, SHAPE, digest=digest)
    attach(name, SHAPE).close()


def test_free_while_in_use(path, name):
    """Who has the table goes on reading it, and the name is free at once."""
    with start(path, name) as table, start(path, name) as reader:
        EngramTable.free(name)
        assert not file_of(name).exists()
        with start(path, name) as other:
            assert not other.attached
            table.weight[7] = -1
            assert reader.weight[7, 0] == -1 and other.weight[7, 0] == 7 * WIDTH
    assert file_of(name).exists()  # the first one's end took nothing of the second's


def test_what_cannot_be_freed(name):
    with pytest.raises(FileNotFoundError, match=f"EngramTable.free: this user has no shared table '{name}'; there is"):
        EngramTable.free(name)
    with forked_writer(name) as writer:
        with pytest.raises(ValueError, match=f"EngramTable.free: process {writer} is filling {file_of(name)}; end"):
            EngramTable.free(name)
    EngramTable.free(name)
    file_of(name).write_bytes(bytes(4096))
    with pytest.raises(FileNotFoundError):
        EngramTable.free(name)
    with pytest.raises(ValueError, match="needs a name of 1 to 128"):
        EngramTable.free("../x")


@pytest.mark.parametrize("publish", [False, True])
def test_a_name_of_a_table_that_is_not_kept(path, name, publish):
    """Alive it is an error, filled or not; dead it makes room."""
    with forked_writer(name, publish=publish):
        with pytest.raises(
            FileExistsError, match=f"from_safetensors: {file_of(name)} is a shared table that is not kept"
        ):
            start(path, name)
    with start(path, name) as table:
        assert not table.attached


def test_tables_that_are_not_from_files(path, name):
    """They are kept as well, and no start takes them for a checkpoint's."""
    weight = torch.ones(ROWS, WIDTH)
    EngramTable.from_tensors(weight, placement="shared", name=name, keep=True).close()
    with attach(name, SHAPE) as table:
        assert table.digest is None and table.weight.eq(1).all()
    with pytest.raises(ValueError, match="without a digest"):
        start(path, name)
    with pytest.raises(FileExistsError, match="attach to it"):
        EngramTable.from_tensors(weight, placement="shared", name=name, keep=True)
    EngramTable.free(name)
    made(name, keep=True).close()  # never published
    assert not file_of(name).exists()


def test_only_shared_tables_are_kept(path):
    for make in (
        lambda: EngramTable.empty(4, 32, "float32", placement="cpu", keep=True),
        lambda: EngramTable.from_tensors(torch.ones(4, 32), placement="cpu", keep=True),
        lambda: EngramTable.from_safetensors(path, placement="cpu", keep=True),
        lambda: EngramTable.from_safetensors(path, placement="cpu", keep=True, mapped=True),
        lambda: EngramTable.from_safetensors(path, placement="cpu", keep=True, mapped=True, memory_bytes=2**27),
    ):
        with pytest.raises(ValueError, match="keep=True is for placement 'shared', got 'cpu'"):
            make()
    with pytest.raises(ValueError, match="placement 'shared' needs a name"):
        EngramTable.from_safetensors(path, placement="shared", keep=True)


def test_the_list_says_who_holds_what(path, name, peers):
    assert peers[0].run(starting(path, name)) is False
    with start(path, name) as table:
        (found,) = [each for each in kept.list_shared() if each.name == name]
        geometry = found.geometry
        assert (geometry.rows, geometry.width, geometry.format, geometry.kept) == (*SHAPE, True)
        assert geometry.digest == table.digest and found.nbytes == table.nbytes and found.state == "complete"
        assert set(found.pids) == {os.getpid(), peers[0].pid} and found.writer == peers[0].pid
    peers[0].run("t.close()")
    (found,) = [each for each in kept.list_shared() if each.name == name]
    assert found.pids == () and found.state == "complete"


def test_files_of_later_versions_are_left_alone(name, monkeypatch):
    """Also where nobody holds them: what that means is theirs to say."""
    with forked_writer(name, publish=True):
        pass
    monkeypatch.setattr(shared_protocol, "_VERSION", 1)
    assert not shared_protocol.remove_unused(file_of(name))
    with pytest.raises(ValueError, match="has version 2 of the layout, this package reads 1"):
        attach(name, SHAPE)


def test_the_documents_example(path, name):
    """The line of docs/host_memory.md, at two starts."""
    blocks = [each for each in Document("docs/host_memory.md").blocks() if "keep=True" in each]
    (block,) = blocks
    block = block.replace('"checkpoint/", layer=1', repr(str(path))).replace("flash-1.0-layer1", name)
    for attached in (False, True):
        space = dict(EngramTable=EngramTable)
        exec(block, space)
        assert space["table"].attached is attached
        space["table"].close()


def test_a_name_that_is_neither_there_nor_free_is_an_error_in_the_end(monkeypatch):
    monkeypatch.setattr(kept, "time", types.SimpleNamespace(sleep=lambda seconds: None))

    def raising(error):
        raise error

    with pytest.raises(FileExistsError, match="taken"):
        kept.attach_or_load(
            lambda: raising(shared_protocol.WriterDied("died")), lambda: raising(FileExistsError("taken"))
        )
