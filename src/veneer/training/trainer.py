"""transformers' Trainer, for an adapter and a task.

What differs: the loss is the task's, averaged over all items of an optimiser step whatever its micro-batches
(8 × 1 equals 1 × 8); validation averages over items, too; what is saved is the adapter folder; a checkpoint
counts only once it is complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from veneer.adapters import Adapter
from veneer.adapters.files import WEIGHTS
from veneer.data.batching import EpochSampler
from veneer.errors import TrainingError
from veneer.storage import write_text
from veneer.tasks import Prepared, Task

COMPLETE = "complete"
"""Marker file: all of a checkpoint has been written and synced."""


class Trainer(transformers.Trainer):
    """Trains an adapter for a task.

    Args:
        adapter: what to train.
        task: what for.
        train: the examples to learn from.
        validation: examples to validate on, or None.
        arguments: transformers' own.
        callbacks: transformers' own.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        adapter: Adapter,
        task: Task,
        train: Prepared,
        validation: Prepared | None,
        arguments: transformers.TrainingArguments,
        callbacks: Sequence[transformers.TrainerCallback] = (),
    ) -> None:
        self.task = task
        self.tokens_seen = 0
        tokenizer = adapter.base.tokenizer
        super().__init__(
            model=adapter,
            args=arguments,
            data_collator=lambda examples: task.collate(examples, tokenizer),
            train_dataset=train.examples,
            eval_dataset=validation.examples if validation else None,
            callbacks=list(callbacks),
        )
        self.remove_callback(transformers.PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        by_length = self.args.train_sampling_strategy == "group_by_length"
        lengths = rows["length"][:] if by_length else None
        return EpochSampler(len(rows), self.args.data_seed or 0, lengths, group)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Items of one optimiser step over all its micro-batches (and processes)."""
        items = sum(self.task.items(batch) for batch in batch_samples)
        if self.args.world_size > 1:
            return self.accelerator.gather(torch.tensor(items, device=device)).sum()
        return items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss."""
        self.tokens_seen += int(inputs["attention_mask"].sum())
        outcome = self.task.outcome(model, inputs)
        if not torch.isfinite(outcome.loss):
            rate = self._get_learning_rate()
            raise TrainingError(
                f"The loss is {float(outcome.loss.detach())} at step {self.state.global_step + 1}, at a learning "
                f"rate of {rate:.1e}. Try a tenth of train.learning_rate. Nothing was saved from this step on."
            )
        loss = outcome.loss / (outcome.items if num_items_in_batch is None else num_items_in_batch)
        if self.args.world_size > 1:
            loss = loss * self.args.world_size  # DDP averages gradients over processes; the divisor is global
        return (loss, {"loss": loss}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all items of the validation data, and the task's metrics."""
        started = time.perf_counter()
        loss, accuracy = self._mean(self.get_eval_dataloader(eval_dataset))
        metrics = {
            "loss": loss,
            **self.task.metrics(loss, accuracy),
            "runtime": time.perf_counter() - started,
        }
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _mean(self, batches: Any) -> tuple[float, float]:
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                outcome = self.task.outcome(self.model, self._prepare_inputs(batch))
                sums += torch.tensor([float(outcome.loss), float(outcome.items), float(outcome.correct)])
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device)).view(-1, 3).sum(0).cpu()
        loss, items, correct = sums.tolist()
        return loss / items, correct / items

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        shutil.rmtree(folder, ignore_errors=True)  # left over from a run that was killed while writing it
        self.model.save(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        write_text(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE, "")
        self._rotate()

    def _rotate(self) -> None:
        """Keep the newest checkpoint and the best one."""
        keep = {self.state.global_step, self.state.best_global_step}
        for step, folder in checkpoints(Path(self.args.output_dir)):
            if step not in keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load_state_dict(load_file(Path(resume_from_checkpoint) / WEIGHTS))

    def _load_best_model(self) -> None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        self.model.load_state_dict(load_file(best / WEIGHTS))


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints in a folder, oldest first, with their steps."""
    found = [
        (int(path.parent.name.rpartition("-")[2]), path.parent) for path in folder.glob(f"checkpoint-*/{COMPLETE}")
    ]
    return sorted(found)
