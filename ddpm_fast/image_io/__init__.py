"""Samples as files: grids, film strips and animations to look at, single PNGs, and npz to measure.

All functions take values in [-1, 1], as ``ddpm_fast.sample`` returns them, and show those outside,
as noisy states have them, as the nearer end. They write every file whole or not at all
(``ddpm_fast.atomic``), and the same bytes for the same input.
"""

from .animation import save_animation
from .npz import save_npz
from .pixels import to_uint8
from .stills import save_grid, save_images, save_strip

__all__ = [
    "save_animation",
    "save_grid",
    "save_images",
    "save_npz",
    "save_strip",
    "to_uint8",
]
