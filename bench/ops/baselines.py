"""What the kernels are compared with: other ways to the same result, on the same machine and inputs.

    eager          the reference, op by op, on the same GPU
    compiled       torch.compile of the reference
    two_launches   ngram_hash, then a lookup for each layer
    embedding      F.embedding over the table's bytes, then dequantised; over a host table by a tensor that views it
    staged         lookup of a staged table over the same memory: threads gather into pinned slots, then a kernel
    cpu_gather     row ids to the CPU, a gather there into pinned memory, a copy back, then dequantised
    demo           as the demo published with the paper does it: the hash in numpy, ids copied, nn.Embedding

Each maker returns ``call(index)``, which computes the result for input set ``index``. A result is checked like the
op's own before its time counts.
"""

import numpy as np
import torch
from torch.nn import functional

from engram_kernels import EngramTable, HashPlan, lookup, ngram_hash
from engram_kernels.reference.ops.rows import dequantise, unpack_e2m1


def compiled(function, inputs):
    """``function(*inputs[index])`` under torch.compile, for fixed shapes.

    The reset keeps what was compiled before from counting towards dynamo's limit, beyond which it falls back to eager.
    """
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False)
    return lambda index: fast(*inputs[index])


def plain_lookup(table: EngramTable):
    """``rows(ids)`` in steps that torch.compile knows: it has no ue8m0, so powers of two come from the scale bytes."""
    weight, scale, fmt = table.weight.view(torch.uint8), table.scale, table.format

    def rows(ids):
        values = weight[ids.long()]
        values = unpack_e2m1(values) if fmt.packed > 1 else values.view(fmt.dtype)
        if fmt.group:
            scales = scale[ids.long()]
            powers = fmt.group_scale == "ue8m0"
            scales = torch.exp2(scales.float() - 127) if powers else scales.view(torch.float8_e4m3fn).float()
            values = (values.float().unflatten(-1, (-1, fmt.group)) * scales[..., None]).flatten(-2)
        if table.own_scale is not None:
            values = values.float() * table.own_scale
        return values.to(table.default_out_dtype)

    return rows


def two_launches(token_ids, plan: HashPlan, tables):
    """Hash and lookup as separate launches, row ids in memory between them."""
    shape = (*token_ids[0].shape, *plan.primes.shape)
    ids = torch.empty(shape, dtype=plan.index_dtype, device=token_ids[0].device)
    rows = torch.empty(
        (len(tables), *token_ids[0].shape, shape[-1], tables[0].width),
        dtype=tables[0].default_out_dtype,
        device=ids.device,
    )

    def call(index):
        ngram_hash(token_ids[index], plan, out=ids)
        for layer, table in enumerate(tables):
            lookup(table, ids[..., layer, :], out=rows[layer])
        return rows

    return call


