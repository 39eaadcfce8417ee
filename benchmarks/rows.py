"""The rows of committed results: pytest-benchmark's JSON, as benchmarks/conftest.py writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
"""What a benchmark recorded: op, contender, device, dtype, elements, over, ..."""


class Results(NamedTuple):
    """What was measured on one device: a CPU or a GPU."""

    device: str
    machine: str
    versions: dict[str, str]
    commit: str
    rows: list[Row]

    def find(self, **wanted: Any) -> list[Row]:
        """The rows with these values; a function as value is a condition.

        Smallest first; loops as they were measured, from the smallest network up.
        """
        found = [row for row in self.rows if _fits(row, wanted)]
        return sorted(found, key=lambda row: row.get("elements", 0))


def _fits(row: Row, wanted: dict[str, Any]) -> bool:
    for name, value in wanted.items():
        if name not in row or not (value(row[name]) if callable(value) else row[name] == value):
            return False
    return True


def load(paths: Sequence[Path]) -> dict[str, Results]:
    """The results of each device, "cpu" and "cuda": the first file that has rows of it."""
    found: dict[str, Results] = {}
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        for device in sorted({row["device"] for row in rows} - found.keys()):
            found[device] = _results(device, content, [r for r in rows if r["device"] == device])
    return found


def _results(device: str, content: dict[str, Any], rows: list[Row]) -> Results:
    machine, commit = content["machine_info"], content["commit_info"]
    cpu = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return Results(
        device=device,
        machine=machine["gpu"] if device == "cuda" else cpu,
        versions={name: version for name, version in machine["versions"].items() if version},
        commit=commit["id"][:10] + (" and changes" if commit["dirty"] else ""),
        rows=rows,
    )
