"""What every method learns: is a message a prompt injection? On MiniLM-L6, from 2,000 rows, with three seeds.

    python -m benchmarks.learning                     # all variants × seeds; goes on where it was stopped
    python -m benchmarks.learning --only lora head    # some
    python -m benchmarks.learning --time              # the time of a step of each, with nothing else running
    python -m benchmarks.learning --write             # docs/learning.md and what `veneer advise` rests on

Every registered method with its own defaults and its own learning rate, and some named variants, for equally many
epochs on the same rows; a seed is that of the head, the method's start, and the order of rows. Beside them stand the
frozen base with a trained head alone (`head`) and full fine-tuning (`full`). Each run is a line of
``benchmarks/results/learning.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import veneer
from veneer.data import read
from veneer.errors import VeneerError
from veneer.evaluation.comparison import statistics
from veneer.methods import method_class, methods
from veneer.tasks import adapter_task
from veneer.tasks.sequence_classification import SequenceClassification

BASE, BASE_NAME, DATA = "minilm-l6", "MiniLM", "prompt-injections"
ROWS, EPOCHS, BATCH, LENGTH, SEEDS = 2000, 2, 16, 64, 3
HEAD, FULL = "head", "full"
RESULTS = Path(__file__).parent / "results" / "learning.jsonl"
TIMES = RESULTS.with_name("learning-times.json")
TIMED_STEPS = 8
PAGE = Path(__file__).parent.parent / "docs" / "learning.md"
ADVICE = Path(__file__).parent.parent / "src" / "veneer" / "planning" / "learned.json"
DRAWS = 4000
REASONS = {
    "tokens": "`tokens` trains the embedding of one token here (id 5) and the head, at half the head's own "
    "rate: it is for new tokens, not for a new task.",
    "prompt": "`prompt` changes the input only; its seeds lie far apart (79 % to 88 %).",
    "ptuning": "`ptuning`, as `prompt`, changes the input only.",
    "lora, rank-stabilised, rank 64": "`lora`, rank-stabilised at rank 64, learned nothing in two of three seeds at "
    "LoRA's rate.",
    "lora, OLoRA": "`lora` from OLoRA's start learned nothing in one of three seeds at LoRA's rate (92 % and 95 % in "
    "the others).",
}


@dataclass(frozen=True)
class Variant:
    """A line of the table.

    Attributes:
        name: what it is called there.
        method: the method's name.
        settings: other than its defaults.
        sources: methods of adapters that are trained first, each on its share of the rows, for one that builds on some.
        rate: learning rate, if not the method's own.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    rate: float | None = None


NAMED = (
    Variant("lora, rank 4", "lora", {"rank": 4}),
    Variant("lora, rank-stabilised, rank 64", "lora", {"rank": 64, "rank_stabilized": True}),
    Variant("lora, LoRA+", "lora", {"b_rate": 16}, rate=1e-4),
    Variant("lora, LoRA-FA", "lora", {"freeze_a": True}),
    Variant("lora, PiSSA", "lora", {"init": "pissa"}),
    Variant("lora, OLoRA", "lora", {"init": "olora"}),
    Variant("lora, on q and v", "lora", {"targets": ["q", "v"]}),
    Variant("compacter++", "compacter", {"places": "mlp"}),
    Variant("parallel, width 64", "parallel", {"bottleneck": 64}),
    Variant("conditional, hyper", "conditional", {"mode": "hyper"}),
    Variant("fusion of two pfeiffer", "fusion", sources=("pfeiffer", "pfeiffer")),
    Variant("mix of lora and bitfit", "mix", {"methods": ["lora", "bitfit"]}),
)


def variants() -> list[Variant]:
    """Every method that can do without settings, and those named above."""
    plain = [Variant(name, name, _least(cls)) for name, cls in methods().items() if _least(cls) is not None]
    covered = {variant.method for variant in NAMED if variant.sources}
    return [variant for variant in (*plain, *NAMED) if variant.sources or variant.method not in covered]


def _least(cls: Any) -> Mapping[str, Any] | None:
    """None but its defaults, else those of its example; None where neither will do."""
    for settings in ({}, cls.example):
        with contextlib.suppress(VeneerError):
            cls(**settings)
            return settings
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=(), help="variants or methods")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--held-out", type=int, help="score on so many rows only, to try things out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--time", action="store_true", help="measure the time of a step")
    parser.add_argument("--write", action="store_true", help="write docs/learning.md from the results")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.write:
        lines = results(options.results)
        options.page.write_text(page(lines), encoding="utf-8")
        ADVICE.write_text(learned(lines), encoding="utf-8")
        print(options.page, ADVICE, sep="\n")
        return
    if options.time:
        TIMES.write_text(json.dumps(times(), indent=1) + "\n", encoding="utf-8")
        return
    measure(options)


