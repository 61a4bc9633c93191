"""The Engram module of one layer: rows, projection, gate and, where the config has one, the short convolution.

    rows  = hash_lookup(token_ids)                      [T, C, R]
    kv    = wkv(rows)                                   keys of all branches, then the value: [T, (H + 1) * D]
    out   = gate_residual | gate_conv_residual          [T, H, D]

State dict, for every config (bias and conv entries where it has them):

    wkv.weight   [(H + 1) * D, C * R]    wkv.bias  [(H + 1) * D]
    q_weight, k_weight, conv_norm  [H, D]          conv_weight  [H, D, K]

The table is not in it: :func:`save_training` saves both, :class:`EngramTable` its rows alone.
:meth:`Engram.load_checkpoint` reads checkpoints in which these tensors have other names.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from engram_kernels.checkpoints.files import Checkpoint, CheckpointTensors, Paths
from engram_kernels.checkpoints.names import as_prefix, module_prefix
from engram_kernels.checkpoints.parallel import Progress
from engram_kernels.checkpoints.weights import dense_tensor
from engram_kernels.geometry.choices import ConvState, Placement
from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import (
    AnyOf,
    Device,
    Dtype,
    Each,
    Flag,
    Instance,
    Optional,
    Path,
    Tensor,
    Text,
    Whole,
    check_all,
    declares,
    takes,
)
from engram_kernels.geometry.plan import HashPlan, layer_plan
from engram_kernels.launching.checks import check_out, check_tensor
from engram_kernels.launching.tokens import check_batch
from engram_kernels.ops.gate import gate_residual
from engram_kernels.ops.gate_conv import gate_conv_residual
from engram_kernels.ops.gate_kernels.arguments import FLOAT_DTYPES
from engram_kernels.ops.gate_kernels.gradients import split_kv
from engram_kernels.ops.hash_rows import hash_lookup
from engram_kernels.ranks.sharded import ShardedTable
from engram_kernels.serving.state import EngramStep
from engram_kernels.tables.engram import EngramTable

from .arguments import (
    FORWARD_KINDS,
    PROJECT_KINDS,
    ROWS_KINDS,
    check_hidden,
    check_row_shape,
    check_rows_of_layer,
)
from .call import EngramCall
from .initial import NEW_KINDS, STD, fill_rows, fill_weights, new_rows
from .weights import layer_weights


class Engram(nn.Module):
    """Engram of one layer of a model; H branches, D hidden size, C columns of R elements.

    config, layer: the :class:`EngramConfig`, and the number of one of its layers.
    plan: the :class:`HashPlan` of all the config's layers, or of this one alone.
    table: this layer's rows, ``[rows_per_layer, R]`` in any format; of a :class:`ShardedTable` each rank looks up its
    own tokens, in forward passes that all ranks make. It is no parameter or buffer: in no state_dict, moved by no
    ``to()``. :func:`save_training` saves it.
    residual: False returns what is to be added to the hidden state instead of the sum, as the demo's module does.
    device, dtype: of the weights: ``wkv.weight [(H + 1) * D, C * R]``, ``q_weight``, ``k_weight [H, D]``, and for a
    convolution ``conv_norm [H, D]`` and ``conv_weight [H, D, K]``.

    ValueError where layer, plan, table and config do not fit each other, or token maps differ.
    """

    if TYPE_CHECKING:
        __call__: EngramCall

    @takes(
        config=Instance(EngramConfig),
        layer=Whole(0),
        plan=Instance(HashPlan),
        table=Instance(EngramTable, ShardedTable),
        residual=Flag(),
        device=Optional(Device()),
        dtype=Optional(Dtype(*FLOAT_DTYPES)),
    )
    def __init__(
        self,
        config: EngramConfig,
        layer: int,
        plan: HashPlan,
        table: EngramTable | ShardedTable,
        *,
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if layer not in config.layers:
            raise ValueError(f"Engram: layer must be one of the config's, {config.layers}, got {layer}")
        plan = layer_plan(plan, config, layer, "Engram")
        if table.width != config.row_width:
            raise ValueError(f"Engram: table must have rows of {config.row_width} elements, got {table.width}")
        check_rows_of_layer(config, layer, plan, table)
        table.token_map = plan.token_map_digest
        self.config, self.layer, self.table, self.residual = config, layer, table, residual
        self._plans = {plan.device: plan}
        branches, hidden_size, width = config.branches, config.hidden_size, config.columns * config.row_width
        options = dict(device=device, dtype=dtype)
        self.wkv = nn.Linear(width, (branches + 1) * hidden_size, bias=config.projection_bias, **options)
        self.q_weight = nn.Parameter(torch.ones(branches, hidden_size, **options))
        self.k_weight = nn.Parameter(torch.ones(branches, hidden_size, **options))
        if config.conv_kernel:
            self.conv_norm = nn.Parameter(torch.ones(branches, hidden_size, **options))
            self.conv_weight = nn.Parameter(torch.zeros(branches, hidden_size, config.conv_kernel, **options))

    @classmethod
    @takes(
        **NEW_KINDS,
        trainable=Flag(),
        residual=Flag(),
        dtype=Optional(Dtype(*FLOAT_DTYPES)),
    )
    def build(
        cls,
        config: EngramConfig,
        layer: int,
        tokenizer: Any = None,
        *,
        placement: Placement,
        name: str | None = None,
        init: float | Callable[["Engram"], object] = STD,
        seed: int = 0,
        trainable: bool = False,
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
    ) -> "Engram":
        """A new layer: its plan, its table in ``placement``, and the module over both, which a training begins with.

        config, layer: the model's :class:`EngramConfig`, and the number of one of its layers.
        tokenizer: that of the model, or the token map ``[V_raw]`` that :func:`build_token_map` gave; None for window
        "eos", which hashes raw ids.
        init: the standard deviation of rows and projection, which ``seed`` makes, the same for every placement; or a
        function that is called with the module and writes both. Convolutions begin at 0, norms at 1 (nn/initial.py).
        trainable: whether rows take gradients, for dense formats. residual: False leaves the hidden state out.
        name: of a table with placement "shared", which is published then. device, dtype: of the module's weights;
        device of the table too, with placement "device". progress: called with (bytes done, all) of rows.

        ValueError where the tokenizer does not fit the config, or the format cannot be trained; nothing is left then.
        """
        table, plan = new_rows(config, layer, tokenizer, placement, name, device, init)
        try:
            module = cls(config, layer, plan, table, residual=residual, device=device, dtype=dtype)
            if callable(init):
                init(module)
                table.rows_changed()
            else:
                fill_weights(module.wkv, init, seed)
                fill_rows(table, init, seed + layer, progress)
            if placement == "shared":
                table.publish()
            table.requires_row_grad_(trainable)
        except BaseException:
            table.close()
            raise
        return module

    @declares(**FORWARD_KINDS)
    def forward(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor | None = None,
        *,
        rows: torch.Tensor | None = None,
        kv: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        conv_state: ConvState | None = None,
        state: EngramStep | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ConvState]:
        """``[T, H, D]`` (``[B, S, H, D]``) from hidden of that shape; with conv_state (out, new state).

        hidden: bfloat16, float16 or float32 (float64 on the CPU), which the result has too.
        token_ids: ``[T]`` (``[B, S]``), with cu_seqlens, history, dead and slots as for :func:`ngram_hash`; or rows
        ``[T, C, R]`` (``[B, S, C, R]``) that were looked up before; or kv ``[T, (H + 1) * D]`` (``[B, S, ...]``) in
        hidden's dtype, which :meth:`project` or an engine's own projection made of them before.
        conv_state: (value, scale) before these tokens, as :meth:`new_conv_state` makes it; it is not written.
        state: a step of :class:`EngramState`, in place of all of them but rows or kv; the result is out alone.
        Padding tokens come back as hidden, and so do dead ones (in DeepSeek-V4.1 those of images), to which a
        convolution, where there is one, still adds what it makes of earlier tokens.
        Under torch.autocast the projection runs in autocast's dtype; its result is cast to hidden's, which out has too.
        ValueError unless there is one of token_ids, rows and kv, and hidden has their tokens; for a conv_state where
        the config has no convolution, and for anything that state stands for beside it.
        """
        given = hidden, token_ids, rows, kv, cu_seqlens, history, dead, slots, conv_state, state
        check_all("Engram.forward", FORWARD_KINDS, dict(zip(FORWARD_KINDS, given, strict=True)))
        if state is not None:
            others = dict(token_ids=token_ids, cu_seqlens=cu_seqlens, history=history, dead=dead, slots=slots)
            others |= dict(conv_state=conv_state)
            if given := [name for name, value in others.items() if value is not None]:
                raise ValueError(f"Engram.forward: state stands for {', '.join(given)} too, got both")
            options = dict(state.options, conv_state=state.conv_state(self.layer))
            token_ids = state.token_ids if rows is None and kv is None else None
            out = self.forward(hidden, token_ids, rows=rows, kv=kv, **options)
            return out if options["conv_state"] is None else out[0]
        sources = dict(token_ids=token_ids, rows=rows, kv=kv)
        if len(given := [name for name, source in sources.items() if source is not None]) != 1:
            got = " and ".join(given) or "none"
            raise ValueError(f"Engram.forward: expected one of token_ids, rows and kv, got {got}")
        if kv is None:
            if rows is None:
                rows = self.rows(token_ids, cu_seqlens=cu_seqlens, history=history, dead=dead, slots=slots)
            check_row_shape("Engram.forward", self.config, rows)
            check_hidden("Engram.forward", self.config, hidden, tuple(rows.shape[:-2]))
            kv = self.project(rows)
        else:
            width = (self.config.branches + 1) * self.config.hidden_size
            if kv.shape[-1:] != (width,):
                expected = f"[T, W] or [B, S, W], W = (H + 1) * D = {width}"
                raise ValueError(f"Engram.forward: kv must have shape {expected}, got {list(kv.shape)}")
            check_hidden("Engram.forward", self.config, hidden, tuple(kv.shape[:-1]))
            dtypes = FLOAT_DTYPES if torch.is_autocast_enabled(hidden.device.type) else (hidden.dtype,)
            check_tensor("Engram.forward", "kv", kv, dtypes=dtypes, device=hidden.device, contiguous=False)
        if torch.is_autocast_enabled(hidden.device.type):
            kv = kv.to(hidden.dtype)
        key, value = split_kv(kv, self.config.branches, self.config.hidden_size)
        inputs = (hidden, key, value, self.q_weight, self.k_weight)
        options = dict(eps=self.config.eps, zero_gate=self.config.zero_gate, residual=self.residual)
        options |= dict(mask=self._mask(hidden, cu_seqlens, dead))
        if not self.config.conv_kernel:
            if conv_state is not None:
                raise ValueError("Engram.forward: this config has no convolution and takes no conv_state")
            return gate_residual(*inputs, **options)
        return gate_conv_residual(
            *inputs,
            self.conv_norm,
            self.conv_weight,
            dilation=self.config.conv_dilation,
            conv_eps=self.config.conv_eps,
            cu_seqlens=cu_seqlens,
            conv_state=conv_state,
            **options,
        )

    @declares(**ROWS_KINDS)
    def rows(
        self,
        token_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        history: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows ``[T, C, R]`` (``[B, S, C, R]``) of token_ids, in the projection's dtype where kernels write it.

        token_ids: ``[T]`` or ``[B, S]``, int32 or int64. cu_seqlens, history, dead, slots: as for :func:`ngram_hash`,
        whose ValueErrors these are.
        """
        options = dict(cu_seqlens=cu_seqlens, history=history, dead=dead, slots=slots)
        check_all("Engram.rows", ROWS_KINDS, dict(token_ids=token_ids, **options))
        dtype = self.wkv.weight.dtype
        out_dtype = dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else None
        options |= dict(out_dtype=out_dtype)
        plan = self._plan(token_ids.device)
        if isinstance(self.table, ShardedTable):
            return self.table.hash_lookup(token_ids, plan, **options)
        return hash_lookup(token_ids, plan, (self.table,), **options)[0]

    @declares(**PROJECT_KINDS)
    def project(self, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """kv ``[T, (H + 1) * D]`` (``[B, S, (H + 1) * D]``) of rows ``[T, C, R]``: what forward() would project.

        out: where to put it, in the projection's dtype, without a gradient. A :class:`Prefetcher` takes this method as
        the layer's projection, and forward() its result as kv. ValueError where rows or out have another shape.
        """
        check_all("Engram.project", PROJECT_KINDS, dict(rows=rows, out=out))
        check_row_shape("Engram.project", self.config, rows)
        kv = self.wkv(rows.flatten(-2).to(self.wkv.weight.dtype))
        if out is None:
            return kv
        check_out("Engram.project", out, kv.shape, kv.dtype, kv.device)
        with torch.no_grad():
            return out.copy_(kv)

    def extra_repr(self) -> str:
        """Layer and table, in the module's repr."""
        return f"layer={self.layer}, table={self.table!r}"

    @takes(batch=Whole(0))
    def new_conv_state(self, batch: int) -> ConvState:
        """The state before the first token of ``batch`` sequences, on the module's device: zeros.

        (value ``[B, (K - 1) * N, D]`` in the weights' dtype, scale ``[B, (K - 1) * N, H]`` in float32, or float64 for
        float64 weights); both are empty where the config has no convolution.
        """
        span, weight = max(0, self.config.conv_kernel - 1) * self.config.conv_dilation, self.wkv.weight
        scale_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        value = weight.new_zeros(batch, span, self.config.hidden_size)
        return value, value.new_zeros(batch, span, self.config.branches, dtype=scale_dtype)

    @takes(tensors=AnyOf(Instance(Mapping), Path(), Each(Path(), least=1)), prefix=Text())
    def load_checkpoint(self, tensors: "Mapping[str, torch.Tensor] | Paths", prefix: str = "") -> None:
        """Copy the layer's weights from a checkpoint's tensors, whose names start with ``prefix``.

        tensors: a mapping from names, or files as :meth:`EngramTable.from_safetensors` takes them, where the layer's
        number tells the prefix.
        DeepSeek-V4.1 (prefix ``layers.{i}.engram.``): wkv.weight, q_weight, k_weight; and those of the state dict that
        the config has besides. Qwen (``...layers.{i}.ple.``): key_proj, value_proj, norm_query, norm_key, norm_conv,
        conv1d. Projections in e4m3 are multiplied by their scale (checkpoints/weights.py).
        ValueError names a tensor that is missing, has another shape, is of a dtype that is no weight's or is more than
        the config has, and refuses a module on the meta device; nothing is changed then.
        """
        where = "Engram.load_checkpoint"
        parameters = dict(self.named_parameters())
        if empty := [name for name, parameter in parameters.items() if parameter.is_meta]:
            raise ValueError(
                f"{where}: {', '.join(empty)} are on the meta device, which holds nothing; give the module memory "
                "first (engram.to_empty(device=...))"
            )
        prefix = as_prefix(prefix, where)
        if not isinstance(tensors, Mapping):
            with Checkpoint(tensors, where) as checkpoint:
                prefix = prefix or module_prefix(checkpoint, self.layer)
                return self.load_checkpoint(CheckpointTensors(checkpoint), prefix)
        loaded = layer_weights(where, tensors, prefix, self.config, parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(loaded[name])

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """As of torch, which would cast whatever it is given: quantised numbers are no weights."""
        for name, _ in self.named_parameters():
            given = state_dict.get(prefix + name)
            Optional(Tensor()).check("Engram.load_state_dict", prefix + name, given)
            if isinstance(given, torch.Tensor) and not given.is_meta:
                dense_tensor(state_dict, prefix + name, "Engram.load_state_dict")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _mask(self, hidden, cu_seqlens, dead) -> torch.Tensor | None:
        """A gate's mask: True unless a token is dead or padding, which the convolution finds itself. None: all True."""
        where, tokens, device = "Engram.forward", hidden.shape[:-2], hidden.device
        if len(tokens) not in (1, 2):
            return None  # the gate refuses such a hidden
        if dead is not None:
            check_tensor(where, "dead", dead, dtypes=(torch.bool,), shape=tokens, device=device)
        mask = None if dead is None else ~dead
        if cu_seqlens is not None and not self.config.conv_kernel:
            check_batch(where, tokens, cu_seqlens, device)
            inside = torch.arange(tokens[0], device=device) < cu_seqlens[-1]
            mask = inside if mask is None else mask & inside
        return mask

    def _plan(self, device: torch.device) -> HashPlan:
        if device not in self._plans:
            self._plans[device] = next(iter(self._plans.values())).to(device)
        return self._plans[device]
