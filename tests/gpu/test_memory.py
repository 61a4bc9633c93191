"""Host memory as only a GPU shows it: registration, reads across chunks, staging streams, other processes, forks."""

import pytest
import torch

from engram_kernels import EngramTable, hash_lookup, lookup
from engram_kernels.tables.memory.host import HostMapping, RuntimeDriver
from engram_kernels.tables.staging import stage
from engram_kernels.testing import tables
from tests.ops.test_hash_rows import parts_of
from tests.ops.test_hashing import small_plan
from tests.ops.test_registration import same
from tests.support.gpu.room import GIB, need_host_memory
from tests.support.processes.forks import in_a_fork
from tests.support.processes.peers import Peer

from .test_prefetch import LONG

pytestmark = pytest.mark.gpu


def test_a_host_table_is_registered_and_says_so(device):
    with EngramTable.empty(1 << 20, 256, "e4m3_ue8m0", placement="host") as table:
        report = table.memory_report()
        assert report.chunks == 1 and report.resident is not None and report.huge is not None
        assert report.resident >= report.bytes
        assert report.huge >= 0.9 * report.resident or any("huge pages" in text for text in report.warnings)
        table.weight.view(torch.uint8)[-1] = 0x38
        table.scale[-1] = 127
        ids = torch.tensor([(1 << 20) - 1], device=device)
        assert lookup(table, ids, out_dtype=torch.float32).eq(1).all()
        torch.cuda.synchronize()


def test_a_refusal_names_the_error_and_leaves_none_behind(device):
    """Registering a range twice: the runtime's own name, and no later launch stumbles over it."""
    mapping = HostMapping(4 << 20, RuntimeDriver())
    error = RuntimeDriver().register(mapping.bytes.data_ptr(), 4 << 20)
    assert error is not None and "ErrorHostMemoryAlreadyRegistered (712)" in error
    assert torch.arange(5, device=device).sum().item() == 10
    mapping.close()