def times() -> dict[str, float]:
    """Seconds of a training step of each variant, the second of two short runs."""
    training, _ = data(TIMED_STEPS * BATCH, 1)
    base = veneer.load_base(BASE, task=SequenceClassification.name)
    found = {}
    for variant in variants():
        with contextlib.suppress(VeneerError), attached(base, variant, 0, 1, training) as adapter:
            runs = [trained(adapter, training, 1, 0) for _ in range(2)]
            found[variant.name] = runs[1].seconds / runs[1].steps
            print(f"{variant.name}: {1000 * found[variant.name]:.0f} ms", flush=True)
    return found


def measure(options: argparse.Namespace) -> None:
    """Run what is not among the results yet."""
    wanted = set(options.only)
    known = {name for each in variants() for name in (each.name, each.method)}
    if wanted - known:
        raise SystemExit(
            f"no variant called {', '.join(sorted(wanted - known))}; there are: {'; '.join(sorted(known))}"
        )
    chosen = [each for each in variants() if not wanted or wanted & {each.name, each.method}]
    key = {"rows": options.rows, "epochs": options.epochs}
    there = [each for each in results(options.results) if not each.get("error") and key.items() <= each.items()]
    done = {(each["variant"], each["seed"]) for each in there}
    todo = [(each, seed) for seed in range(options.seeds) for each in chosen if (each.name, seed) not in done]
    training, held_out = data(options.rows, options.held_out)
    base = veneer.load_base(BASE, task=SequenceClassification.name)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for number, (variant, seed) in enumerate(todo, 1):
        began = time.perf_counter()
        try:
            found = run(base, variant, seed, options.epochs, training, held_out)
        except VeneerError as error:
            found = {"error": str(error)}
        about = {"variant": variant.name, "method": variant.method, "settings": dict(variant.settings), "seed": seed}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**about, **key, **found}) + "\n")
        told = found.get("error") or f"{found['accuracy']:.4f}, {found['rows_per_second']:.0f} rows/s"
        seconds = time.perf_counter() - began
        rest = (time.perf_counter() - started) / number * (len(todo) - number) / 60
        print(
            f"{number}/{len(todo)} {variant.name}, seed {seed}: {told} ({seconds:.0f} s; {rest:.0f} min left)",
            flush=True,
        )


def data(rows: int, held_out: int | None) -> tuple[Any, Any]:
    """Training rows, and held-out rows none of which occurs in the training data."""
    everything = read(DATA, split="train")
    known = {" ".join(text.lower().split()) for text in everything["text"]}
    test = read(DATA, split="test").filter(lambda row: " ".join(row["text"].lower().split()) not in known)
    test = test.shuffle(seed=0)
    return everything.shuffle(seed=0).select(range(rows)), test.select(range(held_out or len(test)))


def run(base: veneer.Base, variant: Variant, seed: int, epochs: float, training: Any, held_out: Any) -> dict[str, Any]:
    """Train and score one variant with one seed."""
    with attached(base, variant, seed, epochs, training) as adapter:
        rate = variant.rate or adapter.method.learning_rate  # before training settles it as what stays of it
        result = trained(adapter, training, epochs, seed, variant.rate)
        began = time.perf_counter()
        right = right_of(adapter, held_out)
        scoring = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(Path(folder) / "adapter")
            stored = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
        return {
            "accuracy": sum(right) / len(right),
            "right": np.packbits(right).tobytes().hex(),
            "held_out": len(right),
            "trainable": result.trainable,
            "trainable_share": result.trainable_share,
            "stored": stored,
            "stored_share": stored / base.nbytes,
            "learning_rate": rate,
            "seconds": result.seconds,
            "steps": result.steps,
            "rows_per_second": len(training) * epochs / result.seconds,
            "score_seconds": scoring,
        }


