"""Running code on shapes alone: what it would hold and do, before there is any number; knows tensors only."""

from veneer.tracing.ledger import Ledger, Moment, Work
from veneer.tracing.shapes import shapes_only

__all__ = ["Ledger", "Moment", "Work", "shapes_only"]
