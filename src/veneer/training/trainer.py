"""transformers' Trainer, for an adapter and a task.

What differs: the loss is the task's, averaged over all items of an optimiser step whatever its micro-batches
(8 × 1 equals 1 × 8); validation averages over items, too; what is saved is the adapter folder; a checkpoint
counts only once it is complete.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from veneer.adapters import Adapter
from veneer.adapters.files import restore
from veneer.data.batching import EpochSampler
from veneer.data.formats import TASK
from veneer.errors import TrainingError
from veneer.tasks import Prepared, Task
from veneer.tasks.conditions import conditioned
from veneer.training.allocator import kept_memory
from veneer.training.checkpoints import discard_all_but, whole
from veneer.training.course import Conduct
from veneer.training.distillation import Distillation
from veneer.training.guards import not_finite
from veneer.training.passes import parts

ROWS = "row"
"""Beside a batch's tensors: the index of each example's row."""


class Trainer(transformers.Trainer):
    """Trains an adapter for a task.

    Args:
        adapter: what to train.
        task: what for.
        train: the examples to learn from.
        validation: examples to validate on, or None.
        arguments: transformers' own.
        callbacks: transformers' own.
        conduct: of the method's own course.
        distillation: a teacher to learn from, too. Validation keeps to the task's own loss.
        pass_tokens: tokens in a forward pass at most; 0: no limit.
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
        conduct: Conduct | None = None,
        distillation: Distillation | None = None,
        pass_tokens: int = 0,
    ) -> None:
        self.task = task
        self.pass_tokens = pass_tokens
        self.distillation = distillation
        self.tokens_seen = self.places_seen = 0
        self._rows_of_step: list[int] = []
        self.save_seconds = 0.0  # that the last checkpoint took
        self._penalties: dict[int, list[float]] = {}  # of the steps since the last log
        super().__init__(
            model=adapter,
            args=arguments,
            data_collator=self._collate,
            train_dataset=train.examples,
            eval_dataset=validation.examples if validation else None,
            callbacks=list(callbacks),
        )
        self.remove_callback(transformers.PrinterCallback)
        self._conduct = conduct
        if conduct is not None:
            self.add_callback(conduct)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """With memory kept from step to step, where a processor computes."""
        with kept_memory() if self.args.device.type == "cpu" else contextlib.nullcontext():
            return super().train(*args, **kwargs)

    def _collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of the task's, and the rows it is made of."""
        return {
            **self.task.collate(examples, self.model.base.tokenizer),
            ROWS: torch.tensor([example["row"] for example in examples]),
            TASK: [{TASK: example.get(TASK)} for example in examples],
        }

    @contextlib.contextmanager
    def _told(self, model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Have the model, and its teacher if there is one, act by the tasks of these rows."""
        teacher = self.distillation.teacher if self.distillation is not None else model
        with conditioned(model, rows), conditioned(teacher, rows):
            yield

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; parameters whose method says so learn at a multiple of the rate, in groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        parameters = dict(self.model.named_parameters())
        times = {parameters[key]: rate for key, rate in self.model.rates.items() if rate != 1}
        for group in list(optimizer.param_groups) if times else []:
            for rate in set(times.values()):
                apart = [parameter for parameter in group["params"] if times.get(parameter) == rate]
                if apart:
                    group["params"] = [parameter for parameter in group["params"] if times.get(parameter) != rate]
                    settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
                    optimizer.add_param_group({**settings, "params": apart, "lr": group["lr"] * rate})
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        rows = self.train_dataset if train_dataset is None else train_dataset
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps
        by_length = self.args.train_sampling_strategy == "group_by_length"
        lengths = rows["length"][:] if by_length else None
        return EpochSampler(len(rows), self.args.data_seed or 0, lengths, group)

    def _run_epoch(self, **loop: Any) -> None:
        """As transformers'; but nothing, where a run was cut off after its last step."""
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        if not self.control.should_training_stop:
            super()._run_epoch(**loop)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Items of one optimiser step over all its micro-batches (and processes)."""
        self._rows_of_step = [row for batch in batch_samples for row in batch[ROWS].tolist()]
        items = sum(self.task.items(batch) for batch in batch_samples)
        if self.args.world_size > 1:
            return self.accelerator.gather(torch.tensor(items, device=device)).sum()
        return items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As transformers', for each part of the batch in turn."""
        *before, last = parts(inputs, self.pass_tokens, self.task.by_token)
        with self.accelerator.no_sync(model):  # processes may have other numbers of parts, and meet at the last
            losses = [super(Trainer, self).training_step(model, dict(part), num_items_in_batch) for part in before]
        losses.append(super().training_step(model, dict(last), num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's mean loss.

        Raises:
            TrainingError: it is no finite number; says at which step, on which rows, and the likely cause.
        """
        batch, rows = _split(inputs)
        self.tokens_seen += int(batch["attention_mask"].sum())
        self.places_seen += batch["attention_mask"].numel()
        with self._told(model, inputs[TASK]):
            outcome = (self.distillation or self.task).outcome(model, batch)
        if not torch.isfinite(outcome.loss):
            raise self._not_finite(f"loss is {float(outcome.loss.detach())}", batch, rows)
        loss = outcome.loss / (outcome.items if num_items_in_batch is None else num_items_in_batch)
        if self.model.training and self._conduct is not None and (more := self._conduct.penalty()) is not None:
            penalty = more * outcome.items / (num_items_in_batch or outcome.items)
            self._penalties.setdefault(self.state.global_step, []).append(float(penalty.detach()))
            loss = loss + penalty
        if self.args.world_size > 1:
            loss = loss * self.args.world_size  # DDP averages gradients over processes; the divisor is global
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As transformers'; but a method's penalty is told apart from the loss it was added to."""
        if "loss" in logs and self._penalties:
            penalty = sum(map(sum, self._penalties.values())) / len(self._penalties)
            logs = {**logs, "loss": logs["loss"] - penalty, "penalty": penalty}
            self._penalties = {}
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As transformers'; but an update by a gradient that is no number is never made."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(norm):
            raise self._not_finite(f"gradient's norm is {float(norm)}", None, self._rows_of_step)
        return norm

    def _not_finite(self, what: str, batch: Mapping[str, Tensor] | None, rows: Sequence[int]) -> TrainingError:
        rate = self._get_learning_rate()
        return not_finite(what, self.state.global_step + 1, rate, self.model, self.task, batch, rows)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all items of the validation data, and the task's metrics.

        Raises:
            TrainingError: the loss is no finite number.
        """
        started = time.perf_counter()
        loss, accuracy, apart = self._mean(self.get_eval_dataloader(eval_dataset))
        if not math.isfinite(loss):
            raise TrainingError(
                f"The validation loss is {loss} at step {self.state.global_step}. Likely cause: weights that have "
                "grown too large, so the learning rate is too high.",
                diverged=True,
            )
        metrics = {
            "loss": loss,
            **self.task.metrics(loss, accuracy),
            **({"divergence": apart} if self.distillation is not None else {}),
            "runtime": time.perf_counter() - started,
        }
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    def _mean(self, batches: Any) -> tuple[float, float, float]:
        """Loss, share of hits, and divergence from the teacher, if there is one."""
        self.model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                inputs = _split(self._prepare_inputs(batch))[0]
                with self._told(self.model, batch[TASK]):
                    outcome = self.task.outcome(self.model, inputs)
                    apart = self.distillation.apart(self.model, inputs) if self.distillation is not None else 0.0
                sums += torch.tensor([float(outcome.loss), float(outcome.items), float(outcome.correct), float(apart)])
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device)).view(-1, 4).sum(0).cpu()
        loss, items, correct, divergence = sums.tolist()
        return loss / items, correct / items, divergence / items

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        self.model.save(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As transformers', but complete or absent; then delete all but this and the best one."""
        started = time.perf_counter()
        state, output = self.state, Path(self.args.output_dir)
        target = output / f"checkpoint-{state.global_step}"
        if state.best_global_step:
            state.best_model_checkpoint = str(output / f"checkpoint-{state.best_global_step}")
        self.store_flos()
        together = self.accelerator.wait_for_everyone
        with whole(target, writes=self.args.should_save, together=together) as folder:
            if self.args.should_save:
                self._save(str(folder))
                if self._conduct is not None:
                    self._conduct.save(folder)
                state.save_to_json(str(folder / TRAINER_STATE_NAME))
            together()
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            discard_all_but(output, {state.global_step, state.best_global_step})
        self.save_seconds = time.perf_counter() - started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore(self.model, Path(resume_from_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers'; but of the steps only whose weights the method is content with."""
        if self._conduct is not None and self.state.global_step < self._conduct.final_from:
            return False
        return bool(super()._determine_best_metric(metrics, trial))

    def _load_best_model(self) -> None:
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        restore(self.model, best)


def _split(inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[int]]:
    """A batch as the task made it, and its rows."""
    return {name: value for name, value in inputs.items() if name not in (ROWS, TASK)}, inputs[ROWS].tolist()
