"""The page of bits per dimension: what is measured, what is kept, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark_of_bits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bits_per_dim

    return bits_per_dim


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    page = "<!-- bits-per-dim -->\nstale\n<!-- /bits-per-dim -->\n"
    (tmp_path / "docs" / "evaluation.md").write_text(page)
    return tmp_path


def test_a_run_is_measured_written_and_kept(
    benchmark_of_bits: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_of_bits, "STEPS", (1, 2))
    command = ["--pictures", "3", "--root", str(checkout)]
    assert benchmark_of_bits.main(command) == 0
    results = checkout / "benchmarks" / "results" / "bits-per-dim.json"
    runs: list[dict[str, Any]] = json.loads(results.read_text())
    assert [(run["part"], run["steps"]) for run in runs] == [
        (part, steps) for steps in (1, 2) for part in ("held_out", "train")
    ]
    for run in runs:
        assert run["total"] == pytest.approx(run["prior"] + sum(run["terms"]), rel=1e-4)
        assert run["pictures"] == 3 and math.isfinite(run["standard_error"])
        assert len(run["terms"]) == len(run["timesteps"]) == run["steps"]
    assert "stale" not in (checkout / "docs" / "evaluation.md").read_text()
    assert (checkout / "docs" / "images" / "bits-per-dim.png").exists()

    def unexpected(*arguments: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(benchmark_of_bits, "measured", unexpected)
    assert benchmark_of_bits.main(command) == 0


def test_independent_pixels_cost_less_than_levels_alone(benchmark_of_bits: ModuleType) -> None:
    assert 2 < benchmark_of_bits.independent_pixels() < math.log2(17)


def test_the_page_is_up_to_date(benchmark_of_bits: ModuleType) -> None:
    from benchmarks.runs import read

    results = ROOT / "benchmarks" / "results" / "bits-per-dim.json"
    runs = read(results, benchmark_of_bits.key)
    page = (ROOT / "docs" / "evaluation.md").read_text()
    assert benchmark_of_bits.report(runs) in page