def device_view(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on ``device`` over the memory of ``tensor`` ``[rows, ...]``, as int64 words where a row has whole ones.

    For registered host memory this is UVA: nothing is copied.
    """
    data = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    words = data.view(torch.int64) if data.shape[-1] * data.element_size() % 8 == 0 else data
    if device.type == "cpu" or words.device == device:
        return words

    class Memory:
        __cuda_array_interface__ = dict(
            shape=tuple(words.shape),
            typestr={torch.int64: "<i8", torch.uint8: "|u1"}[words.dtype],
            data=(words.data_ptr(), False),
            strides=None,
            version=2,
        )

    return torch.as_tensor(Memory(), device=device)


def embedding(table: EngramTable, row_ids):
    """F.embedding over the table's own bytes, wherever they are, and a dequantisation after it."""
    device = row_ids[0].device
    weight = device_view(table.weight, device)
    scale = device_view(table.scale, device) if table.format.group else None

    def call(index):
        rows = functional.embedding(row_ids[index], weight)
        scales = None if scale is None else functional.embedding(row_ids[index], scale)
        return _values(table, rows, scales)

    return call


def staged(table: EngramTable, row_ids):
    """What the package does for memory that the GPU cannot read, over the memory of a host table."""
    own = dict(own_scale=table.own_scale) if table.format.group else {}
    other = EngramTable.from_tensors(table.weight, table.scale, placement="staged", **own)
    out = torch.empty(*row_ids[0].shape, table.width, dtype=table.default_out_dtype, device=row_ids[0].device)
    return lambda index: lookup(other, row_ids[index], out=out)


def cpu_gather(table: EngramTable, row_ids):
    """What a table costs that the GPU cannot read: ids come to the CPU, rows go back."""
    device = row_ids[0].device
    pinned = device.type == "cuda"
    cpu = torch.device("cpu")
    weight = device_view(table.weight, cpu)
    scale = device_view(table.scale, cpu) if table.format.group else None
    flat = row_ids[0].numel()
    rows = torch.empty(flat, weight.shape[-1], dtype=weight.dtype, pin_memory=pinned)
    scales = None if scale is None else torch.empty(flat, scale.shape[-1], dtype=scale.dtype, pin_memory=pinned)

    def call(index):
        ids = row_ids[index].reshape(-1).cpu()  # waits for the copy out of ``rows`` before it, too
        torch.index_select(weight, 0, ids, out=rows)
        moved = rows.to(device, non_blocking=True).view(*row_ids[index].shape, -1)
        if scale is None:
            return _values(table, moved, None)
        torch.index_select(scale, 0, ids, out=scales)
        return _values(table, moved, scales.to(device, non_blocking=True).view(*row_ids[index].shape, -1))

    return call


def demo_hash(token_ids, plan: HashPlan):
    """Row ids ``[T, L, C]`` on the device: hashed in numpy on the CPU, then copied, as the paper's demo does."""
    hash_ids = numpy_hash(plan)
    device = token_ids[0].device
    on_cpu = [ids.cpu().numpy() for ids in token_ids]  # the demo's ids start on the CPU
    return lambda index: torch.from_numpy(hash_ids(on_cpu[index])).to(device)


def demo_rows(token_ids, plan: HashPlan, tables):
    """Numpy hash, id copy, then rows by F.embedding, which is what nn.Embedding calls, ``[L, T, C, R]``."""
    row_ids = demo_hash(token_ids, plan)
    weights = [device_view(table.weight, token_ids[0].device) for table in tables]
    scales = [device_view(table.scale, token_ids[0].device) if table.format.group else None for table in tables]

    def call(index):
        ids = row_ids(index)
        per_layer = []
        for layer, table in enumerate(tables):
            layer_ids = ids[:, layer]
            rows = functional.embedding(layer_ids, weights[layer])
            scale = None if scales[layer] is None else functional.embedding(layer_ids, scales[layer])
            per_layer.append(_values(table, rows, scale))
        return torch.stack(per_layer)

    return call


def numpy_hash(plan: HashPlan):
    """``hash(ids [T]) -> row ids int64 [T, L, C]`` of one sequence in numpy, head by head as the demo has it."""
    multipliers, primes, offsets = (part.cpu().numpy() for part in (plan.multipliers, plan.primes, plan.offsets))
    token_map = None if plan.token_map is None else plan.token_map.cpu().numpy().astype(np.int64)
    orders = plan.orders.cpu().numpy()

    def call(ids):
        ids = ids.astype(np.int64) if token_map is None else token_map[ids]
        shifted = [ids]
        for shift in range(1, plan.max_ngram):
            shifted.append(np.pad(ids, (shift, 0), constant_values=plan.pad)[: len(ids)])
        layers = []
        for layer in range(len(primes)):
            mixes = [shifted[0] * multipliers[layer, 0]]
            for shift in range(1, plan.max_ngram):
                mixes.append(np.bitwise_xor(mixes[-1], shifted[shift] * multipliers[layer, shift]))
            columns = [
                np.mod(mixes[order - 1], primes[layer, column]) + offsets[layer, column]
                for column, order in enumerate(orders)
            ]
            layers.append(np.stack(columns, axis=1))
        return np.stack(layers, axis=1)

    return call


def _values(table: EngramTable, words: torch.Tensor, scale_words: torch.Tensor | None) -> torch.Tensor:
    """Gathered words ``[..., bytes / 8]`` as the table's values in its default output type."""
    rows = words.view(table.format.dtype)
    scales = None if scale_words is None else scale_words.view(torch.uint8)
    return dequantise(rows, scales, table.format, table.own_scale).to(table.default_out_dtype)
