"""Training: the L_simple loop of Ho et al. 2020 (arXiv 2006.11239, algorithm 1), resumable.

Everything random in step ``s`` is a function of (seed, s) alone: the batch, the timesteps, label
dropout, augmentation and the network's dropout come from generators seeded with them, the noise
from the library's counter. So a checkpoint holds no random state, and a run that was stopped and
resumed computes what the uninterrupted one would have: bit for bit on the CPU with the same number
of threads, and as far as its kernels are deterministic on other devices.

Which pictures a step shows, at which timesteps, with which noise and labels, does not depend on how
many processes share it, nor on into how many parts it is divided. Augmentation and the network's
dropout are drawn for each part.
"""

from .averaging import ema_decay
from .config import TrainConfig
from .loop import train
from .recipes import Recipe, digits_recipe, folder_recipe, seeded_unet

__all__ = [
    "Recipe",
    "TrainConfig",
    "digits_recipe",
    "ema_decay",
    "folder_recipe",
    "seeded_unet",
    "train",
]
