"""A plain transformers model with an Engram layer in front of one of its decoder layers, trained on its own source.

    python examples/train_transformers.py [--steps 60] [--train all | engram | adapters]

The model is a small Llama with random weights; any decoder whose layers take the hidden state first goes the same way.
Its hidden state is one branch. Rows are trained by an optimizer of their own, beside that of the model's parameters;
bfloat16 autocast, accumulation, clipping and a cosine schedule act on both. With ``engram`` the model is frozen, and
the layer and its rows learn alone; with ``adapters`` the layer and its rows are frozen too, and low-rank adapters
(LoRA) of the attention learn beside them. Needs transformers (extra ``test``).
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engram_kernels import Engram, EngramConfig, RowAdagrad


def with_engram(model: LlamaForCausalLM, config: EngramConfig, layer: int) -> Engram:
    """An Engram layer in front of decoder layer ``layer``, as a part of the model."""
    engram, seen = Engram.build(config, layer, placement="host", trainable=True), {}

    def remember(module, arguments, named):
        seen["ids"] = named["input_ids"]

    def add(module, arguments, named):
        hidden = engram(arguments[0][:, :, None], seen["ids"])[:, :, 0]
        return (hidden, *arguments[1:]), named

    model.model.register_forward_pre_hook(remember, with_kwargs=True)
    model.model.layers[layer].register_forward_pre_hook(add, with_kwargs=True)
    model.engram = engram  # whose projection, norms and convolution are then the model's parameters
    return engram


class Adapter(torch.nn.Module):
    """A frozen projection, and beside it one of low rank that begins at nothing."""

    def __init__(self, frozen: torch.nn.Linear, rank: int = 8):
        super().__init__()
        self.frozen = frozen
        self.down = torch.nn.Linear(frozen.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, frozen.out_features, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.frozen(hidden) + self.up(self.down(hidden))


def freeze(model: LlamaForCausalLM, what: str) -> None:
    """Leave ``what`` trainable: "all", "engram" or "adapters"."""
    if what == "all":
        return
    model.requires_grad_(False)
    if what == "engram":
        model.engram.requires_grad_(True)
        return
    model.engram.table.requires_row_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)


def main(arguments: list[str] | None = None) -> list[float]:
    """The losses of all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--train", choices=("all", "engram", "adapters"), default="all")
    chosen = parser.parse_args(arguments)
    steps = chosen.steps
    torch.manual_seed(0)
    text = torch.tensor(list(Path(__file__).read_bytes()))  # bytes are the tokens, id 10 ends a line
    sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    config = EngramConfig(
        layers=(1,),
        max_ngram=3,
        heads=4,
        row_width=16,
        table_sizes=(2000, 2000),
        hidden_size=64,
        branches=1,
        raw_vocab_size=256,
        window="eos",  # n-grams of raw ids, which end with a line
        eos_id=10,
        format="float32",
        conv_kernel=4,
    )
    engram = with_engram(model, config, layer=1)
    rows = RowAdagrad(engram.table, lr=0.1)
    freeze(model, chosen.train)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dense = torch.optim.AdamW(learning, lr=3e-3)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, steps) for each in (dense, rows)]
    losses = []
    for _ in range(steps):
        total = 0.0
        for _ in range(2):  # two batches a step
            starts = torch.randint(0, len(text) - 64, (8,))
            ids = torch.stack([text[start : start + 64] for start in starts])
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / 2
            loss.backward()
            total += float(loss.detach())
        anchors = [engram.table.anchor] if engram.table.requires_row_grad else []
        torch.nn.utils.clip_grad_norm_(learning + anchors, 1.0)
        for each in (dense, rows):
            each.step()
            each.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(total)
    print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last of {steps}")
    rows.close()
    engram.table.close()
    return losses


if __name__ == "__main__":
    main()
