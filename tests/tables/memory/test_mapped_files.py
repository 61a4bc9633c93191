"""Tables read straight from mapped files: found out, watched, and refused where the file was cut short."""

import ctypes
import gc
import mmap
import os
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engram_kernels import EngramTable, hash_lookup, lookup, ngram_hash, reference
from engram_kernels.tables.memory import mapped_files, pages
from engram_kernels.tables.memory.mapped_files import MappedFile
from engram_kernels.testing import tables
from tests.ops.test_hashing import ragged, small_plan

ROWS = 4000
PAGE = mmap.PAGESIZE


def by_safetensors(path, weight, scale):
    save_file({"embed.scale": scale, "embed.weight": weight}, path)
    with safe_open(path, "pt") as file:
        return file.get_tensor("embed.weight"), file.get_tensor("embed.scale")


def by_numpy(path, weight, scale):
    path.write_bytes(weight.view(torch.uint8).numpy().tobytes() + scale.numpy().tobytes())
    raw = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    return raw[: weight.nbytes].view(weight.dtype).view(weight.shape), raw[weight.nbytes :].view(scale.shape)


def by_torch(path, weight, scale):
    path.write_bytes(weight.view(torch.uint8).numpy().tobytes() + scale.numpy().tobytes())
    raw = torch.from_file(str(path), size=weight.nbytes + scale.nbytes, dtype=torch.uint8)
    return raw[: weight.nbytes].view(weight.dtype).view(weight.shape), raw[weight.nbytes :].view(scale.shape)


@pytest.mark.parametrize(
    ("mapped", "placement"),
    [(by_safetensors, "staged"), (by_numpy, "staged"), (by_numpy, "cpu"), (by_torch, "cpu")],
)
def test_a_file_that_shrinks_under_the_mapping_is_an_error(tmp_path, mapped, placement):
    """Reading on would end the process: the last pages of the file are gone."""
    weight, scale = tables.random_parts(ROWS, 64, "e4m3_ue8m0")
    path = tmp_path / "table"
    table = EngramTable.from_tensors(*mapped(path, weight, scale), placement=placement)
    assert len(table.files) == 2 and {file.path for file in table.files} == {str(path)}
    ids = torch.tensor([0, ROWS - 1])
    expected = tables.rounded(tables.expected_values(weight, scale, ids), torch.float32)
    assert tables.same_bits(lookup(table, ids, out_dtype=torch.float32), expected, truncated=False)
    size = os.stat(path).st_size
    os.truncate(path, size - 1)
    for function in (lookup, reference.lookup):
        with pytest.raises(ValueError, match=f"{path} shrank to {size - 1:,} bytes while mapped, {size:,} are needed"):
            function(table, ids)
    os.truncate(path, size)  # long enough again: nothing that could end the process
    assert lookup(table, ids).shape == (2, 64)
    table.close()


def test_two_tables_over_one_file(tmp_path):
    """Each watches for itself: one is closed, the other goes on and notices."""
    parts = by_safetensors(tmp_path / "table", *tables.random_parts(ROWS, 64, "e4m3_ue8m0"))
    first, second = (EngramTable.from_tensors(*parts, placement="staged") for _ in range(2))
    first.close()
    ids = torch.arange(5)
    assert lookup(second, ids).shape == (5, 64)
    os.truncate(tmp_path / "table", 100)
    with pytest.raises(ValueError, match="^lookup: .* shrank to 100 bytes"):
        lookup(second, ids)


def test_a_file_that_is_replaced_or_removed_stays_what_was_mapped(tmp_path):
    """As a checkpoint is updated: under a temporary name, then renamed."""
    weight, scale = tables.random_parts(ROWS, 64, "e4m3_ue8m0")
    path = tmp_path / "table"
    table = EngramTable.from_tensors(*by_safetensors(path, weight, scale), placement="staged")
    (tmp_path / "other").write_bytes(b"short")
    os.rename(tmp_path / "other", path)
    assert torch.equal(table.weight.view(torch.uint8), weight.view(torch.uint8))
    path.unlink()
    assert torch.equal(table.weight.view(torch.uint8), weight.view(torch.uint8))


