"""Qwen's per-layer embedding (PLE) in transformers: ``Qwen4ExpTextPLELayer`` of ``models/qwen4_exp``.

    rows  = hash_lookup(ids, history)                   [B, S, C * R]
    out   = gate * value + silu(conv(rms(gate * value) * (1 + norm_conv)))         [B, S, H * D], to be added

Between calls the layer keeps two tensors in the model's own cache, where transformers keeps them, oldest token first:

    conv state 2    int64 [B, N - 1]      the last ids; EOS before the first
    conv state 1    [B, D + X, span]      of the last span = (K - 1) N tokens: the value, then the scale of each branch

in hidden's dtype. X is H where that is float32 or float64; elsewhere a scale is float32 all the same, and two elements
are its bits. transformers' own layer has ``[B, H * D, span]`` there, and what cuts, reorders or copies a cache does so
to both.
"""

import sys

import torch
from torch import nn

from engram_kernels.geometry.plan import HashPlan
from engram_kernels.ops.gate_conv import gate_conv_residual
from engram_kernels.ops.gate_kernels.arguments import MAX_BRANCHES

from .drop_in import DropIn, as_token_ids, own_class

_MODULE = "transformers.models.qwen4_exp.modeling_qwen4_exp"
_LAYER, _HASH, _NORM = "Qwen4ExpTextPLELayer", "Qwen4ExpTextNGramEmbedding", "Qwen4ExpTextRMSNorm"
_PARTS = ("ple_embedding", "key_proj", "value_proj", "norm_key", "norm_query", "norm_conv", "conv1d")
_CONV_STATE, _IDS_STATE = 1, 2  # transformers' numbers; 0 is the linear attention's


