"""Bits per dimension: the variational bound on what a model pays to describe a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import torch
from torch import Tensor
from tqdm import tqdm

from . import ops
from .checks import Argument, check_output_shape
from .conditioning import Labels, checked_labels
from .diffusion import GaussianDiffusion
from .evaluating import evaluating
from .gaussians import normal_kl
from .network import Model, Network, check_has_variance
from .reference import over_batch
from .sampler import checked_first_index
from .solvers import Spacing, StepTable, ddpm, variance_type_of

# How far from a level a pixel may lie, in steps between levels: float32 rounds to far less.
_LEVEL_TOLERANCE = 1e-3


class BitsPerDim(NamedTuple):
    """The bound for N pictures, term by term, in bits per dimension; float64 on the CPU.

    Attributes:
        total: ``[N]``, the bound itself: the prior and all terms together.
        prior: ``[N]``, L_T = KL(q(x_T | x_0) || N(0, I)), which no training changes.
        terms: ``[N, S]``, from the noisiest step to the cleanest, as they are sampled: L_{T-1}
            down to L_1, each KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and last the
            decoder's L_0 = -log p(x_0 | x_1).
        timesteps: the S timesteps of the terms, decreasing. They count from 0, as everywhere
            here, so that the term at timestep t is the paper's L_t.
    """

    total: Tensor
    prior: Tensor
    terms: Tensor
    timesteps: tuple[int, ...]


def bits_per_dim(
    model: Model,
    diffusion: GaussianDiffusion,
    images: Tensor,
    *,
    levels: int = 256,
    class_labels: Labels | None = None,
    num_steps: int | None = None,
    timestep_spacing: Spacing = "trailing",
    seed: SupportsIndex | None = None,
    first_index: SupportsIndex = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    precision: str | None = None,
    backend: str = "auto",
    progress: bool = False,
) -> BitsPerDim:
    """The variational bound on -log2 p(x_0) over the number of dimensions, of each picture.

    Ho et al. 2020 (arXiv 2006.11239), eqs. 5 and 13; p is the chain that ``sample`` draws from
    with the sampler ``ddpm``: the same clamp on x_start and, but for the decoder, which takes its
    neighbour's where the sampler adds no noise, the same variances. Each term is estimated from
    one draw of x_t, whose noise is a function of (seed, index of the picture, timestep, element)
    alone: no batch changes it.

    Args:
        model: as for :func:`ddpm_fast.sample`.
        diffusion: the process it was trained for.
        images: ``[N, C, ...]`` in [-1, 1], each pixel one of the ``levels``.
        levels: the number of values a pixel can have, evenly spaced from -1 to 1: 256 for pictures
            of 8 bits, 17 for the digits. Probabilities are of these values, so that bits per
            dimension compare only at the same number of them.
        class_labels: int64 ``[N]``, or one for all; the bound is then on p(x_0 | label).
        num_steps, timestep_spacing: of a shorter chain, as for :func:`ddpm_fast.sample`, which has
            a bound of its own and costs as much less; all T steps by default.
        seed: in [0, 2**64); drawn from torch's global generator by default.
        first_index: the index of the first picture in the whole run.
        batch_size: pictures that the network is given at a time.
        device, precision, backend: as for :func:`ddpm_fast.sample`.
        progress: show a progress bar.

    Raises:
        ValueError: an argument out of range, of another shape or unknown, or pixels that are none
            of the levels, all before any work; a model whose output has another shape.
        RuntimeError: backend ``native`` cannot serve the device.
    """
    _check_pictures(images, levels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    first = checked_first_index(first_index, len(images))
    labels = None if class_labels is None else checked_labels(class_labels, len(images), model)
    seed = int(ops.seed_tensor(seed, "cpu")) % (1 << 64)  # one for all batches
    bound = _Bound(
        Network(model, device=device, precision=precision),
        diffusion,
        ddpm(diffusion, num_steps, timestep_spacing=timestep_spacing),
        levels=levels,
        backend=backend,
    )
    steps = math.ceil(len(images) / batch_size) * len(bound.timesteps)
    with evaluating(model), tqdm(total=steps, disable=not progress) as bar:
        return bound.of(images, labels, seed, first, batch_size, bar)


class _Bound:
    """The bound and its terms, ``[N]`` each, in bits per dimension.

    The arithmetic is float64, whatever the network's.
    """

    def __init__(
        self,
        network: Network,
        diffusion: GaussianDiffusion,
        table: StepTable,
        *,
        levels: int,
        backend: str,
    ) -> None:
        ops.serves_natively(network.device, backend)
        self.network = network
        self.device = network.device
        self.diffusion = diffusion
        self.chain = _chain(diffusion, table.timesteps)
        self.table = table
        self.timesteps = table.timesteps
        self.levels = levels
        self.backend = backend

    def of(
        self,
        images: Tensor,
        labels: Tensor | None,
        seed: int,
        first: int,
        batch_size: int,
        bar: tqdm[NoReturn],
    ) -> BitsPerDim:
        """All terms, batch by batch."""
        prior = torch.empty(len(images), dtype=torch.float64)
        terms = torch.empty(len(images), len(self.timesteps), dtype=torch.float64)
        for start in range(0, len(images), batch_size):
            chosen = slice(start, start + batch_size)
            kwargs = {} if labels is None else {"class_labels": labels[chosen].to(self.device)}
            with torch.inference_mode(), self.network.autocast():
                x_start = self.moved(images[chosen])
                prior[chosen] = self.prior(x_start)
                for k, term in enumerate(self.terms(x_start, kwargs, seed, first + start)):
                    terms[chosen, k] = term
                    bar.update()
        return BitsPerDim(prior + terms.sum(dim=1), prior, terms, self.timesteps)

    def moved(self, images: Tensor) -> Tensor:
        """Where and in what type the noise is added."""
        dtype = ops.compute_dtype(self.network.dtype)
        layout = self.network.memory_format(images.dim())
        return images.to(self.device, dtype).contiguous(memory_format=layout)

    def prior(self, x_start: Tensor) -> Tensor:
        """L_T."""
        abar = self.chain.alphas_cumprod[-1].to(self.device)
        zero = torch.zeros_like(abar)
        nats = normal_kl(abar.sqrt() * x_start.double(), (1 - abar).log(), zero, zero)
        return nats.flatten(1).mean(dim=1) / math.log(2)

    def terms(
        self, x_start: Tensor, kwargs: Mapping[str, Any], seed: int, first: int
    ) -> Iterator[Tensor]:
        """L_{T-1} ... L_0."""
        sample_index = torch.arange(first, first + len(x_start), device=self.device)
        for k, timestep in enumerate(self.timesteps):
            t = torch.full_like(sample_index, timestep)
            x_t, _ = self.diffusion.q_sample(
                x_start, t, seed=seed, sample_index=sample_index, backend=self.backend
            )
            output = self.network(x_t.to(self.network.dtype), t, kwargs)
            self._check(output, x_t)
            step = torch.full_like(sample_index, len(self.timesteps) - 1 - k)
            yield self._term(x_start.double(), x_t.double(), step, output.double())

    def _check(self, output: Tensor, x_t: Tensor) -> None:
        of_output = Argument("bits_per_dim", "the model's output", output)
        check_output_shape(of_output, Argument("bits_per_dim", "x_t", x_t), guided=False)
        if self.table.reads_variance:
            check_has_variance(output, x_t.shape[1])

    def _term(self, x_start: Tensor, x_t: Tensor, step: Tensor, output: Tensor) -> Tensor:
        """One of them; ``step`` counts the chain's steps from the cleanest."""
        channels = x_t.shape[1]
        pred_xstart = self._clamped(self.chain.predict_xstart(x_t, step, output[:, :channels]))
        log_variance = self.chain.reverse_log_variance(output[:, channels:], step)
        return self.chain.vlb_terms(x_start, x_t, step, pred_xstart, log_variance, self.levels)

    def _clamped(self, pred_xstart: Tensor) -> Tensor:
        """As the sampler clamps it."""
        if self.table.thresholding is not None:
            s = over_batch(self.table.thresholding.of(pred_xstart), pred_xstart)
            return pred_xstart.clamp(-s, s) / s
        clip = self.table.clip
        return pred_xstart if clip is None else pred_xstart.clamp(-clip, clip)


