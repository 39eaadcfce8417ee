"""Who trains: ours, plain PyTorch's loop, and lucidrains' trainer; and a check that each one does.

All train the same network on the same pictures, which are in memory, with Adam, clipped gradients
and weights averaged at every step. A call is `STEPS` steps.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from contenders import Contender
from ddpm_fast import GaussianDiffusion
from ddpm_fast.bench.checking import WrongResult, check_standard_normal
from ddpm_fast.data import TensorDataset
from ddpm_fast.image_io import save_images
from ddpm_fast.models import UNet
from ddpm_fast.processes import Processes
from ddpm_fast.training import TrainConfig, digits_recipe
from ddpm_fast.training.run import Run

Call = Callable[[], object]
STEPS = 4
ENDLESS = 10**9


@dataclass(frozen=True)
class TrainingProblem:
    """The digits' recipe, but for the rise of the learning rate, which lucidrains has not."""

    network: UNet
    diffusion: GaussianDiffusion
    dataset: TensorDataset
    config: TrainConfig

    def shuffled_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels, epoch after epoch, by PyTorch's generator."""
        assert self.dataset.labels is not None
        while True:
            for indices in torch.randperm(len(self.dataset)).split(self.config.batch_size):
                if len(indices) == self.config.batch_size:
                    yield self.dataset.images[indices], self.dataset.labels[indices]


def training_problem(*, dropout: bool = True) -> TrainingProblem:
    """The recipe's; without dropout a step follows from what the network is given."""
    network, diffusion, dataset, config = digits_recipe(
        warmup_steps=0, num_steps=ENDLESS, checkpoint_every=ENDLESS
    )
    assert isinstance(dataset, TensorDataset)
    if not dropout:
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return TrainingProblem(network.train(), diffusion, dataset, config)


# --- the contenders ---------------------------------------------------------------------------


def native(p: TrainingProblem) -> Call:
    """What `ddpm_fast.training.train` does for a step; and its look at the loss, in each call."""
    run = Run(p.network, p.diffusion, p.dataset, p.config, torch.device("cpu"), Processes())

    def steps() -> None:
        for _ in range(STEPS):
            run.advance()
        run.recent()

    return steps


