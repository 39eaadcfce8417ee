"""diffusers' DDPM and DDIM schedulers, with the arithmetic of a step in one kernel.

::

    pipe.scheduler = FusedDDPMScheduler.from_config(pipe.scheduler.config)

Configuration, timesteps, saving and loading are diffusers' own. So are its choices where those of
:mod:`ddpm_fast.solvers` are others, and its coefficients: rows are made of its float32
``alphas_cumprod`` in its order of operations, for in float64 a late step's would be other numbers.
What the kernel does not do, diffusers' own ``step`` does: see :meth:`_Fused._is_fused` and
:meth:`_Table.fits`. docs/diffusers.md tells what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..checks import STATE_DTYPES, walkable
from ..ops import ROW, STREAMS, compute_dtype, q_sample, reverse_step
from ..thresholding import Thresholding

__all__ = ["FusedDDIMScheduler", "FusedDDPMScheduler"]

Generators = torch.Generator | list[torch.Generator] | None

_MOST_KEPT = 64  # tables and indices, of one state


@dataclass(frozen=True)
class _Table:
    """What the steps of one run share.

    Attributes:
        rows: ``[T, len(ROW)]``, one for each timestep of the training.
        indices: int64 ``[T]``, counting: a timestep as the kernel reads it, without a copy.
        timesteps: those that have a row.
        clip: the clamp on the predicted x_0, or None.
        thresholding: the clamp that each sample sets for itself, or None.
        reads_variance: the model has twice the channels.
    """

    rows: Tensor
    indices: Tensor
    timesteps: Collection[int]
    clip: float | None
    thresholding: Thresholding | None
    reads_variance: bool

    def fits(self, sample: Tensor, model_output: Tensor) -> bool:
        """Whether the kernel takes this batch: diffusers also broadcasts, and carries gradients."""
        shape = sample.shape
        if self.reads_variance:
            shape = torch.Size((shape[0], 2 * shape[1], *shape[2:]))
        carries = torch.is_grad_enabled() and (sample.requires_grad or model_output.requires_grad)
        carries = carries or _have_tangents(sample, model_output)
        return model_output.shape == shape and not carries

    def index(self, timestep: int | Tensor) -> Tensor:
        """A timestep as the kernel reads it; a tensor is there already.

        Raises:
            IndexError: the run does not pass it.
        """
        if isinstance(timestep, Tensor):
            return timestep.reshape(()).long()
        if timestep not in self.timesteps:
            raise IndexError(f"timestep {timestep} is not among those of the scheduler")
        return self.indices[timestep]

    def step(
        self, sample: Tensor, model_output: Tensor, index: Tensor, noise: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """``prev_sample`` and ``pred_original_sample``."""
        inputs = walkable(sample), walkable(model_output), self.rows, index
        pred_xstart = torch.empty_like(inputs[0])
        x_prev = reverse_step(
            *inputs,
            clip=self.clip,
            threshold=self.thresholding.threshold(*inputs) if self.thresholding else None,
            pred_xstart=pred_xstart,
            **noise,
        )
        return x_prev, pred_xstart


class _Fused(SchedulerMixin, ConfigMixin):
    """What the two schedulers share: the tables of a run, and noising."""

    _made: tuple[tuple[object, ...], dict[Hashable, Any]] = ((), {})

    def _state(self) -> tuple[object, ...]:
        """All that a table depends on; where one of these is another object, so is the table."""
        raise NotImplementedError

    def _columns(self, *options: Any) -> dict[str, Tensor]:
        """The columns that are not zero, beside the prediction of x_0: ``[T]``."""
        raise NotImplementedError

    def _visited(self) -> Collection[int]:
        """The timesteps that have a row."""
        raise NotImplementedError

    def _is_fused(self) -> bool:
        """Whether the kernel does the steps of this configuration, and not diffusers' own code."""
        config = self.config
        # Rounding makes some runs of "trailing" end in -1, which diffusers takes for T - 1.
        has_rows = bool((self.timesteps >= 0).all())
        known = config.prediction_type in ("epsilon", "sample", "v_prediction")
        # Outside [0, 1], diffusers says what is wrong.
        has_quantile = not config.thresholding or 0 <= config.dynamic_thresholding_ratio <= 1
        clamps = config.clip_sample and not config.thresholding
        has_bound = not clamps or (config.clip_sample_range or 0) > 0
        return known and has_rows and has_quantile and has_bound

    def _kept(self, key: Hashable, make: Callable[..., Any], *arguments: Any) -> Any:
        """What ``make`` makes, made once for each key and state."""
        state = self._state()
        made_for, made = self._made
        same = len(made_for) == len(state) and all(map(is_, made_for, state))
        # An eta of its own for each step would make a table for each.
        if not same or (len(made) >= _MOST_KEPT and key not in made):
            made = {}
            self._made = state, made
        if key not in made:
            with torch.inference_mode(False):  # autograd must be able to save what is kept
                made[key] = make(*arguments)
        return made[key]

    def _table(self, sample: Tensor, *options: Hashable) -> _Table | None:
        """The table for a batch like this one; None where diffusers' own code is to do the step."""
        if sample.dim() < 2 or sample.dtype not in STATE_DTYPES:
            return None
        key = sample.device, sample.dtype, *options
        table: _Table | None = self._kept(key, self._make_table, sample, *options)
        return table

    def _make_table(self, sample: Tensor, *options: Any) -> _Table | None:
        if not self._is_fused():
            return None
        abar = self.alphas_cumprod.cpu()
        columns = {
            "timestep": torch.arange(len(abar), device=abar.device),
            "stream": torch.full_like(abar, STREAMS["reverse"]),
        }
        columns |= _xstart_columns(abar, self.config.prediction_type)
        columns |= self._columns(*options)
        clip = thresholding = None
        if self.config.thresholding:
            thresholding = Thresholding(
                self.config.dynamic_thresholding_ratio, self.config.sample_max_value
            )
        elif self.config.clip_sample:
            clip = self.config.clip_sample_range
        zeros = torch.zeros_like(abar)
        rows = torch.stack([columns.get(name, zeros).double() for name in ROW], dim=1)
        return _Table(
            rows=rows.to(sample.device, compute_dtype(sample.dtype)),
            indices=torch.arange(len(rows), device=sample.device),
            timesteps=self._visited(),
            clip=clip,
            thresholding=thresholding,
            reads_variance="min_log_variance" in columns,
        )

    def _drawn_noise(self, sample: Tensor) -> dict[str, Any]:
        """Noise for the kernel to draw, of a new seed from torch's global generator.

        A seed for each step: no two steps share noise, and ``torch.manual_seed`` governs them as it
        governs diffusers' own.
        """
        count, device = len(sample), sample.device
        seed = torch.randint(2**63 - 1, (), device=device)
        index = self._kept(("index", device, count), lambda: torch.arange(count, device=device))
        return {"seed": seed, "sample_index": index}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) original_samples + sqrt(1 - abar) noise, as diffusers', in one kernel.

        Args:
            original_samples: ``[N, C, ...]``.
            noise: like original_samples.
            timesteps: ``[N]`` or ``[1]``, in [0, T - 1].

        Raises:
            ValueError, IndexError: as :func:`ddpm_fast.ops.q_sample`.
        """
        if not _is_mixed_here(original_samples, noise, timesteps):
            noisy: Tensor = super().add_noise(original_samples, noise, timesteps)
            return noisy
        return self._mixed("add_noise", original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample, as diffusers', in one kernel.

        Args and errors: as :meth:`add_noise`.
        """
        if not _is_mixed_here(sample, noise, timesteps):
            velocity: Tensor = super().get_velocity(sample, noise, timesteps)
            return velocity
        return self._mixed("get_velocity", sample, noise, timesteps)

    def _of_their_type(
        self, x_prev: Tensor, pred_xstart: Tensor, model_output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A step's results, in the types that diffusers' arithmetic gives them."""
        if self.config.prediction_type == "sample":
            pred_xstart = pred_xstart.to(model_output.dtype)
        return x_prev, pred_xstart

    def _mixed(self, what: str, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        key = what, sample.device, sample.dtype
        rows = self._kept(key, self._mixing_rows, *key)
        t = timesteps.to(sample.device, torch.int64)
        t = t.reshape(()) if t.numel() == 1 else t.flatten()
        return q_sample(walkable(sample), t, rows, noise=walkable(noise))[0]

    def _mixing_rows(self, what: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        abar = self.alphas_cumprod.to(device, dtype)  # before the roots, as diffusers rounds
        signal, scale = abar**0.5, (1 - abar) ** 0.5
        columns = [signal, scale] if what == "add_noise" else [-scale, signal]
        return torch.stack(columns, dim=1).to(compute_dtype(dtype))


class FusedDDPMScheduler(_Fused, DDPMScheduler):
    """diffusers' DDPMScheduler, each step in one kernel (Ho et al. 2020, eqs. 7, 11 and 15).

    ``variance_type="fixed_large_log"``, whose pictures are NaN in diffusers, is ``fixed_large``.
    The options are those of :class:`diffusers.DDPMScheduler`.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """x_{t-1} from x_t; the inputs stay as they are.

        Args:
            model_output: ``[N, C, ...]``, or ``[N, 2C, ...]`` with a learned variance.
            timestep: one of ``timesteps``. On the batch's CUDA device, it is not waited for.
            sample: ``[N, C, ...]``; float16 and bfloat16 are computed with in float32.
            generator: draws the noise as in diffusers, one for the batch or one for each sample.
                Without it, the kernel draws.
            return_dict: return an object with the two, not a tuple.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, like sample.

        Raises:
            IndexError: a timestep that the run does not pass.
        """
        x_t, output = _of_one_type(sample, model_output)
        table = self._table(x_t)
        if table is None or not table.fits(x_t, output):
            return super().step(model_output, timestep, sample, generator, return_dict)
        t = _read(timestep, x_t)
        noise: dict[str, Any] = {}
        if generator is None:
            if isinstance(t, Tensor) or t > 0:
                noise = self._drawn_noise(x_t)
        elif self._number(t) > 0:
            noise = {"noise": _like_diffusers(x_t, model_output, generator)}
        result = self._of_their_type(*table.step(x_t, output, table.index(t), noise), model_output)
        return DDPMSchedulerOutput(*result) if return_dict else result

    def _number(self, timestep: int | Tensor) -> int:
        """A timestep as a number.

        Those of ``for t in scheduler.timesteps`` are known by their place in memory, so that no
        device is waited for.
        """
        if not isinstance(timestep, Tensor):
            return timestep
        run = self.timesteps
        place, rest = divmod(timestep.data_ptr() - run.data_ptr(), run.element_size())
        visited = self._kept("visited", run.tolist)
        is_of_run = run.is_contiguous() and rest == 0 and 0 <= place < len(visited)
        return int(visited[place] if is_of_run else timestep)

    def _state(self) -> tuple[object, ...]:
        return (
            self.config,
            self.alphas_cumprod,
            self.timesteps,
            self.num_inference_steps,
            self.custom_timesteps,
            self.variance_type,
        )

    def _is_fused(self) -> bool:
        # To diffusers a "learned" output is the variance, to the kernel its logarithm; and where a
        # timestep comes twice or the type of variance was changed, its step has a rule of its own.
        visits_once = len(self.timesteps.unique()) == len(self.timesteps)
        is_logarithm = self.variance_type == self.config.variance_type != "learned"
        return super()._is_fused() and visits_once and is_logarithm

    def _is_respaced(self) -> bool:
        return bool(self.custom_timesteps or self.num_inference_steps)

    def _visited(self) -> Collection[int]:
        if self._is_respaced():
            return frozenset(self._run().tolist())
        return range(len(self.alphas_cumprod))

    def _run(self) -> Tensor:
        """The timesteps that have an abar; an offset may lead others past the table's end."""
        run: Tensor = self.timesteps.cpu()
        return run[run < len(self.alphas_cumprod)]

    def _abar_prev(self, abar: Tensor) -> Tensor:
        """abar of the timestep that follows in the run; behind the last, 1."""
        one = torch.ones_like(abar[:1])
        if not self._is_respaced():
            return torch.cat([one, abar[:-1]])
        run = self._run()
        prev = torch.full_like(abar, torch.nan)
        prev[run] = torch.cat([abar[run[1:]], one])
        return prev

    def _columns(self) -> dict[str, Tensor]:
        abar = self.alphas_cumprod.cpu()
        prev = self._abar_prev(abar)
        alpha = abar / prev
        beta = 1 - alpha
        posterior_variance = ((1 - prev) / (1 - abar) * beta).clamp(min=1e-20)
        columns = {
            "mean_from_x0": prev**0.5 * beta / (1 - abar),
            "mean_from_xt": alpha**0.5 * (1 - prev) / (1 - abar),
        }
        if self.variance_type == "learned_range":
            sigma = torch.ones_like(abar)
            columns["min_log_variance"] = posterior_variance.log()
            columns["max_log_variance"] = beta.log()
        elif self.variance_type in ("fixed_large", "fixed_large_log"):
            sigma = beta**0.5
        else:  # diffusers, too, takes an unknown name for fixed_small
            sigma = posterior_variance**0.5
        sigma[0] = 0  # its gate is t > 0
        return columns | {"sigma": sigma}


class FusedDDIMScheduler(_Fused, DDIMScheduler):
    """diffusers' DDIMScheduler, each step in one kernel (Song et al. 2021, eqs. 12 and 16).

    The options are those of :class:`diffusers.DDIMScheduler`.
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """x_{t-1} from x_t; the inputs stay as they are.

        Args:
            model_output: ``[N, C, ...]``.
            timestep: in [0, T - 1]. On the batch's CUDA device, it is not waited for.
            sample: ``[N, C, ...]``; float16 and bfloat16 are computed with in float32.
            eta: 0 is deterministic; 1 gives the variances of DDPM with ``fixed_small``.
            use_clipped_model_output: re-derive the noise direction from the clamped x_0.
            generator: draws the noise as in diffusers, one for the batch or one for each sample.
            variance_noise: like sample; instead of a generator. With neither, the kernel draws.
            return_dict: return an object with the two, not a tuple.

        Returns:
            ``prev_sample`` and ``pred_original_sample``, like sample.

        Raises:
            ValueError: ``set_timesteps`` was not called, or both a generator and noise are given.
            IndexError: a timestep outside [0, T - 1].
        """
        x_t, output = _of_one_type(sample, model_output)
        table = self._table(x_t, eta, bool(use_clipped_model_output))
        fits = table is not None and table.fits(x_t, output)
        if variance_noise is not None:
            fits = fits and generator is None and _alike(x_t, variance_noise)
        if table is None or not fits:
            return super().step(
                model_output,
                timestep,
                sample,
                eta,
                use_clipped_model_output,
                generator,
                variance_noise,
                return_dict,
            )
        noise: dict[str, Any] = {}
        if eta > 0 and variance_noise is not None:
            noise = {"noise": walkable(variance_noise)}
        elif eta > 0 and generator is not None:
            noise = {"noise": _like_diffusers(x_t, model_output, generator)}
        elif eta > 0:
            noise = self._drawn_noise(x_t)
        result = table.step(x_t, output, table.index(_read(timestep, x_t)), noise)
        result = self._of_their_type(*result, model_output)
        return DDIMSchedulerOutput(*result) if return_dict else result

    def _state(self) -> tuple[object, ...]:
        return (
            self.config,
            self.alphas_cumprod,
            self.final_alpha_cumprod,
            self.timesteps,
            self.num_inference_steps,
        )

    def _is_fused(self) -> bool:
        return super()._is_fused() and self.num_inference_steps is not None

    def _visited(self) -> Collection[int]:
        return range(len(self.alphas_cumprod))

    def _columns(self, eta: float, use_clipped_model_output: bool) -> dict[str, Tensor]:
        abar = self.alphas_cumprod.cpu()
        prev_t = torch.arange(len(abar), device=abar.device)
        prev_t -= self.config.num_train_timesteps // self.num_inference_steps
        prev = torch.where(prev_t < 0, self.final_alpha_cumprod.cpu(), abar[prev_t.clamp(min=0)])
        sigma = eta * ((1 - prev) / (1 - abar) * (1 - abar / prev)) ** 0.5
        from_eps = ((1 - prev - sigma**2) ** 0.5).double()
        signal, scale = (abar**0.5).double(), ((1 - abar) ** 0.5).double()

        # Where eps comes from: the clamped x_0, the model, the x_0 that the model predicts, or v.
        from_x0 = from_xt = from_out = torch.zeros_like(signal)
        if use_clipped_model_output:
            from_x0, from_xt = -signal / scale, 1 / scale
        elif self.config.prediction_type == "epsilon":
            from_out = torch.ones_like(signal)
        elif self.config.prediction_type == "sample":
            from_xt, from_out = 1 / scale, -signal / scale
        else:
            from_xt, from_out = scale, signal
        return {
            "mean_from_x0": prev**0.5 + from_eps * from_x0,
            "mean_from_xt": from_eps * from_xt,
            "mean_from_out": from_eps * from_out,
            "sigma": sigma,
        }


def _xstart_columns(abar: Tensor, prediction_type: str) -> dict[str, Tensor]:
    """The prediction of x_0 from x_t and the model's output, Ho et al. 2020, eq. 15."""
    signal, scale = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
    if prediction_type == "sample":
        from_xt, from_out = torch.zeros_like(signal), torch.ones_like(signal)
    elif prediction_type == "v_prediction":
        from_xt, from_out = signal, -scale
    else:
        # Where no signal is left, diffusers divides by 0; rows of inf would give inf - inf.
        signal = signal.clamp(min=2.0**-60)
        from_xt, from_out = 1 / signal, -scale / signal
    return {"x0_from_xt": from_xt, "x0_from_out": from_out}


def _of_one_type(sample: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """The two promoted as diffusers' arithmetic promotes them."""
    if sample.dtype == model_output.dtype:
        return sample, model_output
    dtype = torch.promote_types(sample.dtype, model_output.dtype)
    return sample.to(dtype), model_output.to(dtype)


def _read(timestep: int | Tensor, sample: Tensor) -> int | Tensor:
    """The timestep as a number, unless it lies on the batch's device, where reading it waits."""
    if not isinstance(timestep, Tensor):
        return timestep
    waits = timestep.device == sample.device and sample.device.type != "cpu"
    return timestep if waits else int(timestep)


def _like_diffusers(sample: Tensor, model_output: Tensor, generator: Generators) -> Tensor:
    """Noise from diffusers' generators: in the type of the model's output, as there."""
    noise: Tensor = randn_tensor(
        sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
    )
    return noise.to(sample.dtype)


def _have_tangents(*tensors: Tensor) -> bool:
    """Whether one is of a forward-mode derivative, which the kernels know nothing of."""
    parts = [unpack_dual(tensor) for tensor in tensors]  # type: ignore[no-untyped-call]
    return any(part.tangent is not None for part in parts)


def _alike(sample: Tensor, noise: Tensor) -> bool:
    """Whether the kernel takes the two; diffusers also promotes and broadcasts."""
    same = noise.shape == sample.shape and noise.dtype == sample.dtype
    return same and sample.dtype in STATE_DTYPES and sample.dim() >= 2


def _is_mixed_here(sample: Tensor, noise: Tensor, timesteps: Tensor) -> bool:
    """Whether the kernel noises; it is the slower way for float16 on a CPU."""
    slower = sample.dtype == torch.float16 and sample.device.type == "cpu"
    whole = timesteps.dtype in (torch.int64, torch.int32)
    fits = _alike(sample, noise) and whole and timesteps.numel() in (1, len(sample))
    return fits and not slower and not _have_tangents(sample, noise)
