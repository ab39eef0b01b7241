"""The runs of a comparison, and where each leaves its result.

runs/ID/spec.json      what is to be run
runs/ID/result.json    what came out; complete or absent, and what makes the run finished
runs/ID/log.txt        what it said meanwhile
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from veneer.errors import OutputError
from veneer.evaluation.comparison.config import CompareConfig, Entry
from veneer.storage import write_json
from veneer.training.config import RunConfig
from veneer.training.facts import changed_data

RUNS, SPEC, RESULT, OUTPUT = "runs", "spec.json", "result.json", "log.txt"
IN_DOMAIN = "test"
"""What the held-out rows of the training data's kind are called."""
TRAIN, VALIDATION, RETENTION = "train", "validation", "retention "
"""Data, as they are called in `Run.spec`; a retention file's path follows."""
PLAIN = "plain base"
PARENT = "VENEER_COMPARE_PARENT"
"""In the environment of a run's process: the number of the process that began it."""


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        name: of its folder.
        entry: the label of its entry.
        kind: ``base`` (nothing is trained), ``search``, ``main`` or ``size``.
        spec: what the process needs to know.
    """

    name: str
    entry: str
    kind: str
    spec: Mapping[str, Any]

    def folder(self, output: Path) -> Path:
        """Where it works."""
        return output / RUNS / self.name

    def on(self, data: Mapping[str, Any]) -> Run:
        """This run with what is known of the data it uses: their rows and hashes, by `checked`."""
        used = [TRAIN, *([VALIDATION] if self.kind != "base" else [])]
        used += [name if name == IN_DOMAIN else further(name) for name in self.spec["tests"]]
        used += [f"{RETENTION}{path}" for path in self.spec["retention"]]
        return replace(self, spec={**self.spec, "data": {part: data[part] for part in used if part in data}})

    def result(self, output: Path) -> dict[str, Any] | None:
        """What came out, if it is finished. One that failed counts whatever its settings were.

        Raises:
            OutputError: the folder holds the result of another run of this name, or of other data.
        """
        path = self.folder(output) / RESULT
        if not path.exists():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("error"):
            return found
        before, now = dict(found["spec"]), json.loads(json.dumps(self.spec))
        seen, there = before.pop("data", None), now.pop("data", None)
        if other := _differing(before, now):
            raise OutputError(
                f"{path.parent} holds a run with other settings ({'; '.join(other[:3])}). Choose another `output`, or "
                f"delete that folder to have it run again."
            )
        if seen and there and (changed := changed_data(seen, there)):  # older results don't tell what they saw
            raise OutputError(
                f"{path.parent} was run on other data: {changed}. Put them back, choose another `output`, or delete "
                f"{path.parent.parent} to have everything run again."
            )
        return found

    def prepare(self, output: Path) -> Path:
        """The folder, with the specification in it, and no result."""
        folder = self.folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT).unlink(missing_ok=True)
        write_json(folder / SPEC, self.spec)
        return folder


def plain_bases(config: CompareConfig, entries: Sequence[Entry]) -> list[Run]:
    """A run for each base, without anything trained."""
    firsts = {entry.config.base: entry for entry in reversed(entries)} if config.baselines else {}
    several = len(firsts) > 1
    found = []
    for base in dict.fromkeys(entry.config.base for entry in entries if entry.config.base in firsts):
        label = f"{PLAIN}, {base}" if several else PLAIN
        found.append(_run(slug(label), label, "base", config, firsts[base].config, seed=0))
    return found


def searches(config: CompareConfig, entries: Sequence[Entry]) -> list[Run]:
    """A run for each learning rate of each entry's search."""
    found = []
    for entry in entries:
        for factor in config.search.factors if config.search else []:
            name, tried = f"{slug(entry.label)}-rate{factor:g}", factor * rate(entry)
            found.append(_run(name, entry.label, "search", config, entry.config, rate=tried))
    return found


def trainings(config: CompareConfig, entries: Sequence[Entry], rates: Mapping[str, float]) -> list[Run]:
    """A run for each entry and seed, the whole data first, then fewer rows; a seed of all entries before the next.

    Args:
        config: of the comparison.
        entries: its lines.
        rates: label -> learning rate.
    """
    sizes: list[int | None] = [None, *(config.sizes.rows if config.sizes else [])]
    found = []
    for size in sizes:
        for seed in range(config.seeds):
            for entry in entries:
                name = slug(entry.label) + ("" if size is None else f"-rows{size}") + f"-seed{seed}"
                kind = "main" if size is None else "size"
                own = entry.config, seed, rates[entry.label], size
                found.append(_run(name, entry.label, kind, config, *own))
    return found


def rate(entry: Entry) -> float:
    """The learning rate an entry takes by itself."""
    return entry.config.train.learning_rate or entry.config.method.learning_rate


def further(name: str) -> str:
    """What held-out rows of another kind are called among the data."""
    return f"out-of-domain {name}"


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", label).strip("-") or "entry"


def _run(
    name: str,
    label: str,
    kind: str,
    config: CompareConfig,
    run: RunConfig,
    seed: int = 0,
    rate: float | None = None,
    rows: int | None = None,
) -> Run:
    plain = run.plain()
    plain.pop("output")
    plain["train"] |= {"seed": seed, "learning_rate": rate}
    if rows is not None and config.sizes:
        plain["data"]["limit"] = rows
        plain["train"] |= {"keep_best": False, **config.sizes.train}
    scored = kind != "search"
    forgetting = config.forgetting and kind == "main"
    tests = {IN_DOMAIN: config.data.test, **config.data.out_of_domain} if scored else {}
    spec = {
        "entry": label,
        "kind": kind,
        "seed": seed,
        "rows": rows,
        "config": plain,
        "tests": tests,
        "test_split": config.data.test_split,
        "test_limit": config.data.test_limit,
        "metric": config.metric if scored else None,
        "forgetting": forgetting,
        "retention": config.retention if forgetting else [],
        "power": config.power,
    }
    return Run(name, label, kind, spec)


def _differing(before: Any, now: Any, key: str = "") -> list[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            told
            for name in dict.fromkeys([*before, *now])
            for told in _differing(before.get(name), now.get(name), f"{key}.{name}".strip("."))
        ]
    return [] if before == now else [f"{key.removeprefix('config.')} was {before}, is {now}"]