def plain(p: TrainingProblem, *, fused: bool | None = None) -> Call:
    """The loop that a good user of PyTorch writes; nothing is read back within it."""
    network, config = p.network, p.config
    abar = torch.cumprod(1 - p.diffusion.betas, dim=0)
    signal, spread = (table.float().view(-1, 1, 1, 1) for table in (abar.sqrt(), (1 - abar).sqrt()))
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=fused)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    batches = p.shuffled_batches()

    def step() -> None:
        images, labels = next(batches)
        t = torch.randint(len(abar), (len(images),))
        noise = torch.randn_like(images)
        labels = labels.masked_fill(torch.rand(len(images)) < config.label_dropout, 10)
        loss = F.mse_loss(network(signal[t] * images + spread[t] * noise, t, labels), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        optimizer.step()
        ema.update_parameters(network)

    return lambda: [step() for _ in range(STEPS)]


def plain_fused(p: TrainingProblem) -> Call:
    """The same with Adam's fused kernel, which is not its default."""
    return plain(p, fused=True)


def lucidrains(p: TrainingProblem) -> Call:
    """Its `Trainer.train`, whose batches come from memory instead of from its DataLoader."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    network, config = p.network, p.config
    diffusion = GaussianDiffusion(
        _Unlabelled(network),
        image_size=network.image_size,
        timesteps=p.diffusion.num_timesteps,
        objective="pred_noise",
        beta_schedule="linear",
    )
    with tempfile.TemporaryDirectory() as folder:
        save_images(p.dataset.images[:100], folder)  # it wants to see a hundred
        trainer = Trainer(
            diffusion,
            folder,
            train_batch_size=config.batch_size,
            train_lr=config.learning_rate,
            adam_betas=(0.9, 0.999),
            max_grad_norm=config.grad_clip,
            ema_decay=config.ema_decay,
            ema_update_every=1,
            save_and_sample_every=ENDLESS,
            calculate_fid=False,
            results_folder=folder,
        )
    trainer.dl = ((images + 1) / 2 for images, _ in p.shuffled_batches())

    def steps() -> None:
        trainer.train_num_steps = trainer.step + STEPS
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train()

    return steps


class _Unlabelled(nn.Module):
    """A network as lucidrains' GaussianDiffusion calls it; all labels are the null label."""

    self_condition = random_or_learned_sinusoidal_cond = False

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network, self.channels, self.out_dim = (
            network,
            network.in_channels,
            network.in_channels,
        )

    def forward(self, x: Tensor, t: Tensor, x_self_cond: None) -> Tensor:
        return self.network(x, t)


TRAINERS = {
    "plain": Contender(plain),
    "plain_fused": Contender(plain_fused),
    "lucidrains": Contender(lucidrains, needs="denoising_diffusion_pytorch"),
    "native": Contender(native, drawn_by="counter"),
}


# --- what is checked before they are timed ------------------------------------------------------


class Seen(NamedTuple):
    """What the network was given in a step, what it said, and the loss's gradient in that."""

    x_t: Tensor
    t: Tensor
    labels: Tensor
    output: Tensor
    gradient: list[Tensor]

    def noise(self) -> Tensor:
        """What the output was compared with: the gradient of a mean of squares tells."""
        return self.output - self.gradient[0] * self.output.numel() / 2


def check_training(p: TrainingProblem, steps: Call) -> None:
    """The first call must be DDPM's training of pictures of the data set, and change the weights
    as Adam does it in a loop of our own that gives the network the same.

    Raises:
        WrongResult: it is not.
    """
    start = copy.deepcopy(p.network)
    reference, seen = copy.deepcopy(start), watched(p.network, steps)
    if len(seen) != STEPS:
        raise WrongResult(f"{len(seen)} steps, not {STEPS}")
    optimizer = torch.optim.Adam(reference.parameters(), lr=p.config.learning_rate)
    for step in seen:
        check_input(p, step)
        optimizer.zero_grad()
        F.mse_loss(reference(step.x_t, step.t, step.labels), step.noise()).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), p.config.grad_clip)
        optimizer.step()
    first, found, expected = (
        nn.utils.parameters_to_vector(network.parameters()).detach()
        for network in (start, p.network, reference)
    )
    error = float((found - expected).norm() / (expected - first).norm())
    if not error < 0.01:
        raise WrongResult(f"the weights' change differs from the reference's by {error:.2g} of it")


def watched(network: UNet, steps: Call) -> list[Seen]:
    """What goes through a network in a call."""
    seen = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        x_t, t, *labels = *args, *kwargs.values()
        null = torch.full_like(t, network.num_classes)
        gradient: list[Tensor] = []
        output.register_hook(gradient.append)
        seen.append(Seen(x_t, t, *(labels or [null]), output.detach(), gradient))

    with network.register_forward_hook(note, with_kwargs=True):
        steps()
    return seen


def check_input(p: TrainingProblem, step: Seen) -> None:
    """x_t must be a noised picture, with that noise, and the label the picture's own or none."""
    noise, labels = step.noise(), p.dataset.labels
    assert labels is not None
    abar = torch.cumprod(1 - p.diffusion.betas, dim=0)[step.t].float().view(-1, 1, 1, 1)
    pictures = (step.x_t - (1 - abar).sqrt() * noise) / abar.sqrt()
    distance, nearest = torch.cdist(pictures.flatten(1), p.dataset.images.flatten(1)).min(dim=1)
    null = step.labels == p.dataset.num_classes
    if not distance.max() < 0.05 or not (null | (step.labels == labels[nearest])).all():
        raise WrongResult("the network was given what is no noised picture, or another's label")
    check_standard_normal(noise, pictures)
