"""Does veneer learn what Trainer + peft learn? Same base, data, order, initial weights and settings, on SmolLM2-135M.

    python -m benchmarks.parity                      # every method × veneer, peft; goes on where it was stopped
    python -m benchmarks.parity --only lora --steps 20
    python -m benchmarks.parity --full               # LoRA at ten times full fine-tuning's rate, and full fine-tuning
    python -m benchmarks.parity --table              # what has been found so far

Both train on real prose, over a base in float32 (`--dtype bfloat16` for the other): veneer by `veneer.train`, the
other by transformers' `Trainer` over peft's model, with the weights veneer's adapter starts from. Losses are noted at
every step, so that the first of them shows whether both began alike. The held-out loss is computed by the same function
for both. Each cell is a line of ``benchmarks/results/parity.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file

import veneer
from benchmarks.texts import prose
from veneer.data.batching import EpochSampler
from veneer.methods import method_class
from veneer.tasks.causal_lm import IGNORED, CausalLM
from veneer.training import TrainSettings

BASE = "smollm2-135m-instruct"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "ia3": {},
    "prefix": {},
    "prompt": {},
    "adalora": {},
    "vera": {},
}
SETTINGS: dict[str, Any] = {"log_every": 1, "samples": 0}
STEPS, BATCH, LENGTH, HELD_OUT = 300, 2, 48, 200
FULL, LORA = "full", "lora"
FULL_RATE = 5e-5
"""Of full fine-tuning; LoRA's is ten times that, which is its default."""
SEEDS = 3
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for a 95 % interval, by the number of seeds."""
RESULTS = Path(__file__).parent / "results" / "parity.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", type=int, choices=sorted(T_95), default=SEEDS)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.full:
        rates = {FULL: FULL_RATE, LORA: 10 * FULL_RATE}
        cells = [
            {"method": name, "side": "veneer", "seed": seed, "rate": rate}
            for seed in range(options.seeds)
            for name, rate in rates.items()
        ]
    else:
        rate = {name: method_class(name).learning_rate for name in options.only}
        cells = [
            {"method": name, "side": side, "seed": 0, "rate": rate[name]}
            for name in options.only
            for side in ("veneer", "peft")
        ]
    common = {"steps": options.steps, "batch": options.batch, "held_out": options.held_out, "dtype": options.dtype}
    if not options.table:
        measure([{**cell, **common} for cell in cells], options.results)
    found = [line for line in results(options.results) if common.items() <= line.items()]
    print(full_table(found) if options.full else table(found))


def measure(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Run the cells that are not among the results yet."""
    there = results(path)
    todo = [cell for cell in cells if not any(cell.items() <= line.items() for line in there)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(todo, 1):
        began = time.perf_counter()
        found = run(cell)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**cell, **found}) + "\n")
        seconds = time.perf_counter() - began
        told = f"{found['before']:.4f} → {found['after']:.4f}"
        print(f"{number}/{len(todo)} {cell['method']} by {cell['side']}, seed {cell['seed']}: {told} ({seconds:.0f} s)")