def _chain(diffusion: GaussianDiffusion, timesteps: Sequence[int]) -> GaussianDiffusion:
    """The diffusion that visits these timesteps alone; its own timesteps count them."""
    abar = diffusion.alphas_cumprod[list(reversed(timesteps))]
    return GaussianDiffusion(
        1 - abar / torch.cat([abar.new_ones(1), abar[:-1]]),
        prediction_type=diffusion.prediction_type,
        variance_type=variance_type_of(diffusion, len(timesteps)),
    )


def _check_pictures(images: Tensor, levels: int) -> None:
    if images.dim() < 2 or 0 in images.shape or not images.is_floating_point():
        raise ValueError(
            "bits_per_dim: images must be floating-point numbers [N, C, ...], "
            f"no dimension of size 0; got {images.dtype} of shape {list(images.shape)}"
        )
    if levels < 2:
        raise ValueError(f"bits_per_dim: levels must be at least 2; got {levels}")
    place = (images.detach().double() + 1) / 2 * (levels - 1)
    level = place.round().clamp(0, levels - 1)
    # NaN fails every comparison, so it is refused here too.
    if not bool(((place - level).abs() <= _LEVEL_TOLERANCE).all()):
        raise ValueError(
            f"bits_per_dim: each pixel must be one of {levels} levels, evenly spaced from -1 to 1; "
            "say with levels how many values the pixels can have"
        )
