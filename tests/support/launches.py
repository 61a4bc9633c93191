"""One launch each, of arguments in a row: what launchers prepare for a signature, prepared and launched at once."""

from engram_kernels.cache import lookup as cached
from engram_kernels.launching.launch import Kept
from engram_kernels.launching.tokens import Tokens
from engram_kernels.ops import gate, gate_conv, hash_rows, hashing, rows
from engram_kernels.ops.conv_kernels import backward as conv_backward
from engram_kernels.ops.conv_kernels.arguments import ConvCall
from engram_kernels.ops.conv_kernels.scale import prepare_gate_scale
from engram_kernels.ops.gate_conv import prepare_gate_conv_residual
from engram_kernels.ops.gate_kernels import backward as gate_backward
from engram_kernels.ops.gate_kernels.arguments import GateCall
from engram_kernels.ops.gate_kernels.residual import prepare_gate_residual
from engram_kernels.ops.hash_kernels.row_ids import prepare_ngram_hash
from engram_kernels.ops.row_kernels.by_id import prepare_lookup
from engram_kernels.ops.row_kernels.hashed import prepare_hash_lookup
from engram_kernels.ops.row_kernels.output import Reading
from engram_kernels.serving.inputs import prepare_copy


def forget_launches():
    """Drop the launches that ops keep, as in a process that has launched nothing."""
    for op in (hashing.HASH, rows.LOOKUP, hash_rows.HASH_LOOKUP, gate.GATE, gate_conv.GATE_CONV):
        op.forget()
    Kept.forget()


def launch_ngram_hash(token_ids, plan, cu_seqlens, history, dead, out, key_stride=None, slots=None):
    tokens = Tokens(token_ids, cu_seqlens, history, dead, slots)
    prepare_ngram_hash(tokens, plan, key_stride)(tokens, out)


def launch_copy_tokens(sources, copies):
    prepare_copy(sources, copies)(*sources)


def launch_lookup(row_ids, view, out, storage, programs, order="direct"):
    prepare_lookup(row_ids, view, Reading(storage, programs, order))(row_ids, out)


def launch_hash_lookup(
    token_ids, plan, view, cu_seqlens, history, dead, out, storage, programs, order="direct", slots=None
):
    tokens = Tokens(token_ids, cu_seqlens, history, dead, slots)
    prepare_hash_lookup(tokens, plan, view, Reading(storage, programs, order))(tokens, out)


def launch_cached_lookup(cache, view, storage, programs, order, token_ids, cu_seqlens, history, dead, out, slots=None):
    tokens = Tokens(token_ids, cu_seqlens, history, dead, slots)
    cached.launch_cached_lookup(cache, tokens, view, Reading(storage, programs, order), out)


def launch_gate_residual(
    hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual, out, scalars=None
):
    call = GateCall(hidden, key, value, query_norm, key_norm, eps, clamp, mask, zero_gate, residual)
    prepare_gate_residual(call, out)(call, out, scalars)


def launch_gate_conv_residual(*arguments, recorded=None, ring=None):
    """Fields of a ConvCall, a dense state (value, scale), the output, and the new state; ring: slots in their place."""
    *fields, value, scale, out, new_value, new_scale = arguments
    call = ConvCall(*fields, ring if value is None else (value, scale))
    prepare_gate_conv_residual(call, out)(call, out, (new_value, new_scale), recorded)


def launch_gate_scale(hidden, key, value, query_norm, key_norm, eps, conv_eps, clamp, mask, zero_gate, gate, scale):
    norms = (query_norm, key_norm, None, None)
    call = ConvCall(hidden, key, value, *norms, 1, eps, conv_eps, clamp, mask, zero_gate, True, None)
    prepare_gate_scale(call, 0)(call, gate, scale, None)


def launch_gate_backward(
    grad, hidden, key, value, query_norm, key_norm, scalars, clamp, mask, zero_gate, residual, needs, gradients
):
    call = GateCall(hidden, key, value, query_norm, key_norm, None, clamp, mask, zero_gate, residual)
    gate_backward.launch_gate_backward(grad, call, scalars, needs, gradients)


def launch_gate_conv_backward(grad, *arguments):
    """Seven tensors; gate, scale and scalars; dilation and all after it but eps; then needs and gradients."""
    *arguments, needs, gradients = arguments
    tensors, recorded, (dilation, *options) = arguments[:7], arguments[7:10], arguments[10:]
    call = ConvCall(*tensors, dilation, None, *options)
    conv_backward.launch_gate_conv_backward(grad, call, *recorded, needs, gradients)


def launch_layers(row_ids, tables, out, storage, programs):
    hash_rows.launch_layers(row_ids, tables, out, Reading(storage, programs))
