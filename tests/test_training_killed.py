"""Training whose processes are killed: SIGKILL gives no warning, and nothing but the last step."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_fast import checkpoint
from ddpm_fast.training import train
from small_training import (
    Child,
    children,
    commands,
    curves,
    environments,
    exit_codes,
    quick_recipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def killed_until_done(out: Path, chance: random.Random, **options: object) -> int:
    """Train in processes that are killed in or after one of their steps; how many were killed."""
    kills = 0
    child = Child(out, **options)
    while child.goes_on(batches=chance.randint(1, 7)):
        time.sleep(chance.uniform(0, 0.1))
        child.kill()
        kills += 1
        child = Child(out, **options)
    assert exit_codes(child) == [0]
    return kills


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "num_steps"), [(0, 12), (1, 60), (2, 60)])
def test_a_killed_run_goes_on_to_the_same_weights_bit_for_bit(
    tmp_path: Path, seed: int, num_steps: int
) -> None:
    options = {"num_steps": num_steps, "checkpoint_every": 3, "lr_schedule": "cosine"}
    whole = train(*quick_recipe(**options), out=tmp_path / "whole.safetensors", progress=False)
    killed = tmp_path / "killed.safetensors"
    assert killed_until_done(killed, random.Random(seed), **options) >= num_steps // 6
    assert killed.read_bytes() == whole.read_bytes()


def same_weights(found: Path, wanted: Path) -> None:
    ours, theirs = checkpoint.read(found), checkpoint.read(wanted)
    assert ours.step == theirs.step
    for name, weight in theirs.model.items():
        torch.testing.assert_close(ours.model[name], weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(ours.ema[name], theirs.ema[name], rtol=1e-3, atol=1e-4)


def same_losses(found: Path, wanted: Path, steps: list[int]) -> None:
    """Each point of the curve is a mean over the steps since the one before."""
    ours, theirs = curves(found)["loss"], curves(wanted)["loss"]
    assert [step for step, _ in ours] == [step for step, _ in theirs] == steps
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-3)


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on_as_one_would(tmp_path: Path) -> None:
    """They show the same pictures with the same noise, so only the sums are rounded otherwise."""
    options = {"deterministic": True, "num_steps": 20, "batch_size": 5}
    logs, logs_of_two = tmp_path / "logs", tmp_path / "logs-of-two"
    whole = train(
        *quick_recipe(**options),
        out=tmp_path / "whole.safetensors",
        progress=False,
        log_dir=logs,
    )
    out = tmp_path / "two.safetensors"
    first, second = children(2, out, log_dir=logs_of_two, **options)
    first.release()
    assert second.goes_on(batches=9)
    second.kill()
    assert exit_codes(first) != [0]
    assert checkpoint.read(out).step == 5
    assert exit_codes(*children(2, out, log_dir=logs_of_two, **options)) == [0, 0]
    same_weights(out, whole)
    same_losses(logs_of_two, logs, steps=[5, 10, 15, 20])


@pytest.mark.slow
def test_the_number_of_processes_may_change(tmp_path: Path) -> None:
    options = {"deterministic": True, "num_steps": 10}
    whole = train(*quick_recipe(**options), out=tmp_path / "whole.safetensors", progress=False)
    out = tmp_path / "two.safetensors"
    assert exit_codes(*children(2, out, **(options | {"num_steps": 5}))) == [0, 0]
    train(*quick_recipe(**options), out=out, resume=True, progress=False)
    same_weights(out, whole)


SCRIPT = """
import sys, torch, weakref
import torch.distributed as dist
from ddpm_fast.training import train
from small_training import quick_recipe

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
train(*quick_recipe(deterministic=True), out=f"{folder}/two.safetensors", progress=False)
assert dist.is_initialized()
group = weakref.ref(dist.group.WORLD)
dist.destroy_process_group()
assert group() is None  # nor are there its threads, which could abort the process at its end
"""


@pytest.mark.slow
def test_a_group_that_is_there_is_joined(tmp_path: Path) -> None:
    whole = train(*quick_recipe(deterministic=True), out=tmp_path / "whole.safetensors")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    same_weights(tmp_path / "two.safetensors", whole)


def torchrun(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """``ddpm-fast train`` in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*launch, "-m", "ddpm_fast", "train", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_torchrun_trains_resumes_and_ends_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(tmp_path / "pictures" / f"{i}.png")
    small = "--device cpu --image-size 8 --channels 1 --model-channels 8 --batch-size 4"
    arguments = ("pictures", "--out", "m.safetensors", *small.split())

    done = torchrun(*arguments, "--steps", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "trained to step 2" in line]
    assert len(told) == 1 and "on 2 processes of cpu in" in told[0]

    again = torchrun(*arguments, "--steps", 3, folder=tmp_path)  # both find the file
    sentence = "ddpm-fast: error: m.safetensors: exists already; resume it, or choose another path"
    assert again.returncode != 0 and again.stderr.count(sentence) == 1
    assert again.stderr.count("ddpm-fast: error: ") == 1

    picture = tmp_path / "pictures" / "3.png"  # one of the two will find it
    picture.write_bytes(bytes(picture.stat().st_size))  # another size would be another data set
    broken = torchrun(*arguments, "--steps", 9, "--resume", folder=tmp_path)
    sentence = "ddpm-fast: error: pictures/3.png: cannot be read as a picture"
    assert broken.returncode != 0 and broken.stderr.count(sentence) == 1
    assert broken.stderr.count("ddpm-fast: error: ") == 1
    assert checkpoint.read(tmp_path / "m.safetensors").step == 2


@pytest.mark.slow
def test_that_a_process_was_killed_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = "train digits --device cpu --out m.safetensors --batch-size 4 --checkpoint-every 1"
    left, killed = commands(command, environments(2), tmp_path)
    while not (tmp_path / "m.safetensors").exists() and left.poll() is None:
        time.sleep(0.01)
    killed.kill()
    _, told = left.communicate(timeout=300)
    killed.communicate()
    assert left.returncode == 2, told
    assert "Traceback" not in told
    assert told.endswith("ddpm-fast: error: the connection to another process was lost\n")
