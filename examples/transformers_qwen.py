"""Load a Qwen checkpoint with a per-layer embedding into transformers without ever holding its table twice.

python examples/transformers_qwen.py FOLDER, with the folder of a text model (``Qwen4ExpForCausalLM``). Tables are read
from its files straight into the memory that kernels read, pinned host memory where there is a GPU; transformers loads
all else.
"""

import sys

import torch
from transformers import AutoConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

from engram_kernels import EngramTable, replace_engram

folder = sys.argv[1]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = AutoConfig.from_pretrained(folder)
layers = [number - 1 for number in config.ple_layer_ids]  # ple_layer_ids count from 1
placement = "host" if device.type == "cuda" else "cpu"
tables = {layer: EngramTable.from_safetensors(folder, placement=placement, layer=layer) for layer in layers}


class QwenWithTables(Qwen4ExpForCausalLM):
    _keys_to_ignore_on_load_unexpected = [r"^mtp.*", r"\.ngram_embedding\."]

    def __init__(self, config):
        super().__init__(config)  # on the meta device: from_pretrained gives memory to what it loads
        replace_engram(self, tables=tables)


model = QwenWithTables.from_pretrained(folder, dtype="auto").to(device).eval()
for layer, table in tables.items():
    print(f"layer {layer}: {table!r}")
prompt = torch.arange(8, device=device)[None] % config.vocab_size
tokens = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
print("tokens:", *tokens[0].tolist())
