"""``python -m bench train``: a small transformer on real text, with and without Engram, and a check of every step.

Three models of equal dense parameters learn the novels of ``data/`` from the same batches:

    engram     one Engram layer, its table on the host, its rows moved by RowAdagrad
    dense      the same by the eager references: F.embedding over a dense parameter, the rule written over all of it
    without    no Engram; the parameters of its projection and convolution go into the feed-forward layers

The first two must agree at every step, and the first must beat the last on text that none of them has seen, by more
than three seeds differ. float32; on a CPU this takes minutes.
"""

import argparse
import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bench.running.environment import cpu_name, describe_software
from bench.running.plots import label_end
from bench.running.text import load_token_ids, load_token_map
from engram_kernels import Engram, EngramConfig, EngramTable, HashPlan, RowAdagrad, reference, split_kv
from engram_kernels.commands.console import track

RESULT = Path(__file__).parents[1] / "results" / "train.json"
#: The two losses of a step may differ by this, relative; sums of another order differ by far less.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """Sizes and rates. The vocabulary is the most frequent ids of the text; the rest is one id more."""

    vocab: int = 2048
    hidden: int = 64
    layers: int = 2
    heads: int = 2
    feed_forward: int = 192
    engram_layer: int = 1
    table_size: int = 40_000
    row_width: int = 16
    context: int = 64
    batch: int = 8
    steps: int = 300
    rate: float = 3e-3
    row_rate: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)
    held_out: int = 32_768  #: tokens at the end of the text, which no model learns from

    @property
    def config(self) -> EngramConfig:
        return EngramConfig(
            layers=(self.engram_layer,),
            max_ngram=3,
            heads=4,
            row_width=self.row_width,
            table_sizes=(self.table_size,) * 2,
            hidden_size=self.hidden,
            branches=1,
            raw_vocab_size=self.vocab + 1,
            vocab_size=self.vocab + 1,
            format="float32",
            eps=1e-6,
            conv_kernel=4,
            conv_eps=1e-6,
        )


