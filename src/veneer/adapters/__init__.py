"""Adapters: attaching methods to a base, choosing which acts, and keeping them in files."""

from veneer.adapters.adapter import Adapter
from veneer.adapters.base import Base

__all__ = ["Adapter", "Base"]
