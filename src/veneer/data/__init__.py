"""Data: reading files into rows, and rows into one of a few known formats."""

from veneer.data.catalogue import DATASETS
from veneer.data.formats import Format, detect
from veneer.data.reading import read, split_off

__all__ = ["DATASETS", "Format", "detect", "read", "split_off"]