def test_what_is_watched(tmp_path):
    """Memory is not; a file is, unless its name has gone or means another file by now."""
    assert MappedFile.behind(torch.zeros(5)) is None and MappedFile.behind(torch.zeros(1 << 20)) is None
    path = tmp_path / "a name with spaces"
    _, scale = by_numpy(path, *tables.random_parts(ROWS, 64, "e4m3_ue8m0"))
    watched = MappedFile.behind(scale[:10])
    watched.check("op")
    os.truncate(path, ROWS * 64 + 20)
    watched.check("op")  # long enough for these ten rows
    os.truncate(path, ROWS * 64 + 19)
    with pytest.raises(ValueError, match=r"^op: .* shrank to 256,019 bytes while mapped, 256,020 are needed$"):
        watched.check("op")
    os.rename(path, tmp_path / "b")
    (tmp_path / "c").write_bytes(bytes(10))
    os.rename(tmp_path / "c", path)
    found = MappedFile.behind(scale)  # the kernel follows the rename; the name it gives means the same file
    assert found is None or found.path == str(tmp_path / "b")
    assert MappedFile._open(str(path), os.stat(tmp_path / "b").st_ino) is None  # as in a container's own root
    (tmp_path / "b").unlink()
    assert MappedFile.behind(scale) is None


def test_watching_leaks_no_open_file(tmp_path):
    parts = by_safetensors(tmp_path / "table", *tables.random_parts(ROWS, 64, "e4m3_ue8m0"))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for round in range(50):
        table = EngramTable.from_tensors(*parts, placement="staged")
        if round % 2:
            table.close()
        del table
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def on_disk(path):
    """The open file, of which the page cache has nothing; skipped where it keeps all, as of a file system in memory."""
    file = open(path, "rb")
    os.fsync(file)
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(file):
        pytest.skip("the page cache does not give this file's pages back")
    return file


def pages_in_memory(file):
    """Numbers of the file's pages that the page cache has, which asking does not change."""
    nbytes = os.fstat(file.fileno()).st_size
    with mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY) as mapping:
        first, found = (ctypes.c_char * nbytes).from_buffer(mapping), (ctypes.c_uint8 * -(-nbytes // PAGE))()
        assert ctypes.CDLL(None).mincore(first, ctypes.c_size_t(nbytes), found) == 0
        del first
    return {page for page, flags in enumerate(found) if flags & 1}


@pytest.mark.parametrize("refused", [False, True])
def test_pages_of_rows_are_asked_for_ahead(tmp_path, monkeypatch, refused):
    """Exactly those of the rows, whether the kernel takes many at once or refuses to."""
    if refused:
        monkeypatch.setattr(pages, "_PROCESS_MADVISE", 1_000_000)
    monkeypatch.setattr(pages, "_AT_ONCE", 2)
    path = tables.cpu_table(ROWS, 80, "float32").save_safetensors(tmp_path / "table.safetensors")
    with EngramTable.from_safetensors(path, placement="cpu", mapped=True) as table, on_disk(path) as file:
        offset = os.fstat(file.fileno()).st_size - table.nbytes
        ids = np.array([-1, 3999, 700, 12, 13, 700, 2000, ROWS])
        edges = [offset + row * 320 + at for row in (3999, 700, 12, 13, 2000) for at in (0, 319)]
        wanted = {edge // PAGE for edge in edges}
        assert len(wanted) > 4  # some rows cross the border of two pages
        table.prefetch(torch.from_numpy(ids))
        waited = time.monotonic() + 60
        while not wanted <= pages_in_memory(file):
            assert time.monotonic() < waited
        assert pages_in_memory(file) == wanted


def test_lookups_ask_ahead_for_what_is_not_in_memory(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(mapped_files, "advise_ranges", lambda ranges, advice: asked.append(ranges // PAGE))
    plan = small_plan()
    loaded = [tables.cpu_table(rows, 96, "e4m3_ue8m0", seed) for seed, rows in enumerate(plan.rows_per_layer)]
    paths = [each.save_safetensors(tmp_path / f"{layer}.safetensors") for layer, each in enumerate(loaded)]
    mapped = [EngramTable.from_safetensors(path, placement="cpu", mapped=True) for path in paths]
    token_ids, *_ = ragged(plan.vocab_size)
    row_ids = ngram_hash(token_ids, plan)
    files = [on_disk(path) for path in paths]
    found = hash_lookup(token_ids, plan, mapped)
    assert len(asked) >= len(mapped)  # of rows, and of scales that share no page with them
    assert torch.equal(found.view(torch.int16), hash_lookup(token_ids, plan, loaded).view(torch.int16))
    asked.clear()
    hash_lookup(token_ids, plan, mapped)
    lookup(mapped[0], row_ids[:, 0])
    assert not asked  # all in memory now
    for each in (*files, *mapped):
        each.close()
    files = [on_disk(path) for path in paths]
    with EngramTable.from_safetensors(paths[1], placement="cpu", mapped=True) as table:
        files.append(on_disk(paths[1]))  # without what its header was read with
        asked.clear()
        lookup(table, row_ids[:, 1])
    assert asked
    for file in files:
        file.close()
