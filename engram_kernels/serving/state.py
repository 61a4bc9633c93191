"""What Engram remembers between the steps of a serving engine, by sequence slot.

    begin     reads nothing       which tokens are of which slots
    forward   reads the slots     history, by the kernel that hashes, or that copies for a Prefetcher; the convolution's
                                  window, by the kernel that convolves; new tokens go behind it
    commit    moves the slots on  by the tokens accepted: all, some or none

Forward and commit are launched on the caller's stream, so each finds what the last commit before it wrote, and no
launch writes what another one of the same step may still read. docs/serving.md has the argument. T tokens, B sequences,
N longest n-gram, H branches, D hidden size.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch.compiler import is_compiling

from engram_kernels.geometry.config import EngramConfig
from engram_kernels.geometry.kinds import AnyOf, Device, Dtype, Instance, Optional, Tensor, Whole, declares, takes
from engram_kernels.launching.buffers import Buffers
from engram_kernels.launching.checks import check_tensor
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.launching.launch import Kept
from engram_kernels.launching.tokens import ID_DTYPES, check_batch
from engram_kernels.ops.call import form_of
from engram_kernels.ops.conv_kernels.slots import ConvSlots, launch_store_conv
from engram_kernels.ops.gate_kernels.arguments import FLOAT_DTYPES
from engram_kernels.reference.ops import conv_slots as reference
from engram_kernels.reference.ops.sequences import slot_history
from engram_kernels.reference.serving.history import NO_TOKEN

from .history import commit_history

_TOKENS = dict(
    token_ids=Tensor(*ID_DTYPES), cu_seqlens=Optional(Tensor(torch.int32)), dead=Optional(Tensor(torch.bool))
)
_SLOTS = Tensor(torch.int32)


@dataclass(eq=False)
class EngramStep:
    """One forward over tokens of some slots, made by :meth:`EngramState.begin`, ended by :meth:`commit`."""

    token_ids: torch.Tensor
    slots: torch.Tensor
    cu_seqlens: torch.Tensor | None
    dead: torch.Tensor | None
    state: "EngramState" = field(repr=False)
    _form: Hashable = field(repr=False)
    captured: bool = False  #: begun in the capture of a CUDA graph: one commit follows each replay
    _committed: bool = field(default=False, init=False, repr=False)
    #: {slot: how often it had been moved when the step began}, where values are checked.
    _seen: dict[int, int] = field(default_factory=dict, repr=False)

    @property
    def options(self) -> dict[str, torch.Tensor | None]:
        """``cu_seqlens``, ``history``, ``dead`` and ``slots``: what hashes, :meth:`Prefetcher.start` and lookups take.

        History is the state's own, which they read by slot: give them to the stream before :meth:`commit`.
        """
        self._check_open("options")
        history = self.state._history
        return dict(cu_seqlens=self.cu_seqlens, history=history, dead=self.dead, slots=self.slots)

    @property
    def history(self) -> torch.Tensor:
        """``[B, N - 1]`` raw ids before each sequence's first token here, oldest first, -1 for none; a copy."""
        self._check_open("history")
        return slot_history(self.state._history, self.slots)

    @declares(layer=Whole(0))
    def conv_state(self, layer: int) -> ConvSlots | None:
        """State of ``layer``, as :func:`gate_conv_residual` takes it; None without a convolution.

        ValueError after commit().
        """
        Whole(0).check("EngramStep.conv_state", "layer", layer)
        self._check_open("conv_state")
        return self.state.layer_slots(layer, self.slots)

    @declares(accepted=Optional(Tensor(torch.int32)))
    def commit(self, accepted: torch.Tensor | None = None) -> None:
        """Take the first ``accepted [B]`` (int32) tokens of each sequence into the state; None: all of them.

        To be given to the stream after the forward, once for each begin() or replay of it: another time would take the
        same tokens in again, and is a ValueError unless begin() was captured. What is not accepted leaves no trace. The
        tensors given to begin() must still hold what they held.

        Nothing else may have moved a slot that it moves since begin(), neither another step's commit nor reset() or
        restore(): these tokens follow what the slot held then. On a CPU that is a ValueError, on a GPU it is up to you.
        """
        if self._committed and not self.captured:
            raise ValueError(
                "EngramStep.commit: expected a step of its own (EngramState.begin), got one committed before"
            )
        self.state._commit(self, accepted)
        self._committed = True

    def _check_open(self, name: str) -> None:
        """Raise where what the step is to read has moved on."""
        if self._committed and not self.captured:
            raise ValueError(
                f"EngramStep.{name}: expected before commit(), which moves on what a step reads, got after"
            )


