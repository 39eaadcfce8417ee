"""The page of quality against steps: what is measured, what is kept, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import quality_by_steps

    # They take minutes.
    monkeypatch.setattr(quality_by_steps, "measured", run)
    monkeypatch.setattr(quality_by_steps, "draw", lambda runs, folder: None)
    return quality_by_steps


def run(sampler: str, steps: int, labelled: float = 0.99, commit: str = "new") -> dict[str, Any]:
    values = {
        "labelled as asked": (labelled, True),
        "  by another classifier": (0.5, True),
        "Fréchet distance": (1.5, False),
        "  to the training half": (1.0, True),
        "nearest neighbour": (0.9, True),
    }
    return {
        "options": {"sampler": sampler, "steps": steps},
        "figures": {n: {"name": n, "value": v, "met": met} for n, (v, met) in values.items()},
        "machine_info": {"cpu": "A processor", "threads": 2, "versions": {"torch": "2.14.1"}},
        "commit_info": {"id": commit, "dirty": False},
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    parts = ("target", "quality")
    page = "".join(f"<!-- {name} -->\nstale\n<!-- /{name} -->\n" for name in parts)
    (tmp_path / "docs" / "samplers.md").write_text(page)
    return tmp_path


def commits(checkout: Path) -> dict[tuple[str, int], str]:
    content = json.loads((checkout / "benchmarks/results/quality-by-steps.json").read_text())
    return {
        (r["options"]["sampler"], r["options"]["steps"]): r["commit_info"]["id"] for r in content
    }


@pytest.mark.parametrize(("options", "kept"), [((), True), (("--fresh",), False)])
def test_runs_that_are_there_are_kept(
    by_steps: ModuleType, checkout: Path, options: tuple[str, ...], kept: bool
) -> None:
    from benchmarks.runs import write

    old = {("ddim", 10): run("ddim", 10, commit="old")}
    write(checkout / "benchmarks/results/quality-by-steps.json", old)
    assert by_steps.main([*options, "--root", str(checkout)]) == 0
    found = commits(checkout)
    assert found.keys() == {(name, steps) for name in by_steps.SAMPLERS for steps in by_steps.STEPS}
    assert found.pop(("ddim", 10)) == ("old" if kept else "new")
    assert set(found.values()) == {"new"}
    lines = (checkout / "docs" / "samplers.md").read_text().splitlines()
    assert "stale" not in lines
    assert sum("commit" in line for line in lines) == (2 if kept else 1)


def test_a_run_is_written_before_the_next_begins(
    by_steps: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_steps, "measured", until("dpmpp_2m"))
    with pytest.raises(KeyboardInterrupt):
        by_steps.main(["--root", str(checkout)])
    assert commits(checkout) == {("ddpm", 5): "new", ("ddim", 5): "new"}


def until(name: str) -> Callable[[str, int], dict[str, Any]]:
    def measured(sampler: str, steps: int) -> dict[str, Any]:
        if sampler == name:
            raise KeyboardInterrupt
        return run(sampler, steps)

    return measured


@pytest.mark.parametrize(("labelled", "verdict"), [(0.96, "met"), (0.95, "**missed**")])
def test_the_target(by_steps: ModuleType, labelled: float, verdict: str) -> None:
    found = by_steps.target({("dpmpp_2m", 20): run("dpmpp_2m", 20, labelled)})
    assert "at least 96 %" in found and found.endswith(f"{100 * labelled:.1f} %, {verdict}.")


def test_the_table_tells_what_misses_its_bound(by_steps: ModuleType) -> None:
    runs = {(name, n): run(name, n) for name in by_steps.SAMPLERS for n in by_steps.STEPS}
    row = "| `ddpm` | 5 | 99.0 % | 50.0 % | 1.500 **missed** | 1.000 | 0.900 |"
    assert row in by_steps.table(runs).splitlines()


def test_the_page_is_up_to_date(by_steps: ModuleType) -> None:
    from benchmarks.runs import read

    runs = read(ROOT / "benchmarks" / "results" / "quality-by-steps.json", by_steps.key)
    page = (ROOT / "docs" / "samplers.md").read_text()
    parts = by_steps.target(runs), by_steps.table(runs), by_steps.origin(runs.values())
    assert all(part in page for part in parts)
