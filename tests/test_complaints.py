"""What users of other libraries complain of, each shown here not to happen.

Numbers are those of the issues of huggingface/diffusers, unless another repository is named. Where
another file shows it already, docs/faq.md says which test does; it is the index of them all.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cases import GaussianModel, laid_out, randn, reverse_step_case
from ddpm_fast import (
    GaussianDiffusion,
    Sampler,
    checkpoint,
    load,
    ops,
    sample,
    sample_progressive,
)
from ddpm_fast.data import TensorDataset
from ddpm_fast.editing import initial_noise
from ddpm_fast.image_io import save_grid
from ddpm_fast.integrations.schedulers import FusedDDIMScheduler, FusedDDPMScheduler
from ddpm_fast.models import LightweightUNet
from ddpm_fast.solvers import SAMPLERS, ddpm, step_table
from ddpm_fast.training import TrainConfig, train

ROOT = Path(__file__).parent.parent

SHAPE = (3, 2, 5, 7)
DIFFUSION = GaussianDiffusion.from_schedule("linear", 20, beta_end=0.3)
MODEL = GaussianModel(DIFFUSION)


def draw(model: Any = MODEL, shape: tuple[int, ...] = SHAPE, **options: Any) -> Tensor:
    return sample(model, shape, **{"diffusion": DIFFUSION, "seed": 0} | options)


# --- seeds --------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 2**48 - 64))
def test_a_run_does_not_depend_on_its_workers_diffusion_wo_cfg_2(
    shares: list[int], first: int
) -> None:
    """tzco/Diffusion-wo-CFG#2: one node of 4 GPUs and two of 8 gave other samples, another FID."""
    whole = draw(shape=(sum(shares), 2, 3), num_steps=5, first_index=first)
    ends = itertools.accumulate(shares)
    parts = [
        draw(shape=(share, 2, 3), num_steps=5, first_index=first + end - share)
        for share, end in zip(shares, ends, strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_of_a_batch_only_the_networks_rounding_is_seen_issue_2659() -> None:
    """The noise is the same to the bit; a real network rounds otherwise in other batches."""
    model, diffusion = load("digits")
    options: dict[str, Any] = {"diffusion": diffusion, "num_steps": 5, "seed": 0}
    whole = sample(model, (3, 1, 8, 8), **options)
    noise = initial_noise((3, 1, 8, 8), seed=0)
    for first, count in ((0, 1), (1, 2)):
        shape, those = (count, 1, 8, 8), slice(first, first + count)
        assert torch.equal(initial_noise(shape, seed=0, first_index=first), noise[those])
        part = sample(model, shape, first_index=first, **options)
        torch.testing.assert_close(part, whole[those], rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_noise_can_be_the_callers_own_k_diffusion_25_44(sampler: str, backend: str) -> None:
    """A torch.Generator for each picture, as Stable Diffusion's interfaces want: batches agree."""
    table = step_table(DIFFUSION, sampler, 6, eta=0.5 if sampler == "ddim" else 0.0)
    rows = table.to(torch.device("cpu"), torch.float32)

    def drawn(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (1, *SHAPE[1:])

        def noise() -> Tensor:
            return torch.cat([torch.randn(shape, generator=each) for each in generators])

        x = noise()
        for i, t in enumerate(table.timesteps):
            output = MODEL(x, torch.full((len(x),), t))
            step = torch.tensor(i)
            x = ops.reverse_step(x, output, rows, step, noise=noise(), backend=backend)
        return x

    batch = drawn([5, 6, 7])
    assert torch.equal(batch, torch.cat([drawn([5]), drawn([6, 7])]))


def test_a_run_does_not_depend_on_threads_or_layout_issue_1514(native: str) -> None:
    """A whole run of one machine, in every way that it can be computed: the same bytes."""
    shape, before = (2, 3, 65, 33), torch.get_num_threads()

    def channels_last(x: Tensor, t: Tensor) -> Tensor:
        return laid_out(MODEL(x, t), "channels_last")

    expected = draw(shape=shape, num_steps=4, backend=native)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for model in (MODEL, channels_last):
                drawn = draw(model, shape, num_steps=4, backend=native)
                assert torch.equal(drawn, expected)
    finally:
        torch.set_num_threads(before)


def test_no_two_draws_are_alike(backend: str) -> None:
    """Not the same, not shifted, not correlated: seeds 0, 1, ... of samples 0, 1, ... at any step.

    Interfaces that give picture i the seed s + i draw the picture (s + 1, 0) twice.
    """
    numbers = (0, 1)
    z = torch.cat(
        [
            ops.philox_normal(
                (len(numbers), 4096),
                seed=torch.tensor(seed),
                sample_index=torch.tensor(numbers),
                timestep=torch.tensor(timestep),
                stream=stream,
                backend=backend,
            )
            for seed in numbers
            for timestep in numbers
            for stream in numbers
        ]
    ).double()
    # Six standard errors; all shifts at once, by the Fourier transforms.
    spectra = torch.fft.rfft(z)
    correlation = torch.fft.irfft(spectra[:, None] * spectra.conj(), n=4096) / 4096
    itself = torch.arange(len(z))
    correlation[itself, itself, 0] = 0
    assert float(correlation.abs().max()) < 6 * 4096**-0.5


# --- end points ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_black_picture_is_not_written_lucidrains_101(
    sampler: str, backend: str, tmp_path: Path
) -> None:
    """A network gone NaN: others write its pictures as black ones, here the error says which."""

    def network(x: Tensor, t: Tensor) -> Tensor:
        output = MODEL(x, t)
        output[1] = torch.nan
        return output

    drawn = draw(network, (3, 1, 4, 4), sampler=sampler, num_steps=4, backend=backend)
    assert drawn[1].isnan().all() and drawn[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="must not hold NaN; 1 of 3 do, the first at index 1"):
        save_grid(drawn, tmp_path / "black.png")
    assert not list(tmp_path.iterdir())


# --- what the host waits for --------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the ops that read a number back, for which a GPU is waited for, and a network's calls.

    On a GPU itself, TestOnCuda.test_the_host_never_waits sees all that waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal") or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits() -> None:
    with Watch() as watch:
        x = torch.ones(3)
        _ = x[0].item(), bool(x.any()), x.nonzero(), x[x > 0]
    assert watch.seen == ["_local_scalar_dense", "_local_scalar_dense", "nonzero", "index"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 3.0, "class_labels": 1},
        {"known": torch.zeros(SHAPE), "mask": torch.ones(1)},
        {"diffusion": GaussianDiffusion(dynamic_thresholding_ratio=0.9)},
    ],
    ids=["plain", "guided", "inpainting", "thresholding"],
)
def test_nothing_is_read_between_steps_issues_3950_9417_9485_11696(
    sampler: str, options: dict[str, Any], native: str
) -> None:
    """What happens between the first call of the network and the last reads no number back."""
    watch = Watch()

    class Network(nn.Module):
        num_classes = 10

        def forward(self, x: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
            watch.seen.append("network")
            return x * 0.5

    with watch:
        draw(Network(), sampler=sampler, num_steps=8, backend=native, **options)
    first = watch.seen.index("network")
    assert watch.seen[first : first + 8] == ["network"] * 8


# --- threads ------------------------------------------------------------------------------------


def at_once(jobs: list[Callable[[], Any]]) -> list[Any]:
    """The jobs' results, each computed in a thread of its own while the others are."""
    barrier = Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


def one_by_one(jobs: list[Callable[[], Any]]) -> list[Any]:
    return [job() for job in jobs]


def same(results: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


class Noisy(nn.Module):
    """A network whose dropout shows whether another run has put it back into training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.dropout = LightweightUNet(2, 4, 2), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.network(x, t))
        return output


def test_threads_share_a_model_and_a_table_issues_1606_5749(backend: str) -> None:
    """Runs of different lengths and samplers, from one network in training mode."""
    torch.manual_seed(0)
    model = Noisy().train()
    table = step_table(DIFFUSION, "dpmpp_2m", 15)
    samplers = [
        Sampler(model, SHAPE, diffusion=DIFFUSION, sampler=table, backend=backend),
        Sampler(model, SHAPE, diffusion=DIFFUSION, sampler=table, backend=backend),
        Sampler(model, SHAPE, diffusion=DIFFUSION, num_steps=7, backend=backend),
        Sampler(model, SHAPE, diffusion=DIFFUSION, sampler="ddim", eta=1.0, backend=backend),
    ]
    jobs: list[Callable[[], Tensor]] = [
        lambda sampler=sampler, seed=seed: torch.stack(  # type: ignore[misc]
            [sampler(seed=seed, first_index=3 * batch) for batch in range(5)]
        )
        for seed, sampler in enumerate(samplers)
    ]
    jobs += [lambda: draw(model, backend=backend), lambda: draw(model, num_steps=3, seed=9)]
    assert same(at_once(jobs), one_by_one(jobs))
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("fused", [FusedDDPMScheduler, FusedDDIMScheduler])
def test_threads_share_a_drop_in_scheduler_issues_1606_5749(fused: Any) -> None:
    """No step is counted, so none is counted twice. (Only set_timesteps is not to be shared.)"""
    scheduler = fused()
    scheduler.set_timesteps(20)

    def run(seed: int) -> Tensor:
        generator, x = torch.Generator().manual_seed(seed), randn((2 + seed % 2, 1, 8, 8), seed)
        options = {"eta": 1.0} if fused is FusedDDIMScheduler else {}
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x, generator=generator, **options).prev_sample
        return x

    jobs: list[Callable[[], Tensor]] = [lambda seed=seed: run(seed) for seed in range(4)]  # type: ignore[misc]
    assert same(at_once(jobs), one_by_one(jobs))


# --- the rest of the interface ------------------------------------------------------------------


@given(st.integers(0, 2**31), st.booleans(), st.sampled_from(["given", "drawn"]))
def test_each_sample_at_a_timestep_of_its_own_issue_1784(
    seed: int, learned: bool, noise: str
) -> None:
    """Step, seed and noise each of a sample's own: the same bytes as one by one."""
    case = reverse_step_case((4, 2, 3, 5), seed=seed, learned=learned, noise=noise)
    x, output, rows, _ = case.args
    steps = torch.randint(5, (4,), generator=torch.Generator().manual_seed(seed))
    together = ops.reverse_step(x, output, rows, steps, **case.kwargs)
    of_each = ("noise", "sample_index")
    for i, step in enumerate(steps):
        kwargs = {k: v[i : i + 1] if k in of_each else v for k, v in case.kwargs.items()}
        alone = ops.reverse_step(x[i : i + 1], output[i : i + 1], rows, step, **kwargs)
        assert torch.equal(alone, together[i : i + 1])


def test_steps_at_timesteps_of_their_own_carry_gradients_issue_1784(backend: str) -> None:
    """Its author steps within training, examples at different timesteps, and needs a gradient."""
    weight = torch.tensor(0.5, requires_grad=True)
    x, steps = randn(SHAPE, 0), torch.tensor([3, 17, 9])
    table = ddpm(DIFFUSION)
    rows = table.to(torch.device("cpu"), torch.float32)
    stepped = ops.reverse_step(x, weight * x, rows, steps, clip=None, backend=backend)
    stepped.sum().backward()
    columns = dict(zip(ops.ROW, rows[steps].unbind(1), strict=True))
    slope = columns["mean_from_x0"] * columns["x0_from_out"] + columns["mean_from_out"]
    expected = (slope * x.flatten(1).sum(dim=1)).sum()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_yielded_before_the_next_is_computed_issue_9407() -> None:
    """So that a server can send it on at once, and a client that leaves costs nothing more."""
    calls = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return MODEL(x, t)

    steps = sample_progressive(network, SHAPE, diffusion=DIFFUSION, seed=0)
    assert calls == []
    for number, (step, x, pred_xstart) in enumerate(itertools.islice(steps, 3)):
        assert step == number and len(calls) == number + 1
        assert x.shape == pred_xstart.shape == SHAPE
    steps.close()  # type: ignore[attr-defined]
    assert calls == [19, 18, 17]


# --- slow sampling ------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_4000_timesteps_need_not_be_4000_steps_improved_diffusion_34_65(sampler: str) -> None:
    """A network trained with 4000 is asked 100 times, and its samples are still those of its data.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), section 4.
    """
    diffusion = GaussianDiffusion.from_schedule("squaredcos_cap_v2", 4000, clip_denoised=False)
    model, calls = GaussianModel(diffusion, mean=0.3, std=0.2), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return model(x, t)

    x = draw(network, (1, 1, 128, 128), diffusion=diffusion, sampler=sampler, num_steps=100)
    assert len(calls) == 100 and calls == sorted(calls, reverse=True)
    assert float(x.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(x.std()) == pytest.approx(0.2, abs=0.02)


# --- training -----------------------------------------------------------------------------------


def test_averaging_leaves_the_schedule_alone_lucidrains_136(tmp_path: Path) -> None:
    """There the average took in the diffusion's buffers, and DDIM drew black pictures."""
    pictures = TensorDataset(randn((8, 2, 4, 4), 0).clamp(-1, 1))
    config = TrainConfig(num_steps=3, batch_size=4)
    network = LightweightUNet(2, 4, 2)
    path = tmp_path / "m.safetensors"
    train(network, DIFFUSION, pictures, config, out=path, progress=False)
    assert checkpoint.read(path).ema.keys() == dict(network.named_parameters()).keys()
    averaged, diffusion = load(path)
    assert torch.equal(diffusion.betas, DIFFUSION.betas)
    drawn = draw(averaged, (2, 2, 4, 4), diffusion=diffusion, sampler="ddim")
    assert drawn.isfinite().all() and drawn.std() > 0.1


# --- installation -------------------------------------------------------------------------------

ALONE = """
import sys
from importlib.machinery import PathFinder

class Others(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in ("mpi4py", "accelerate", "datasets", "diffusers", "sklearn", "matplotlib"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Others
from ddpm_fast.cli import main
options = "--image-size 4 --model-channels 8 --batch-size 2 --steps 1 --out m.safetensors"
assert main(["train", "pictures", *options.split()]) == 0
assert main(["sample", "--checkpoint", "m.safetensors", "--num", "1", "--steps", "2"]) == 0
"""


@pytest.mark.slow
def test_the_required_packages_are_enough_improved_diffusion_5_24_125(tmp_path: Path) -> None:
    """To train and to sample, without MPI and without anything of the extras."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "pictures" / "red.png")
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples.png").exists()


def test_ninja_comes_with_the_build_xlstm_12() -> None:
    """And is not asked for later: the package never compiles when it is imported or used."""
    assert 'requires = ["setuptools>=64", "ninja"]' in (ROOT / "pyproject.toml").read_text()
    sources = [path.read_text() for path in (ROOT / "ddpm_fast").rglob("*.py")]
    assert sources and not any("cpp_extension" in source for source in sources)
