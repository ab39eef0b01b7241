"""How to train: what stands under ``train:`` and ``distill:`` in a config, and its translation for transformers."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "inverse_sqrt"]

_PASS, _LEAST_PASS = 1024, 512
"""Tokens, on processors: hardly faster with more; with fewer each part's own costs are felt."""
_UNEVEN = 1.25
"""A batch of so many times the tokens of an average one is not split."""
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(rf"([0-9]+(?:[.][0-9]+)?) ?({'|'.join(_UNITS)})")


def _every(value: int | str) -> int | str:
    if (value < 1) if isinstance(value, int) else not _TIME.fullmatch(value):
        raise ValueError("should be a number of steps (200) or a time (30 s, 10 min, 1 h)")
    return value


class TrainSettings(BaseModel):
    """Settings of the training loop."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    epochs: float = Field(3.0, gt=0)
    """Passes over the data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimiser steps, whatever `epochs` says."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; by default the method's own."""
    batch_size: int = Field(8, ge=1)
    """Rows per forward pass and device."""
    accumulation: int = Field(1, ge=1)
    """Forward passes per optimiser step; their losses are averaged over tokens, not over passes."""
    pass_tokens: int | None = Field(None, ge=0)
    """Tokens in a forward pass at most, padding counted: larger batches are computed in parts, which is the same step
    in less memory. 0: whole batches. By default, on processors, 1,024, which are hardly faster with more, or as few as
    512 where an average batch has no more: the few that do would double the memory; whole batches on GPUs."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after warm-up."""
    warmup: float = Field(0.05, ge=0)
    """Steps over which the learning rate rises: a share of all if below 1, else a number."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 switches it off."""
    optimizer: str = "adamw_torch_fused"
    """Any of transformers' optimisers. `adamw_8bit` keeps AdamW's moments in 8 bits (bitsandbytes), `paged_adamw_8bit`
    also moves them to main memory where a GPU has too little."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about half again the time."""
    group_by_length: bool = True
    """Put rows of like length into a batch: less padding."""
    evaluate_every: int | None = Field(None, ge=1)
    """Validate, and save a checkpoint, every so many steps; by default after each epoch."""
    checkpoint_every: Annotated[int | str, AfterValidator(_every)] = "10 min"
    """Save a checkpoint between validations, too: every so many steps (200), or by time (30 s, 10 min, 1 h), which
    waits until writing them takes less than a hundredth of the run."""
    patience: int | None = Field(None, ge=1)
    """Stop early: when the validation loss has not improved this many validations in a row."""
    keep_best: bool = True
    """End with the weights of the lowest validation loss, not the last ones."""
    log_every: int = Field(10, ge=1)
    """Report the loss every so many steps."""
    samples: int = Field(2, ge=0)
    """Answers to validation rows shown at each validation."""
    trackers: tuple[str, ...] = ()
    """Experiment trackers of transformers to report to: tensorboard, mlflow, wandb, trackio."""
    seed: int = 0
    """Of the order of rows, dropout and initial values."""

    @property
    def checkpoint_interval(self) -> int | float:
        """`checkpoint_every`, as steps (an int) or seconds (a float)."""
        if isinstance(self.checkpoint_every, int):
            return self.checkpoint_every
        number, unit = _TIME.fullmatch(self.checkpoint_every).groups()  # type: ignore[union-attr]
        return float(number) * _UNITS[unit]

    def tokens_of_a_pass(self, device: torch.device, lengths: Sequence[int]) -> int:
        """`pass_tokens` where training is on this device, on rows of these lengths; 0: no limit."""
        if self.pass_tokens is not None or device.type != "cpu":
            return self.pass_tokens or 0
        usual = self.batch_size * statistics.fmean(lengths) if lengths else 0
        return min(max(round(_UNEVEN * usual), _LEAST_PASS), _PASS)

    def arguments(self, output: Path, *, rows: int, learning_rate: float, validate: bool) -> dict[str, Any]:
        """The same as keyword arguments of `transformers.TrainingArguments`.

        Args:
            output: folder of the run.
            rows: training examples.
            learning_rate: the peak.
            validate: whether there is something to validate on.
        """
        # An epoch's end as a number of steps: transformers' own "epoch" also fires when a run stops within one.
        passes = math.ceil(rows / (self.batch_size * int(os.environ.get("WORLD_SIZE", 1))))
        steps = self.evaluate_every or math.ceil(passes / self.accumulation)
        schedule: dict[str, Any] = {"num_cycles": 0.5} if self.schedule == "cosine" else {}
        if self.schedule == "cosine_with_min_lr":
            schedule = {"min_lr_rate": 0.1}
        return {
            "output_dir": str(output),
            "num_train_epochs": self.epochs,
            "max_steps": self.max_steps or -1,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "lr_scheduler_type": self.schedule,
            "lr_scheduler_kwargs": schedule,
            "warmup_steps": self.warmup,
            "weight_decay": self.weight_decay,
            "max_grad_norm": self.max_grad_norm,
            "optim": self.optimizer,
            "train_sampling_strategy": "group_by_length" if self.group_by_length else "random",
            "logging_steps": self.log_every,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,
            "report_to": list(self.trackers) or "none",
            "seed": self.seed,
            "data_seed": self.seed,
            "eval_strategy": "steps" if validate else "no",
            "eval_steps": steps,
            "save_strategy": "steps",
            "save_steps": steps,
            "load_best_model_at_end": validate and self.keep_best,
            "metric_for_best_model": "eval_loss" if validate else None,
            "greater_is_better": False if validate else None,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "dataloader_pin_memory": False,
        }


class DistillSettings(BaseModel):
    """Settings of distillation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    teacher: str
    """base (the base without the adapter: learn from the data, forget nothing), an adapter's folder, or another base:
    its hub id, folder or catalogue name."""
    weight: float = Field(0.5, gt=0, le=1)
    """The share λ of the teacher in the loss; 1: the labels don't count."""
    temperature: float = Field(2.0, gt=0)
    """T softens what both say, so that unlikely answers count, too."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """forward: KL(teacher ‖ student); reverse: KL(student ‖ teacher); jsd: the mean of both to their middle."""
