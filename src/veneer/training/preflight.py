"""Before the first step: what the data are like, one example as it will be learned, and whether it all fits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from rich.console import Console
from rich.text import Text

from veneer.adapters import Adapter
from veneer.data import DataReport, Part
from veneer.deltas import Tokens
from veneer.errors import ConfigError, DataError
from veneer.tasks import Checked, Prepared, Task, check_data
from veneer.training.forecast import forecast
from veneer.training.progress import duration, peak_memory, size
from veneer.training.rehearsal import KINDS
from veneer.training.settings import TrainSettings

_TIMED = 3
"""Steps that are timed, after a first one that pays for warming up."""
_SHOWN = 400
"""Characters of each piece of the example."""
_ERROR = 0.25
"""By how much a forecast of memory may be too high."""


def preflight(
    adapter: Adapter,
    task: Task,
    parts: Sequence[Part],
    settings: TrainSettings,
    *,
    max_truncated: float,
    console: Console,
) -> tuple[Checked, dict[str, Any] | None]:
    """Check everything that can be known before the first step, and show it.

    Returns:
        The data, checked and prepared, and the `forecast` of what is going to be held.

    Args:
        adapter: what will be trained.
        task: what for.
        parts: the rows, training first.
        settings: of the loop.
        max_truncated: share of the rows that may be cut or left out.
        console: where to show it.

    Raises:
        DataError: the data have errors that training refuses to start over.
        ConfigError: nothing would be trained, or memory clearly won't do.
    """
    if not adapter.trainable:
        raise ConfigError(
            f"Nothing would be trained: {adapter.method.name} has no trainable parameters here; choose another method "
            "or other method.targets."
        )
    for said in adapter.method.remarks(adapter.sites):
        console.print(f"note: {said}", markup=False)
    checked = check_data(task, adapter.base, parts, max_truncated=max_truncated, say=console.print)
    for line in checked.report.lines():
        console.print(line, markup=False)
    refuse(checked.report)
    for finding in checked.report.findings:
        console.print(f"[yellow]warning:[/yellow] {finding.part}: ", end="")
        console.print(finding.message, markup=False)
    training = checked.prepared[parts[0].name]
    if unmet := unmet_tokens(adapter, training):
        console.print("[yellow]warning:[/yellow] training: ", end="")
        console.print(
            f"{', '.join(unmet)} {'occur' if len(unmet) > 1 else 'occurs'} in no row, so {adapter.method.name} learns "
            "nothing of what that means. Is it spelt in the text as the tokenizer has it?",
            markup=False,
        )
    check_markers(adapter, checked)
    planned = forecast(adapter, task, training, settings)
    check_memory(planned, adapter.device, console)
    show_example(task, checked.parts[parts[0].name], adapter.base.tokenizer, console)
    return checked, planned


def refuse(report: DataReport) -> None:
    """Raises DataError if a report has findings that training refuses to start over."""
    refused = [f"{finding.part}: {finding.message}" for finding in report.findings if finding.refused]
    if len(refused) == 1:
        raise DataError(f"The data are not fit to learn from. {refused[0]}")
    if refused:
        raise DataError("The data are not fit to learn from:\n" + "\n".join(f"  - {each}" for each in refused))


def unmet_tokens(adapter: Adapter, training: Prepared) -> list[str]:
    """The tokens whose own parameters are trained and which no example has, as the tokenizer writes them."""
    unmet = set(adapter.method.meets())
    for examples in training.examples.iter(1000) if unmet else ():
        unmet.difference_update(*examples["input_ids"])
    return [f"{adapter.base.tokenizer.decode([token])!r} (token {token})" for token in sorted(unmet)]


def check_markers(adapter: Adapter, checked: Checked) -> None:
    """Raises DataError if rows lack the markers that the adapter's virtual tokens are to stand at."""
    deltas = adapter.lower(training=False).values()
    tokens = next((delta for delta in deltas if isinstance(delta, Tokens) and delta.marker is not None), None)
    if tokens is None or tokens.marker is None:
        return
    marker, wanted = int(tokens.marker), len(tokens.slots)
    name = adapter.base.tokenizer.decode([marker])
    for part, prepared in checked.prepared.items():
        examples = prepared.examples
        pairs = zip(examples["row"][:], examples["input_ids"][:], strict=True)
        lacking = [row for row, ids in pairs if ids.count(marker) < wanted]
        if lacking:
            raise DataError(
                f"{part}: {len(lacking)} of {len(examples)} examples have fewer markers {name} than the {wanted} slots "
                f"that {adapter.method.name} has, the first at {checked.parts[part].where(lacking[:1])}. Put them into "
                "the text, early enough not to be cut off, or set method.slots to as many as there are."
            )


