"""A serving engine's work on random texts, step by step, whose results must be those of one call per text, bit for bit.

Gates that PyTorch computes on a CPU are compared in float64 to its rounding: the last bit of its sigmoid is another one
in a vector than behind the last vector.

Texts wait for a slot. Each step takes chunks of the texts in the slots, in any order, some with drafts behind them:
wrong ids with NaN for hidden states, keys and values. Then it commits as many of the right tokens as it pleases.
"""

from dataclasses import dataclass

import torch

from engram_kernels import (
    EngramConfig,
    EngramState,
    HashPlan,
    gate_conv_residual,
    gate_residual,
    hash_lookup,
    ngram_hash,
)
from engram_kernels.launching.device import is_kernel_device
from engram_kernels.testing import tables

VOCAB, MAX_DRAFTS = 20, 2
SIZES = dict(max_ngram=3, heads=2, row_width=8, table_sizes=(30, 50), hidden_size=8, branches=2, raw_vocab_size=VOCAB)
EXACT, FLOAT64 = dict(rtol=0, atol=0), dict(rtol=1e-13, atol=1e-13)
DIALECTS = {
    "pad": dict(layers=(1, 4), vocab_size=VOCAB),
    "eos": dict(layers=(2, 3), window="eos", eos_id=7, multiplier_rule="splitmix64"),
}
FORMS = [(dialect, conv) for dialect in DIALECTS for conv in (0, 3)]


@dataclass
class Text:
    """A sequence, and what each layer makes of it in one call."""

    ids: torch.Tensor
    dead: torch.Tensor
    inputs: list  # of each layer: hidden, key, value
    row_ids: torch.Tensor | None = None  # [T, L, C]
    rows: torch.Tensor | None = None  # [L, T, C, R]
    outputs: list | None = None  # of each layer
    conv_states: list | None = None  # of each layer, at the end

    def history(self, depth):
        """The last ids, dead ones as -1."""
        ids = torch.cat([torch.full((depth,), -1), self.ids.masked_fill(self.dead, -1)])
        return ids[len(ids) - depth :]


class Engine:
    """One model's ops on ``device``, with ``slots`` slots; ``conv`` is the number of taps, 0 for none."""

    def __init__(self, dialect, conv, device, slots=3):
        self.config = EngramConfig(**SIZES, **DIALECTS[dialect], format="float32", eps=1e-6, conv_kernel=conv)
        token_map = torch.arange(VOCAB) if dialect == "pad" else None
        self.plan = HashPlan.build(self.config, token_map).to(device)
        self.tables = [
            tables.place(torch.randn(count, 8), None, torch.device(device)) for count in self.config.rows_per_layer
        ]
        self.exact = is_kernel_device(torch.empty(0, device=device))
        self.real = dict(dtype=torch.float32 if self.exact else torch.float64, device=device)
        self.state = EngramState(self.config, slots, **self.real, max_drafts=MAX_DRAFTS)
        self.device = device
        shape = (len(self.config.layers), self.config.branches, self.config.hidden_size)
        self.norms = [torch.rand(3, *shape[1:], **self.real) + 0.5 for _ in range(shape[0])]
        self.weights = [torch.randn(*shape[1:], max(1, conv), **self.real) for _ in range(shape[0])]

    def same(self, result, expected):
        """Equal, or computed in float64 and close."""
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, **(EXACT if self.exact else FLOAT64))

    def text(self, length, dead):
        """A random text, EOS among its ids."""
        ids = torch.randint(0, VOCAB, (length,)).to(self.device)
        ids[torch.rand(length) < 0.2] = 7
        return self.text_of(ids, dead)

    def text_of(self, ids, dead):
        """A text of some ids, with what one call makes of it."""
        length, heads, size = len(ids), self.config.branches, self.config.hidden_size
        shapes = ((length, heads, size), (length, heads, size), (length, size))
        inputs = [[torch.randn(shape, **self.real) for shape in shapes] for _ in self.config.layers]
        text = Text(ids, dead.to(self.device), inputs)
        span = 2 * self.config.conv_dilation
        text.row_ids = ngram_hash(ids, self.plan, dead=text.dead)
        text.rows = hash_lookup(ids, self.plan, self.tables, dead=text.dead)
        text.outputs, text.conv_states = [], []
        for layer in range(len(self.config.layers)):
            state = (torch.zeros(1, span, size, **self.real), torch.zeros(1, span, heads, **self.real))
            out = self.gate(layer, inputs[layer], text.dead, conv_state=state)
            text.outputs.append(out[0] if self.config.conv_kernel else out)
            text.conv_states += [out[1]] if self.config.conv_kernel else []
        return text

    def gate(self, layer, inputs, dead, **sequences):
        """One layer's gate, with its convolution where there is one."""
        query, key, conv = self.norms[layer]
        options = dict(eps=1e-6, mask=~dead)
        if not self.config.conv_kernel:
            return gate_residual(*inputs, query, key, **options)
        options |= dict(conv_eps=1e-5, dilation=self.config.conv_dilation, **sequences)
        return gate_conv_residual(*inputs, query, key, conv, self.weights[layer], **options)

    def pack(self, pieces, padding):
        """Ids, dead marks, inputs of each layer and lengths of (slot, text, first, count, drafts, accepted)."""
        ids, dead, lengths, parts = [], [], [], [[] for _ in self.config.layers]
        for _, text, first, count, drafts, _ in pieces:
            wrong = torch.randint(0, VOCAB, (drafts,)).to(self.device)
            ids.append(torch.cat([text.ids[first : first + count], wrong]))
            dead.append(torch.cat([text.dead[first : first + count], wrong < 2]))
            lengths.append(count + drafts)
            for layer, inputs in enumerate(text.inputs):
                nan = [torch.full((drafts, *x.shape[1:]), float("nan"), device=self.device) for x in inputs]
                chunk = [x[first : first + count] for x in inputs]
                parts[layer].append([torch.cat(pair) for pair in zip(chunk, nan, strict=True)])
        ids, dead = torch.cat([*ids, ids[0].new_zeros(padding)]), torch.cat([*dead, dead[0].new_zeros(padding)])
        inputs = [
            [torch.cat([*x, x[0].new_full((padding, *x[0].shape[1:]), float("nan"))]) for x in zip(*part, strict=True)]
            for part in parts
        ]
        return ids, dead, inputs, lengths

    def forward(self, ids, dead, inputs, slots, cu):
        """The step, row ids, rows, and the outputs of each layer."""
        step = self.state.begin(ids, slots, cu_seqlens=cu, dead=dead)
        row_ids = ngram_hash(ids, self.plan, **step.options)
        rows = hash_lookup(ids, self.plan, self.tables, **step.options)
        outputs = []
        for layer, name in enumerate(self.config.layers):
            out = self.gate(layer, inputs[layer], dead, cu_seqlens=cu, conv_state=step.conv_state(name))
            outputs.append(out[0] if self.config.conv_kernel else out)
        return step, row_ids, rows, outputs

    def check(self, pieces, lengths, row_ids, rows, outputs):
        """What the right tokens of each piece have become."""
        start = 0
        for (slot, text, first, count, *_), length in zip(pieces, lengths, strict=True):
            here, there, start = slice(start, start + count), slice(first, first + count), start + length
            if slot >= 0:
                assert torch.equal(row_ids[here], text.row_ids[there])
                assert torch.equal(rows[:, here], text.rows[:, there])
                for out, expected in zip(outputs, text.outputs, strict=True):
                    self.same(out[here], expected[there])

    def step(self, pieces, padding=0):
        """One forward; checks the right tokens, then commits those accepted."""
        ids, dead, inputs, lengths = self.pack(pieces, padding)
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)
        slots = torch.tensor([piece[0] for piece in pieces], dtype=torch.int32, device=self.device)
        step, *results = self.forward(ids, dead, inputs, slots, cu)
        self.check(pieces, lengths, *results)
        accepted = [piece[5] for piece in pieces]
        if any(accepted):  # a step that is given up is one of which nothing is accepted
            step.commit(None if accepted == lengths else torch.tensor(accepted, dtype=torch.int32, device=self.device))

    def move(self, text, first, source, target):
        """A sequence of ``first`` tokens goes on in another slot, from its ids and the states kept of it."""
        slots = torch.tensor([source], dtype=torch.int32, device=self.device)
        states = self.state.conv_states(slots) if self.config.conv_kernel else None
        known = slice(max(0, first - 3), first)
        self.state.restore(target, text.ids[known], dead=text.dead[known], conv_states=states)
        self.state.reset(slots)

    def check_end(self, slot, text):
        """The state of a slot that has taken all of a text."""
        slots = torch.tensor([slot], dtype=torch.int32, device=self.device)
        empty = self.state.begin(text.ids[:0], slots)
        assert torch.equal(empty.history[0], text.history(2))
        for (value, scale), expected in zip(self.state.conv_states(slots), text.conv_states, strict=True):
            assert torch.equal(value, expected[0])
            self.same(scale, expected[1])


