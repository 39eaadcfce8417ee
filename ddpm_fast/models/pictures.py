"""What every network here asks of its input."""

from torch import Tensor


def check_pictures(network: str, x: Tensor, channels: int) -> None:
    """Raise ValueError unless ``x`` is [N, channels, H, W]."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"{network}: x must have shape [N, {channels}, H, W]; got {list(x.shape)}")