class QwenEngram(DropIn):
    """In the place of a ``Qwen4ExpTextPLELayer``: the same call, and what it returns is added to hidden."""

    looked_for = f"{_LAYER} of {_MODULE}"
    embedding = "ple_embedding.ngram_embedding"
    layer_number = "layer_idx"
    called = ("key_proj", "value_proj")

    @classmethod
    def resembles(cls, module: nn.Module) -> bool:
        theirs = _theirs(_LAYER)
        if theirs is not None and isinstance(module, theirs):
            return True
        return sum(hasattr(module, part) for part in _PARTS) > len(_PARTS) // 2

    @classmethod
    def check(cls, name: str, module: nn.Module) -> None:
        kinds = dict(ple_embedding=_HASH, norm_key=_NORM, norm_query=_NORM, norm_conv=_NORM)
        for path, kind in {"": _LAYER, **kinds}.items():
            part = getattr(module, path, None) if path else module
            theirs = _theirs(kind)
            if theirs is None or not own_class(part, theirs):
                where = f"{name}.{path}" if path else name
                got = f"{type(part).__module__}.{type(part).__qualname__}"
                raise ValueError(f"{where} must be a {_MODULE}.{kind} with the methods of that class, got {got}")
        hashing, conv = module.ple_embedding, module.conv1d
        branches, hidden_size = module.hc_count, module.hidden_size
        channels, dilation = branches * hidden_size, hashing.ngram_size
        if not own_class(conv, nn.Conv1d):
            raise ValueError(f"{name}.conv1d must be an nn.Conv1d, got {type(conv).__name__}")
        taps = module.short_conv_state_len // dilation + 1
        norms = [getattr(module, f"norm_{which}") for which in ("key", "query", "conv")]
        checks = (
            ("hc_count", branches, min(branches, MAX_BRANCHES)),
            ("conv1d.weight.shape", tuple(conv.weight.shape), (channels, 1, taps)),
            ("conv1d.dilation", tuple(conv.dilation), (dilation,)),
            ("conv1d.padding", tuple(conv.padding), (0,)),
            ("conv1d.stride", tuple(conv.stride), (1,)),
            ("conv1d.bias", None if conv.bias is None else "one", None),
            ("norm_key.eps", module.norm_key.eps, module.norm_query.eps),
            ("norm_*.group_size", {norm.group_size for norm in norms}, {hidden_size}),
            ("norm_*.weight.shape", {tuple(norm.weight.shape) for norm in norms}, {(channels,)}),
            ("ple_embedding.layer_idx", hashing.layer_idx, module.layer_idx),
        )
        for attribute, got, expected in checks:
            if got != expected:
                raise ValueError(f"{name}.{attribute} must be {expected}, got {got}")
        if not hashing.layer_multipliers.is_meta:
            rows, got = _plan_of(hashing, name).rows_per_layer[0], hashing.ngram_embedding.num_embeddings
            if got < rows:
                raise ValueError(f"{name}.{cls.embedding} must have at least {rows} rows, got {got}")

    def __init__(self, module: nn.Module, *arguments):
        super().__init__(module, *arguments)
        multipliers = self.ple_embedding.layer_multipliers
        if not multipliers.is_meta:
            # Made here where it can be: torch.compile does not follow how it is made.
            self._plan(multipliers.device)

    def _make_plan(self) -> HashPlan:
        return _plan_of(self.ple_embedding, f"replace_engram: layer {self.layer_idx}")

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        for name, buffer in self.ple_embedding.named_buffers(f"{prefix}ple_embedding"):
            if self._plans and name in state_dict and not torch.equal(state_dict[name].to(buffer), buffer):
                self._plans.clear()  # made again of what is being loaded

    def forward(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, cache=None, conv_mask=None) -> torch.Tensor:
        """``[B, S, H * D]`` from hidden_states of that shape, raw ids ``[B, S]`` and a mask that is 0 for padding."""
        shape = (self.hc_count, self.hidden_size)
        hidden = hidden_states.contiguous().unflatten(-1, shape)
        ids = as_token_ids(input_ids, hidden.device)
        rows = self._rows(ids, self._history(cache), self.value_proj, hidden)
        key = self.key_proj(rows).to(hidden.dtype).unflatten(-1, shape)
        value = self.value_proj(rows).to(hidden.dtype)
        mask = None if conv_mask is None else conv_mask.bool().expand(ids.shape).contiguous()
        out, entries = self._gated(hidden, key, value, mask, cache)
        if cache is not None:  # at the end: what raises before leaves the cache as it was
            self._store(cache, ids.long(), entries)
        return out.flatten(-2)

    def _gated(self, hidden, key, value, mask, cache) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The addend ``[B, S, H, D]``, and what a cache is to keep of these tokens, ``[B, D + X, up to S]``."""
        shape, span = hidden.shape[-2:], self.short_conv_state_len
        norms = [1.0 + norm.weight.float().view(shape) for norm in (self.norm_query, self.norm_key, self.norm_conv)]
        options = dict(dilation=self.ple_embedding.ngram_size, eps=self.norm_key.eps, conv_eps=self.norm_conv.eps)
        options |= dict(zero_gate="sign", residual=False)
        weight = self.conv1d.weight.view(*shape, -1)

        def gated(hidden, key, value, mask, state=None):
            return gate_conv_residual(hidden, key, value, *norms, weight, mask=mask, conv_state=state, **options)

        if cache is None or span == 0:
            return gated(hidden, key, value, mask), None
        past, length = self._conv_state(cache, hidden), hidden.shape[1]
        kept = length if cache.is_recording_past(self.layer_idx) else min(length, span)
        if past is None:
            out = gated(hidden, key, value, mask)
        else:
            out, state = gated(hidden, key, value, mask, past)
        if past is None or kept > span:
            state = _states(gated, (hidden, key, value, mask), kept, span)
        # The bits of a scale are elements of the cache's dtype, of which a half-precision one needs two.
        entries = torch.cat([state[0], state[1].contiguous().view(hidden.dtype)], -1)
        return out, entries[:, -kept:].detach().transpose(1, 2)

    def _history(self, cache) -> torch.Tensor | None:
        """The last N - 1 ids in the cache, None where there are none."""
        past = None if cache is None else cache.get_conv_state(self.layer_idx, state_idx=_IDS_STATE)
        return None if past is None else _last(past, self.ple_embedding.context_len, self.ple_embedding.eos_token_id)

    def _store(self, cache, ids: torch.Tensor, entries: torch.Tensor | None) -> None:
        size = self.ple_embedding.context_len
        if ids.shape[1] < size and not cache.has_previous_state(self.layer_idx, _IDS_STATE):
            ids = _last(ids, size, self.ple_embedding.eos_token_id)  # the cache itself would fill up with zeros
        cache.update_conv_state(ids, self.layer_idx, state_idx=_IDS_STATE, conv_kernel_size=size)
        if entries is not None:
            options = dict(state_idx=_CONV_STATE, conv_kernel_size=self.short_conv_state_len)
            cache.update_conv_state(entries, self.layer_idx, **options)

    def _conv_state(self, cache, hidden) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Value ``[B, span, D]`` and scale ``[B, span, H]`` of the tokens before, None where there are none."""
        state = cache.get_conv_state(self.layer_idx, state_idx=_CONV_STATE)
        if state is None:
            return None
        branches, width = hidden.shape[-2:]
        scale_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        channels = width + branches * (scale_dtype.itemsize // hidden.dtype.itemsize)
        if state.shape[1] != channels or state.dtype != hidden.dtype:
            raise ValueError(
                f"replace_engram: layer {self.layer_idx} finds {state.dtype} [B, {state.shape[1]}, span] in the cache, "
                f"and keeps {hidden.dtype} [B, {channels}, span]: a cache goes on with the modules that filled it"
            )
        state = _last(state, self.short_conv_state_len, 0).transpose(1, 2)
        value, scale = (part.contiguous() for part in state.tensor_split([width], -1))
        return value, scale.view(scale_dtype)


def _theirs(kind: str) -> type | None:
    """A class of transformers, without importing it: where nobody has, no model has modules of that class."""
    return getattr(sys.modules.get(_MODULE), kind, None)


def _plan_of(hashing: nn.Module, name: str) -> HashPlan:
    """From the tensors of a ``Qwen4ExpTextNGramEmbedding``, which checkpoints hold; name: of its layer, for errors."""
    eos, offsets = hashing.eos_token_id, hashing.ngram_heads_offsets.tolist()
    # Copies: a plan is made anew where the module's tensors change, and never changes by itself.
    parts = (tensor[None].clone() for tensor in (hashing.layer_multipliers, hashing.ngram_heads_vocab_sizes))
    plan = HashPlan.from_parts(*parts, pad=eos, eos=eos, vocab_size=hashing.unigram_vocab_size)
    if (expected := plan.offsets[0].tolist()) != offsets:
        raise ValueError(f"{name}.ple_embedding.ngram_heads_offsets must be {expected}, got {offsets}")
    return plan


def _last(state: torch.Tensor, size: int, fill) -> torch.Tensor:
    """The last ``size`` entries of the last dimension, ``fill`` ahead of them where there are fewer.

    A copy: the cache writes into its own memory, and a backward pass may read this later.
    """
    state = state[..., -size:]
    return torch.cat([state.new_full((*state.shape[:-1], size - state.shape[-1]), fill), state], -1)


@torch.no_grad()
def _states(gated, tensors, count: int, span: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and scale of the last ``count`` tokens of each sequence, ``[B, count, ...]``.

    The op returns those of a sequence's last ``span``. A token's own do not depend on its neighbours, so that pieces of
    ``span`` tokens, each a sequence, give all of them.
    """
    batch, padding = len(tensors[0]), -count % span
    pieces = (count + padding) // span

    def cut(tensor):
        ends = (0, 0) * (tensor.dim() - 2)
        tensor = nn.functional.pad(tensor[:, -count:], (*ends, 0, padding))
        return tensor.reshape(batch * pieces, span, *tensor.shape[2:])

    hidden, key, value, mask = (None if tensor is None else cut(tensor.detach()) for tensor in tensors)
    scale_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    empty = torch.zeros_like(value), value.new_zeros(*hidden.shape[:-1], dtype=scale_dtype)
    _, state = gated(hidden, key, value, mask, empty)
    return tuple(part.view(batch, pieces * span, -1)[:, :count] for part in state)