def serve(engine, random, texts=5, longest=16, step=None):
    """Serves some random texts to their end, by the choices of ``random``, a :class:`random.Random`.

    step: what takes the pieces of a step, and the number of padding tokens; None is the engine's own.
    """
    waiting, running = [], {}
    for _ in range(texts):
        length = random.randint(1, longest)
        dead, first = torch.zeros(length, dtype=torch.bool), random.randint(0, length - 1)
        dead[first : first + random.randint(0, 4)] = True
        waiting.append(engine.text(length, dead))
    span = engine.state._span
    while waiting or running:
        free = [slot for slot in range(engine.state.slots) if slot not in running]
        fresh = [slot for slot in free if waiting and random.random() < 0.8]
        for slot in fresh[: len(waiting)]:
            running[slot] = [waiting.pop(), 0]
        fresh = [*fresh[: len(running)], -1]
        engine.state.reset(torch.tensor(fresh, dtype=torch.int32, device=engine.device))
        free = [slot for slot in range(engine.state.slots) if slot not in running]
        if free and running and random.random() < 0.2:
            slot = random.choice(list(running))
            engine.move(*running[slot], slot, free[0])
            running[free[0]] = running.pop(slot)
        pieces = []
        for slot, (text, first) in running.items():
            count = random.choice([0, 1, 1, 2, len(text.ids) - first])
            count = min(count, len(text.ids) - first)
            drafts = random.randint(0, MAX_DRAFTS)
            # Any number of tokens can be taken back while all of them fit behind the window, else max_drafts.
            fits = not span or count + drafts <= span + MAX_DRAFTS
            least = 0 if fits else max(0, count + drafts - MAX_DRAFTS)
            pieces.append((slot, text, first, count, drafts, random.choice([count, random.randint(least, count)])))
        if random.random() < 0.5 and running:
            text = pieces[0][1]
            pieces.append((-1, text, 0, min(2, len(text.ids)), 0, 0))
        random.shuffle(pieces)
        if not pieces:
            continue
        (step or engine.step)(pieces, random.randint(0, 2))
        for slot, *_, accepted in pieces:
            if slot >= 0:
                running[slot][1] += accepted
                text, first = running[slot]
                if first == len(text.ids):
                    engine.check_end(slot, text)
                    del running[slot]