def right_of(adapter: veneer.Adapter, rows: Any) -> list[bool]:
    """Whether each row is answered right."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["text"]))  # like lengths: less padding
    adapter.eval()
    answers = adapter_task(adapter).predict(adapter, adapter.base, [rows[index] for index in order], batch_size=64)
    right = [False] * len(rows)
    for index, answer in zip(order, answers, strict=True):
        right[index] = str(rows[index]["label"]) == answer["label"]
    return right


@contextlib.contextmanager
def attached(base: veneer.Base, variant: Variant, seed: int, epochs: float, training: Any) -> Iterator[veneer.Adapter]:
    """A fresh adapter with a fresh head; the base is plain again afterwards."""
    task = SequenceClassification.for_rows(training, base, max_length=LENGTH)

    def fresh(method: veneer.Method, name: str) -> veneer.Adapter:
        return base.attach(method, name, modules=task.head(base, seed=seed), task=task.describe(), seed=seed)

    names = [f"source{number}" for number in range(len(variant.sources))]
    settings = {**variant.settings, **({"adapters": tuple(names)} if names else {})}
    try:
        for number, (name, source) in enumerate(zip(names, variant.sources, strict=True)):
            share = training.shard(len(names), number)
            trained(fresh(method_class(source)(), name), share, epochs, seed)
        yield fresh(method_class(variant.method)(**settings), "adapter")
    finally:
        for name in list(base.adapters):
            base.detach(name)


def trained(adapter: veneer.Adapter, rows: Any, epochs: float, seed: int, rate: float | None = None) -> Any:
    """Train with what is the same for all."""
    settings: dict[str, Any] = {} if rate is None else {"learning_rate": rate}
    with quiet():
        return veneer.train(
            adapter, rows, validation=0, epochs=epochs, batch_size=BATCH, seed=seed, samples=0, **settings
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def results(path: Path) -> list[dict[str, Any]]:
    """What has been measured; of a run measured again, the last; a line cut off by a kill is left out."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            found[line["variant"], line["seed"], line["rows"], line["epochs"]] = line
    return list(found.values())


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def right_answers(runs: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """``[seeds, held-out rows]``, ones where the answer was right."""
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), np.uint8))[: run["held_out"]] for run in runs]
    return np.stack(rows).astype(float)


def difference(ours: np.ndarray, theirs: np.ndarray | None = None, draws: int = DRAWS) -> Estimate:
    """Accuracy, or that over another's on the same rows, by bootstrap over both seeds and rows.

    In each draw the seeds of either and the rows (the same for both) are drawn with replacement. So the interval holds
    for other held-out rows of this kind and other seeds; of few seeds it makes too little rather than too much.
    """
    generator = np.random.default_rng(0)
    rows = ours.shape[1]
    weights = generator.multinomial(rows, np.full(rows, 1 / rows), draws) / rows  # [draws, rows]

    def drawn(right: np.ndarray) -> np.ndarray:
        by_seed = weights @ right.T
        seeds = generator.integers(0, len(right), (draws, len(right)))
        return np.take_along_axis(by_seed, seeds, 1).mean(1)

    values = drawn(ours) - (0 if theirs is None else drawn(theirs))
    mean = ours.mean() - (0 if theirs is None else theirs.mean())
    low, high = np.percentile(values, [2.5, 97.5])
    return Estimate(float(mean), float(low), float(high))


_HEAD = """# What the methods learn

Is a message an attempt to manipulate an AI assistant? `{data}`, {rows:,} training rows, {held_out:,} held-out rows
none of which occurs in the training data; `{base}` (22.7 million parameters), {epochs:g} epochs in batches of {batch},
every method with its own defaults and its own learning rate (LoRA+ with a fifth of LoRA's), {seeds} seeds (of the
head, the method's start and the order of rows; fewer where the last column says so). `mix` is one
of `bitfit` and `norm`.
Written by `python -m benchmarks.learning --write` from what `python -m benchmarks.learning` measured.

*Score* is accuracy, the mean over seeds, with the 95 % interval of a bootstrap over both held-out rows and seeds.
*Over the head* is the difference to the frozen base with a trained head alone, on the same rows, with its interval:
where that reaches down to zero, the method is marked ✗. *Trained* and *stored* count the head (770 numbers), as shares
of the base's parameters and bytes. *Step* is the time of a training step on 2 CPU cores.

*Learning rate* is the method's own default, one for all bases and tasks; nothing was searched for with these runs,
which have no validation rows. Most defaults were not changed once a method was there. Those of `mam`, `unilora`,
`vblora`, `parallel`, `diff-pruning` and `tokens`, and LoRA+'s here, were changed after trials (`mam`'s since one of
three seeds learned nothing at the one before). The trials' rows were not kept apart from this table's, so these scores
may flatter. `veneer compare` with `search` chooses a rate for each method by validation rows.

The intervals are bootstraps over three seeds, which make too little of how far seeds lie apart: `veneer compare` has
wider ones. Methods whose intervals overlap are not told apart here, nor are they shown to be equal.

"""


