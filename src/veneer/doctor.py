"""What this machine has, and whether veneer works on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from packaging.version import Version

from veneer.errors import VeneerError
from veneer.packages import offline
from veneer.storage import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

TESTED = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "safetensors": "0.8.0",
    "peft": "0.21.2",
}
"""The versions the tests run with."""
OPTIONAL = {
    "peft": "exchange of configs with peft",
    "optuna": "veneer sweep",
    "trl": "preference tuning with TRL's trainers",
    "tensorboard": "train.trackers=[tensorboard]",
    "mlflow": "train.trackers=[mlflow]",
    "wandb": "train.trackers=[wandb]",
    "trackio": "train.trackers=[trackio]",
}
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)
_LEAST_MEMORY, _LEAST_DISK = 2e9, 2e9
_HUB_TIMEOUT = 4.0


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        section: what it belongs to.
        name: what was looked at.
        ok: whether it is well; None where there is nothing to be judged.
        found: what is there.
        advice: what to do, if it is not well.
        essential: whether nothing will work without it.
    """

    section: str
    name: str
    ok: bool | None
    found: str
    advice: str = ""
    essential: bool = False


def examine() -> Iterator[Check]:
    """All checks, one by one; the training comes last and takes about ten seconds."""
    for section in (_machine, _versions, _arithmetic, _cache, _hub, _extras, _training):
        try:
            yield from section()
        except ImportError as error:
            advice = "Install it again, e.g. pip install --force-reinstall " + (error.name or "veneer").split(".")[0]
            yield Check(
                "versions", error.name or "import", False, f"cannot be imported: {error}", advice, essential=True
            )


def _machine() -> Iterator[Check]:
    section = "machine"
    yield Check(section, "system", None, f"{platform.system()} {platform.release()}, {platform.machine()}")
    version, advice = platform.python_version(), "veneer needs Python 3.11 or newer."
    yield Check(section, "Python", sys.version_info >= (3, 11), version, advice, essential=True)
    cores, threads = psutil.cpu_count(logical=False) or 0, psutil.cpu_count() or 0
    flags = _cpu_flags()
    known = ", ".join(flag for flag in _INSTRUCTIONS if flag in flags)
    yield Check(section, "CPU", None, f"{cores} cores, {threads} threads" + (f"; {known}" if known else ""))
    memory = psutil.virtual_memory()
    enough, found = memory.available >= _LEAST_MEMORY, f"{_gb(memory.available)} free of {_gb(memory.total)}"
    advice = "Close other programs; take a small base, train.batch_size=1 and train.checkpointing=true."
    yield Check(section, "memory", enough, found, advice)