def run(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one method on one side; held-out loss before and after, and the loss of each step."""
    base = veneer.load_base(BASE, dtype=cell["dtype"])
    task = CausalLM(max_length=LENGTH)
    training, held_out = data(cell["held_out"])
    tokenizer = base.tokenizer
    settings = TrainSettings(
        **SETTINGS,
        batch_size=cell["batch"],
        max_steps=cell["steps"],
        learning_rate=cell["rate"],
        seed=cell["seed"],
        epochs=1000,
    )
    method = method_class(cell["method"])(**METHODS.get(cell["method"], {}))
    adapter = base.attach(method, "a", task=task.describe(), seed=cell["seed"])
    examples = task.prepare(held_out, tokenizer).examples
    before = loss_on(adapter, task, tokenizer, examples)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet():
        if cell["side"] == "peft":
            adapter.save(f"{folder}/start")
            plain = veneer.load_base(BASE, dtype=cell["dtype"]).model
            model: Any = as_peft(plain, Path(folder) / "start", method, cell["steps"])
            losses = by_peft(model, task, tokenizer, training, settings, Path(folder) / "run")
        else:
            model = adapter
            plainly = settings.model_dump(exclude_unset=True)
            veneer.train(adapter, training, validation=0, task=task, output=f"{folder}/run", **plainly)
            lines = (Path(folder) / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
            losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    seconds = time.perf_counter() - began
    after = loss_on(model, task, tokenizer, examples)
    return {"before": before, "after": after, "losses": losses, "seconds": seconds}


def data(held_out: int) -> tuple[Dataset, Dataset]:
    """Texts to learn from and to hold out."""
    training, apart = prose(held_out)
    return Dataset.from_list(training), Dataset.from_list(apart)


def as_peft(model: Any, folder: Path, method: veneer.Method, steps: int) -> Any:
    """peft's model with the weights of an adapter folder, to be trained."""
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    if hasattr(config, "tinit"):  # AdaLoRA's schedule, in steps
        config.total_step, config.deltaT = steps, method.every
        config.tinit, config.tfinal = round(steps * method.warmup), round(steps * method.final)
    if not config.is_prompt_learning:
        return peft.PeftModel.from_pretrained(model, folder, config=config, is_trainable=True)
    theirs = peft.get_peft_model(model, config)  # peft loads prompts for inference only
    start = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(start)
    return theirs


class SameOrder(transformers.Trainer):
    """transformers' own, but for the order of the rows, which is veneer's."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return EpochSampler(len(self.train_dataset), self.args.data_seed, self.train_dataset["length"][:], group)


class Allocate(transformers.TrainerCallback):
    """What peft leaves to the user of AdaLoRA: cutting ranks after each step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if hasattr(model.base_model, "update_and_allocate"):
            model.base_model.update_and_allocate(state.global_step)


def by_peft(
    model: Any, task: CausalLM, tokenizer: Any, rows: Any, settings: TrainSettings, output: Path
) -> list[float]:
    """Train peft's model with transformers' Trainer; the loss of each step."""

    def collate(examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = task.collate(examples, tokenizer)
        batch["labels"][:, 0] = IGNORED  # nothing predicts the first token, but Trainer would count it
        return batch

    examples = task.prepare(rows, tokenizer).examples
    rate = settings.learning_rate
    assert rate is not None
    given = settings.arguments(output, rows=len(examples), learning_rate=rate, validate=False)
    arguments = transformers.TrainingArguments(**{**given, "save_strategy": "no", "use_cpu": True})
    trainer = SameOrder(model, arguments, collate, train_dataset=examples, callbacks=[Allocate()])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loss_on(model: Any, task: CausalLM, tokenizer: Any, examples: Any, batch_size: int = 16) -> float:
    """Mean cross-entropy of a token."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = task.collate([examples[i] for i in range(start, min(start + batch_size, len(examples)))], tokenizer)
        targets = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits  # peft's come with those of virtual tokens before them
        logits = logits[:, -batch["input_ids"].shape[1] :][:, :-1]
        total += float(
            F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        )
        count += int((targets != IGNORED).sum())
    return total / count


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        yield


def results(path: Path) -> list[dict[str, Any]]:
    """What has been measured; a line cut off by a kill is left out."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Both sides beside each other."""
    rows = ["method    veneer   peft     ratio    first loss differs by"]
    for name in METHODS:
        its = {"method": name, "rate": method_class(name).learning_rate, "seed": 0}
        sides = {line["side"]: line for line in lines if its.items() <= line.items()}
        if len(sides) == 2:
            ours, theirs = sides["veneer"], sides["peft"]
            ratio = ours["after"] / theirs["after"]
            first = abs(ours["losses"][0] - theirs["losses"][0])
            mark = "" if abs(ratio - 1) <= 0.005 else "   more than 0.5 % off"
            rows.append(f"{name:<9} {ours['after']:.4f}   {theirs['after']:.4f}   {ratio:.4f}   {first:.1e}{mark}")
    return "\n".join(rows)


def full_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """LoRA beside full fine-tuning, each with the interval of its seeds."""
    rows, found = [], {}
    for name, rate in ((FULL, FULL_RATE), (LORA, 10 * FULL_RATE)):
        its = {"method": name, "rate": rate, "side": "veneer"}
        losses = [line["after"] for line in lines if its.items() <= line.items()]
        if len(losses) < 2:
            return f"{name}: {len(losses)} seeds measured, at least 2 are needed"
        mean = statistics.fmean(losses)
        half = T_95[len(losses)] * statistics.stdev(losses) / math.sqrt(len(losses))
        found[name] = (mean, half)
        rows.append(f"{name:<5} rate {rate:g}: held-out loss {mean:.4f} ± {half:.4f} ({len(losses)} seeds)")
    reached = found[LORA][0] <= sum(found[FULL])
    rows.append(f"LoRA {'reaches' if reached else 'does not reach'} full fine-tuning's loss within its seeds' interval")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
