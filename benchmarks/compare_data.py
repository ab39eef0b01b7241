"""The data of ``compare-smollm2.yaml``: messages with the question of the demonstration, and the verdict as JSON.

python -m benchmarks.compare_data runs/compare-data
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from veneer.data import read
from veneer.demo import PROMPT
from veneer.storage import write_text

LONGEST = 400
"""Characters of a message; longer ones are left out."""
PARTS = {
    "train": ("prompt-injections", "train"),
    "validation": ("prompt-injections", "validation"),
    "test": ("prompt-injections", "test"),
    "jailbreaks": ("jailbreaks", "test"),
}


def verdict(label: str | int) -> str:
    return json.dumps({"injection": bool(int(label))})


def main(folder: Path) -> None:
    for name, (source, split) in PARTS.items():
        rows = [row for row in read(source, split=split) if len(row["text"]) <= LONGEST]
        lines = [{"prompt": PROMPT.format(text=row["text"]), "completion": verdict(row["label"])} for row in rows]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(folder / f"{name}.jsonl", len(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
