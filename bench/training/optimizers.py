"""``python -m bench optimizers``: the optimizers of rows on the model of ``python -m bench train``.

Each moves the same table under the same model, whose dense parameters Adam moves. Its rate is the one of five, half an
order of magnitude apart, with the least held-out loss from a seed of its own; with that rate it trains from the three
seeds that are reported. float32; on a CPU this takes minutes.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.running.environment import describe_software
from engram_kernels import RowAdagrad, RowAdam, RowSinkhorn

from .train import Settings, device_name, load_ids, train

RESULT = Path(__file__).parents[1] / "results" / "optimizers.json"
RATES = {
    RowAdagrad: (0.1, 0.3, 1.0, 3.0, 10.0),
    RowAdam: (0.01, 0.03, 0.1, 0.3, 1.0),
    RowSinkhorn: (0.01, 0.03, 0.1, 0.3, 1.0),
}
#: The seed that rates are chosen with.
CHOOSING = 3


def run(settings: Settings, device: torch.device) -> dict:
    """Held-out losses, nats a token, of each optimizer: by rate, and by seed with the rate that is chosen."""
    ids, found = load_ids(settings), {}
    for optimizer, rates in RATES.items():

        def held_out(rate: float, seed: int, optimizer=optimizer) -> float:
            return train("engram", replace(settings, row_rate=rate), seed, ids, device, optimizer)["held_out"]

        by_rate = {rate: held_out(rate, CHOOSING) for rate in rates}
        rate = min(by_rate, key=by_rate.get)
        by_seed = [held_out(rate, seed) for seed in settings.seeds]
        found[optimizer.__name__] = dict(by_rate=by_rate, rate=rate, held_out=by_seed)
    return dict(
        settings=asdict(settings),
        environment=dict(describe_software(), device=device_name(device)),
        command="python -m bench optimizers",
        unit="nats a token, on text that no model has seen",
        optimizers=found,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bench optimizers", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT, metavar="FILE", help="the JSON")
    chosen = parser.parse_args(arguments)
    result = run(Settings(), torch.device(chosen.device))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, each in result["optimizers"].items():
        losses = ", ".join(f"{loss:.4f}" for loss in each["held_out"])
        print(f"held-out loss, {name:<11} rate {each['rate']:<5g} {losses}")
    print(f"Wrote {chosen.out}")
    return 0
