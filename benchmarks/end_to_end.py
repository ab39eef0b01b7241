"""A whole fine-tuning of SmolLM2-135M (bf16) on real prose of uneven length, by veneer and by its peers.

    python -m benchmarks.end_to_end [--json] [--rounds 1] [--only veneer trainer]

All train LoRA (r = 16, all linear layers) for one epoch on the same paragraphs (20 to 4,700 characters), with the same
learning rate and schedule, from the same weights, about as many tokens a step. Each run has a process of its own; a
round runs each side once. Time is that of preparing the data and training, the base being loaded.

    veneer   `veneer.train` as it is
    trainer  transformers' Trainer over peft's model as both document it: adapter in float32, batches padded
    trl      TRL's SFTTrainer at its best here: packed rows (best fit), adapter in bf16, no checkpointing

Held-out loss is computed by the same function for all, one row at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from benchmarks.processes import alone

BASE, RATE, BATCH, LONGEST, HELD_OUT = "smollm2-135m-instruct", 5e-4, 8, 512, 100
SIDES = ("veneer", "trainer", "trl")


def paragraphs() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to learn from and to hold out, no two equal."""
    parts = (" ".join(part.split()) for name in sorted(topics) for part in topics[name].split("\n\n"))
    rows = [{"text": part} for part in dict.fromkeys(parts) if len(part) >= 20]
    random.Random(0).shuffle(rows)
    return rows[HELD_OUT:], rows[:HELD_OUT]


def one(side: str, seed: int, rows: int, threads: int) -> dict[str, Any]:
    """A run."""
    import torch

    from benchmarks.memory import forget_peak, held, peak
    from benchmarks.train_step import Variant, loaded

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    base = loaded(Variant("", "lora", "bfloat16", "all"))
    before = held(base.device)
    training, held_out = paragraphs()
    forget_peak(base.device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train = {"veneer": by_veneer, "trainer": by_trainer, "trl": by_trl}[side]
        model, steps = train(base, training[:rows], seed, folder)
    return {
        "side": side,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "memory": peak(base.device) - before,
        "steps": steps,
        "loss": held_out_loss(model, base.tokenizer, held_out),
    }


def by_veneer(base: Any, rows: list[dict[str, str]], seed: int, folder: str) -> tuple[Any, int]:
    """As its documentation has it."""
    import veneer

    adapter = base.attach(veneer.LoRA(rank=16), "a", seed=seed)
    result = veneer.train(
        adapter, rows, task="causal-lm", output=f"{folder}/run", validation=0, epochs=1, batch_size=BATCH,
        learning_rate=RATE, seed=seed, samples=0, max_truncated=1.0,
    )  # fmt: skip
    return adapter, result.steps


def as_peft(base: Any, seed: int, folder: str, *, wide: bool) -> Any:
    """peft's model with the weights veneer starts from."""
    import peft

    import veneer

    base.attach(veneer.LoRA(rank=16), "a", seed=seed).save(Path(folder) / "start")
    base.detach("a")
    return peft.PeftModel.from_pretrained(base.model, f"{folder}/start", is_trainable=True, autocast_adapter_dtype=wide)


def arguments(seed: int, folder: str, batch: int) -> dict[str, Any]:
    """What all have in common."""
    return {
        "output_dir": f"{folder}/run", "num_train_epochs": 1, "per_device_train_batch_size": batch,
        "learning_rate": RATE, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.0,
        "seed": seed, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_strategy": "no",
    }  # fmt: skip


def by_trainer(base: Any, rows: list[dict[str, str]], seed: int, folder: str) -> tuple[Any, int]:
    """transformers' Trainer, as in the documentation of peft."""
    import transformers
    from datasets import Dataset

    tokenizer = base.tokenizer

    def tokens(batch: dict[str, list[str]]) -> Any:
        return tokenizer([text + tokenizer.eos_token for text in batch["text"]], truncation=True, max_length=LONGEST)

    model = as_peft(base, seed, folder, wide=True)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**arguments(seed, folder, BATCH)),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=Dataset.from_list(rows).map(tokens, batched=True, remove_columns=["text"]),
    )
    trainer.train()
    return model, trainer.state.global_step


def by_trl(base: Any, rows: list[dict[str, str]], seed: int, folder: str) -> tuple[Any, int]:
    """TRL's trainer; a packed row holds about as many tokens as a batch of the others."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = as_peft(base, seed, folder, wide=False)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            **arguments(seed, folder, 1), max_length=LONGEST, packing=True, gradient_checkpointing=False, bf16=False
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )
    trainer.train()
    return model, trainer.state.global_step


def held_out_loss(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean cross-entropy of a token."""
    import torch
    import torch.nn.functional as F

    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids = tokenizer(row["text"] + tokenizer.eos_token, return_tensors="pt")["input_ids"][:, :LONGEST]
        ids = ids.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    runs = []
    for seed in range(options.rounds):
        for side in options.only:
            runs.append(alone(one, side, seed, options.rows, options.threads))
            if not options.json:
                print(json.dumps(runs[-1]), flush=True)

    def of(side: str, what: str) -> float:
        return statistics.median(run[what] for run in runs if run["side"] == side)

    rows = [
        {
            "bench": "end_to_end",
            "method": "lora",
            "peer": side,
            "dtype": "bfloat16",
            "labelled": "all",
            "seconds": of("veneer", "seconds"),
            "peer_seconds": of(side, "seconds"),
            "time_ratio": of(side, "seconds") / of("veneer", "seconds"),
            "memory_ratio": of("veneer", "memory") / of(side, "memory"),
            "loss": of("veneer", "loss"),
            "peer_loss": of(side, "loss"),
        }
        for side in options.only
        if side != "veneer" and "veneer" in options.only
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['peer']:<9}{row['seconds']:.0f} s against {row['peer_seconds']:.0f} s: {row['time_ratio']:.2f}x, "
            f"memory {row['memory_ratio']:.2f} of theirs, loss {row['loss']:.4f} against {row['peer_loss']:.4f}"
        )


if __name__ == "__main__":
    main()
