"""Runs that take long: each is kept in a file as soon as it is done, so that none is done twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]
Key = tuple[str, int]
"""What is measured, and in how many steps."""

Runs = dict[Key, Run]


def completed(
    path: Path,
    wanted: Iterable[Key],
    measured: Callable[[str, int], Run],
    key: Callable[[Run], Key],
    *,
    fresh: bool,
) -> Runs:
    """The runs of a file, after those that it lacks are measured; all of them if ``fresh``."""
    runs = {} if fresh or not path.exists() else read(path, key)
    for missing in wanted:
        if missing not in runs:
            runs[missing] = measured(*missing)
            write(path, runs)
    return runs


def read(path: Path, key: Callable[[Run], Key]) -> Runs:
    """The runs so far."""
    runs: list[Run] = json.loads(path.read_text(encoding="utf-8"))
    return {key(run): run for run in runs}


def write(path: Path, runs: Runs) -> None:
    """All runs, one a line."""
    lines = ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs.values())
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
