"""Continuous batching around a small transformer with Engram layers and random weights.

Each step is one forward over chunks of prompts, single tokens and drafts of all running requests, padded to one of two
sizes and, on a GPU, captured: history and convolution state come from EngramState, rows from a Prefetcher. Greedy.
Runs anywhere; prints tokens a second and the share of a step that Engram takes.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from engram_kernels import Engram, EngramConfig, EngramState, EngramTable, HashPlan, Prefetcher

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
CONFIG = EngramConfig(
    layers=(1, 3),
    max_ngram=3,
    heads=4,
    row_width=32,
    table_sizes=(20_000, 20_000),
    hidden_size=128,
    branches=2,
    raw_vocab_size=300,
    eps=1e-6,
    conv_kernel=4,
    conv_eps=1e-6,
)
LAYERS, HEADS, POSITIONS = 4, 4, 160  # of the transformer; tokens that a slot has room for
SLOTS, SIZES, MAX_DRAFTS = 4, (16, 48), 3  # requests at a time, tokens of a step, drafts of a request


class Transformer(nn.Module):
    """A decoder; who calls it says how a layer attends and what its Engram adds."""

    def __init__(self):
        super().__init__()
        self.plan = HashPlan.build(CONFIG, torch.arange(CONFIG.raw_vocab_size)).to(DEVICE)
        # A trained model's rows come from its checkpoint: EngramTable.from_safetensors.
        rows = [torch.randn(count, CONFIG.row_width, dtype=torch.bfloat16) for count in self.plan.rows_per_layer]
        self.tables = [EngramTable.from_tensors(weight, placement="host") for weight in rows]
        layers = zip(CONFIG.layers, self.tables, strict=True)
        engrams = {str(layer): Engram(CONFIG, layer, self.plan, table) for layer, table in layers}
        for engram in engrams.values():
            nn.init.normal_(engram.conv_weight)
        self.engrams = nn.ModuleDict(engrams)
        size = CONFIG.hidden_size
        self.embedding = nn.Embedding(CONFIG.raw_vocab_size, size)
        self.qkv = nn.ModuleList(nn.Linear(size, 3 * size) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, size)) for _ in self.qkv
        )
        self.norm = nn.RMSNorm(size, elementwise_affine=False)
        self.head = nn.Linear(size, CONFIG.raw_vocab_size, bias=False)

    def forward(self, token_ids, positions, attend, add_engram):
        """Logits ``[T, V]``."""
        angles = positions[:, None] / 10 ** torch.linspace(0, 3, CONFIG.hidden_size, device=positions.device)
        hidden = self.embedding(token_ids) + angles.sin().to(self.embedding.weight.dtype)
        hidden = hidden[:, None].expand(-1, CONFIG.branches, -1).contiguous()
        for layer in range(LAYERS):
            if layer in CONFIG.layers:
                hidden = add_engram(layer, hidden)
            q, k, v = self.qkv[layer](self.norm(hidden.mean(1))).unflatten(1, (3, HEADS, -1)).unbind(1)
            hidden = hidden + attend(layer, q, k, v).flatten(1)[:, None]
            hidden = hidden + silu(self.mlp[layer](self.norm(hidden.mean(1))))[:, None]
        return self.head(self.norm(hidden.mean(1)))


@dataclass
class Request:
    """Its tokens, prompt first, and how many of them are in the caches."""

    tokens: list[int]
    wanted: int  # tokens in the end
    slot: int = -1
    cached: int = 0
    drafts: list[int] = field(default_factory=list)  # of this step

    def guess(self) -> list[int]:
        """Drafts: what followed the last two tokens when they came before."""
        pair, room = self.tokens[-2:], self.wanted - len(self.tokens) - 1
        for start in range(len(self.tokens) - 3, -1, -1):
            if self.tokens[start : start + 2] == pair:
                return self.tokens[start + 2 : start + 2 + max(0, min(MAX_DRAFTS, room))]
        return []


class Engine:
    """Slots, caches and the buffers that a step reads."""

    def __init__(self, model: Transformer):
        self.model, size = model, SIZES[-1]
        self.state = EngramState(CONFIG, SLOTS, DEVICE, dtype=DTYPE, max_drafts=MAX_DRAFTS)
        self.prefetcher = Prefetcher(model.plan, model.tables, size, layers=CONFIG.layers)
        shape = (2, LAYERS, SLOTS + 1, POSITIONS, HEADS, CONFIG.hidden_size // HEADS)  # the last slot is padding's
        self.cache = torch.zeros(shape, dtype=DTYPE, device=DEVICE)
        # Per token: id, position, slot, sequence, whether it is a draft. Per sequence: slot, and slot if it is new.
        self.tokens = torch.zeros(5, size, dtype=torch.int64, device=DEVICE)
        self.sequences = torch.zeros(2, SLOTS, dtype=torch.int32, device=DEVICE)
        self.cu_seqlens = torch.zeros(SLOTS + 1, dtype=torch.int32, device=DEVICE)
        self.graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self.taken = self.drafted = 0

    def forward(self, size: int, with_engram: bool = True) -> torch.Tensor:
        """Most likely next token of each token, then the number of tokens accepted of each sequence."""
        ids, positions, token_slots, owner, draft = self.tokens[:, :size].contiguous()
        slots, fresh = self.sequences
        step = None
        if with_engram:
            self.state.reset(fresh)
            step = self.state.begin(ids, slots, cu_seqlens=self.cu_seqlens)
            self.prefetcher.start(ids, **step.options)

        def attend(layer, q, k, v):
            keys, values = self.cache[:, layer]
            keys[token_slots, positions], values[token_slots, positions] = k, v
            seen = torch.arange(POSITIONS, device=DEVICE) <= positions[:, None]
            k, v = (part[token_slots].transpose(1, 2) for part in (keys, values))
            return scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=seen[:, None, None]).squeeze(2)

        def add_engram(layer, hidden):
            if step is None:
                return hidden
            return self.model.engrams[str(layer)](hidden, rows=self.prefetcher.rows(layer), state=step)

        likely = self.model(ids, positions, attend, add_engram).argmax(1)
        # A draft is right if it is what the token before it makes most likely, and all drafts before it are right.
        wrong = ((draft == 1) & (ids != likely.roll(1))).long().cumsum(0)
        first = self.cu_seqlens[:-1].clamp(max=size - 1).long()  # never a draft, so not wrong itself
        right = wrong == torch.cat([wrong[first], wrong[:1]])[owner]
        accepted = torch.zeros(SLOTS + 1, dtype=torch.int64, device=DEVICE).index_add_(0, owner, right.long())[:-1]
        if step is not None:
            step.commit(accepted.int())
        return torch.cat([likely, accepted])

    def run(self, size: int, with_engram: bool = True) -> torch.Tensor:
        """:meth:`forward`, from a graph where there is a GPU."""
        if DEVICE.type == "cpu":
            return self.forward(size, with_engram)
        if (size, with_engram) not in self.graphs:
            kept = self.sequences.clone()
            self.sequences.fill_(-1)  # warming up leaves no trace
            self.forward(size, with_engram)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.forward(size, with_engram)
            self.graphs[size, with_engram] = graph, result
            self.sequences.copy_(kept)
        graph, result = self.graphs[size, with_engram]
        graph.replay()
        return result

    def serve(self, requests: list[Request]) -> None:
        """Run all requests to their end."""
        waiting, free = list(requests), list(range(SLOTS))
        running: list[Request] = []
        while waiting or running:
            while waiting and free:
                running.append(waiting.pop(0))
                running[-1].slot = free.pop()
            batch = self.fill(running)
            likely, accepted = self.run(self.size).split([self.size, SLOTS])
            likely, accepted = likely.tolist(), accepted.tolist()  # the one wait of a step
            for (request, start, count), taken in zip(batch, accepted, strict=False):
                if request.cached + count == len(request.tokens):
                    request.tokens += likely[start + count - 1 : start + taken]
                    self.taken, self.drafted = self.taken + taken - count, self.drafted + len(request.drafts)
                request.cached += taken
                if len(request.tokens) >= request.wanted:
                    running.remove(request)
                    free.append(request.slot)

    def fill(self, running: list[Request]) -> list[tuple[Request, int, int]]:
        """Write the next step into the buffers: (request, its first token there, tokens that are no drafts)."""
        batch: list[tuple[Request, int, int]] = []
        columns: list[tuple[int, int, int, int, int]] = []
        ends = [0]
        sequences = [[-1] * SLOTS, [-1] * SLOTS]
        # Who generates goes first, and a prompt takes what is left.
        for request in sorted(running, key=lambda request: len(request.tokens) - request.cached):
            chunk = request.tokens[request.cached :][: SIZES[-1] - len(columns)]
            if not chunk:
                continue
            room = SIZES[-1] - len(columns) - len(chunk)
            request.drafts = request.guess()[:room] if len(chunk) == 1 else []
            for place, token in enumerate(chunk + request.drafts):
                columns.append((token, request.cached + place, request.slot, len(batch), int(place >= len(chunk))))
            sequences[0][len(batch)] = request.slot
            sequences[1][len(batch)] = -1 if request.cached else request.slot
            batch.append((request, ends[-1], len(chunk)))
            ends.append(len(columns))
        self.size = next(size for size in SIZES if size >= len(columns))
        columns += [(0, 0, -1, SLOTS, 0)] * (self.size - len(columns))
        self.tokens[:, : self.size] = torch.tensor(columns).T
        self.sequences.copy_(torch.tensor(sequences))
        self.cu_seqlens.copy_(torch.tensor(ends + [ends[-1]] * (SLOTS + 1 - len(ends))))
        return batch

    def seconds(self, with_engram: bool) -> float:
        """Of the last step, again."""
        times = []
        for _ in range(12):
            begin = time.perf_counter()
            self.run(self.size, with_engram).tolist()
            times.append(time.perf_counter() - begin)
        return min(times)


def one_shot(model: Transformer, tokens: list[int], wanted: int) -> list[int]:
    """The same tokens with no state at all: the whole sequence again for each."""

    def attend(layer, q, k, v):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)

    while len(tokens) < wanted:
        ids = torch.tensor(tokens, device=DEVICE)
        positions = torch.arange(len(tokens), device=DEVICE)
        logits = model(ids, positions, attend, lambda n, hidden, ids=ids: model.engrams[str(n)](hidden, ids))
        tokens = [*tokens, int(logits[-1].argmax())]
    return tokens


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = Transformer().to(DEVICE, DTYPE)
    prompts = [torch.randint(0, CONFIG.raw_vocab_size, (length,)).tolist() for length in (70, 5, 33, 1, 18, 60, 9)]
    requests = [Request(prompt, len(prompt) + 40) for prompt in prompts]
    engine = Engine(model)
    begin = time.perf_counter()
    engine.serve(requests)
    seconds = time.perf_counter() - begin
    same = sum(
        request.tokens == one_shot(model, p, request.wanted) for p, request in zip(prompts, requests, strict=True)
    )
    count = sum(request.wanted for request in requests)
    print(f"{len(requests)} requests, {count} tokens in {seconds:.2f} s on {DEVICE}: {count / seconds:.0f} tokens/s")
    print(f"drafts: {engine.taken} of {engine.drafted} accepted")
    share = 1 - engine.seconds(False) / engine.seconds(True)
    print(f"Engram's share of a step of {engine.size} tokens: {share:.0%}")
    print(f"the tokens of one-shot generation: {same} of {len(requests)} requests")


if __name__ == "__main__":
    main()
