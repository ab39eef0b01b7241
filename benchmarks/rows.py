"""Sixteen rows, sixteen adapters of six kinds, one batch: generation on SmolLM2-135M, against the plain base.

    python -m benchmarks.rows [--rounds 5] [--json]

Also how long attaching to all 210 linear maps takes, beside one adapter and beside a hundred.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

import veneer
from veneer.methods import method_class

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "ia3": {},
    "houlsby": {"bottleneck": 32},
    "prefix": {"length": 10},
    "prompt": {"length": 10},
    "bitfit": {},
}


def attach_times(rounds: int = 15) -> tuple[float, float]:
    """Milliseconds to attach one more LoRA on all linear maps, beside one and beside a hundred, in turn."""
    bases = [veneer.load_base("smollm2-135m-instruct") for _ in range(2)]
    for base, others in zip(bases, (1, 100), strict=True):
        for number in range(others):
            base.attach(veneer.LoRA(rank=8), f"a{number}")
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for which, base in enumerate(bases):
            started = time.perf_counter()
            base.attach(veneer.LoRA(rank=8), "one-more")
            times[which].append((time.perf_counter() - started) * 1000)
            base.detach("one-more")
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = veneer.load_base("smollm2-135m-instruct")
    names = []
    for row in range(16):
        kind = list(KINDS)[row % len(KINDS)]
        adapter = base.attach(method_class(kind)(**KINDS[kind]), f"{kind}{row}", seed=row)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        names.append(adapter.name)
    ids = torch.randint(5, 49000, (16, 32), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    kinds = {"plain base": [None] * 16, "16 LoRA": None, "16 adapters, 6 kinds": names}
    for row in range(16):
        base.attach(veneer.LoRA(rank=8), f"only{row}", seed=row)
    kinds["16 LoRA"] = [f"only{row}" for row in range(16)]
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(options.rounds + 1):
        for name, rows in kinds.items():
            started = time.perf_counter()
            with base.rows(rows):  # type: ignore[arg-type]
                base.model.generate(ids, **settings)  # type: ignore[operator]
            if turn:
                times[name].append(time.perf_counter() - started)
    first, hundredth = attach_times()
    plain = statistics.median(times["plain base"])
    rows_out = [
        {"batch": name, "seconds": statistics.median(t), "ratio_to_plain": statistics.median(t) / plain,
         "new_tokens_per_second": 256 / statistics.median(t)}
        for name, t in times.items()
    ]  # fmt: skip
    if options.json:
        print(json.dumps({"rows": rows_out, "attach_ms": {"beside_1": first, "beside_100": hundredth}}, indent=2))
        return
    for line in rows_out:
        speed = f"{line['ratio_to_plain']:.2f}×  {line['new_tokens_per_second']:.0f} tokens/s"
        print(f"{line['batch']:<22} {line['seconds']:.2f} s  {speed}")
    print(f"attaching to 210 maps: {first:.0f} ms beside one adapter, {hundredth:.0f} ms beside a hundred")


if __name__ == "__main__":
    main()
