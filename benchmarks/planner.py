"""What the planner says beside what is measured: memory and time of training steps on SmolLM2-135M and MiniLM-L6.

    python -m benchmarks.planner                  # all combinations; goes on where it was stopped
    python -m benchmarks.planner --only 3         # the first three that are not among the results
    python -m benchmarks.planner --table          # nothing is run: the table of what there is
    python -m benchmarks.planner --json           # the same as JSON

Each combination of base, method, batch, dtype, checkpointing and share of labelled tokens runs in a process of its own,
as training does it: forward, loss, backward, clipping, AdamW, with memory kept between steps. Predicted and measured
are a line each of ``benchmarks/results/planner.jsonl``.

*Memory* is the greatest resident size of the process in steps after the first, above that with the base loaded, all
of its weights read, and run on a few tokens; and the bytes of its weights.
*Time* is the median of steps after the first; measure it with nothing else running. The signed error is
predicted / measured − 1, its mean the bias.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import alone

RESULTS = Path(__file__).parent / "results" / "planner.jsonl"
STEPS = 5
MEMORY, TIME = 0.10, 0.25
"""Errors that are allowed."""
SMOL, MINI = "smollm2-135m-instruct", "minilm-l6"


@dataclass(frozen=True)
class Case:
    """One combination."""

    base: str
    method: str
    rows: int
    tokens: int
    dtype: str
    checkpointing: bool = False
    labelled: float = 1.0


FITTED = (
    Case(SMOL, "lora", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "lora", 8, 128, "bfloat16"),
    Case(SMOL, "lora", 2, 512, "bfloat16"),
    Case(SMOL, "lora", 4, 256, "bfloat16", checkpointing=True),
    Case(SMOL, "lora", 4, 256, "float32", labelled=0.5),
    Case(SMOL, "lora", 1, 1024, "bfloat16", labelled=0.25),
    Case(SMOL, "ia3", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "dora", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "vera", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "houlsby", 8, 128, "bfloat16"),
    Case(SMOL, "prefix", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "prompt", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "bitfit", 4, 128, "float32"),
    Case(SMOL, "partial", 4, 256, "bfloat16"),
    Case(SMOL, "full", 4, 256, "bfloat16", labelled=0.5),
    Case(SMOL, "full", 2, 128, "float32", checkpointing=True),
    Case(MINI, "lora", 16, 128, "float32"),
    Case(MINI, "lora", 32, 64, "float32"),
    Case(MINI, "lora", 16, 128, "bfloat16"),
    Case(MINI, "lora", 16, 256, "float32", checkpointing=True),
    Case(MINI, "houlsby", 16, 128, "float32"),
    Case(MINI, "ia3", 16, 256, "float32"),
    Case(MINI, "oft", 16, 128, "float32"),
    Case(MINI, "prefix", 32, 128, "float32"),
    Case(MINI, "full", 16, 128, "float32"),
    Case(MINI, "head", 32, 128, "float32"),
)
"""The combinations to which the shares of memory in gaps were fitted."""
OTHERS = (
    Case(SMOL, "adalora", 4, 128, "bfloat16"),
    Case(SMOL, "lora", 2, 256, "float32", checkpointing=True, labelled=0.5),
    Case(SMOL, "pfeiffer", 2, 256, "bfloat16"),
    Case(SMOL, "lokr", 4, 256, "bfloat16", labelled=0.25),
    Case(SMOL, "ia3", 2, 768, "bfloat16", labelled=0.5),
    Case(MINI, "vera", 16, 128, "float32"),
    Case(MINI, "lora", 64, 32, "float32"),
    Case(MINI, "houlsby", 16, 256, "float32", checkpointing=True),
    Case(MINI, "bitfit", 8, 256, "float32"),
    Case(MINI, "mam", 16, 128, "bfloat16"),
)
CASES = FITTED + OTHERS


def predicted(case: Case, threads: int) -> dict[str, Any]:
    """What the planner says."""
    import torch

    from veneer.methods import method_class
    from veneer.planning import Request, plan
    from veneer.training.rehearsal import Batch

    torch.set_num_threads(threads)
    request = Request(
        base=case.base,
        methods=[method_class(case.method)()],
        batch=Batch(case.rows, case.tokens, case.labelled),
        checkpointing=case.checkpointing,
        dtype=case.dtype,
    )
    (row,) = plan(request).methods
    return {"memory": row.train_memory["total"], "seconds": row.seconds_per_step, "parts": dict(row.train_memory)}


def measured(case: Case, threads: int, steps: int) -> dict[str, Any]:
    """Load, train a few steps, tell."""
    import torch

    import veneer
    from benchmarks.memory import forget_peak, held, peak
    from veneer.bases.architecture import architecture
    from veneer.methods import method_class
    from veneer.training.allocator import kept_memory
    from veneer.training.rehearsal import task_for

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    found = architecture(case.base)
    task: Any = task_for(found)
    base = veneer.load_base(case.base, task=task.name if found.kind == "encoder" else None, dtype=case.dtype)
    with torch.no_grad():
        base.model(input_ids=torch.arange(8)[None])
        for each in base.model.parameters():
            each.sum()  # files are mapped: what was never read is not resident yet
    before = held(base.device) - base.nbytes
    adapter = base.attach(method_class(case.method)(), "a", modules=task.head(base, seed=0))
    if case.checkpointing:
        base.enable_checkpointing()
    adapter.train()
    learned = [each for each in adapter.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=True)
    batch = task.blank(case.rows, case.tokens)
    generator = torch.Generator().manual_seed(0)
    batch["input_ids"] = torch.randint(5, 30000, batch["input_ids"].shape, generator=generator)
    if batch["labels"].dim() == 2:
        kept = torch.arange(case.tokens) >= case.tokens * (1 - case.labelled)
        batch["labels"] = torch.where(kept, batch["input_ids"], -100)
    seconds = []
    with kept_memory():
        for number in range(steps + 1):
            began = time.perf_counter()
            outcome = task.outcome(adapter, batch)
            (outcome.loss / outcome.items).backward()
            del outcome  # it holds on to the graph
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            if number == 0:  # what is done once only
                forget_peak(base.device)
        return {"memory": peak(base.device) - before, "seconds": statistics.median(seconds[1:])}


def results(path: Path) -> list[dict[str, Any]]:
    """What has been measured, predicted anew by whoever asks; a line cut off by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def errors(rows: Sequence[dict[str, Any]], what: str) -> list[float]:
    """Signed errors, predicted / measured − 1."""
    return [row["predicted"][what] / row["measured"][what] - 1 for row in rows]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of memory and time: the signed bias, the greatest error, and how many lie within what is allowed."""
    told = {}
    for what, allowed in (("memory", MEMORY), ("seconds", TIME)):
        found = errors(rows, what)
        told[what] = {
            "bias": statistics.mean(found),
            "greatest": max(found, key=abs),
            "within": sum(abs(each) <= allowed for each in found),
            "of": len(found),
            "allowed": allowed,
        }
    return told


def summaries(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the combinations that shares were fitted to, and of the others; those of which there are results."""
    groups = {
        name: [row for row in rows if Case(**row["case"]) in cases]
        for name, cases in (("fitted to", FITTED), ("others", OTHERS))
    }
    return {name: summary(own) for name, own in groups.items() if own}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    print(f"{'base':<22}{'method':<9}{'batch':>9} {'dtype':<9}{'ckpt':<5}{'labelled':>8}", end="")
    print(f"{'memory':>9}{'measured':>10}{'error':>8}{'step':>9}{'measured':>10}{'error':>8}")
    for row in rows:
        case, said, seen = Case(**row["case"]), row["predicted"], row["measured"]
        memory, seconds = (errors([row], what)[0] for what in ("memory", "seconds"))
        print(
            f"{case.base:<22}{case.method:<9}{f'{case.rows} x {case.tokens}':>9} {case.dtype:<9}"
            f"{'yes' if case.checkpointing else '':<5}{case.labelled:>8.0%}{said['memory'] / 1e6:>6.0f} MB"
            f"{seen['memory'] / 1e6:>7.0f} MB{memory:>+8.1%}"
            f"{said['seconds']:>7.2f} s{seen['seconds']:>8.2f} s{seconds:>+8.1%}"
        )
    for (group, found), what in itertools.product(summaries(rows).items(), ("memory", "seconds")):
        told = found[what]
        print(
            f"{group}: {what}: bias {told['bias']:+.1%}, greatest error {told['greatest']:+.1%}, "
            f"{told['within']} of {told['of']} within {told['allowed']:.0%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, help="run so many combinations at most")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--steps", type=int, default=STEPS, help="that are timed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument(
        "--again", action="store_true", help="predict anew what has been measured already, at the rates of this moment"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    done = results(options.results)
    if not options.table:
        known = [row["case"] for row in done]
        todo = [case for case in CASES if asdict(case) not in known][: options.only]
        options.results.parent.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(todo, 1):
            seen = alone(measured, case, options.threads, options.steps)
            row = {"case": asdict(case), "predicted": alone(predicted, case, options.threads), "measured": seen}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            done.append(row)
            print(f"{number}/{len(todo)} {case}", flush=True)
    if options.again:
        done = [{**row, "predicted": alone(predicted, Case(**row["case"]), options.threads)} for row in done]
    if options.json:
        print(json.dumps({"rows": done, **summaries(done)}, indent=2))
    else:
        show(done)


if __name__ == "__main__":
    main()
