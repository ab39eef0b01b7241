"""How to train: what stands under ``train:`` in a config, and its translation for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr", "inverse_sqrt"]


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
    schedule: Schedule = "cosine"
    """How the learning rate falls after warm-up."""
    warmup: float = Field(0.05, ge=0)
    """Steps over which the learning rate rises: a share of all if below 1, else a number."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this norm; 0 switches it off."""
    optimizer: str = "adamw_torch"
    """Any of transformers' optimisers."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    group_by_length: bool = True
    """Put rows of like length into a batch: less padding."""
    evaluate_every: int | None = Field(None, ge=1)
    """Validate, and save a checkpoint, every so many steps; by default after each epoch."""
    patience: int | None = Field(None, ge=1)
    """Stop when the validation loss has not improved this many validations in a row."""
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

    def arguments(self, output: Path, *, learning_rate: float, validate: bool) -> dict[str, Any]:
        """The same as keyword arguments of `transformers.TrainingArguments`."""
        when = {"strategy": "steps", "steps": self.evaluate_every} if self.evaluate_every else {"strategy": "epoch"}
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
            "eval_strategy": when["strategy"] if validate else "no",
            "eval_steps": when.get("steps"),
            "save_strategy": when["strategy"],
            "save_steps": when.get("steps") or 500,
            "load_best_model_at_end": validate and self.keep_best,
            "metric_for_best_model": "eval_loss" if validate else None,
            "greater_is_better": False if validate else None,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "label_names": ["labels"],
            "dataloader_pin_memory": False,
        }