def of_variants(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each variant, of the rows and epochs that most runs had."""
    good = [line for line in lines if not line.get("error")]
    if not any(line["variant"] == HEAD for line in good):
        raise SystemExit("there are no results of the head alone to compare with: run `python -m benchmarks.learning`")
    usual = max({(line["rows"], line["epochs"]) for line in good}, key=lambda key: _count(good, key))
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for line in good:
        if (line["rows"], line["epochs"]) == usual:
            runs.setdefault(line["variant"], []).append(line)
    return runs


def learned(lines: Sequence[Mapping[str, Any]]) -> str:
    """What `veneer advise` rests on: of each method with its own defaults, its score, whether it beat the head, and by
    how much it was below each that scored higher: the difference paired by seed and row, its 95 % interval, and p
    adjusted for all the methods that are below the same one."""
    runs = of_variants(lines)
    scored = {name: scores_of(own) for name, own in runs.items() if name in methods()}
    means = {name: float(own.values.mean()) for name, own in scored.items()}  # of whole numbers: ties are exact
    names = sorted(scored, key=lambda name: (-means[name], name))
    below: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for place, better in enumerate(names):
        lower = [name for name in names[place + 1 :] if means[name] < means[better]]
        found = {name: statistics.difference(scored[name], scored[better]) for name in lower}
        adjusted = statistics.holm({name: each.p for name, each in found.items() if each})
        for name, each in found.items():
            if each:
                below[name][better] = _rounded((each.mean, each.low, each.high, adjusted[name]))
    rows = []
    for name in names:
        score = difference(right_answers(runs[name]))
        own = {"accuracy": score.mean, "low": score.low, "high": score.high}
        over_head = statistics.difference(scored[name], scored[HEAD])
        beats = name != HEAD and over_head is not None and over_head.low > 0
        told = {key: round(value, 3) for key, value in own.items()}
        rows.append({"method": name, **told, "beats_head": beats, "below": below[name]})
    one, seeds = runs[HEAD][0], len(runs[HEAD])
    on = f"one task ({DATA.replace('-', ' ')}, {BASE_NAME}, {one['rows']:,} rows, {seeds} seeds)"
    listed = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{{"on": {json.dumps(on)},\n "methods": [\n{listed}\n]}}\n'


def scores_of(runs: Sequence[Mapping[str, Any]]) -> statistics.Scores:
    """Right answers by seed and row."""
    runs = sorted(runs, key=lambda run: run["seed"])
    right = right_answers(runs)
    return statistics.Scores(right, np.ones(right.shape[1]), [run["seed"] for run in runs])


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 3) for value in values]


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """docs/learning.md."""
    runs = of_variants(lines)
    head = right_answers(runs[HEAD])
    scores = {name: difference(right_answers(own)) for name, own in runs.items()}
    steps = json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}
    rows, failed = [], []
    for name in sorted(runs, key=lambda name: -scores[name].mean):
        own, score = runs[name], scores[name]
        over = difference(right_answers(own), head)
        beaten = "" if name == HEAD else f"{over.mean:+.1%} ({over.low:+.1%} to {over.high:+.1%})"
        if name != HEAD and over.low <= 0:
            beaten += " ✗"
            failed.append(f"`{name}` ({over.mean:+.1%})")
        first = own[0]
        cells = [
            f"**`{name}`**" if name in (HEAD, FULL) else f"`{name}`",
            f"{score.mean:.1%} ({score.low:.1%}–{score.high:.1%})",
            beaten,
            share(first["trainable_share"]),
            share(first["stored_share"]),
            f"{1000 * steps[name]:.0f} ms" if name in steps else "",
            f"{first['learning_rate']:g}",
            str(len(own)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    one = runs[HEAD][0]
    measured = {"rows": one["rows"], "epochs": one["epochs"], "held_out": one["held_out"], "seeds": len(runs[HEAD])}
    text = _HEAD.format(data=DATA, base=BASE, batch=BATCH, **measured)
    titles = ("method", "score", "over the head", "trained", "stored", "step", "learning rate", "seeds")
    text += f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n" + "\n".join(rows) + "\n"
    if failed:
        text += f"\nNot shown to beat the head alone: {', '.join(failed)}.\n"
        text += (
            "".join(f"\n- {REASONS[name]}" for name in REASONS if any(f"`{name}`" in each for each in failed)) + "\n"
        )
    errors = {line["variant"]: line["error"] for line in lines if line.get("error") and line["variant"] not in runs}
    if errors:
        text += "\nNot run: " + "; ".join(f"`{name}`: {why}" for name, why in errors.items()) + "\n"
    return text


def _count(lines: Sequence[Mapping[str, Any]], key: tuple[Any, Any]) -> int:
    return sum((line["rows"], line["epochs"]) == key for line in lines)


def share(value: float) -> str:
    """A share with two digits."""
    return f"{value * 100:.2g} %" if value < 0.995 else f"{value * 100:.0f} %"


if __name__ == "__main__":
    main()