def test_rows_across_chunks(device):
    """The last row of the first 64 GiB and the first one behind it, which are two registrations."""
    rows = (65 * GIB) // 256
    need_host_memory(70 * GIB)
    with EngramTable.empty(rows, 256, "e4m3", placement="host") as table:
        assert table.memory_report().chunks == 2
        picked = torch.tensor([0, 64 * GIB // 256 - 1, 64 * GIB // 256, rows - 1])
        for place, row in enumerate(picked.tolist()):
            table.weight.view(torch.uint8)[row] = 0x30 + 8 * place
        values = torch.as_tensor(lookup(table, picked.to(device), out_dtype=torch.float32))
        assert values[:, 0].tolist() == [0.5, 1.0, 2.0, 4.0] and torch.equal(values, values[:, :1].expand(-1, 256))
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["e4m3_ue8m0", "bfloat16", "nvfp4"])
def test_staged_rows_of_full_slots(device, name):
    """More rows than all slots hold, from the default ring: the bits of a registered table, again and again."""
    weight, scale = tables.random_parts(50_000, 256, name)
    ids = torch.randint(-10, 50_010, (5000, 24), device=device)
    with tables.place(weight, scale, device, "host") as host, tables.place(weight, scale, device, "staged") as staged:
        for out_format in ("values", "storage"):
            expected = lookup(host, ids, out_format=out_format)
            for _ in range(3):
                assert same(lookup(staged, ids, out_format=out_format), expected)
        torch.cuda.synchronize()


def test_staged_rows_on_two_streams(device):
    """Each stream's rows are its own, whatever the other has in the ring and the allocator gives out again."""
    weight, scale = tables.random_parts(50_000, 256, "e4m3_ue8m0")
    table = tables.place(weight, scale, device, "staged")
    ids = [torch.randint(0, 50_000, (3000, 24), device=device) for _ in range(2)]
    expected = [lookup(table, x) for x in ids]
    torch.cuda.synchronize()
    streams, kept = [torch.cuda.Stream() for _ in ids], [[], []]
    for _ in range(5):
        for stream, x, results in zip(streams, ids, kept, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                results.append(lookup(table, x))
    torch.cuda.synchronize()
    assert all(same(rows, wanted) for wanted, results in zip(expected, kept, strict=True) for rows in results)
    table.close()


def test_a_staged_block_waits_for_the_last_use_of_its_memory(device):
    """Memory that is freed while its stream still reads it, and given out as the block that copies write to."""
    weight, scale = tables.random_parts(500, 256, "bfloat16")
    ids = torch.arange(500)
    on_device = ids.to(device)
    with tables.place(weight, scale, device, "staged") as table:

        def staged_rows():
            local, view = stage(table, on_device, "test", ids)
            return local.untyped_storage()

        first = staged_rows()  # the ring and its slots
        torch.cuda.synchronize()
        before = torch.full((first.nbytes(),), 7, dtype=torch.uint8, device=device)
        torch.cuda._sleep(LONG)
        late, address = before.clone(), before.data_ptr()
        del before
        block = staged_rows()
        assert block.data_ptr() == address, "the allocator gave other memory: this shows nothing"
        assert late.eq(7).all()


def test_staged_tables_refuse_graphs(device):
    plan = small_plan().to(device)
    placed = [tables.place(*part, device, "staged") for part in parts_of(plan, 64, "bfloat16")]
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    hash_lookup(ids, plan, placed)
    for call in (lambda: hash_lookup(ids, plan, placed), lambda: lookup(placed[0], ids)):
        with pytest.raises(ValueError, match="placement 'staged' reads row ids on the CPU, which no CUDA graph"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                call()
        with pytest.raises(Exception, match="placement 'staged' reads row ids on the CPU"):
            torch.compile(call, fullgraph=True)()
    assert hash_lookup(ids, plan, placed).isfinite().all()


@pytest.mark.parametrize("scales", [None, "device"])
def test_another_process_reads_a_shared_table(device, scales):
    """Registered by both; rows by its GPU reads equal ours, also after we have gone."""
    name = f"gpu-test-{scales}"
    weight, scale = tables.random_parts(3000, 64, "e4m3_ue8m0")
    ids = torch.arange(-1, 3001, 7)
    table = EngramTable.from_tensors(weight, scale, placement="shared", name=name, scales=scales)
    assert table.memory_report().chunks == 1
    values = lookup(table, ids.to(device), out_dtype=torch.float32)
    assert tables.same_bits(
        values, tables.rounded(tables.expected_values(weight, scale, ids), torch.float32), truncated=False
    )
    peer = Peer().wait_ready()
    try:
        peer.run(f"t = EngramTable.attach({name!r}, 3000, 64, 'e4m3_ue8m0', scales={scales!r}, timeout=1800)")
        torch.cuda.synchronize()
        table.close()
        code = f"from engram_kernels import lookup; ids = torch.tensor({ids.tolist()}, device='cuda'); "
        code += "result = lookup(t, ids, out_dtype=torch.float32).nan_to_num(7.5).cpu().view(torch.int32).tolist()"
        assert peer.run(code) == values.nan_to_num(7.5).cpu().view(torch.int32).tolist()
    finally:
        peer.end()


def test_a_fork_after_registration(device):
    """The child is refused a table that it does not have; the parent's stays what it was."""
    weight, scale = tables.random_parts(3000, 64, "e4m3_ue8m0")
    with tables.place(weight, scale, device, "host") as table:
        ids = torch.arange(100)
        before = lookup(table, ids.to(device))

        def child():
            try:
                return lookup(table, ids).shape
            except ValueError as error:
                return str(error)

        assert "registered host memory is left out of forks" in in_a_fork(child)
        table.weight.view(torch.uint8)[0] = 0x38  # seen by the GPU: the page is still the one it holds
        table.scale[0] = 127
        after = lookup(table, ids.to(device))
        assert after[0].eq(1).all() and same(after[1:], before[1:])
        torch.cuda.synchronize()
