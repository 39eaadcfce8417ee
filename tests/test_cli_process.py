"""The command line as a process: exit codes, interruption, and progress bars on a terminal only."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from ddpm_fast import GaussianDiffusion, checkpoint
from ddpm_fast.models import LightweightUNet

pytestmark = pytest.mark.slow  # each starts a Python that imports torch

COMMAND = [sys.executable, "-m", "ddpm_fast"]
SAMPLE = "sample --checkpoint model.safetensors --image-size 128 --num 1 --device cpu"
TRAIN = "train pictures --image-size 8 --model-channels 8 --batch-size 2 --out trained.safetensors"
UNDER_WAY = re.compile(r" [1-9]\d*/\d+ \[")  # a bar, after its first step


@pytest.fixture(autouse=True)
def current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, whose whole chain takes long, and with two pictures."""
    checkpoint.save(tmp_path / "model.safetensors", LightweightUNet(), GaussianDiffusion())
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (f"{SAMPLE} --steps 2", 0),
        (f"{TRAIN} --steps 2 --device cpu", 0),
        ("sample --config no.toml", 2),
    ],
)
def test_exit_codes_and_no_bar_on_a_pipe(line: str, code: int) -> None:
    done = subprocess.run([*COMMAND, *line.split()], capture_output=True, text=True)
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0)
    errors = [text for text in done.stderr.splitlines() if "warning: " not in text]
    assert len(errors) == (1 if code else 0)
    assert all(text.startswith("ddpm-fast: error: ") for text in errors)


@pytest.mark.parametrize("line", [SAMPLE, f"{TRAIN} --device cpu"], ids=["sample", "train"])
def test_a_bar_on_a_terminal_and_an_interruption(line: str, current_folder: Path) -> None:
    before = sorted(current_folder.iterdir())
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # else it has no width
    process = subprocess.Popen([*COMMAND, *line.split()], stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    said = ""
    for text in read(ours):
        was_under_way = UNDER_WAY.search(said)
        said += text
        if UNDER_WAY.search(said) and not was_under_way:
            process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate()
    assert UNDER_WAY.search(said)
    assert process.returncode == 130
    assert stdout == b""
    last = said.splitlines()[-1]
    if line is SAMPLE:
        assert last == "ddpm-fast: interrupted"
        assert sorted(current_folder.iterdir()) == before, "nothing half done is left"
    else:
        assert re.fullmatch(r"ddpm-fast: training stopped at step \d+ of .*; resume .*", last)
        assert checkpoint.read("trained.safetensors").step > 0


def read(terminal: int) -> Iterator[str]:
    """What is written to a terminal, until all who write have closed it."""
    with os.fdopen(terminal, "rb", buffering=0) as file:
        while True:
            try:
                text = file.read(1024)
            except OSError:  # how Linux says that the other side is closed
                return
            if not text:
                return
            yield text.decode()
