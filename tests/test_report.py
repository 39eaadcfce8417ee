"""From benchmark results to pages: what is written, and which verdicts the claims get."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
MACHINE = {
    "cpu": "A processor",
    "threads": 2,
    "gpu": "A GPU",
    "versions": {"torch": "2.14.1", "diffusers": None},
}


def step_row(contender: str, times_native: float, elements: int = 49_152) -> dict[str, Any]:
    return {
        "op": "reverse_step",
        "kind": "noise",
        "dtype": "float32",
        "contender": contender,
        "device": "cpu",
        "elements": elements,
        "ns_per_element": times_native,
        "seconds_per_step": times_native * elements * 1e-9,
        "copy_share": 0.5 / times_native,
        "over": {"native": times_native},
    }


def loop_row(contender: str, over_bare_network: float) -> dict[str, Any]:
    return {
        "op": "loop",
        "network": "three_convolutions",
        "batch": 1,
        "resolution": 32,
        "contender": contender,
        "device": "cpu",
        "steps_per_sec": 1000.0,
        "over": {"native": over_bare_network / 1.02, "bare_network": over_bare_network},
    }


ROWS = [
    step_row("native", 1.0),
    step_row("textbook", 5.6),
    step_row("in_place", 9.0),
    step_row("in_place", 4.9, 3_145_728),
    step_row("randn", 4.5),
    loop_row("native", 1.02),
    loop_row("lucidrains", 1.2),
]


def pages(folder: Path) -> Path:
    """The pages that a report rewrites, with something old between the markers."""
    (folder / "docs").mkdir()
    (folder / "README.md").write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    parts = ("machines", "claims", "plots")
    page = "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in parts)
    (folder / "docs" / "benchmarks.md").write_text(page)
    return folder


def report(folder: Path, rows: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    content = {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": [{"extra_info": row} for row in rows],
    }
    (folder / "results.json").write_text(json.dumps(content))
    command = [sys.executable, "-m", "benchmarks.report", folder / "results.json"]
    return subprocess.run([*command, "--root", folder], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose pages tell of ROWS."""
    folder = pages(tmp_path_factory.mktemp("reported"))
    run = report(folder, ROWS)
    assert run.returncode == 0, run.stderr
    return folder


def test_the_readme_keeps_all_but_the_table(reported: Path) -> None:
    page = (reported / "README.md").read_text()
    assert page.startswith("before\n<!-- speed -->\n") and page.endswith("<!-- /speed -->\nafter\n")
    assert "old" not in page
    assert "A processor, 2 threads" in page and "A GPU" not in page
    assert "| eager PyTorch, as textbooks write it | 5.6 × as long |" in page
    assert "| three convolutions, 1 × 32² | 1,000 | 1.02 |  | 1.20 |" in page


def test_verdicts_of_the_claims(reported: Path) -> None:
    page = (reported / "docs" / "benchmarks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if " at " in line]
    verdicts = {claim: rest for _, claim, _, *rest in rows}
    assert verdicts["reverse step, against eager as textbooks write it, 49 k"] == ["5.6×", "met"]
    # The worst of the sizes counts.
    assert verdicts["reverse step, against eager in place, 49 k up"] == ["4.9×", "**missed**"]
    assert verdicts["q_sample against eager, 49 k up"] == ["", "unmeasured"]
    assert verdicts["one step in a replayed graph, 3 k"] == ["", "unmeasured (no GPU)"]
    assert "commit 0123456789 and changes; torch 2.14.1" in page


@pytest.mark.parametrize("sizes", [[], [3_072], [3_072, 3_145_728]])
def test_a_plot_for_each_group_that_was_measured(tmp_path: Path, sizes: list[int]) -> None:
    """That of time against size draws lines, which want three points."""
    more = [step_row("native", 1.0, elements) for elements in sizes]
    assert report(pages(tmp_path), ROWS + more).returncode == 0
    names = ["speed-up-bars", "bandwidth-bars", "loop-bars"]
    names += ["time-against-size"] if len(sizes) == 2 else []
    images = {path.name for path in (tmp_path / "docs" / "images").iterdir()}
    assert images == {f"{name}-cpu.png" for name in names}
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert all(f"(images/{name})" in page for name in images)


def test_no_results_leave_every_claim_unmeasured(tmp_path: Path) -> None:
    assert report(pages(tmp_path), []).returncode == 0
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.count("unmeasured (no ") > 20 and "met" not in page


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    (pages(tmp_path) / "README.md").write_text("nothing")
    run = report(tmp_path, ROWS)
    assert run.returncode == 1 and "must have the markers of speed once" in run.stderr
