"""From benchmark results to the README's table, the page of claims and its plots.

    python -m benchmarks.report [benchmarks/results/NAME.json ...]

Rewrites what stands between the markers in README.md and docs/benchmarks.md, and the pictures in
docs/images/; each figure comes from the JSON files, by default all of speeds that are committed. A
CPU and a GPU may come from different files; the first that has rows of a device counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .claims import NOISE, claims_table, over_bare_network, speed_up
from .plots import draw
from .rows import Results, Row, load

ROOT = Path(__file__).parent.parent
QUALITY_BY_STEPS = "quality-by-steps.json"
BITS_PER_DIM = "bits-per-dim.json"
NEWCOMER = "newcomer.json"
CONTENDERS = {
    "textbook": "eager PyTorch, as textbooks write it",
    "in_place": "eager PyTorch, in place",
    "compiled": "`torch.compile`, noise included",
    "compiled_after_randn": "`torch.compile`, after `torch.randn`",
    "diffusers": "diffusers' `step`",
    "reference": "ddpm_fast without its extension",
    "randn": "`torch.randn` alone, without the step",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the results and rewrite the pages; 0 if that could be done."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="*", type=Path, help="default: all of benchmarks/results")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to write to")
    args = parser.parse_args(argv)
    results = load(args.results or results_of_speed())

    images = args.root / "docs" / "images"
    images.mkdir(exist_ok=True)
    pictures = [path for part in results.values() for path in draw(part, images)]
    replace_between_markers(args.root / "README.md", "speed", speed_tables(results))
    page = args.root / "docs" / "benchmarks.md"
    replace_between_markers(page, "claims", claims_table(results))
    replace_between_markers(page, "machines", machines(results))
    replace_between_markers(page, "plots", gallery(pictures))
    return 0


def results_of_speed() -> list[Path]:
    """All that are committed."""
    committed = (ROOT / "benchmarks" / "results").glob("*.json")
    others = (QUALITY_BY_STEPS, BITS_PER_DIM, NEWCOMER)
    return sorted(path for path in committed if path.name not in others)


def replace_between_markers(page: Path, name: str, text: str) -> None:
    """Put a text between `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: the page has no such markers.
    """
    old = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    new, count = re.subn(
        pattern, lambda found: f"{found[1]}{text}\n{found[2]}", old, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} must have the markers of {name} once; it has them {count} times")
    page.write_text(new, encoding="utf-8")


def speed_tables(results: Mapping[str, Results]) -> str:
    """For each device, the step against its contenders, and the loops against their networks."""
    parts = []
    for part in results.values():
        parts += [f"On {part.machine}, torch {part.versions['torch']}:", step_table(part)]
        parts += [loop_table(part)] if part.find(op="loop") else []
    return "\n\n".join(parts)


def step_table(results: Results) -> str:
    """One reverse step with noise: native in microseconds, the others in multiples of it."""
    native = results.find(**NOISE, contender="native")
    lines = [
        _line(["one step, float32", *(f"{row['elements']:,} elements" for row in native)]),
        _line(["---", *("---:" for _ in native)]),
        _line(["ddpm_fast", *(f"{row['seconds_per_step'] * 1e6:,.1f} µs" for row in native)]),
    ]
    for name, text in CONTENDERS.items():
        rows = {row["elements"]: row for row in results.find(**NOISE, contender=name)}
        if rows:
            cells = [_times(rows.get(row["elements"])) for row in native]
            lines.append(_line([text, *cells]))
    return "\n".join(lines)


def loop_table(results: Results) -> str:
    """Whole chains: steps per second, and each library's time over the bare network's."""
    libraries = ("native", "diffusers", "lucidrains")
    head = ["sampling, time over the bare network's", "steps/s", *libraries]
    lines = [_line(head).replace("native", "ddpm_fast"), _line(["---", *["---:"] * 4])]
    for row in results.find(op="loop", contender="native"):
        chain = {name: row[name] for name in ("network", "batch", "resolution")}
        found = [results.find(op="loop", contender=name, **chain) for name in libraries]
        network = row["network"].replace("_", " ")
        lines.append(
            _line(
                [
                    f"{network}, {row['batch']} × {row['resolution']}²",
                    f"{row['steps_per_sec']:,.0f}",
                    *(f"{over_bare_network(rows[0]):.2f}" if rows else "" for rows in found),
                ]
            )
        )
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _times(row: Row | None) -> str:
    return "" if row is None else f"{speed_up(row):.3g} × as long"


def machines(results: Mapping[str, Results]) -> str:
    """What the figures were measured on, and with."""
    lines = []
    for part in results.values():
        versions = ", ".join(f"{name} {version}" for name, version in part.versions.items())
        lines.append(f"- {part.machine}: commit {part.commit}; {versions}")
    return "\n".join(lines)


def gallery(pictures: Sequence[Path]) -> str:
    """The plots, as they lie beside the page."""
    return "\n\n".join(f"![{path.stem.replace('-', ' ')}](images/{path.name})" for path in pictures)


if __name__ == "__main__":
    sys.exit(main())
