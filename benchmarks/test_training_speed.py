"""Training of the digits: the recipe's network and batch in every trainer."""

from __future__ import annotations

import pytest
import torch

from conftest import Race
from ddpm_fast.training import digits_recipe
from training_contenders import STEPS, TRAINERS, check_training, native, training_problem

pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full if name == "plain" else ()) for name in TRAINERS],
)
def test_training(race: Race, name: str) -> None:
    problem = training_problem(dropout=False)
    check_training(problem, TRAINERS[name].prepare(problem))
    race(
        TRAINERS[name].prepare(training_problem()),
        {"native": native(training_problem())},
        device=torch.device("cpu"),
        group="training, digits",
        steps=STEPS,
        patience=2 if name == "native" else 40,  # they differ by a few percent
        op="train",
        network="digits",
        batch=digits_recipe().config.batch_size,
        contender=name,
    )
