"""``python -m ddpm_fast``: the command ``ddpm-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