class EngramState:
    """State of ``slots`` sequences: their last N - 1 raw ids, and for a convolution the window of each layer.

        step = state.begin(token_ids, slots, cu_seqlens=cu_seqlens)
        prefetcher.start(token_ids, **step.options)
        hidden = engram(hidden, rows=prefetcher.rows(layer), state=step)         in each Engram layer
        step.commit(accepted)

    One step takes any mix of prompts' chunks, single tokens and blocks of drafts, with each sequence's slot in int32
    ``[B]``; slot -1 is padding, for which nothing is read or written. Everything is on ``device`` and in a fixed number
    of launches that can be captured; nothing waits for the GPU. A new state is that of empty sequences.

    config: of the model; all its layers have a state. dtype: of the hidden states.
    max_drafts: most tokens of a sequence that a commit may reject, where a convolution has to remember them.
    ValueError for sizes that are out of bounds, and a dtype that is no hidden state's.
    """

    @takes(
        config=Instance(EngramConfig),
        slots=Whole(1),
        device=Device(),
        dtype=Dtype(*FLOAT_DTYPES),
        max_drafts=Whole(0),
    )
    def __init__(
        self,
        config: EngramConfig,
        slots: int,
        device: torch.device | str,
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_drafts: int = 8,
    ):
        self.config, self.slots, self.max_drafts = config, slots, max_drafts
        self._span = max(0, config.conv_kernel - 1) * config.conv_dilation
        self._ring = 2 * self._span + max_drafts if self._span else 0
        self._history = torch.full((slots, config.max_ngram - 1), NO_TOKEN, dtype=torch.int64, device=device)
        self._cursor = torch.zeros(slots, dtype=torch.int32, device=device) if self._span else None
        self._rings: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = dict.fromkeys(config.layers)
        for layer in config.layers if self._span else ():
            scale_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            value = torch.zeros(slots, self._ring, config.hidden_size, dtype=dtype, device=device)
            scale = torch.zeros(slots, self._ring, config.branches, dtype=scale_dtype, device=device)
            self._rings[layer] = value, scale
        self._buffers = Buffers("the state", self._tensors())
        self._checked = Kept()  # forms of what steps and commits were given
        self._own = object()  # tells launches of this state from those of others
        self._moves: Counter[int] = Counter()  # how often each slot was moved, where values are checked

    @property
    def device(self) -> torch.device:
        """Where the state is."""
        return self._history.device

    @property
    def nbytes(self) -> int:
        """Bytes of all slots and layers."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @declares(slots=_SLOTS, **_TOKENS)
    def begin(
        self,
        token_ids: torch.Tensor,
        slots: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
    ) -> EngramStep:
        """A step over ``token_ids``: ``[T]`` with cu_seqlens, int32 ``[B + 1]``, or ``[B, S]``.

        dead: bool, of their shape, tokens that take no part in n-grams.
        slots: int32 ``[B]``, different from each other; -1 for padding. Without a convolution several sequences may
        have one slot, as candidates for its continuation of which commit() accepts at most one. No launch.
        ValueError where shapes do not fit, and on a CPU for a slot that is not there.
        """
        where = "EngramState.begin"
        self._buffers.check(where)
        form = None if is_compiling() else form_of(token_ids, slots, cu_seqlens, dead)
        if form is None or form not in self._checked or self._checks_values():
            batch = self._check_tokens(where, token_ids, cu_seqlens, dead)
            self._check_slots(where, slots, batch, distinct=self._span > 0)
            if form is not None:
                self._checked.get(form, lambda: True)
        captured = token_ids.is_cuda and not is_compiling() and torch.cuda.is_current_stream_capturing()
        seen = {slot: self._moves[slot] for slot in slots.tolist()} if self._checks_values() else {}
        return EngramStep(token_ids, slots, cu_seqlens, dead, self, form, captured, seen)

    @takes(slots=Optional(AnyOf(Whole(), _SLOTS)))
    def reset(self, slots: torch.Tensor | int | None = None) -> None:
        """Make slots those of empty sequences: int32 ``[B]`` with -1 for none, one slot, or None for all.

        ValueError, on a CPU, for a slot that is not there.
        """
        self._buffers.check("EngramState.reset")
        if slots is None:
            self._moves.update(range(self.slots))
            self._history.fill_(NO_TOKEN)
            if self._cursor is not None:
                self._cursor.zero_()
            return
        slots = self._slots_tensor(slots)
        self._check_slots("EngramState.reset", slots, None, distinct=True)
        commit_history(self._history, self._cursor, slots, self._history.new_empty(0), restart=0)
        self._moved(slots)

    @takes(slots=AnyOf(Whole(), _SLOTS), conv_states=Optional(Instance(Sequence)), **_TOKENS)
    def restore(
        self,
        slots: torch.Tensor | int,
        token_ids: torch.Tensor,
        *,
        cu_seqlens: torch.Tensor | None = None,
        dead: torch.Tensor | None = None,
        conv_states: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """Make slots those of sequences whose first tokens were computed elsewhere, whatever they held.

        slots: int32 ``[B]``, or one slot. token_ids: the tokens until now, ``[T]`` with cu_seqlens or ``[B, S]``, of
        which the last N - 1 of each sequence suffice; dead: bool, of their shape. As in a history -1 is no token, so
        ``[B, N - 1]`` of an engine's own are taken as they are; on a CPU any other id is checked, unless it is dead.
        conv_states: for a convolution, each of the config's layers' (value, scale) after these tokens, as
        :meth:`conv_states` returns them. ValueError where they are missing, too many or of another shape, and for ids
        and slots that are not there.
        """
        where = "EngramState.restore"
        self._buffers.check(where)
        slots = self._slots_tensor(slots)
        batch = self._check_tokens(where, token_ids, cu_seqlens, dead)
        self._check_slots(where, slots, batch, distinct=True)
        none = token_ids == NO_TOKEN
        dead = none if dead is None else dead | none
        self._check_ids(where, token_ids, cu_seqlens, dead)
        if (conv_states is not None) != (self._span > 0):
            needs = "one pair per layer" if self._span else "None, as this config has no convolution"
            raise ValueError(f"{where}: conv_states must be {needs}, got {type(conv_states).__name__}")
        if conv_states is not None:
            self._check_conv_states(where, conv_states, batch)
            for layer, (value, scale) in zip(self.config.layers, conv_states, strict=True):
                parts = value.view(batch * self._span, -1), scale.view(batch * self._span, -1)
                ring = self.layer_slots(layer, slots)
                if is_kernel_device(value) and value.dtype != torch.float64:
                    launch_store_conv(ring, *parts, None, None, self._span, restart=True)
                else:
                    reference.store_conv(ring, *parts, span=self._span, restart=True)
        tokens = dict(cu_seqlens=cu_seqlens, dead=dead)
        commit_history(self._history, self._cursor, slots, token_ids, **tokens, restart=self._span)
        self._moved(slots)

    @takes(slots=AnyOf(Whole(), _SLOTS))
    def conv_states(self, slots: torch.Tensor | int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(value ``[B, (K-1) * N, D]``, scale ``[B, (K-1) * N, H]``) of each layer, copied, as restore() takes them.

        slots: int32 ``[B]``, or one slot; ValueError, on a CPU, for one that is not there. The list is empty without a
        convolution. For keeping the state of a prefix, or sending it to where the sequence goes on.
        """
        slots = self._slots_tensor(slots)
        self._check_slots("EngramState.conv_states", slots, None, distinct=False)
        layers = self.config.layers if self._span else ()
        return [reference.gather_conv(self.layer_slots(layer, slots), self._span) for layer in layers]

    @declares(layer=Whole(0), slots=_SLOTS)
    def layer_slots(self, layer: int, slots: torch.Tensor) -> ConvSlots | None:
        """State of ``layer`` for sequences in ``slots``, int32 ``[B]``; None without a convolution.

        ValueError for a layer that is none of the config's.
        """
        Whole(0).check("EngramState.layer_slots", "layer", layer)
        if layer not in self._rings:
            raise ValueError(f"EngramState: layer must be one of the config's, {self.config.layers}, got {layer!r}")
        _SLOTS.check("EngramState.layer_slots", "slots", slots)
        self._buffers.check("EngramState.layer_slots")
        ring = self._rings[layer]
        return None if ring is None else ConvSlots(*ring, self._cursor, slots)

    def _tensors(self) -> list[torch.Tensor]:
        """All that the state holds."""
        rings = [part for ring in self._rings.values() if ring is not None for part in ring]
        return [self._history, *([] if self._cursor is None else [self._cursor]), *rings]

    def _commit(self, step: EngramStep, accepted: torch.Tensor | None) -> None:
        where, batch = "EngramStep.commit", len(step.slots)
        self._buffers.check(where)
        form = None if is_compiling() else (self._own, step._form, form_of(accepted))
        if accepted is not None and (form is None or form not in self._checked):
            check_tensor(where, "accepted", accepted, dtypes=(torch.int32,), shape=(batch,), device=self.device)
            if form is not None:
                self._checked.get(form, lambda: True)
        moved = self._check_accepted(where, step, accepted) if self._checks_values() else ()
        tokens = dict(cu_seqlens=step.cu_seqlens, dead=step.dead, accepted=accepted)
        options = dict(ring=self._ring, span=self._span, form=form)
        commit_history(self._history, self._cursor, step.slots, step.token_ids, **tokens, **options)
        self._moves.update(moved)

    def _moved(self, slots: torch.Tensor) -> None:
        if self._checks_values():
            self._moves.update(slots.tolist())

    def _checks_values(self) -> bool:
        """Values are checked on a CPU alone: on a GPU that would wait for it."""
        return self.device.type == "cpu" and not is_compiling()

    def _slots_tensor(self, slots) -> torch.Tensor:
        if isinstance(slots, int) and not isinstance(slots, bool):
            return torch.full((1,), slots, dtype=torch.int32, device=self.device)
        return slots

    def _check_tokens(self, where, token_ids, cu_seqlens, dead) -> int:
        check_tensor(where, "token_ids", token_ids, dtypes=ID_DTYPES, device=self.device)
        if token_ids.dim() not in (1, 2) or token_ids.numel() >= 2**31:
            shape = list(token_ids.shape)
            raise ValueError(f"{where}: token_ids must have shape [T] or [B, S], below 2^31 ids, got {shape}")
        if dead is not None:
            check_tensor(where, "dead", dead, dtypes=(torch.bool,), shape=token_ids.shape, device=self.device)
        return check_batch(where, token_ids.shape, cu_seqlens, self.device)

    def _check_slots(self, where, slots, batch: int | None, distinct: bool) -> None:
        shape = None if batch is None else (batch,)
        check_tensor(where, "slots", slots, dtypes=(torch.int32,), shape=shape, device=self.device)
        if slots.dim() != 1:
            raise ValueError(f"{where}: slots must have shape [B], got {list(slots.shape)}")
        if not self._checks_values():
            return
        given = slots.tolist()
        if given and (min(given) < -1 or max(given) >= self.slots):
            raise ValueError(f"{where}: slots must be within -1..{self.slots - 1}, got {given}")
        given = [slot for slot in given if slot >= 0]
        if distinct and len(set(given)) != len(given):
            raise ValueError(f"{where}: slots must be different from each other, got {given}")

    def _check_ids(self, where, token_ids, cu_seqlens, dead) -> None:
        if not self._checks_values():
            return
        end = None if cu_seqlens is None else int(cu_seqlens[-1])
        ids, most = token_ids[:end][~dead[:end]], self.config.raw_vocab_size
        if len(wrong := ids[(ids < 0) | (ids >= most)]):
            raise ValueError(f"{where}: token_ids must be -1 for none, or within 0 <= id < {most}, got {int(wrong[0])}")

    def _check_accepted(self, where, step: EngramStep, accepted) -> set[int]:
        """The slots that the commit moves."""
        lengths = [step.token_ids.numel() // max(1, len(step.slots))] * len(step.slots)
        if step.cu_seqlens is not None:
            lengths = step.cu_seqlens.diff().tolist()
        taken = lengths if accepted is None else accepted.tolist()
        moved = set()
        for slot, length, count in zip(step.slots.tolist(), lengths, taken, strict=True):
            if not 0 <= count <= length:
                raise ValueError(
                    f"{where}: accepted must be within 0..{length}, the tokens of its sequence, got {count}"
                )
            if self._span and slot >= 0 and length > self._ring - self._span and length - count > self.max_drafts:
                raise ValueError(
                    f"{where}: accepted must leave out at most max_drafts = {self.max_drafts} of {length} tokens, "
                    f"got {count}"
                )
            if slot in moved and count:
                raise ValueError(f"{where}: accepted must be 0 in all but one of the sequences of slot {slot}")
            moves = self._moves[slot]
            if count and slot >= 0 and not step.captured and step._seen.get(slot, moves) != moves:
                raise ValueError(
                    f"{where}: accepted must be 0 for slot {slot}, which another step, reset or restore has moved "
                    f"since this step began, got {count}"
                )
            moved |= {slot} if count and slot >= 0 else set()
        return moved

    def _check_conv_states(self, where, conv_states, batch) -> None:
        if not isinstance(conv_states, Sequence) or len(conv_states) != len(self.config.layers):
            count = len(conv_states) if isinstance(conv_states, Sequence) else type(conv_states).__name__
            raise ValueError(f"{where}: conv_states must be {len(self.config.layers)} pairs, one a layer, got {count}")
        for index, (pair, ring) in enumerate(zip(conv_states, self._rings.values(), strict=True)):
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise TypeError(f"{where}: conv_states[{index}] must be a pair (value, scale), got {pair!r:.80}")
            for part, own in zip(pair, ring, strict=True):
                options = dict(dtypes=(own.dtype,), shape=(batch, self._span, own.shape[-1]), device=self.device)
                check_tensor(where, f"conv_states[{index}]", part, **options)
