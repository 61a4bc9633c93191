"""Replace the demo's Engram modules in a model by the kernels', and compare the outputs.

Runs anywhere; with a GPU the tables go to pinned host memory.
"""

import torch
from demo_engram import Model

from engram_kernels import replace_engram

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
model = Model().to(device)
input_ids = torch.randint(0, 500, (2, 48), device=device)

with torch.no_grad():
    before = model(input_ids)
    replaced = replace_engram(model, placement="host" if device.type == "cuda" else "cpu")
    after = model(input_ids)

print("replaced:", ", ".join(replaced))
print(f"largest difference: {(before - after).abs().max():.1e} at outputs up to {before.abs().max():.1f}")
