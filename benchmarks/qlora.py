"""QLoRA beside LoRA: the same rows, seed and steps over SmolLM2-135M in bf16, NF4, NF4 from LoftQ's start, and int8.

    python -m benchmarks.qlora [--steps 300] [--seeds 1] [--json]

The task is to go on with real prose, so that the loss is over all tokens. Each
run has a process of its own, whose greatest memory is told.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.processes import alone

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4": {"quantize": "nf4"},
    "nf4, loftq": {"quantize": "nf4", "init": "loftq"},
    "int8": {"quantize": "int8"},
}
BASE, BOUND = "smollm2-135m-instruct", 0.03


def one(kind: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """A run: held-out loss of the plain base, of the fresh adapter and of the trained one; bytes."""
    import torch

    import veneer
    from benchmarks.texts import prose

    training, held_out = prose(options["held_out"])
    plain = veneer.load_base(BASE, dtype=torch.bfloat16)
    base = veneer.load_base(BASE, dtype=torch.bfloat16, quantize=KINDS[kind].get("quantize"))
    all_bytes, weights = plain.nbytes, sum(site.in_features * site.out_features for site in plain.sites)
    del plain
    method = veneer.LoRA(rank=options["rank"], init=KINDS[kind].get("init", "kaiming"))
    result = veneer.train(
        base.attach(method, "a", seed=seed),
        training,
        validation=held_out,
        task="causal-lm",
        max_truncated=1.0,
        epochs=1000,
        max_steps=options["steps"],
        batch_size=options["batch"],
        evaluate_every=options["steps"],
        learning_rate=5e-4,
        keep_best=False,
        samples=0,
        seed=seed,
    )
    assert result.before is not None
    assert result.after is not None
    return {
        "kind": kind,
        "seed": seed,
        "before": result.before["loss"],
        "after": result.after["loss"],
        "base_bytes": base.nbytes,
        "bits_per_quantised_weight": 16 - 8 * (all_bytes - base.nbytes) / weights,
        "peak_memory": result.peak_memory,
        "steps": result.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("steps", 300), ("seeds", 1), ("batch", 4), ("held-out", 200), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    options = vars(parser.parse_args())
    runs = [alone(one, kind, seed, options) for seed in range(options["seeds"]) for kind in KINDS]
    table = []
    for kind in KINDS:
        mine = [run for run in runs if run["kind"] == kind]
        apart = [
            run["after"] / next(r["after"] for r in runs if r["kind"] == "bf16" and r["seed"] == run["seed"]) - 1
            for run in mine
        ]
        means = {key: statistics.mean(run[key] for run in mine) for key in mine[0] if key not in ("kind", "seed")}
        table.append({"kind": kind, **means, "above_bf16": statistics.mean(apart), "within": max(apart) <= BOUND})
    if options["json"]:
        print(json.dumps({"runs": runs, "table": table, "bound": BOUND}, indent=2))
        return
    print(f"{'base':<12}{'before':>9}{'after':>9}{'above bf16':>12}{'base held':>12}{'bits a weight':>15}{'peak':>9}")
    for row in table:
        print(
            f"{row['kind']:<12}{row['before']:>9.4f}{row['after']:>9.4f}{row['above_bf16']:>12.2%}"
            f"{row['base_bytes'] / 1e6:>9.1f} MB{row['bits_per_quantised_weight']:>15.3f}"
            f"{row['peak_memory'] / 1e9:>6.2f} GB"
        )


if __name__ == "__main__":
    main()
