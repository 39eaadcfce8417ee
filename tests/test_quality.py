"""The measures of sample quality, against real digits."""

from __future__ import annotations

import numpy as np
import pytest

import quality

pytest.importorskip("sklearn")


def test_nearest_distances() -> None:
    queries, references = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 3.5]])
    np.testing.assert_allclose(quality.nearest_distances(queries, references), [1.0, 0.5])


def real(part: str) -> tuple[quality.Array, quality.Array]:
    dataset = quality.digits(part)
    assert dataset.labels is not None
    return quality._pixels(dataset), dataset.labels.numpy()


def test_the_training_set_itself_is_no_news() -> None:
    labelled, other, frechet, fit, neighbour = quality.measure(*real("train"))
    assert labelled.met and labelled.value == pytest.approx(1, abs=0.01)
    assert other.value == other.real < labelled.value
    assert frechet.met and frechet.value == pytest.approx(1, rel=1e-3)
    assert fit.value < 1
    assert not neighbour.met and neighbour.value == pytest.approx(0, abs=1e-6)


def test_blurred_and_mislabelled_samples_miss_the_bounds() -> None:
    pixels, labels = real("train")
    blurred = 0.5 * pixels + 0.5 * pixels.mean(axis=0)
    labelled, _, frechet, fit, _ = quality.measure(blurred, (labels + (labels < 5)) % 10)
    assert not labelled.met and not frechet.met
    assert fit.value > 2
    assert "MISSED" in quality.table([labelled])


@pytest.mark.parametrize("split", ["order", "random"])
def test_halves_part_the_digits(split: str) -> None:
    train, held_out = quality.halves(split)
    both = np.concatenate([quality._pixels(train), quality._pixels(held_out)])
    everything = quality._pixels(quality.digits("all"))
    np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(everything, axis=0))
    assert (len(train), len(held_out)) == (898, 899)


def test_random_halves_are_stratified() -> None:
    train, held_out = quality.halves("random")
    difference = train.labels.bincount() - held_out.labels.bincount()
    assert difference.abs().max() <= 1


def test_a_memoriser_draws_its_training_half() -> None:
    real = quality.halves("random")
    drawn, labels = quality.memorised(real, 1000, seed=0)
    assert drawn.shape == (1000, 64) and labels.shape == (1000,)
    assert quality.nearest_distances(drawn, quality._pixels(real.train)).max() < 1e-5
    labelled, *_, neighbour = quality.measure(drawn, labels, real=real)
    assert labelled.value == 1 and not neighbour.met
