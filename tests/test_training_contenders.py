"""The benchmark of training refuses to time what is not DDPM's training. No test times."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sklearn")

from ddpm_fast.bench.checking import WrongResult
from ddpm_fast.data import TensorDataset
from training_contenders import (
    TrainingProblem,
    check_training,
    native,
    plain,
    plain_fused,
    training_problem,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def problem() -> TrainingProblem:
    whole = training_problem(dropout=False)
    return replace(whole, config=replace(whole.config, batch_size=16))


@pytest.mark.parametrize("trainer", [plain, plain_fused, native])
def test_trainers_are_right(problem: TrainingProblem, trainer: object) -> None:
    torch.manual_seed(0)
    check_training(problem, trainer(problem))


@pytest.mark.parametrize("changes", [{"learning_rate": 2e-3}, {"grad_clip": 1e-9}])
def test_another_step_is_refused(problem: TrainingProblem, changes: dict[str, float]) -> None:
    other = replace(problem, config=replace(problem.config, **changes))
    with pytest.raises(WrongResult, match="the weights' change differs"):
        check_training(problem, plain(other))


@pytest.mark.parametrize("wrong", ["pictures", "labels"])
def test_other_data_are_refused(problem: TrainingProblem, wrong: str) -> None:
    images, labels = problem.dataset.images, problem.dataset.labels
    assert labels is not None
    given = (images / 2, labels) if wrong == "pictures" else (images, (labels + 1) % 10)
    other = replace(problem, dataset=TensorDataset(*given, num_classes=10))
    with pytest.raises(WrongResult, match="no noised picture, or another's label"):
        check_training(problem, plain(other))


def test_dropout_is_seen(problem: TrainingProblem) -> None:
    other = replace(training_problem(), config=problem.config)
    with pytest.raises(WrongResult, match="the weights' change differs"):
        check_training(other, plain(other))


def test_steps_are_counted(problem: TrainingProblem) -> None:
    with pytest.raises(WrongResult, match="0 steps, not 4"):
        check_training(problem, lambda: None)
