"""A training step by veneer and by its peers, on SmolLM2-135M: time and memory.

    python -m benchmarks.train_step [--json] [--methods lora,ia3] [--dtypes bfloat16] [--labelled half]
    python -m benchmarks.train_step --profile           # where veneer's own step spends its time

A step is 4 × 256 random tokens, half or all of them labelled: forward, loss, backward, AdamW. Each variant runs in a
process of its own, all of a group one after the other in turns, veneer's before each of its peers'; a row holds the
ratio of the medians of such pairs. All rows take three quarters of an hour.

    peft-default  the same adapter, with the same weights, in peft as its documentation has it: adapter in float32
    peft-best     the best of peft's adapter in float32 or the base's dtype, compiled or not, the batch whole or halved
    full          transformers' model, all of its parameters trained
    forward       transformers' model without gradients, with its usual loss

All run on the GPU where there is one. Memory is the most a process holds during steps (resident, or on the GPU), above
that with the base loaded and run on a few tokens. All begin as `veneer train` does, without
glibc's thread caches of small blocks. The table's first ratio is that of times, peer / veneer (`time_ratio`), the
second that of memory, veneer / peer (`memory_ratio`).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.processes import alone, sparing

BASE = "smollm2-135m-instruct"
ROWS, TOKENS = 4, 256
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 16},
    "dora": {"rank": 16},
    "adalora": {},
    "vera": {},
    "loha": {},
    "lokr": {},
    "oft": {},
    "hira": {},
    "ia3": {},
    "prefix": {},
    "prompt": {},
    "full": {},
}
"""The methods both have, with settings other than their defaults."""
DTYPES, LABELLED = ("bfloat16", "float32"), ("half", "all")
VENEER, DEFAULT, BEST, FULL, FORWARD = "veneer", "peft-default", "peft-best", "full", "forward"


@dataclass(frozen=True)
class Variant:
    """What one process runs."""

    side: str
    method: str
    dtype: str
    labelled: str
    wide_adapter: bool = True
    """peft's adapter in float32."""
    compiled: bool = False
    parts: int = 1
    """Micro-batches a step."""


def batch_of(variant: Variant, device: Any = "cpu") -> dict[str, Any]:
    """The tokens of a step."""
    import torch

    ids = torch.randint(0, 49152, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    first = TOKENS // 2 if variant.labelled == "half" else 0
    labels = torch.where(torch.arange(TOKENS) < first, -100, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}


def loaded(variant: Variant) -> Any:
    """The base, all of whose weights have been read."""
    import torch

    import veneer

    base = veneer.load_base(BASE, dtype=variant.dtype)
    with torch.no_grad():
        base.model(input_ids=torch.arange(8, device=base.device)[None])
    return base


def stepper(base: Any, variant: Variant) -> Callable[[], float]:
    """What does a step and returns its loss."""
    import torch

    batch = batch_of(variant, base.device)
    if variant.side == VENEER:
        return own_step(base, variant, batch)
    model: Any = base.model
    if variant.side == FORWARD:

        def forward() -> float:
            with torch.no_grad():
                return float(model(**batch, use_cache=False).loss)

        model.requires_grad_(False)
        return forward
    if variant.side == FULL:
        model.requires_grad_(True)
    else:
        model = as_peft(base, variant)
    model.train()
    run = torch.compile(model) if variant.compiled else model
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4, fused=True)
    parts = [{name: value.chunk(variant.parts)[part] for name, value in batch.items()} for part in range(variant.parts)]

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = run(**part, use_cache=False).loss / variant.parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    return step


def own_step(base: Any, variant: Variant, batch: dict[str, Any]) -> Callable[[], float]:
    """veneer's, as its trainer does it."""
    import torch

    from veneer.methods import method_class
    from veneer.tasks.causal_lm import CausalLM
    from veneer.training.passes import parts
    from veneer.training.settings import TrainSettings

    adapter = base.attach(method_class(variant.method)(**SETTINGS[variant.method]), "a", seed=0)
    adapter.train()
    task, optimizer = CausalLM(), torch.optim.AdamW(adapter.parameters(), lr=1e-4, fused=True)
    passes = parts(batch, TrainSettings(batch_size=ROWS).tokens_of_a_pass(base.device, [TOKENS]), task.by_token)
    items = task.items(batch)

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in passes:
            loss = task.outcome(adapter, part).loss / items
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    return step


