"""veneer: parameter-efficient fine-tuning. Thin trainable layers over one frozen model.

Names are imported when first used, so that ``import veneer`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from veneer.lazy import lazy

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "veneer.adapters",
    "Base": "veneer.adapters",
    "HeadOnly": "veneer.methods.head",
    "LoRA": "veneer.methods.lora",
    "Method": "veneer.methods",
    "Trainer": "veneer.training",
    "evaluate": "veneer.evaluation",
    "factorize": "veneer.bases.factorize",
    "from_peft": "veneer.methods.peft_config",
    "load_adapter": "veneer.tasks",
    "load_base": "veneer.tasks",
    "predict": "veneer.evaluation",
    "train": "veneer.training",
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from veneer.adapters import Adapter as Adapter
    from veneer.adapters import Base as Base
    from veneer.bases.factorize import factorize as factorize
    from veneer.evaluation import evaluate as evaluate
    from veneer.evaluation import predict as predict
    from veneer.methods import Method as Method
    from veneer.methods.head import HeadOnly as HeadOnly
    from veneer.methods.lora import LoRA as LoRA
    from veneer.methods.peft_config import from_peft as from_peft
    from veneer.tasks import load_adapter as load_adapter
    from veneer.tasks import load_base as load_base
    from veneer.training import Trainer as Trainer
    from veneer.training import train as train


__getattr__ = lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted(__all__)
