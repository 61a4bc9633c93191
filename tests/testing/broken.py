"""Implementations that are wrong in one way each, as kernels are: the suite has to find every one of them."""

import dataclasses

import torch

from engram_kernels import reference
from engram_kernels.reference.ops.rows import unpack_e2m1


class Lookup:
    """Of op lookup. Results are changed after the reference, or ids before it."""

    def clamps_ids(table, row_ids):
        return reference.lookup(table, row_ids.clamp(0, table.rows - 1))

    def counts_missing_rows_from_the_end(table, row_ids):
        return reference.lookup(
            table, torch.where((row_ids < 0) & (row_ids >= -table.rows), row_ids + table.rows, row_ids)
        )

    def has_no_last_row(table, row_ids):
        return reference.lookup(table, row_ids.masked_fill(row_ids == table.rows - 1, -1))

    def takes_ids_as_int32(table, row_ids):
        return reference.lookup(table, row_ids.int())

    def ignores_strides(table, row_ids):
        dense = torch.empty(row_ids.shape).stride()
        return reference.lookup(table, row_ids.as_strided(row_ids.shape, dense))

    def swaps_halves_of_a_byte(table, row_ids):
        rows = reference.lookup(table, row_ids)
        return rows.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if table.format.packed == 2 else rows

    def shifts_scales_by_a_group(table, row_ids, *, out_dtype=None):
        if not table.format.group:
            return reference.lookup(table, row_ids, out_dtype=out_dtype)
        return reference.lookup(_Rows(table, scale=table.scale.roll(1, -1)), row_ids, out_dtype=out_dtype)

    def drops_nan(table, row_ids):
        rows = reference.lookup(table, row_ids)
        return torch.where(rows.isnan(), torch.zeros_like(rows), rows)

    def drops_the_sign_of_zero(table, row_ids):
        return reference.lookup(table, row_ids) + 0.0

    def flushes_subnormals(table, row_ids, *, out_dtype=None):
        rows = reference.lookup(table, row_ids, out_dtype=out_dtype)
        return rows.masked_fill(rows.abs().float() < torch.finfo(torch.float32).smallest_normal, 0)

    def multiplies_missing_rows_by_the_scale(table, row_ids):
        inside = (row_ids >= 0) & (row_ids < table.rows)
        rows = reference.lookup(table, row_ids)
        return rows.masked_fill(~inside[..., None], torch.nan) if table.format.name == "e4m3" else rows

    def rounds_twice(table, row_ids, *, out_dtype=None):
        return reference.lookup(table, row_ids, out_dtype=torch.bfloat16).to(out_dtype or table.default_out_dtype)

    def returns_another_dtype(table, row_ids):
        return reference.lookup(table, row_ids).float()

    def leaves_out_alone(table, row_ids, *, out=None):
        return reference.lookup(table, row_ids) if out is None else out

    def returns_its_own_out(table, row_ids, *, out=None):
        return reference.lookup(table, row_ids)

    def writes_to_its_ids(table, row_ids):
        rows = reference.lookup(table, row_ids)
        row_ids.clamp_(0, table.rows - 1)
        return rows

    def decodes_storage(table, row_ids, *, out_format="values"):
        rows = reference.lookup(table, row_ids, out_format=out_format)
        if out_format == "values" or table.format.packed == 1:
            return rows
        return unpack_e2m1(rows[0]), rows[1]


class _Rows:
    """A table with other tensors."""

    def __init__(self, table, **changed):
        self._table = table
        self.__dict__.update(changed)

    def __getattr__(self, name):
        return getattr(self._table, name)


class NgramHash:
    """Of op ngram_hash."""

    def is_off_by_one(token_ids, plan):
        return reference.ngram_hash(token_ids, plan) + 1

    def omits_offsets(token_ids, plan):
        return reference.ngram_hash(token_ids, dataclasses.replace(plan, offsets=torch.zeros_like(plan.offsets)))

    def truncates_remainders(token_ids, plan):
        rows = reference.ngram_hash(token_ids, plan)
        mixes, _ = reference.ops.hashing.ngram_mixes(token_ids, plan, None, None, None)
        mixes = mixes[..., plan.orders.long() - 1].view(rows.shape)
        return torch.where(rows < 0, rows, torch.fmod(mixes, plan.primes) + plan.offsets).to(rows.dtype)

    def divides_in_float64(token_ids, plan):
        rows = reference.ngram_hash(token_ids, plan)
        mixes, _ = reference.ops.hashing.ngram_mixes(token_ids, plan, None, None, None)
        mixes = mixes[..., plan.orders.long() - 1].view(rows.shape).double()
        return torch.where(rows < 0, rows, torch.remainder(mixes, plan.primes) + plan.offsets).to(rows.dtype)

    def takes_ids_as_int32(token_ids, plan):
        return reference.ngram_hash(token_ids.int(), plan)

    def clamps_ids(token_ids, plan):
        most = 2**63 - 1 if plan.vocab_size is None else plan.vocab_size - 1
        return reference.ngram_hash(token_ids.clamp(0, most), plan)

    def reads_past_an_eos(token_ids, plan):
        return reference.ngram_hash(token_ids, dataclasses.replace(plan, eos=None))

    def pads_with_zero(token_ids, plan):
        return reference.ngram_hash(token_ids, dataclasses.replace(plan, pad=0))

    def reads_over_rows_of_a_batch(token_ids, plan):
        return reference.ngram_hash(token_ids.flatten(), plan).view(*token_ids.shape, *plan.primes.shape)

    def returns_int64(token_ids, plan):
        return reference.ngram_hash(token_ids, plan).long()

    def ignores_dead_tokens(token_ids, plan, *, cu_seqlens=None, history=None, dead=None):
        return reference.ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens, history=history)

    def reverses_history(token_ids, plan, *, cu_seqlens=None, history=None, dead=None):
        history = None if history is None else history.flip(1)
        return reference.ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens, history=history, dead=dead)

    def hashes_padding(token_ids, plan, *, cu_seqlens=None):
        if cu_seqlens is not None:
            cu_seqlens = torch.cat([cu_seqlens[:-1], cu_seqlens.new_tensor([len(token_ids)])])
        return reference.ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens)

    def takes_slots_in_order(token_ids, plan, *, cu_seqlens=None, history=None, slots=None):
        history = history if slots is None else history[: len(slots)]
        return reference.ngram_hash(token_ids, plan, cu_seqlens=cu_seqlens, history=history)


