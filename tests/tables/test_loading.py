"""EngramTable.from_safetensors: names of both models, bits, memory, mapped files, and files that change meanwhile."""

import errno
import gc
import json
import os
import threading

import pytest
import torch

from engram_kernels import EngramConfig, EngramTable, lookup
from engram_kernels.checkpoints import parallel as chunk_runner
from engram_kernels.checkpoints import reading
from engram_kernels.checkpoints.files import CheckpointError
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.tables import files as table_files
from engram_kernels.tables.memory.pages import Pages
from engram_kernels.testing import tables
from tests.support import checkpoints
from tests.support.checkpoints import E8M0, QWEN, QWEN_SCALE, V41, by_hand, raw, save
from tests.support.processes.sharing import file_of

load = EngramTable.from_safetensors
V41_NAME = "layers.{}.engram.embed."


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def memory(field="VmRSS"):
    with open("/proc/self/status") as lines:
        return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) << 10


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 1,000 bytes, which end in the middle of rows."""
    monkeypatch.setattr(reading, "CHUNK", 1000)


@pytest.mark.parametrize("placement", ["cpu", "host"])
def test_deepseek_checkpoint(tmp_path, placement, small_chunks):
    folder, tensors = checkpoints.v41_folder(tmp_path / "v41")
    for layer in V41.layers:
        name = V41_NAME.format(layer)
        # The folder; its index; one file, by layer; several, by name, with and without the dot.
        index = folder / "model.safetensors.index.json"
        file = folder / f"model-0000{1 if layer == 1 else 2}-of-00002.safetensors"
        for paths, options in (
            (folder, dict(config=V41, layer=layer)),
            (str(index), dict(layer=layer)),
            ([file], dict(config=V41)),
            (sorted(folder.glob("*.safetensors")), dict(prefix=name)),
            (folder, dict(prefix=name.rstrip("."), config=V41)),
        ):
            table = load(paths, placement=placement, **options)
            assert (table.format.name, table.placement) == ("e4m3_ue8m0", placement)
            assert torch.equal(raw(table.weight), raw(tensors[name + "weight"]))
            assert torch.equal(table.scale, raw(tensors[name + "scale"]))


@pytest.mark.parametrize("parts", [1, 8, 512])
def test_qwen_checkpoint(tmp_path, parts, small_chunks):
    """Parts in the order of their numbers, not of their names, from files in turn; one bfloat16 scale."""
    folder, weight, _ = checkpoints.qwen_folder(tmp_path / "qwen", parts)
    table = load(folder, placement="host", config=QWEN)
    assert table.format.name == "e4m3" and torch.equal(raw(table.weight), raw(weight))
    assert float(table.scale) == float(QWEN_SCALE)
    ids = torch.tensor([0, 3, len(weight) - 1])
    expected = tables.expected_values(weight, float(QWEN_SCALE), ids)
    assert tables.same_bits(lookup(table, ids), tables.rounded(expected, torch.bfloat16), truncated=False)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_with_one_table_needs_no_name(tmp_path, name):
    weight, scale = tables.random_parts(20, 32, name)
    tensors = {"weight": weight}
    if name == "e4m3":
        tensors["weight_scale"] = torch.tensor(scale)
    elif name == "nvfp4":
        tensors |= dict(weight_scale=scale.view(torch.float8_e4m3fn), weight_scale_2=torch.tensor(tables.TABLE_SCALE))
    elif scale is not None:
        tensors["scale"] = scale
    table = load(save(tmp_path / "table.safetensors", tensors), placement="cpu")
    assert table.format.name == name and torch.equal(raw(table.weight), raw(weight))
    if FORMATS[name].group:
        assert torch.equal(table.scale, scale)
    if name == "nvfp4":
        assert table.own_scale == float(torch.tensor(tables.TABLE_SCALE))


@pytest.mark.parametrize("spelling", ["scale", "weight_scale", "weight_scale_inv"])
def test_scales_of_groups_by_either_type_and_any_name(tmp_path, spelling):
    weight, scale = tables.random_parts(20, 64, "e4m3_ue8m0")
    for stored in (scale, scale.view(E8M0)):
        tensors = {"layers.3.engram.embed.weight": weight, f"layers.3.engram.embed.{spelling}": stored}
        table = load(save(tmp_path / "a.safetensors", tensors), placement="cpu", layer=3)
        assert table.format.name == "e4m3_ue8m0" and torch.equal(table.scale, scale)


def test_progress_comes_from_the_calling_thread_and_ends_with_all_bytes(tmp_path, small_chunks):
    folder, weight, _ = checkpoints.qwen_folder(tmp_path / "qwen")
    calls = []
    load(folder, placement="cpu", threads=1, progress=lambda *call: calls.append((*call, threading.get_ident())))
    assert {ident for *_, ident in calls} == {threading.get_ident()}
    done = [count for count, _, _ in calls]
    assert done[0] == 0 and done == sorted(done) and done[-1] == weight.numel() and len(done) > 5
    assert {total for _, total, _ in calls} == {weight.numel()}


class Elsewhere:
    """Memory that only copies reach, as a GPU's."""

    is_cpu = False

    def __init__(self, tensor):
        self.tensor = tensor

    def __getitem__(self, part):
        return self.tensor[part]