def show_example(task: Task, training: Part, tokenizer: Any, console: Console) -> None:
    """Print a row as the model will get it, the first that is whole: what is learned in colour, or in ⟦ ⟧ where there
    are no colours."""
    tokens = training.tokens
    lost = {*tokens.truncated.tolist(), *tokens.dropped.tolist()} if tokens else set()
    chosen = next((index for index in range(len(training.rows)) if index not in lost), 0)
    marked = not console.is_terminal or console.no_color
    text = Text()
    for piece, learned in task.pieces(training.rows[chosen], tokenizer):
        shown = _shortened(piece)
        text.append(f"⟦{shown}⟧" if learned and marked else shown, style="bold green" if learned else "dim")
    console.print(f"{training.where([chosen])}, as the model gets it; ", end="", markup=False)
    console.print(Text("what is in ⟦ ⟧ is learned:" if marked else "green is learned:", "" if marked else "bold green"))
    console.print(Text("\n").join(Text("  ") + line for line in text.split("\n")))


def _shortened(text: str) -> str:
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} … {text[-half:]}"


def check_memory(planned: Mapping[str, Mapping[str, int]] | None, device: torch.device, console: Console) -> None:
    """Tell what a step is going to hold.

    Raises:
        ConfigError: that is clearly more than there is.
    """
    if planned is None:
        return
    step, free = planned["training"], available_memory(device)
    need = step["total"] - step["weights"] - step.get("adapter", 0)  # these are there already
    parts = sorted(((value, name) for name, value in step.items() if name in KINDS), reverse=True)
    most = ", ".join(f"{name} {size(value)}" for value, name in parts[:3])
    told = f"{step['rows']} rows of up to {step['tokens']:,} tokens: {most}"
    if need * (1 - _ERROR) <= free:
        total = size(step["total"])
        console.print(f"plan: a step holds about {total} of tensors ({told}); {size(free)} free", markup=False)
        return
    raise ConfigError(
        f"A step needs about {size(need)} of memory besides base and adapter, but {size(free)} are free ({told}). "
        "Lower train.batch_size (and raise train.accumulation), train.pass_tokens or task.max_length, or set "
        "train.checkpointing=true."
    )


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken, on the GPU where training is on one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return min(free, _container_memory())


def _container_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container's limit leaves, which the machine's own figures don't tell; cached files can be let go."""
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    return 1 << 62 if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))


class Pace(transformers.TrainerCallback):
    """Times the first steps and says how long all of them will take."""

    def __init__(self, device: torch.device, console: Console) -> None:
        self.device, self.console = device, console
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the watch."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, and tell once enough was timed; of a run that is over at once, nothing."""
        if len(self.seconds) > _TIMED:
            return
        self.seconds.append(time.perf_counter() - self._began)
        left = state.max_steps - state.global_step
        if len(self.seconds) <= _TIMED or left <= _TIMED:
            return
        step = sum(self.seconds[1:]) / _TIMED
        self.console.print(
            f"pace: {step:.2g} s a step, about {duration(step * left)} for the {left:,} steps left, validations apart; "
            f"{size(peak_memory())} of memory held, {size(available_memory(self.device))} free"
        )