class DenseEngram(nn.Module):
    """What an Engram module computes, by the references and over a parameter that autograd knows whole."""

    def __init__(self, engram: Engram, plan: HashPlan):
        super().__init__()
        self.engram, self.plan = engram, plan
        self.weight = nn.Parameter(engram.table.weight.to(engram.wkv.weight.device, copy=True))

    def forward(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """``[B, S, 1, D]``, as :class:`Engram`."""
        engram, config = self.engram, self.engram.config
        row_ids = reference.ngram_hash(token_ids, self.plan)[..., 0, :]
        kv = engram.wkv(functional.embedding(row_ids, self.weight).flatten(-2))
        key, value = split_kv(kv, 1, config.hidden_size)
        return reference.gate_conv_residual(
            *(hidden, key, value, engram.q_weight, engram.k_weight, engram.conv_norm, engram.conv_weight),
            dilation=config.conv_dilation,
            eps=config.eps,
            conv_eps=config.conv_eps,
        )


class Transformer(nn.Module):
    """A pre-norm decoder; ``engram`` is a module ``(hidden [B, S, 1, D], ids)`` before one of its layers, or None."""

    def __init__(self, settings: Settings, engram: nn.Module | None, feed_forward: int):
        super().__init__()
        width = settings.hidden
        self.settings, self.engram = settings, engram
        self.embed = nn.Embedding(settings.vocab + 1, width)
        self.place = nn.Parameter(torch.zeros(settings.context, width))
        self.mixers = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(settings.layers))
        self.outs = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(settings.layers))
        self.ups = nn.ModuleList(nn.Linear(width, feed_forward, bias=False) for _ in range(settings.layers))
        self.downs = nn.ModuleList(nn.Linear(feed_forward, width, bias=False) for _ in range(settings.layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * settings.layers + 1))
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, vocab + 1]`` of the token after each."""
        hidden = self.embed(ids) + self.place
        for layer in range(self.settings.layers):
            if self.engram is not None and layer == self.settings.engram_layer:
                hidden = self.engram(hidden[:, :, None], ids)[:, :, 0]
            mixed = self.mixers[layer](self.norms[2 * layer](hidden))
            query, key, value = (
                part.unflatten(-1, (self.settings.heads, -1)).transpose(1, 2) for part in mixed.chunk(3, -1)
            )
            attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = hidden + self.outs[layer](attended.transpose(1, 2).flatten(2))
            hidden = hidden + self.downs[layer](functional.gelu(self.ups[layer](self.norms[2 * layer + 1](hidden))))
        return self.norms[-1](hidden) @ self.embed.weight.T


def load_ids(settings: Settings) -> torch.Tensor:
    """The text in compressed ids, renumbered by frequency; ids outside the vocabulary are ``vocab``."""
    ids = load_token_map()[load_token_ids()]
    values, counts = np.unique(ids[: -settings.held_out], return_counts=True)
    kept = values[np.argsort(-counts, kind="stable")[: settings.vocab]]
    number = np.full(int(ids.max()) + 1, settings.vocab)
    number[kept] = np.arange(len(kept))
    return torch.from_numpy(number[ids]).long()


def build(kind: str, settings: Settings, seed: int, device: torch.device):
    """``(model, rows)``: rows is the table of "engram", the parameter of "dense", None of "without"."""
    torch.manual_seed(seed)
    config = settings.config
    plan = HashPlan.build(config, torch.arange(settings.vocab + 1)).to(device)
    table = EngramTable.empty(plan.rows_per_layer[0], config.row_width, config.format, placement="host")
    # One row of the stream of random numbers a table, so that all models start from the same weights.
    table.weight.copy_(initial_rows(table, seed))
    engram = Engram(config, settings.engram_layer, plan, table)
    nn.init.normal_(engram.conv_weight, std=0.1)
    if kind != "without":
        rows = table if kind == "engram" else None
        module = engram if kind == "engram" else DenseEngram(engram, plan)
        model = Transformer(settings, module, settings.feed_forward).to(device)
        if rows is None:
            table.close()
            return model, module.weight
        return model, table.requires_row_grad_()
    table.close()
    extra = sum(parameter.numel() for parameter in engram.parameters())
    wider = settings.feed_forward + round(extra / (2 * settings.hidden * settings.layers))
    return Transformer(settings, None, wider).to(device), None


def initial_rows(table: EngramTable, seed: int) -> torch.Tensor:
    """What the rows of a table begin with."""
    return 0.02 * torch.randn(table.weight.shape, generator=torch.Generator().manual_seed(seed))


class DenseAdagrad:
    """The rule of :class:`RowAdagrad` over every row of a dense parameter; rows without a gradient do not move."""

    def __init__(self, weight: nn.Parameter, lr: float, eps: float = 1e-10):
        self.weight, self.lr, self.eps = weight, lr, eps
        self.sums = torch.zeros(len(weight), device=weight.device)

    @torch.no_grad()
    def step(self) -> None:
        grad = self.weight.grad
        if grad is None:
            return
        self.sums += grad.square().mean(1)
        # A row that never had a gradient is 0 / eps.
        self.weight.add_(-self.lr * grad / (self.sums.sqrt() + self.eps)[:, None])

    def zero_grad(self) -> None:
        self.weight.grad = None


def train(
    kind: str, settings: Settings, seed: int, ids: torch.Tensor, device: torch.device, optimizer=RowAdagrad
) -> dict:
    """Losses of every step, and over the held-out text after the last; ``optimizer`` is that of the rows."""
    with fitted(kind, settings, seed, ids, device, optimizer) as (model, losses):
        dense = sum(parameter.numel() for parameter in dense_parameters(model))
        return dict(losses=losses, held_out=held_out_loss(model, settings, ids, device), dense_parameters=dense)


@contextlib.contextmanager
def fitted(
    kind: str, settings: Settings, seed: int, ids: torch.Tensor, device: torch.device, optimizer=RowAdagrad
) -> Iterator[tuple[Transformer, list[float]]]:
    """(the model after the last step, losses of all); what holds the rows of "engram" is closed behind it."""
    model, rows = build(kind, settings, seed, device)
    optimizers = [torch.optim.Adam(dense_parameters(model), lr=settings.rate, eps=1e-6)]
    if kind == "engram":
        optimizers.append(optimizer(rows, lr=settings.row_rate))
    elif kind == "dense":
        optimizers.append(DenseAdagrad(rows, settings.row_rate))
    learnt = ids[: -settings.held_out]
    order = torch.Generator().manual_seed(1000 + seed)
    losses = []
    for _ in track(range(settings.steps), f"{kind}, seed {seed}", settings.steps):
        starts = torch.randint(0, len(learnt) - settings.context - 1, (settings.batch,), generator=order)
        windows = torch.stack([learnt[start : start + settings.context + 1] for start in starts]).to(device)
        loss = loss_of(model, windows)
        for each in optimizers:
            each.zero_grad()
        loss.backward()
        for each in optimizers:
            each.step()
        losses.append(float(loss.detach()))
    yield model, losses
    if kind == "engram":
        for resource in (*optimizers[1:], rows):
            resource.close()


def dense_parameters(model: Transformer) -> list[nn.Parameter]:
    """All but the rows."""
    rows = getattr(model.engram, "weight", None)
    return [parameter for parameter in model.parameters() if parameter is not rows]


@torch.no_grad()
def held_out_loss(model: Transformer, settings: Settings, ids: torch.Tensor, device: torch.device) -> float:
    windows = ids[-settings.held_out :].unfold(0, settings.context + 1, settings.context).to(device)
    return float(sum(loss_of(model, part) * len(part) for part in windows.split(64))) / len(windows)


def loss_of(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    logits = model(windows[:, :-1].contiguous())
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def run(settings: Settings, device: torch.device) -> dict:
    """Every model and seed; the claims in numbers."""
    ids = load_ids(settings)
    results = {
        kind: [train(kind, settings, seed, ids, device) for seed in seeds] for kind, seeds in runs(settings).items()
    }
    pairs = zip(results["engram"][0]["losses"], results["dense"][0]["losses"], strict=True)
    held_out = {kind: [result["held_out"] for result in results[kind]] for kind in ("engram", "without")}
    return dict(
        settings=asdict(settings),
        environment=dict(describe_software(), device=device_name(device)),
        command="python -m bench train",
        unit="nats a token",
        runs=results,
        largest_difference=max(abs(ours - dense) / dense for ours, dense in pairs),
        tolerance=TOLERANCE,
        held_out=held_out,
        gain=sum(held_out["without"]) / len(settings.seeds) - sum(held_out["engram"]) / len(settings.seeds),
        spread=max(max(losses) - min(losses) for losses in held_out.values()),
    )


def runs(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Model -> the seeds it is trained with. One suffices for the comparison step by step."""
    return {"engram": settings.seeds, "dense": settings.seeds[:1], "without": settings.seeds}


