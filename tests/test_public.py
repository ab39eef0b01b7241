from __future__ import annotations

import veneer
from veneer import errors


def test_exported_names() -> None:
    assert veneer.__all__ == [
        "__version__", "Adapter", "Base", "HeadOnly", "LoRA", "Method", "Trainer", "evaluate", "factorize", "from_peft",
        "load_adapter", "load_base", "predict", "train",
    ]  # fmt: skip
    for name in veneer.__all__:
        assert getattr(veneer, name)
    assert "LoRA" in dir(veneer)


def test_every_error_is_in_the_tree_and_refines_a_standard_one() -> None:
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    found = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert len(found) >= 10
    for error in found:
        assert issubclass(error, errors.VeneerError)
        assert error is errors.VeneerError or issubclass(error, ValueError | OSError | LookupError | ArithmeticError)
        assert error.__name__ in (errors.__doc__ or "")