def as_peft(base: Any, variant: Variant) -> Any:
    """The same adapter in peft, to be trained."""
    import peft

    from veneer.methods import method_class

    with tempfile.TemporaryDirectory() as folder:
        base.attach(method_class(variant.method)(**SETTINGS[variant.method]), "a", seed=0).save(Path(folder) / "a")
        base.detach("a")
        config = peft.PeftConfig.from_pretrained(f"{folder}/a")
        config.inference_mode = False
        if config.is_prompt_learning:  # peft loads these for inference only
            return peft.get_peft_model(base.model, config)
        return peft.PeftModel.from_pretrained(
            base.model, f"{folder}/a", config=config, is_trainable=True, autocast_adapter_dtype=variant.wide_adapter
        )


def serve(variant: Variant, threads: int, pipe: Any) -> None:
    """A process: load, then a step for each request, answering with its seconds and loss; None ends it."""
    import torch

    from benchmarks.memory import forget_peak, held, peak
    from veneer.training.allocator import kept_memory

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    base = loaded(variant)
    wait = torch.cuda.synchronize if base.device.type == "cuda" else lambda: None
    before = held(base.device)
    step = stepper(base, variant)
    with kept_memory() if variant.side == VENEER else contextlib.nullcontext():
        step()  # what is done once only: buffers, the optimiser's state, compilation
        forget_peak(base.device)
        pipe.send("ready")
        while pipe.recv() is not None:
            started = time.perf_counter()
            loss = step()
            wait()
            pipe.send((time.perf_counter() - started, loss, peak(base.device) - before))


@contextlib.contextmanager
def running(variants: Sequence[Variant], threads: int) -> Iterator[list[Any]]:
    """A pipe to a ready process of each."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for variant in variants:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(variant, threads, theirs), daemon=True)
            with sparing():
                process.start()
            theirs.close()
            processes.append(process)
            ours.recv()  # one loads and warms up at a time
            pipes.append(ours)
        yield pipes
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in processes:
            process.join(10)
            process.kill()


def once(pipe: Any) -> tuple[float, float, int]:
    """A step of one process."""
    pipe.send("step")
    answer: tuple[float, float, int] = pipe.recv()
    return answer


def best(variant: Variant, threads: int) -> Variant:
    """peft's fastest: the adapter's dtype, then the batch's layout, then compilation, each with the best yet."""
    found = replace(variant, wide_adapter=True)
    for change in ({"wide_adapter": False}, {"parts": 2}, {"compiled": True}):
        other = replace(found, **change)  # type: ignore[arg-type]
        if variant.dtype == "float32" and "wide_adapter" in change:
            continue
        with contextlib.suppress(EOFError), running([found, other], threads) as pipes:  # EOF: that one can't
            times = [[once(pipe)[0] for pipe in pipes] for _ in range(3)]
            now, then = (statistics.median(column) for column in zip(*times, strict=True))
            found = other if then < now else found
    return found


def compared(own: Variant, peers: Sequence[Variant], rounds: int, threads: int) -> list[dict[str, Any]]:
    """A row a peer."""
    with running([own, *peers], threads) as pipes:
        pairs: list[list[tuple[Any, Any]]] = [[] for _ in peers]
        for _, (number, pipe) in itertools.product(range(rounds), enumerate(pipes[1:])):
            pairs[number].append((once(pipes[0]), once(pipe)))
    rows = []
    for peer, measured in zip(peers, pairs, strict=True):
        ours, theirs = (statistics.median(pair[side][0] for pair in measured) for side in (0, 1))
        memory = [max(pair[side][2] for pair in measured) for side in (0, 1)]
        rows.append(
            {
                "bench": "train_step",
                "method": own.method,
                "peer": peer.side,
                "dtype": own.dtype,
                "labelled": own.labelled,
                "seconds": ours,
                "peer_seconds": theirs,
                "time_ratio": theirs / ours,
                "memory": memory[0],
                "peer_memory": memory[1],
                "memory_ratio": memory[0] / memory[1],
                "loss_difference": abs(measured[0][0][1] - measured[0][1][1]),
                **({"setting": asdict(peer)} if peer.side == BEST else {}),
            }
        )
    return rows


