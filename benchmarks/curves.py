"""What a LoRA step costs, against tokens, batch, rank, adapted layers and idle adapters; SmolLM2-135M in bf16.

    python -m benchmarks.curves                 # measures (with nothing else running), prints a table
    python -m benchmarks.curves --json
    python -m benchmarks.curves --plot docs/img # curves as SVG, too

From a step of 4 × 256 tokens, half of them labelled, with rank 16 on all linear layers, one thing at a time is varied.
Each point has a process of its own: the median of steps after the first, and the peak of memory above the loaded base.
`products` is the limit: the base's matrix products of that step alone, forward and for the gradients of their inputs,
one after the other on the same tensors' shapes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.processes import alone

STEPS = 5
WORDS = {
    "tokens": "tokens a row, of 4 rows",
    "rows": "rows of 256 tokens",
    "rank": "rank",
    "layers": "adapted layers, the last of 30",
    "idle": "adapters attached, one acting",
}


@dataclass(frozen=True)
class Point:
    """A step."""

    tokens: int = 256
    rows: int = 4
    rank: int = 16
    layers: int = 30
    idle: int = 1


VARIED: dict[str, tuple[int, ...]] = {
    "tokens": (64, 128, 256, 512, 1024),
    "rows": (1, 2, 4, 8),
    "rank": (1, 4, 16, 64, 256),
    "layers": (1, 4, 10, 20, 30),
    "idle": (1, 10, 100),
}


def measured(point: Point, threads: int) -> dict[str, Any]:
    """Seconds of a step and of its products, and bytes."""
    import torch

    from benchmarks.memory import forget_peak, held, peak
    from benchmarks.train_step import Variant, loaded
    from veneer.methods import method_class
    from veneer.tasks.causal_lm import CausalLM
    from veneer.training.allocator import kept_memory

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    base = loaded(Variant("veneer", "lora", "bfloat16", "half"))
    lora = method_class("lora")(rank=point.rank, layers=f"-{point.layers}:")
    before = held(base.device)
    adapters = [base.attach(lora, f"a{number}", seed=0) for number in range(point.idle)]
    adapters[0].train()
    task, optimizer = CausalLM(), torch.optim.AdamW(adapters[0].parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 49152, (point.rows, point.tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(point.tokens) < point.tokens // 2, -100, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    with kept_memory():
        times = []
        for number in range(STEPS + 1):
            started = time.perf_counter()
            optimizer.zero_grad()
            outcome = task.outcome(adapters[0], batch)
            (outcome.loss / outcome.items).backward()
            optimizer.step()
            times.append(time.perf_counter() - started)
            if number == 0:
                forget_peak(base.device)
    memory = peak(base.device) - before
    return {
        "seconds": statistics.median(times[1:]),
        "products": products(base, point),
        "memory": memory,
    }


def products(base: Any, point: Point) -> float:
    """Seconds of the base's own: linear maps forward, and backward as far as gradients go; the output projection at
    labelled tokens, both ways."""
    import torch

    model, number = base.model, point.rows * point.tokens
    blocks = [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")]
    times = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            for index, block in enumerate(blocks):
                for weight in (each.weight for each in block.modules() if isinstance(each, torch.nn.Linear)):
                    x = torch.empty(number, weight.shape[1], dtype=weight.dtype).fill_(0.5)
                    y = x @ weight.t()
                    if index >= len(blocks) - point.layers:
                        y @ weight
            hidden = torch.empty(number // 2, model.lm_head.weight.shape[1], dtype=weight.dtype).fill_(0.5)
            for part in hidden.split(256):
                (part @ model.lm_head.weight.t()) @ model.lm_head.weight
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def plots(rows: list[dict[str, Any]], folder: Path) -> None:
    """An SVG for each thing varied."""
    from veneer.evaluation.comparison.charts import Point as Mark
    from veneer.evaluation.comparison.charts import lines

    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row["varied"] for row in rows):
        words, own = WORDS[name], [row for row in rows if row["varied"] == name]
        series = [
            (label, kind, [Mark(row[name], row[key], label, kind) for row in own])
            for label, kind, key in (("a step", "best", "seconds"), ("the base's products alone", "base", "products"))
        ]
        picture = lines(f"Seconds against {words}", series, words, "seconds")
        head, rest = picture.split(">", 1)
        (folder / f"step-{name}.svg").write_text(
            f'{head} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n', encoding="utf-8"
        )


STYLE = (
    "svg{background:#fff} text{font-family:sans-serif;fill:#444} .grid{stroke:#ddd} .line{fill:none;stroke-width:2} "
    ".line.best{stroke:#1667b7} .mark.best{fill:#1667b7} .line.base{stroke:#888} .mark.base{fill:#888}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIED, default=list(VARIED))
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--plot", type=Path, help="folder for SVG files")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows, known = [], dict[Point, dict[str, Any]]()
    for name in options.only:
        for value in VARIED[name]:
            point = replace(Point(), **{name: value})
            if point not in known:
                known[point] = alone(measured, point, options.threads)
            rows.append({"bench": "curves", "varied": name, **asdict(point), **known[point]})
            if not options.json:
                row = rows[-1]
                told = f"{row['seconds']:>7.2f} s, products {row['products']:.2f} s, {row['memory'] / 1e9:.2f} GB"
                print(f"{WORDS[name]:<32}{value:>6}{told}", flush=True)
    if options.plot:
        plots(rows, options.plot)
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
