"""The Gaussian diffusion of Ho et al. 2020 (arXiv 2006.11239): its tables, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import ops
from .gaussians import discretized_gaussian_log_likelihood, normal_kl
from .losses import LOSSES, min_snr_weight
from .schedules import named_betas, rescale_zero_terminal_snr

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")

# Numbers that must not be those of another draw are drawn under the seed with these bits flipped.
_OFFSET_SEED = 0x9E3779B97F4A7C15


class GaussianDiffusion:
    """Everything that follows from the betas of a forward process.

    The tables are float64 tensors ``[T]`` on the CPU and are rounded once, when a kernel's table
    is made of them. Timesteps count from 0 to T - 1, and ``alphas_cumprod_prev[0]`` is 1.

    Args:
        betas: ``[T]``, each in (0, 1]; the linear schedule 1e-4 ... 0.02 of T = 1000 by default.
        prediction_type: what the network predicts: ``epsilon`` the noise, ``sample`` x_start,
            ``v_prediction`` sqrt(abar) eps - sqrt(1 - abar) x_start (Salimans & Ho 2022).
        variance_type: the reverse process's sigma_t^2: ``fixed_small`` is the posterior's
            variance, ``fixed_large`` is beta_t, ``learned`` reads a log-variance from a second
            set of output channels, ``learned_range`` an interpolation between the two logs
            (Nichol & Dhariwal 2021, eq. 15). None chooses by the chain's length: ``fixed_large``
            for all T steps, ``fixed_small`` for fewer (Song et al. 2021, Table 1).
        clip_denoised: clamp the predicted x_start to [-1, 1] in every step.
        dynamic_thresholding_ratio: in (0, 1]; clamp it to [-s, s] instead and divide it by s, the
            quantile of this ratio of each sample's absolute values, or 1 where that is less
            (Saharia et al. 2022, arXiv 2205.11487, section 2.3).
        sample_max_value: the largest s, at least 1; None sets no bound.

    Raises:
        ValueError: betas that are empty, not finite or outside (0, 1]; an unknown option, or one
            that is out of range or contradicts another.
    """

    def __init__(
        self,
        betas: Tensor | None = None,
        *,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        clip_denoised: bool = True,
        dynamic_thresholding_ratio: float | None = None,
        sample_max_value: float | None = None,
    ) -> None:
        _check_option("prediction_type", prediction_type, PREDICTION_TYPES)
        if variance_type is not None:
            _check_option("variance_type", variance_type, VARIANCE_TYPES)
        _check_flag("clip_denoised", clip_denoised)
        _check_thresholding(clip_denoised, dynamic_thresholding_ratio, sample_max_value)
        self.prediction_type = prediction_type
        self.variance_type = variance_type
        self.clip_denoised = clip_denoised
        self.dynamic_thresholding_ratio = dynamic_thresholding_ratio
        self.sample_max_value = sample_max_value
        self._schedule: dict[str, Any] | None = None
        if betas is None:
            self._schedule = {
                "beta_schedule": "linear",
                "num_timesteps": 1000,
                "beta_start": 1e-4,
                "beta_end": 0.02,
            }
            betas = named_betas(**self._schedule)
        self._build_tables(_checked_betas(betas))

    def _build_tables(self, betas: Tensor) -> None:
        self.betas = betas
        self.num_timesteps = len(betas)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        # Infinite where no signal is left.
        self.sqrt_recip_alphas_cumprod = (1 / self.alphas_cumprod).sqrt()
        self.sqrt_recipm1_alphas_cumprod = (1 / self.alphas_cumprod - 1).sqrt()
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)

        # q(x_{t-1} | x_t, x_0): Ho et al. 2020, eqs. 6 and 7
        prev, abar = self.alphas_cumprod_prev, self.alphas_cumprod
        self.posterior_variance = betas * (1 - prev) / (1 - abar)
        # The variance is 0 at t = 0, so its logarithm copies index 1 there.
        floor = self.posterior_variance[1:2] if len(betas) > 1 else betas[:1]
        self.posterior_log_variance_clipped = torch.cat([floor, self.posterior_variance[1:]]).log()
        self.posterior_mean_coef1 = betas * prev.sqrt() / (1 - abar)
        self.posterior_mean_coef2 = (1 - prev) * (1 - betas).sqrt() / (1 - abar)

        self._forward_rows = torch.stack(
            [self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod], dim=1
        )
        self._xstart_from_xt, self._xstart_from_out = self.xstart_coefs(self.alphas_cumprod)
        self._log_betas = betas.log()
        # beta_0 is far below its neighbour: the decoder's variance is the posterior's.
        self._fixed_large_log_variance = torch.cat(
            [self.posterior_log_variance_clipped[:1], self._log_betas[1:]]
        )
        self._tables_on: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_schedule(
        cls,
        beta_schedule: str = "linear",
        num_timesteps: int = 1000,
        *,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        rescale_betas_zero_snr: bool = False,
        **options: Any,
    ) -> GaussianDiffusion:
        """A diffusion with the betas of :func:`ddpm_fast.schedules.named_betas`.

        ``rescale_betas_zero_snr`` passes them through
        :func:`ddpm_fast.schedules.rescale_zero_terminal_snr`.

        Raises:
            ValueError: as these two functions and the class.
        """
        _check_flag("rescale_betas_zero_snr", rescale_betas_zero_snr)
        schedule = {
            "beta_schedule": beta_schedule,
            "num_timesteps": num_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
        }
        betas = named_betas(**schedule)  # type: ignore[arg-type]
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
            schedule["rescale_betas_zero_snr"] = True
        diffusion = cls(betas, **options)
        diffusion._schedule = schedule
        return diffusion

    @property
    def learns_variance(self) -> bool:
        """Whether a second set of the network's output channels tells the variance."""
        return self.variance_type in ("learned", "learned_range")

    def config(self) -> dict[str, Any]:
        """A JSON-able description from which :meth:`from_config` builds the same diffusion.

        Zero-terminal SNR and dynamic thresholding stand in it only where they are in use, so that
        it equals the description in a checkpoint that does not know of them.
        """
        thresholding = {
            "dynamic_thresholding_ratio": self.dynamic_thresholding_ratio,
            "sample_max_value": self.sample_max_value,
        }
        return {
            **(self._schedule or {"betas": self.betas.tolist()}),
            "prediction_type": self.prediction_type,
            "variance_type": self.variance_type,
            "clip_denoised": self.clip_denoised,
            **{name: value for name, value in thresholding.items() if value is not None},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GaussianDiffusion:
        """The inverse of :meth:`config`."""
        options = dict(config)
        if "betas" in options:
            betas = torch.tensor(options.pop("betas"), dtype=torch.float64)
            return cls(betas, **options)
        return cls.from_schedule(**options)

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        *,
        seed: int | None = None,
        sample_index: Tensor | None = None,
        out: Tensor | None = None,
        noise_out: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Diffuse ``x_start`` to timestep ``t``: sqrt(abar_t) x_start + sqrt(1 - abar_t) noise.

        Ho et al. 2020, eq. 4.

        Args:
            x_start: ``[N, C, ...]``, in [-1, 1].
            t: int64 ``[N]`` (or ``[]``), each in [0, T - 1].
            noise: ``[N, C, ...]``; drawn from the counter where it is not given.
            seed: the run's seed in [0, 2**64); drawn from torch's global generator by default.
            sample_index: int64 ``[N]``, each sample's index in the whole run; 0 ... N - 1 by
                default. The noise is a function of (seed, sample_index, t, element) alone.
            out, noise_out: where to write x_t and drawn noise, like ``x_start``.
            backend: ``auto``, ``native`` or ``reference``.

        Returns:
            x_t and the noise in it, both like ``x_start``.

        Raises:
            ValueError, TypeError, IndexError: see :func:`ddpm_fast.ops.q_sample`.
        """
        source = {"noise": noise, "sample_index": sample_index}
        if noise is None or seed is not None:
            source["seed"] = ops.seed_tensor(seed, x_start.device)
            if sample_index is None:
                source["sample_index"] = torch.arange(len(x_start), device=x_start.device)
        rows = self._table("_forward_rows", x_start)
        return ops.q_sample(
            x_start, t, rows, **source, out=out, noise_out=noise_out, backend=backend
        )

    def q_step(self, x_prev: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """One forward step, q(x_t | x_{t-1}): sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise.

        Ho et al. 2020, eq. 2. ``x_prev`` and ``noise`` are ``[N, C, ...]``, ``t`` int64 ``[N]``.
        """
        rows = (1 - self.betas).to(x_prev.device, ops.compute_dtype(x_prev.dtype))
        keep, add = _at(rows, t, x_prev).sqrt(), self._at("betas", t, x_prev).sqrt()
        return (keep * x_prev + add * noise).to(x_prev.dtype)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0).

        Ho et al. 2020, eqs. 6 and 7. ``x_start`` and ``x_t`` are ``[N, C, ...]``, ``t`` int64
        ``[N]``; the mean is like ``x_t``, the other two broadcast against it.
        """
        coef1 = self._at("posterior_mean_coef1", t, x_t)
        coef2 = self._at("posterior_mean_coef2", t, x_t)
        variance = self._at("posterior_variance", t, x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        return (coef1 * x_start + coef2 * x_t).to(x_t.dtype), variance, log_variance

    def predict_xstart(self, x_t: Tensor, t: Tensor, model_output: Tensor) -> Tensor:
        """The x_start that a model's output stands for, before any clamp.

        For epsilon: (x_t - sqrt(1 - abar) eps) / sqrt(abar), Ho et al. 2020, eq. 15; for
        v_prediction: sqrt(abar) x_t - sqrt(1 - abar) v, Salimans & Ho 2022, appendix D. ``x_t``,
        ``model_output`` and the result are ``[N, C, ...]``, ``t`` int64 ``[N]``. With epsilon
        nothing follows where abar is 0.
        """
        from_xt, from_out = (
            self._at("_xstart_from_xt", t, x_t),
            self._at("_xstart_from_out", t, x_t),
        )
        predicted = from_xt * x_t + from_out * model_output
        return predicted.to(x_t.dtype)

    def xstart_coefs(self, abar: Tensor) -> tuple[Tensor, Tensor]:
        """Like ``abar``, float64 ``[S]``: x_start = first x_t + second model_output."""
        if self.prediction_type == "epsilon":
            return (1 / abar).sqrt(), -(1 / abar - 1).sqrt()
        if self.prediction_type == "sample":
            return torch.zeros_like(abar), torch.ones_like(abar)
        return abar.sqrt(), -(1 - abar).sqrt()

    def eps_coefs(self, abar: Tensor) -> tuple[Tensor, Tensor]:
        """Like ``abar``, float64 ``[S]``: eps = first x_t + second model_output."""
        if self.prediction_type == "epsilon":
            return torch.zeros_like(abar), torch.ones_like(abar)
        if self.prediction_type == "sample":
            return (1 / (1 - abar)).sqrt(), -(abar / (1 - abar)).sqrt()
        return (1 - abar).sqrt(), abar.sqrt()

    def training_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should output for ``q_sample(x_start, t, noise)``; like ``x_start``."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x_start
        signal = self._at("sqrt_alphas_cumprod", t, x_start)
        v = signal * noise - self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start
        return v.to(x_start.dtype)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        seed: int | None = None,
        sample_index: Tensor | None = None,
        loss: str = "mse",
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        vlb_weight: float = 0.001,
    ) -> Tensor:
        """What each sample costs the network, ``[N]``: by default L_simple.

        That is the mean squared error to :meth:`training_target` (Ho et al. 2020, eq. 14,
        averaged over elements). A learned variance, which it does not reach, is trained by
        ``vlb_weight`` T :meth:`vlb_terms` on top, the hybrid objective of Nichol & Dhariwal 2021
        (arXiv 2102.09672), eq. 16; that term's gradient does not reach the prediction. Its unit is
        the bit per dimension, as in OpenAI's code, whose factor T / 1000 the default is.

        Args:
            model: called as ``model(x_t, t, **model_kwargs)``.
            x_start, t, noise, seed, sample_index: as for :meth:`q_sample`.
            model_kwargs: passed on to the model.
            loss: of each element: ``mse``, ``l1``, or ``huber``, which is half the square up to an
                error of 1 and linear beyond.
            min_snr_gamma: weigh the timesteps, see :func:`ddpm_fast.losses.min_snr_weight`.
            offset_noise: how much of one more number for each sample and channel is added to the
                drawn noise (Guttenberg 2023, "Diffusion with Offset Noise"), so that the mean of a
                channel is noised more than by 1 / sqrt(H W), and learned.
            vlb_weight: lambda of the hybrid objective.

        Raises:
            ValueError: an unknown loss; offset noise on top of given noise; a learned variance
                with epsilon and zero-terminal SNR; or a model's output that has neither the shape
                of ``x_start`` nor, where the variance is learned, twice its channels.
        """
        _check_option("loss", loss, tuple(LOSSES))
        if self.learns_variance:
            self._check_xstart_follows()
        if offset_noise and noise is not None:
            raise ValueError("offset_noise is added to drawn noise, and noise was given")
        if offset_noise:
            noise = self._offset_noise(x_start, t, offset_noise, seed, sample_index)
            seed = sample_index = None
        x_t, noise = self.q_sample(x_start, t, noise, seed=seed, sample_index=sample_index)
        output = model(x_t, t, **(model_kwargs or {}))
        _check_output(output, x_start, self.learns_variance)
        output = output.to(ops.compute_dtype(output.dtype))
        prediction = output[:, : x_start.shape[1]]
        target = self.training_target(x_start, t, noise).to(output.dtype)
        losses = LOSSES[loss](prediction, target, reduction="none").flatten(1).mean(dim=1)
        if min_snr_gamma is not None:
            snr = self._at("snr", t, x_start).flatten()
            losses = losses * min_snr_weight(snr, self.prediction_type, min_snr_gamma)
        if self.learns_variance:
            log_variance = self.reverse_log_variance(output[:, x_start.shape[1] :], t)
            pred_xstart = self.predict_xstart(x_t, t, prediction.detach())
            bits = self.vlb_terms(x_start, x_t, t, pred_xstart, log_variance)
            losses = losses + vlb_weight * self.num_timesteps * bits
        return losses

    def vlb_terms(
        self,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        pred_xstart: Tensor,
        log_variance: Tensor,
        levels: int = 256,
    ) -> Tensor:
        """The term L_t of the variational bound, ``[N]``, in bits per dimension.

        At t > 0 KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 minus the log-likelihood of
        x_0 (Ho et al. 2020, eqs. 5 and 13).

        Args:
            x_start, x_t, t: ``[N, C, ...]``, likewise and int64 ``[N]``; x_t drawn from x_start.
            pred_xstart: the x_start that the model predicts, clamped or not, like ``x_start``; see
                :meth:`predict_xstart`.
            log_variance: of p, broadcasting against it; see :meth:`reverse_log_variance`.
            levels: the number of values a pixel can have, evenly spaced from -1 to 1: 256 for
                pictures of 8 bits.
        """
        true_mean, _, true_log_variance = self.q_posterior(x_start, x_t, t)
        mean, *_ = self.q_posterior(pred_xstart, x_t, t)
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        at_the_end = (t == 0).reshape(-1, *[1] * (x_start.dim() - 1))
        # Elsewhere the decoder gets what it has a gradient at: 0 times infinity would be NaN.
        decoder = -discretized_gaussian_log_likelihood(
            x_start,
            torch.where(at_the_end, mean, x_start),
            torch.where(at_the_end, 0.5 * log_variance, 0.0),
            levels,
        )
        return torch.where(at_the_end, decoder, kl).flatten(1).mean(dim=1) / math.log(2)

    def reverse_log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """log sigma_t^2 of p(x_{t-1} | x_t), broadcasting against ``v``.

        ``learned`` is v itself, ``learned_range`` with f = (v + 1) / 2 is f log(beta_t) +
        (1 - f) log of the posterior's variance (Nichol & Dhariwal 2021, eq. 15). ``fixed_small`` is
        the latter; ``fixed_large``, as None is, is log(beta_t), and at t = 0 the latter too.

        Args:
            v: ``[N, C, ...]``, the channels of a learned variance. A fixed one takes its device
                and type alone, and may be given none of them.
            t: int64 ``[N]``.
        """
        if self.variance_type == "learned":
            return v
        if self.variance_type == "fixed_small":
            return self._at("posterior_log_variance_clipped", t, v)
        if not self.learns_variance:
            return self._at("_fixed_large_log_variance", t, v)
        fraction = (v + 1) / 2
        low = self._at("posterior_log_variance_clipped", t, v)
        return fraction * self._at("_log_betas", t, v) + (1 - fraction) * low

    def _check_xstart_follows(self) -> None:
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise ValueError(
                f"training_losses: variance_type {self.variance_type} cannot be trained with "
                "prediction_type epsilon and zero-terminal SNR, where no x_start follows at the "
                "last timestep; predict sample or v_prediction"
            )

    def _offset_noise(
        self,
        x_start: Tensor,
        t: Tensor,
        strength: float,
        seed: int | None,
        sample_index: Tensor | None,
    ) -> Tensor:
        _, noise = self.q_sample(x_start, t, seed=seed, sample_index=sample_index)
        channels = x_start.new_zeros(*x_start.shape[:2], *[1] * (x_start.dim() - 2))
        seed = None if seed is None else seed ^ _OFFSET_SEED
        _, offset = self.q_sample(channels, t, seed=seed, sample_index=sample_index)
        return noise + strength * offset

    def _table(self, name: str, like: Tensor) -> Tensor:
        """A table on the device of ``like``, in its compute type; copied there once."""
        key = name, like.device, ops.compute_dtype(like.dtype)
        if key not in self._tables_on:
            with torch.inference_mode(False):  # autograd must be able to save what is kept
                self._tables_on[key] = getattr(self, name).to(*key[1:])
        return self._tables_on[key]

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        return _at(self._table(name, like), t, like)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    # Unlike table[t], this refuses negative timesteps.
    return table.index_select(0, t.reshape(-1)).reshape(-1, *[1] * (like.dim() - 1))


def _check_output(output: Tensor, x_start: Tensor, learned: bool) -> None:
    samples, channels, *rest = x_start.shape
    if list(output.shape) != [samples, channels * (2 if learned else 1), *rest]:
        wanted = ", with twice its channels for a learned variance" if learned else ""
        raise ValueError(
            f"the model's output must have the shape of x_start{wanted}; "
            f"got {list(output.shape)} and {list(x_start.shape)}"
        )


def _checked_betas(betas: Tensor) -> Tensor:
    betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu").detach().clone()
    if betas.dim() != 1 or len(betas) == 0:
        raise ValueError(f"betas must be a non-empty vector; got shape {list(betas.shape)}")
    # NaN fails every comparison, so it is refused here too.
    if not bool(((betas > 0) & (betas <= 1)).all()):
        raise ValueError("betas must be finite and lie in (0, 1]")
    return betas


def _check_option(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def _check_thresholding(clip_denoised: bool, ratio: float | None, ceiling: float | None) -> None:
    if ratio is None:
        if ceiling is not None:
            raise ValueError("sample_max_value needs a dynamic_thresholding_ratio")
        return
    if not clip_denoised:
        raise ValueError("dynamic_thresholding_ratio is a way to clamp: it needs clip_denoised")
    if not 0 < ratio <= 1:
        raise ValueError(f"dynamic_thresholding_ratio must lie in (0, 1]; got {ratio}")
    if ceiling is not None and not (1 <= ceiling < math.inf):
        raise ValueError(f"sample_max_value must be finite and at least 1; got {ceiling}")