def peers_of(own: Variant, threads: int) -> list[Variant]:
    """Whom it is compared with."""
    if own.method == "full":
        return [replace(own, side=FULL)]
    default = replace(own, side=DEFAULT)
    if own.method != "lora":
        return [default]
    return [default, replace(best(default, threads), side=BEST), replace(own, side=FULL), replace(own, side=FORWARD)]


def profile(variant: Variant, threads: int) -> dict[str, float]:
    """Seconds of veneer's step by what they are spent on, told by operation and shapes."""
    import torch
    from torch.profiler import ProfilerActivity

    from veneer.training.allocator import kept_memory

    torch.set_num_threads(threads)
    step = stepper(loaded(variant), variant)
    with kept_memory():
        step()
        step()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            step()
    seconds: dict[str, float] = {}
    for event in profiled.key_averages(group_by_input_shape=True):
        kind = kind_of(event.key, {size for shape in event.input_shapes for size in shape})
        seconds[kind] = seconds.get(kind, 0) + event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def kind_of(operation: str, sizes: set[Any]) -> str:
    """What an operation belongs to, by its name and the sizes in its inputs' shapes; the first that fits."""
    vocabulary, rank = 49152, SETTINGS["lora"]["rank"]
    scores = {768, 66}  # queries of a group of three heads; a head's width and two sums beside it
    if vocabulary in sizes or "CrossEntropy" in operation or operation == "veneer::head":
        return "head"
    if operation.startswith("veneer::low_rank_linears"):  # by tiles both are one operation
        return "base products and adapter"
    if re.search("rms_norm|RMSNorm|gated|Gated|silu", operation):
        return "norms and gates"
    if re.search("ttention|otary", operation) or scores & sizes:
        return "attention"
    if rank in sizes or "LowRank" in operation:
        return "adapter"
    if operation in ("aten::mm", "aten::addmm", "veneer::product"):
        return "base products"
    return "rest"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = "separated by commas; by default %(default)s"
    parser.add_argument("--methods", default=",".join(SETTINGS), help=several)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of the base, {several}")
    parser.add_argument("--labelled", default=",".join(LABELLED), help=f"how many of the tokens, {several}")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps a row, by default %(default)s")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count(), help="of each process")
    parser.add_argument("--json", action="store_true", help="print one list of rows at the end instead of a table")
    parser.add_argument("--profile", action="store_true", help="tell where veneer's own step spends its time, only")
    options = parser.parse_args()
    chosen = [options.methods.split(","), options.dtypes.split(","), options.labelled.split(",")]
    for given, known in zip(chosen, (SETTINGS, DTYPES, LABELLED), strict=True):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    rows: list[dict[str, Any]] = []
    if options.profile:
        found = [Variant(VENEER, *each) for each in itertools.product(*chosen)]
        told = [{**asdict(own), "profile": alone(profile, own, options.threads)} for own in found]
        print(json.dumps(told, indent=2))
        return
    if not options.json:
        print(f"{'method':<9}{'dtype':<10}{'labelled':<9}{'peer':<13}{'ours':>8}{'peer':>8}{'time':>7}", end="")
        print(f"{'ours':>9}{'peer':>9}{'memory':>7}")
    for method, dtype, labelled in itertools.product(*chosen):
        own = Variant(VENEER, method, dtype, labelled)
        for row in compared(own, peers_of(own, options.threads), options.rounds, options.threads):
            rows.append(row)
            if not options.json:
                print(
                    f"{method:<9}{dtype:<10}{labelled:<9}{row['peer']:<13}{row['seconds']:>7.2f}s"
                    f"{row['peer_seconds']:>7.2f}s{row['time_ratio']:>7.2f}{row['memory'] / 1e9:>7.2f}GB"
                    f"{row['peer_memory'] / 1e9:>7.2f}GB{row['memory_ratio']:>7.2f}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
