"""Where a plan is for: how much memory there is, how fast operations are, what they draw.

The time of an operation is taken as

    overhead + FLOPs / rate + bytes / bandwidth                 of products
    overhead + numbers · cost + bytes / bandwidth               of all else

with figures of its dtype: measured on this machine (`veneer.planning.calibration`), or public ones of another
(`DEVICES`), of whose peak rate a share is reached.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from veneer.errors import ConfigError, UnknownName, did_you_mean
from veneer.tracing import Work

REACHED = 0.5
"""Share of a GPU's published peak that training reaches in its products; published runs lie between 0.35 and 0.6."""
STREAMED = 0.8
"""Share of a GPU's published bandwidth that element-wise operations reach."""
LAUNCH = 4e-6
"""Seconds a GPU's operation takes at least."""
HERE = (None, "here", "cpu")
"""Names of this machine."""
_HEAVY = re.compile(
    r"exp|log|silu|gelu|tanh|sigmoid|softmax|pow|rsqrt|sqrt|layer_norm|cos|sin|erf|sort|topk|norm|gated"
)
_DRAWN = re.compile(r"dropout|bernoulli|rand|uniform_|normal_|exponential_")


@dataclass(frozen=True)
class Products:
    """How fast they are.

    Attributes:
        flops: per second.
        streamed: bytes per second that they read and write.
    """

    flops: float
    streamed: float


@dataclass(frozen=True)
class Rates:
    """Of one dtype.

    Attributes:
        products: torch's.
        light: seconds a number in sums, products of numbers, copies.
        heavy: the same in functions such as exp.
        drawn: seconds a random number, as dropout draws for each it sees; far more than `heavy` on processors.
        ours: products by veneer's own forms; None where there are none, or nobody measured.
    """

    products: Products
    light: float
    heavy: float
    drawn: float
    ours: Products | None = None


@dataclass(frozen=True)
class Machine:
    """What a plan is for.

    Attributes:
        name: for people.
        memory: bytes there are.
        rates: by name of a dtype (``float32``, ``bfloat16``).
        overhead: seconds of an operation that does nothing.
        watts: it draws when busy; None where nobody says.
        measured: whether the rates were measured, on this very machine.
        heap: whether what a step makes is on a processor's heap, which holds more than is alive.
        paces: by name of a dtype, how long a step takes by the times of its operations alone; 1 where nobody measured.
    """

    name: str
    memory: int
    rates: Mapping[str, Rates]
    overhead: float
    watts: float | None
    measured: bool
    heap: bool = False
    paces: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, work: Mapping[Work, float]) -> float:
        """Of operations, each so many times, as if each ran alone."""
        return max(sum(self._seconds(each) * times for each, times in work.items()), 0.0)

    def step(self, work: Mapping[Work, float], dtype: torch.dtype) -> float:
        """Seconds of a step of these operations, on a base of this dtype."""
        return self.seconds(work) * self.paces.get(str(dtype).removeprefix("torch."), 1.0)

    def _seconds(self, work: Work) -> float:
        rates = self.rates.get(str(work.dtype).removeprefix("torch."), self.rates["float32"])
        if work.flops:
            products = rates.ours if work.ours and rates.ours else rates.products
            return self.overhead + work.flops / products.flops + work.nbytes / products.streamed
        if _DRAWN.search(work.name):
            return self.overhead + work.numbers * rates.drawn
        return self.overhead + work.numbers * (rates.heavy if _HEAVY.search(work.name) else rates.light)


@dataclass(frozen=True)
class Device:
    """A GPU's public figures.

    Attributes:
        gigabytes: of its memory (2³⁰ bytes).
        teraflops: dense products in 16 bit, by tensor cores.
        teraflops_32: products in float32.
        bandwidth: gigabytes a second.
        watts: its board's limit.
        bfloat16: whether it has units for that.
    """

    gigabytes: int
    teraflops: float
    teraflops_32: float
    bandwidth: float
    watts: int
    bfloat16: bool = True

    def machine(self, name: str) -> Machine:
        """As a machine to plan for."""
        streamed = self.bandwidth * 1e9 * STREAMED
        rates = {}
        for dtype, peak, size in (
            ("bfloat16", self.teraflops, 2), ("float16", self.teraflops, 2), ("float32", self.teraflops_32, 4)
        ):  # fmt: skip
            number = 2.5 * size / streamed
            if self.bfloat16 or dtype != "bfloat16":
                rates[dtype] = Rates(Products(peak * 1e12 * REACHED, streamed), number, number, number)
        return Machine(name, self.gigabytes << 30, rates, LAUNCH, self.watts, measured=False)


DEVICES: Mapping[str, Device] = {
    "rtx-3060": Device(12, 51, 12.7, 360, 170),
    "rtx-3090": Device(24, 71, 35.6, 936, 350),
    "rtx-4080": Device(16, 97, 48.7, 717, 320),
    "rtx-4090": Device(24, 165, 82.6, 1008, 450),
    "rtx-5090": Device(32, 210, 104.8, 1792, 575),
    "rtx-a6000": Device(48, 155, 38.7, 768, 300),
    "rtx-6000-ada": Device(48, 364, 91.1, 960, 300),
    "t4": Device(16, 65, 8.1, 320, 70, bfloat16=False),
    "v100": Device(32, 125, 15.7, 900, 300, bfloat16=False),
    "l4": Device(24, 121, 30.3, 300, 72),
    "a10": Device(24, 125, 31.2, 600, 150),
    "l40s": Device(48, 362, 91.6, 864, 350),
    "a100-40gb": Device(40, 312, 19.5, 1555, 400),
    "a100-80gb": Device(80, 312, 19.5, 2039, 400),
    "h100": Device(80, 989, 66.9, 3350, 700),
    "h200": Device(141, 989, 66.9, 4800, 700),
    "b200": Device(180, 2250, 75, 7700, 1000),
    "mi300x": Device(192, 1307, 163.4, 5300, 750),
}
"""From their makers' data sheets; dense rates, without sparsity."""


def machine(name: str | None = None, *, dtypes: tuple[torch.dtype, ...] = ()) -> Machine:
    """This machine, with measured rates of these dtypes; or another, by name.

    Raises:
        UnknownName: no figures of such a device are known.
    """
    if name in HERE:
        from veneer.planning.calibration import this_machine

        return this_machine(dtypes)
    known = name.lower().replace("_", "-").replace(" ", "-")
    if known not in DEVICES:
        raise UnknownName(
            f"No figures of a device called {name!r}.{did_you_mean(known, DEVICES)} Known: here, {', '.join(DEVICES)}."
        )
    return DEVICES[known].machine(known)


_SIZE = re.compile(r"([0-9]+(?:[.][0-9]+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)
_LEAST = 10**6
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


def parse_size(text: str) -> int:
    """Bytes of ``24GB``, ``1.5 TB``, ``512MiB``.

    Raises:
        ConfigError: it is no size, or less than a megabyte.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found[1]) <= 0:
        raise ConfigError(f"{text!r} is no size of memory; write 24GB, 512MB or 16GiB.")
    size = round(float(found[1]) * _UNITS[(found[2] or "").lower()])
    if size < _LEAST:
        raise ConfigError(f"{text!r} is {size:,} bytes of memory, too few for anything; write the unit, such as 24GB.")
    return size