def test_rows_go_through_a_buffer_where_the_cpu_does_not_see_the_memory(tmp_path, small_chunks, monkeypatch):
    flat = table_files.flat_bytes
    monkeypatch.setattr(table_files, "flat_bytes", lambda tensor: Elsewhere(flat(tensor)))
    folder, tensors = checkpoints.v41_folder(tmp_path / "v41")
    table = load(folder, placement="cpu", config=V41, layer=4)
    assert torch.equal(raw(table.weight), raw(tensors["layers.4.engram.embed.weight"]))
    assert torch.equal(table.scale, raw(tensors["layers.4.engram.embed.scale"]))


def test_memory_beyond_the_table_is_bounded(tmp_path):
    """A sparse file of 300 MB, read by eight threads: a copy of it, or of a part, would show."""
    rows, parts = 1 << 20, 4
    header, size = {}, rows // parts * 300
    for k in range(parts):
        place = {"shape": [rows // parts, 75], "data_offsets": [k * size, (k + 1) * size]}
        header[f"shard_{k}.weight"] = {"dtype": "F32", **place}
    header = {k: v | {"shape": [rows // parts // 4, 300]} for k, v in header.items()}
    path = by_hand(tmp_path / "sparse.safetensors", header)
    os.truncate(path, path.stat().st_size + parts * size)
    gc.collect()
    before = memory()
    try:
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")  # the peak begins anew
    except OSError as error:
        pytest.skip(f"this kernel does not reset the peak: {error}")
    table = load(path, placement="host")
    assert memory("VmHWM") - before - table.nbytes < 64 << 20
    assert table.nbytes == parts * size > 256 << 20


def failing(at):
    def progress(done, total):
        if done >= at * total:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("placement", ["cpu", "host"])
def test_memory_is_released_on_an_error(tmp_path, placement):
    """While the error, and with it every frame it came through, is still alive."""
    weight = torch.ones(1 << 18, 64)  # 64 MiB
    path = save(tmp_path / "a.safetensors", {"weight": weight})
    del weight
    gc.collect()
    before = memory()
    with pytest.raises(KeyboardInterrupt) as kept:
        load(path, placement=placement, progress=failing(0.7))
    assert memory() - before < 24 << 20 and kept.value is not None


@pytest.mark.parametrize("where", ["progress", "disk", "memory"])
def test_a_shared_table_that_cannot_be_filled_leaves_nothing(tmp_path, shared_name, monkeypatch, where):
    """An interrupt, a sector that cannot be read, and memory that others take while the table is filled."""
    path = save(tmp_path / "a.safetensors", {"weight": torch.ones(1 << 17, 64)})  # 32 MiB
    before, held, options = memory(), len(os.listdir("/proc/self/fd")), {}
    if where == "progress":
        options["progress"], expected = failing(0.5), pytest.raises(KeyboardInterrupt)
    elif where == "disk":
        monkeypatch.setattr(reading.Checkpoint, "read_into", lambda *_: os.preadv(-1, [bytearray(1)], 0))
        expected = pytest.raises(OSError, match="Bad file descriptor")
    else:
        allocate = os.posix_fallocate

        def full(fd, begin, nbytes):
            if begin > 16 << 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            allocate(fd, begin, nbytes)

        monkeypatch.setattr(os, "posix_fallocate", full)
        expected = pytest.raises(RuntimeError, match=r"do not fit in /dev/shm \(No space left on device\), [\d,]+ are")
    with expected as kept:
        load(path, placement="shared", name=shared_name, **options)
    assert not file_of(shared_name).exists() and kept.value is not None
    assert memory() - before < 24 << 20 and len(os.listdir("/proc/self/fd")) == held


def test_shared_memory_comes_while_the_table_is_filled(tmp_path, shared_name, monkeypatch):
    """In huge pages at once, which are not put together when it is published; of several files as of one."""
    weight = torch.randn(50_000, 64)
    save_table = EngramTable.from_tensors(weight, placement="cpu").save_safetensors
    monkeypatch.setattr(Pages, "fault_in", lambda *_, **__: pytest.fail("faulted in before it was filled"))
    for number, shard_bytes in enumerate((None, 5_000_001)):
        path = save_table(tmp_path / f"{number}.safetensors", shard_bytes=shard_bytes)
        with load(path, placement="shared", name=shared_name) as table:
            assert torch.equal(table.weight, weight)
            report = table.memory_report()
            assert report.resident >= table.nbytes and (report.huge >= 0.9 * (12 << 20) or report.warnings)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = save(tmp_path / "a.safetensors", {"weight": torch.ones(1000, 64)})
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors ended at byte 5,000 while it was read, before the end of"
    ):
        load(path, placement="host", progress=lambda *_: os.truncate(path, 5000))


def test_what_takes_the_name_of_a_file_is_not_read(tmp_path):
    """The header that was checked and the rows come from one file, though another is put in its place meanwhile."""
    path = save(tmp_path / "a.safetensors", {"weight": torch.ones(1000, 64)})
    other = save(tmp_path / "b.safetensors", {"weight": torch.zeros(1000, 64)})
    table = load(path, placement="cpu", progress=lambda done, _: done or os.replace(other, path))
    assert (table.weight == 1).all()


def test_two_tables_over_one_file(tmp_path):
    tensors = checkpoints.v41_tensors(1) | checkpoints.v41_tensors(4)
    path = save(tmp_path / "a.safetensors", tensors)
    for options in (dict(), dict(mapped=True)):
        first, second, again = (load(path, placement="cpu", layer=layer, **options) for layer in (1, 4, 1))
        raw(first.weight)[3] = 0x11
        first.scale[3] = 99
        first.close()
        for table, layer in ((second, 4), (again, 1)):
            assert torch.equal(raw(table.weight), raw(tensors[f"layers.{layer}.engram.embed.weight"]))
            assert torch.equal(table.scale, raw(tensors[f"layers.{layer}.engram.embed.scale"]))


@pytest.mark.parametrize("name", FORMATS)
def test_a_mapped_table_reads_as_a_loaded_one(tmp_path, name):
    tables.cpu_table(50, 64, name).save_safetensors(tmp_path / "a.safetensors")
    mapped, loaded = (load(tmp_path / "a.safetensors", placement="cpu", mapped=choice) for choice in (True, False))
    assert mapped.aligned and mapped.weight.data_ptr() % 4096 == 0
    ids = torch.tensor([[0, 49], [-1, 7]])
    for form in ({}, {"out_format": "storage"}):
        pair = [lookup(table, ids, **form) for table in (mapped, loaded)]
        parts = pair if not form else [pair[0][0], pair[1][0]]
        assert torch.equal(raw(parts[0]), raw(parts[1]))
    mapped.close()
    with pytest.raises(ValueError, match="the table is closed"):
        lookup(mapped, ids)


def test_mapped_rows_may_begin_anywhere(tmp_path):
    """Kernels need multiples of 16 bytes; published files promise 8, and this one has 1."""
    weight, scale = tables.random_parts(9, 64, "e4m3_ue8m0")
    header = {
        "scale": dict(dtype="F8_E8M0", shape=[9, 2], data_offsets=[0, 18]),
        "weight": dict(dtype="F8_E4M3", shape=[9, 64], data_offsets=[18, 18 + 9 * 64]),
    }
    text = json.dumps(header).encode()
    data = scale.numpy().tobytes() + raw(weight).numpy().tobytes()
    path = by_hand(tmp_path / "a.safetensors", text + b" " * (-(len(text) + 1) % 16), data)
    table = load(path, placement="cpu", mapped=True)
    assert table.weight.data_ptr() % 2 == 1 and not table.aligned
    ids = torch.arange(-1, 10)
    expected = tables.rounded(tables.expected_values(weight, scale, ids), torch.float32)
    assert tables.same_bits(lookup(table, ids, out_dtype=torch.float32), expected, truncated=False)


def test_a_mapped_table_notices_that_its_file_has_shrunk(tmp_path):
    path = save(tmp_path / "a.safetensors", {"weight": torch.ones(1000, 64)})
    table = load(path, placement="cpu", mapped=True)
    assert (lookup(table, torch.tensor([999])) == 1).all()
    size = path.stat().st_size - 100  # within the last page, which stays readable: a missing check shows as zeros
    os.truncate(path, size)
    with pytest.raises(ValueError, match=rf"^lookup: .*a\.safetensors shrank to {size:,} bytes while mapped"):
        lookup(table, torch.tensor([999]))


def test_mapped_rows_have_to_lie_together(tmp_path):
    weight = torch.randn(6, 64)
    ordered = {"shard_0.weight": weight[:3].clone(), "shard_1.weight": weight[3:].clone()}
    header = {
        name: dict(dtype="F32", shape=[3, 64], data_offsets=[768 * k, 768 * k + 768]) for k, name in enumerate(ordered)
    }
    padding = b" " * (-len(json.dumps(header)) % 8)
    path = by_hand(tmp_path / "a.safetensors", json.dumps(header).encode() + padding, weight.numpy().tobytes())
    assert torch.equal(load(path, placement="cpu", mapped=True).weight, weight)
    odd = by_hand(tmp_path / "odd.safetensors", json.dumps(header).encode() + padding + b" ", weight.numpy().tobytes())
    with pytest.raises(ValueError, match=r"needs shard_0.weight at a multiple of 4 bytes in .*; convert the file, or"):
        load(odd, placement="cpu", mapped=True)
    assert torch.equal(load(odd, placement="cpu").weight, weight)
    folder = checkpoints.save_in_files(tmp_path / "b", {f"{k}.safetensors": {k: v} for k, v in ordered.items()})
    with pytest.raises(
        ValueError, match="needs rows that follow each other in one file, and shard_0.weight is one of 2"
    ):
        load(folder, placement="cpu", mapped=True)
    assert torch.equal(load(folder, placement="cpu").weight, weight)
    with pytest.raises(ValueError, match="mapped=True needs placement 'cpu'.*, whose rows a CPU reads, got 'host'"):
        load(path, placement="host", mapped=True)


def test_a_table_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "a.safetensors", {"weight": torch.ones(1000, 64)})
    monkeypatch.setattr(table_files, "available_host_memory", lambda: 255_999)
    monkeypatch.setattr(EngramTable, "_new", lambda *_, **__: pytest.fail("asked for memory"))
    for placement in ("cpu", "host"):
        with pytest.raises(MemoryError, match=r"takes 256,000 bytes and 255,999 are available; .*mapped=True\)$"):
            load(path, placement=placement)
    assert load(path, placement="cpu", mapped=True).rows == 1000


def full_size(path):
    """V4.1's layer 1 as a sparse file of 94.4 GiB, with content in its last row alone."""
    config = EngramConfig.deepseek_v41_flash()
    rows = config.rows_per_layer[0]
    header = {
        "layers.1.engram.embed.weight": dict(dtype="F8_E4M3", shape=[rows, 256], data_offsets=[0, rows * 256]),
        "layers.1.engram.embed.scale": dict(dtype="F8_E8M0", shape=[rows, 8], data_offsets=[rows * 256, rows * 264]),
    }
    by_hand(path, header)
    begin = path.stat().st_size
    os.truncate(path, begin + rows * 264)
    with open(path, "r+b") as file:
        for place, content in ((rows * 256 - 256, bytes(range(256))), (rows * 264 - 8, bytes([127] * 4 + [130] * 4))):
            file.seek(begin + place)
            file.write(content)
    return config, rows


def test_a_mapped_table_of_full_size(tmp_path):
    config, rows = full_size(tmp_path / "a.safetensors")
    resident = memory()
    table = load(tmp_path, placement="cpu", mapped=True, config=config, layer=1)
    assert table.rows == rows and table.nbytes > 2**36
    values = lookup(table, torch.tensor([rows - 1, 0]), out_dtype=torch.float32)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    expected[128:] *= 8
    assert torch.equal(values[0].nan_to_num(7), expected.nan_to_num(7)) and not values[1].any()
    assert memory() - resident < 16 << 20


def test_no_descriptor_stays_open(tmp_path):
    folder, _ = checkpoints.v41_folder(tmp_path / "v41")
    before = len(os.listdir("/proc/self/fd"))
    for options in (dict(layer=1), dict(layer=4, progress=failing(0.5)), dict(layer=9), dict()):
        try:
            load(folder, placement="cpu", **options)
        except (ValueError, KeyboardInterrupt):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_chunks_after_an_error_are_left():
    begun = []

    def work(chunk):
        begun.append(chunk)
        if chunk == 2:
            raise OSError("2")
        return 1

    with pytest.raises(OSError, match="^2$"):
        chunk_runner.run_chunks(range(10_000), work, threads=2, total=10_000)
    assert len(begun) < 100
    assert list(chunk_runner.interleave([[1, 2, 3], [], [4]])) == [1, 4, 2, 3]
    assert list(chunk_runner.spans(7, 3)) == [(0, 3), (3, 6), (6, 7)]