def _arithmetic() -> Iterator[Check]:
    import torch

    from veneer.bases.loading import fast_bfloat16
    from veneer.kernels import native

    section = "torch"
    yield Check(section, "CPU", None, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    fast = fast_bfloat16(torch.device("cpu"))
    yield Check(section, "bfloat16 on the CPU", None, "fast" if fast else "slow here: dtype=auto takes float32 instead")
    yield Check(section, "forms in C", native.there() or None, native.state())
    yield from _gpus(section)


def _gpus(section: str) -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found = f"{torch.cuda.get_device_name(index)}, {_gb(free)} free of {_gb(total)}"
            yield Check(section, f"GPU {index}", True, found)
    elif torch.backends.mps.is_available():
        yield Check(section, "GPU", True, "Apple (MPS)")
    elif shutil.which("nvidia-smi"):
        advice = f"torch {torch.__version__} cannot use it: install a torch built for CUDA (see pytorch.org)."
        yield Check(section, "GPU", False, "an NVIDIA driver is here, but torch sees no GPU", advice)
    else:
        yield Check(section, "GPU", None, "none: everything runs on the CPU")


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _cpu_flags() -> set[str]:
    """Instruction sets, where the kernel tells them (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return set(line.partition(":")[2].split())
    return set()


def _versions() -> Iterator[Check]:
    least = _least()
    for name, tested in TESTED.items():
        version = _installed(name)
        if version is None:
            if name in least:
                yield Check("versions", name, False, "not installed", f"pip install {name}=={tested}", essential=True)
            continue
        lowest = least.get(name, "0")
        found = version if Version(version).public == tested else f"{version} (tested: {tested})"
        if Version(version) < Version(lowest):
            advice = f"veneer needs {name} {lowest} or newer: pip install '{name}>={lowest}'"
            yield Check("versions", name, False, found, advice, essential=True)
        elif Version(version).release[:2] > Version(tested).release[:2]:
            advice = f"Newer than what is tested; if something is odd, try pip install {name}=={tested}"
            yield Check("versions", name, False, found, advice)
        else:
            yield Check("versions", name, True, found)


def _least() -> dict[str, str]:
    """The lowest version of each library that veneer's own metadata allows."""
    from packaging.requirements import Requirement

    found = {}
    for text in importlib.metadata.requires("veneer") or ():
        requirement = Requirement(text)
        lowest = [part.version for part in requirement.specifier if part.operator == ">="]
        if lowest and requirement.marker is None:
            found[requirement.name] = lowest[0]
    return found


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> Iterator[Check]:
    from veneer.bases.catalogue import CATALOGUE
    from veneer.data.catalogue import DATASETS

    folder = cache_dir()
    advice = "Make it writable, or have VENEER_CACHE name another folder."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield Check("cache", "folder", True, f"{folder}, {_gb(used)}")
    except OSError as error:
        yield Check("cache", "folder", False, f"{folder}: {error.strerror or error}", advice, essential=True)
        return
    free = shutil.disk_usage(folder).free
    yield Check(
        "cache", "disk", free >= _LEAST_DISK, f"{_gb(free)} free", "Make room, or have VENEER_CACHE name another disk."
    )
    bases = [entry.name for entry in CATALOGUE.values() if entry.cached]
    data = [entry.name for entry in DATASETS.values() if entry.folder.is_dir()]
    yield Check("cache", "holds", None, ", ".join([*bases, *data]) or "no bases yet: `veneer models` lists some")


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or offline():
        name = "VENEER_OFFLINE" if offline() else "HF_HUB_OFFLINE"
        yield Check("network", "hub", None, f"offline mode ({name} is set): only what is cached can be loaded")
        return
    advice = (
        "Catalogued bases (`veneer models`) and model folders work without it. Behind a mirror, set HF_ENDPOINT; "
        "without a network, HF_HUB_OFFLINE=1 spares the waiting."
    )
    error = _unreachable(constants.ENDPOINT)
    found = f"{constants.ENDPOINT} " + ("answers" if error is None else f"cannot be reached ({error})")
    yield Check("network", "hub", error is None, found, advice)


def _unreachable(address: str) -> Exception | None:
    """Why nothing answers there, or None if something does."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_HUB_TIMEOUT):
            return None
    except urllib.error.HTTPError:
        return None  # an answer all the same
    except (OSError, ValueError) as error:
        return error


def _extras() -> Iterator[Check]:
    for name, what in OPTIONAL.items():
        version = _installed(name) or _installed(f"{name}-skinny")
        yield Check(
            "extras", name, True if version else None, version or f"not installed; for {what}: pip install {name}"
        )


def _training() -> Iterator[Check]:
    """A tiny base learns to count, and every promise about adapters is kept on this machine."""
    section = "ten-second training"
    trial = _Trial()
    steps: tuple[tuple[str, Callable[[], str]], ...] = (
        ("learns", trial.learns),
        ("saves and loads", trial.saves_and_loads),
        ("merges", trial.merges),
        ("leaves the base alone", trial.leaves_the_base_alone),
    )
    for name, step in steps:
        try:
            yield Check(section, name, True, step())
        except (VeneerError, RuntimeError, OSError, ValueError, AssertionError) as error:
            advice = "Compare the versions above with the tested ones; then report it with this output (--json)."
            first = (str(error).splitlines() or [""])[0]
            yield Check(section, name, False, f"{type(error).__name__}: {first}", advice, essential=True)
            return


class _Trial:
    """One small training, and what must hold after it. Each step raises if it doesn't."""

    def __init__(self) -> None:
        from veneer.adapters import Base
        from veneer.bases.synthetic import tiny_decoder
        from veneer.methods import method_from_config
        from veneer.methods.registry import DEFAULT

        made = tiny_decoder()
        self.base = Base(made.model, made.tokenizer, name=made.name)
        self.before = {name: value.clone() for name, value in self.base.model.state_dict().items()}
        self.adapter = self.base.attach(method_from_config(DEFAULT), "trial")

    def learns(self) -> str:
        """The loss falls, by the training that `veneer train` uses."""
        from veneer.bases.synthetic import WORDS
        from veneer.training import progress, train

        rows = [
            {"prompt": f"next {word} :", "completion": f" {after}"}
            for word, after in zip(WORDS, (*WORDS[1:], WORDS[0]), strict=True)
        ]
        quiet, progress.console.quiet = progress.console.quiet, True
        try:
            result = train(self.adapter, rows * 8, validation=rows, epochs=6, learning_rate=1e-2, samples=0)
        finally:
            progress.console.quiet = quiet
        assert result.before is not None
        assert result.after is not None
        first, last = result.before["loss"], result.after["loss"]
        if not last < first / 2:
            raise RuntimeError(f"the loss did not fall: {first:.3f} → {last:.3f}")
        return f"loss {first:.2f} → {last:.2f} in {result.steps} steps, {result.seconds:.0f} s"

    def saves_and_loads(self) -> str:
        """What is loaded computes what was saved."""
        import torch

        from veneer.adapters import Base
        from veneer.bases.synthetic import tiny_decoder

        with tempfile.TemporaryDirectory(prefix="veneer-") as folder:
            path = Path(folder) / "adapter"
            self.adapter.save(path)
            made = tiny_decoder()
            again = Base(made.model, made.tokenizer, name=made.name).load(path)
            written = sum(file.stat().st_size for file in path.iterdir())
        if not torch.equal(self._logits(again), self._logits(self.adapter)):
            raise RuntimeError("a loaded adapter gives other results than the one that was saved")
        return f"bit for bit the same ({written:,} bytes)"

    def merges(self) -> str:
        """Merged weights compute what the adapter computes, which is not what the base computes."""
        adapted = self._logits(self.adapter)
        changed = float((adapted - self._logits(self.base.model)).abs().max())
        off = float((adapted - self._logits(self.adapter.merged())).abs().max())
        if not off < 1e-3 < changed:
            raise RuntimeError(f"merged weights are off by {off:.1e}, where the adapter changes {changed:.1e}")
        return f"merged ≡ adapted to {off:.0e}; the adapter changes logits by {changed:.1f}"

    def leaves_the_base_alone(self) -> str:
        """After detaching, weights and names are those from before."""
        import torch

        self.base.detach("trial")
        after = self.base.model.state_dict()
        if after.keys() != self.before.keys() or not all(torch.equal(after[k], v) for k, v in self.before.items()):
            raise RuntimeError("the base's weights have changed")
        return "every weight of the base is what it was"

    def _logits(self, model: Any) -> Tensor:
        import torch

        ids = torch.arange(4, 16, device=self.base.device)[None]
        with torch.no_grad():
            return model(input_ids=ids).logits
