"""Tables loaded into and saved from memory that a GPU reads. Needs safetensors beside what the gpu lane needs."""

import pytest
import torch

from engram_kernels import EngramTable, lookup
from engram_kernels.testing import tables

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["bfloat16", "e4m3_ue8m0", "e4m3", "nvfp4", "mxfp4"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_checkpoint_through_the_gpu(device, tmp_path, name, placement):
    """Saved from the GPU's memory or the host's, loaded there again in chunks that end inside rows, and looked up."""
    pytest.importorskip("safetensors")
    weight, scale = tables.random_parts(300, 64, name)
    ids = torch.arange(-1, 301)
    expected = tables.rounded(tables.expected_values(weight, scale, ids), torch.bfloat16)
    with tables.place(weight, scale, device, placement) as table:
        path = table.save_safetensors(tmp_path, shard_bytes=5000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engram_kernels.checkpoints.reading.CHUNK", 1000)
        with EngramTable.from_safetensors(path, placement=placement) as table:
            values = lookup(table, ids.to(device), out_dtype=torch.bfloat16)
            assert tables.same_bits(values, expected, truncated=False)
            torch.cuda.synchronize()
