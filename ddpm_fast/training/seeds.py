"""Seeds for the generators of a run."""

from __future__ import annotations

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A 64-bit seed that is a fixed function of ``parts``, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
