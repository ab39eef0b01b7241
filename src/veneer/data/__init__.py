"""Data: reading files into rows, rows into one of a few known formats, checking and splitting them."""

from veneer.data.catalogue import DATASETS
from veneer.data.formats import Format, detect
from veneer.data.part import Part, Tokens
from veneer.data.reading import read
from veneer.data.report import DataReport, report
from veneer.data.splitting import split_off

__all__ = ["DATASETS", "DataReport", "Format", "Part", "Tokens", "detect", "read", "report", "split_off"]