def holds(result: dict) -> bool:
    """Whether the run shows what it is there to show."""
    return result["largest_difference"] < result["tolerance"] and result["gain"] > result["spread"]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def plot(result: dict, path: Path) -> None:
    """Training loss over steps, smoothed over ten, and held-out loss, both of the first seed of each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    names = dict(without="without Engram", engram="with Engram", dense="Engram as a dense\nparameter (the same)")
    for kind, style, shift in (("without", "-", 0), ("engram", "-", 12), ("dense", ":", -24)):
        smooth = np.convolve(result["runs"][kind][0]["losses"], np.ones(10) / 10, mode="valid")
        held_out = result["runs"][kind][0]["held_out"]
        (line,) = axes.plot(smooth, style, linewidth=2)
        label_end(line, f"{names[kind]}\nheld out: {held_out:.2f}", shift)
    axes.set_xlim(0, len(smooth) * 1.32)  # room for the labels, below too
    axes.set_xticks(range(0, len(smooth) + 10, 50))
    axes.set_ylim(axes.get_ylim()[0] - 0.35)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token (mean of ten steps)")
    axes.set_title(f"A small transformer on English novels, seed 0, {result['environment']['device']}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench train", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="the JSON; its plot goes beside it")
    chosen = parser.parse_args(arguments)
    settings = Settings()
    result = run(settings, torch.device(chosen.device))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, chosen.out.with_suffix(".png"))
    for kind, losses in result["held_out"].items():
        text = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"held-out loss, {kind:<8} {text}   (perplexity {math.exp(sum(losses) / len(losses)):.1f})")
    print(f"gain {result['gain']:.4f}, spread of seeds {result['spread']:.4f}")
    print(f"largest difference from the dense run, relative: {result['largest_difference']:.2e}")
    print(f"Wrote {chosen.out} and {chosen.out.with_suffix('.png')}")
    return 0 if holds(result) else 1