class HashLookup:
    """Of op hash_lookup."""

    def reads_the_first_table_alone(token_ids, plan, tables):
        return reference.hash_lookup(token_ids, plan, [tables[0]] * len(tables))

    def puts_layers_behind_tokens(token_ids, plan, tables):
        return reference.hash_lookup(token_ids, plan, tables).transpose(0, 1)

    def ignores_sequences(token_ids, plan, tables, *, cu_seqlens=None, history=None, dead=None):
        return reference.hash_lookup(token_ids, plan, tables)


class GateResidual:
    """Of op gate_residual."""

    def adds_hidden_twice(*tensors, eps):
        return reference.gate_residual(*tensors, eps=eps) + tensors[0]

    def omits_hidden(*tensors, eps, residual=True):
        return reference.gate_residual(*tensors, eps=eps, residual=False)

    def has_no_sign_at_zero(*tensors, eps):
        return reference.gate_residual(*tensors, eps=eps, zero_gate="sign")

    def has_a_sign_at_zero(*tensors, eps, zero_gate="copysign"):
        return reference.gate_residual(*tensors, eps=eps)

    def ignores_the_sign(hidden, key, value, *norms, eps):
        d = reference.gate_residual(hidden, key, torch.ones_like(value), *norms, eps=eps, residual=False).double()
        return (hidden + torch.maximum(d, 1 - d) * value[..., None, :]).to(hidden.dtype)

    def omits_eps(*tensors, eps):
        return reference.gate_residual(*tensors, eps=1e-30)

    def takes_eps_none_for_zero(*tensors, eps):
        return reference.gate_residual(*tensors, eps=eps or 0.0)

    def ignores_the_clamp(*tensors, eps, clamp=1e-6):
        return reference.gate_residual(*tensors, eps=eps)

    def reads_one_branch(hidden, key, *rest, eps):
        return reference.gate_residual(hidden, key[..., :1, :].expand_as(key), *rest, eps=eps)

    def computes_in_bfloat16(*tensors, eps):
        low = [x.bfloat16() for x in tensors]
        return reference.gate_residual(*low, eps=eps).to(tensors[0].dtype)

    def drops_nan(hidden, key, *rest, eps):
        return reference.gate_residual(hidden.nan_to_num(), key.nan_to_num(), *rest, eps=eps)

    def multiplies_by_the_mask(hidden, key, value, *norms, eps, mask=None):
        live = torch.ones(value.shape[:-1], dtype=torch.bool) if mask is None else mask
        return reference.gate_residual(hidden, key, value * live[..., None], *norms, eps=eps)

    def gates_masked_tokens_of_clean_values(hidden, key, value, *norms, eps, mask=None):
        value = value if mask is None else value.where(mask[..., None], 0)
        return reference.gate_residual(hidden, key.nan_to_num(), value, *norms, eps=eps)

    def writes_to_hidden(*tensors, eps):
        return reference.gate_residual(*tensors, eps=eps, out=tensors[0])


class GateConvResidual:
    """Of op gate_conv_residual."""

    def reverses_taps(*tensors, **options):
        return reference.gate_conv_residual(*tensors[:-1], tensors[-1].flip(-1), **options)

    def dilates_by_one_less(*tensors, dilation, eps, conv_eps):
        return reference.gate_conv_residual(*tensors, dilation=max(1, dilation - 1), eps=eps, conv_eps=conv_eps)

    def has_no_activation(*tensors, dilation, eps, conv_eps, residual=True):
        options = dict(dilation=dilation, eps=eps, conv_eps=conv_eps)
        conv = reference.gate_conv_residual(*tensors, **options)
        return conv + 0.01 * (conv - reference.gate_residual(*tensors[:5], eps=eps))

    def reads_over_sequences(*tensors, dilation, eps, conv_eps, cu_seqlens=None):
        return reference.gate_conv_residual(*tensors, dilation=dilation, eps=eps, conv_eps=conv_eps)

    def forgets_the_state(*tensors, conv_state=None, **options):
        zeros = None if conv_state is None else tuple(torch.zeros_like(part) for part in conv_state)
        return reference.gate_conv_residual(*tensors, conv_state=zeros, **options)

    def keeps_the_old_state(*tensors, conv_state=None, **options):
        found = reference.gate_conv_residual(*tensors, conv_state=conv_state, **options)
        return found if conv_state is None else (found[0], conv_state)

    def convolves_nothing_around_masked_tokens(*tensors, mask=None, **options):
        hidden, key, value, *rest = tensors
        if mask is not None:
            key, value = key.where(mask[..., None, None], 1), value.where(mask[..., None], 0)
        found = reference.gate_conv_residual(hidden, key, value, *rest, **options)
        return found if mask is None else found.where(mask[..., None, None], hidden)


BROKEN = {
    "lookup": Lookup,
    "ngram_hash": NgramHash,
    "hash_lookup": HashLookup,
    "gate_residual": GateResidual,
    "gate_conv_residual": GateConvResidual,
}
