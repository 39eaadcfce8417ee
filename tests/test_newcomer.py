"""The page that walks from a folder of pictures to samples: what it shows is what is run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from ddpm_fast import cli
from ddpm_fast.data import ImageFolder

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "your-own-images.md"


@pytest.fixture
def newcomer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import newcomer

    return newcomer


def test_the_page_shows_the_commands_that_are_timed(newcomer: ModuleType) -> None:
    shown = newcomer.commands_of({newcomer.TRAIN: 0.0, newcomer.SAMPLE: 0.0})
    assert shown in PAGE.read_text()


def test_the_commands_of_the_page_are_understood() -> None:
    text = PAGE.read_text().replace(" \\\n", " ")
    commands = re.findall(r"^ddpm-fast (.*)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        cli._parser().parse_args(shlex.split(command))


def test_pictures_are_of_ten_classes_and_many_colours(newcomer: ModuleType, tmp_path: Path) -> None:
    assert newcomer.write_pictures(tmp_path) == 1797
    dataset = ImageFolder(tmp_path, newcomer.IMAGE_SIZE, class_labels=True)
    assert (len(dataset), dataset.num_classes) == (1797, 10)
    with Image.open(dataset.files[0]) as first, Image.open(dataset.files[-1]) as last:
        assert first.size == last.size == (newcomer.IMAGE_SIZE, newcomer.IMAGE_SIZE)
        assert first.getpixel((0, 0)) != last.getpixel((0, 0))


def test_times_and_pictures_are_written(
    newcomer: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(command: str, folder: Path) -> float:
        assert (folder / "pictures" / "0" / "0000.png").exists()
        Image.new("RGB", (4, 4), "red").save(folder / "samples.png")
        return 61.0 if " train " in command else 7.0

    monkeypatch.setattr(newcomer, "timed", timed)
    for folder in ("docs/images", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    page = tmp_path / "docs" / PAGE.name
    page.write_text(PAGE.read_text())
    assert newcomer.main(["--root", str(tmp_path)]) == 0
    assert "training took 61 s and sampling 7 s" in page.read_text()
    result = json.loads((tmp_path / "benchmarks" / "results" / "newcomer.json").read_text())
    assert result["seconds"] == {newcomer.TRAIN: 61.0, newcomer.SAMPLE: 7.0}
    assert {path.name for path in (tmp_path / "docs" / "images").iterdir()} == {
        "your-own-pictures.png",
        "your-own-samples.png",
    }
