"""Gemma's per-layer embeddings in host memory, read by lookup.

Gemma-3n and Gemma-4 give every layer a vector of each token that depends on its id alone. transformers keeps those of
all layers in one nn.Embedding, embed_tokens_per_layer: in Gemma-3n 262,144 rows of 35 * 256 elements, 4.7 GB in
bfloat16. Here they move to a table, a row for each token and layer, and the model's outputs keep their bits.

Runs anywhere, on small random models; with a GPU the table is in pinned host memory. Needs transformers.
"""

import torch
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedModel

from engram_kernels import EngramTable, lookup


class TableEmbedding(nn.Module):
    """Gemma's scaled embedding with its rows in a table; for inference, since nothing gives them a gradient.

    An id outside the table reads as zeros, where nn.Embedding fails; Gemma-3n puts 0 in its place before it asks.
    The rows are no parameter: they keep dtype and place when the model's change, and a checkpoint of the model lacks
    them (EngramTable.save_safetensors writes them).
    """

    def __init__(self, embedding: nn.Embedding, layers: int, placement: str):
        super().__init__()
        self.layers = layers
        weight = embedding.weight.detach().view(embedding.num_embeddings * layers, -1)  # row id * layers + layer
        self.table = EngramTable.from_tensors(weight, placement=placement)
        self.register_buffer("embed_scale", embedding.embed_scale, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[B, S, layers * width]`` of ids ``[B, S]``."""
        first = input_ids[..., None].long() * self.layers
        rows = lookup(self.table, first + torch.arange(self.layers, device=input_ids.device)).flatten(-2)
        return rows * self.embed_scale.to(rows.dtype)  # rounded in the rows' dtype, as transformers does


def move_per_layer_embeddings(model: PreTrainedModel, placement: str) -> EngramTable:
    """Move embed_tokens_per_layer of a Gemma-3n or Gemma-4 to a table, and return that.

    "host" copies the rows, from a GPU too. A layer's part of a row must have a multiple of 16 bytes.
    """
    layers = model.config.get_text_config().num_hidden_layers
    moved = TableEmbedding(model.get_per_layer_input_embeddings(), layers, placement)
    model.set_per_layer_input_embeddings(moved)
    return moved.table


def small_models(width: int = 16) -> list[PreTrainedModel]:
    """Gemma-3n and Gemma-4 with random weights, ``width`` elements a layer; the first has fewer rows than token ids."""
    sizes = dict(
        vocab_size=320,
        hidden_size=64,
        hidden_size_per_layer_input=width,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=128,
        num_kv_shared_layers=0,
    )
    gemma3n = Gemma3nTextConfig(
        **sizes, vocab_size_per_layer_input=300, laurel_rank=8, activation_sparsity_pattern=[0.0] * 4
    )
    gemma4 = Gemma4TextConfig(**sizes, vocab_size_per_layer_input=320, global_head_dim=32)
    return [Gemma3nForCausalLM(gemma3n).eval(), Gemma4ForCausalLM(gemma4).eval()]


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    for model in small_models():
        model.to(device, torch.bfloat16)
        ids = torch.randint(1, model.config.vocab_size, (2, 12), device=device)
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        with torch.no_grad():
            logits, tokens = model(ids).logits, model.generate(ids, **options)
            table = move_per_layer_embeddings(model, "host" if device.type == "cuda" else "cpu")
            same = torch.equal(model(ids).logits, logits) and torch.equal(model.generate(ids, **options), tokens)
        print(f"{type(model).__name__}: {table}")
        print("logits and generated tokens", "equal" if same else "DIFFER")


if __name__ == "__main__":
    main()
