"""Whole chains: the same network, batch and number of steps in every library's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from conftest import Race
from contenders import LOOPS
from ddpm_fast.bench.checking import check_loop
from ddpm_fast.bench.contenders import LoopProblem, bare_network, loop_problem, native_loop
from ddpm_fast.models import LightweightUNet, UNet
from grid import marks


def three_convolutions() -> nn.Module:
    return LightweightUNet()


def small_unet() -> nn.Module:
    """The paper's network, narrow and shallow enough for a CPU."""
    return awake(UNet(model_channels=32, channel_mult=(1, 2), num_res_blocks=1))


def paper_unet_bf16() -> nn.Module:
    """The paper's network for CIFAR-10 as a GPU likes it: bfloat16, channels_last."""
    return awake(UNet.cifar10()).to(torch.bfloat16, memory_format=torch.channels_last)


def awake(network: UNet) -> UNet:
    """An untrained U-Net predicts zero; with small weights instead of none it does not."""
    for weight in network.parameters():
        if weight.dim() > 1 and not weight.any():
            nn.init.normal_(weight, std=0.02)
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    network.__name__: network for network in (three_convolutions, small_unet, paper_unet_bf16)
}


@dataclass(frozen=True)
class Chain:
    """What is drawn: ``batch`` square RGB pictures, in so many steps."""

    network: str
    batch: int
    resolution: int
    steps: int
    device: str

    def patience(self, contender: str) -> int:
        """Between the smallest network and our loop a percent is in question, else many."""
        if self.device == "cuda":
            return 2  # nobody else is on it
        close = self.network == "three_convolutions" and self.batch == 1
        return 40 if close and contender == "native" else 8

    def __str__(self) -> str:
        return f"{self.network}-{self.batch}-{self.resolution}-{self.device}"

    def problem(self) -> LoopProblem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = NETWORKS[self.network]()
        shape = (self.batch, 3, self.resolution, self.resolution)
        return loop_problem(network, shape, self.steps, device=torch.device(self.device))


SHORT = [
    Chain("three_convolutions", 1, 32, 50, "cpu"),
    Chain("small_unet", 1, 16, 25, "cpu"),
    Chain("three_convolutions", 1, 32, 200, "cuda"),
    Chain("three_convolutions", 16, 32, 200, "cuda"),
    Chain("three_convolutions", 64, 32, 200, "cuda"),
    Chain("paper_unet_bf16", 16, 32, 50, "cuda"),
]
FULL = [
    Chain("three_convolutions", 2, 32, 50, "cpu"),
    Chain("three_convolutions", 8, 32, 25, "cpu"),
    Chain("three_convolutions", 32, 32, 25, "cpu"),
    Chain("three_convolutions", 1, 64, 50, "cpu"),
    Chain("three_convolutions", 1, 128, 25, "cpu"),
    Chain("small_unet", 4, 16, 25, "cpu"),
    Chain("small_unet", 1, 32, 25, "cpu"),
    Chain("three_convolutions", 4, 32, 200, "cuda"),
    Chain("three_convolutions", 16, 128, 200, "cuda"),
    Chain("paper_unet_bf16", 1, 32, 50, "cuda"),
    Chain("paper_unet_bf16", 64, 32, 50, "cuda"),
    Chain("paper_unet_bf16", 16, 64, 50, "cuda"),
]


@pytest.mark.parametrize(
    "chain", [pytest.param(c, id=str(c), marks=marks(c.device, c in SHORT)) for c in SHORT + FULL]
)
@pytest.mark.parametrize("name", LOOPS)
def test_loop(race: Race, chain: Chain, name: str) -> None:
    problem = chain.problem()
    loop = LOOPS[name].prepare(problem)
    check_loop(problem, loop, drawn_by=LOOPS[name].drawn_by)
    race(
        loop,
        {"native": native_loop(problem), "bare_network": bare_network(problem)},
        device=problem.device,
        group=(
            f"loop, {chain.network.replace('_', ' ')}, batch {chain.batch}, "
            f"{chain.resolution}x{chain.resolution}, {chain.device}"
        ),
        steps=chain.steps,
        patience=chain.patience(name),
        op="loop",
        network=chain.network,
        batch=chain.batch,
        resolution=chain.resolution,
        contender=name,
    )
