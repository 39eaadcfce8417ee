"""The command line, ``ddpm-fast COMMAND``: thin wrappers of the library."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from ..processes import OtherProcessError, first_of_machine, processes, sentence
from . import bench, eval, info, sample, train
from .config import ConfigurableParser, add_config
from .options import PROG, Command, add_commands

COMMANDS: dict[str, Command] = {
    "sample": sample,
    "train": train,
    "eval": eval,
    "bench": bench,
    "info": info,
}
SHARED = (sample, train)  # by the processes that torchrun starts
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own, and return its exit code.

    0 is success; 2 a mistaken option or bad input, told in one sentence on stderr; 130 an
    interruption by Ctrl-C. An option that cannot be parsed raises SystemExit(2), as argparse does.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with processes() as group:  # of which the first that fails tells why
                args = _parser().parse_args(argv)
                if group.count > 1 and args.command not in SHARED:
                    raise ValueError("this command works in one process; run it without torchrun")
                args.command.run(args)
        except OtherProcessError:
            return EXIT_BAD_INPUT
        except _Mistake as mistake:
            _say(f"error: {mistake}")
            raise SystemExit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt as interrupt:
            _say(str(interrupt) or "interrupted")
            return EXIT_INTERRUPTED
        except (FloatingPointError, ImportError, OSError, ValueError) as error:
            _say(f"error: {sentence(error)}")
            return EXIT_BAD_INPUT
    return 0


def _say(message: str) -> None:
    print(f"{PROG}: {message}", file=sys.stderr)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if first_of_machine():
        _say(f"warning: {message}")


class _Mistake(Exception):
    """An option that cannot be parsed."""


class _Parser(ConfigurableParser):
    """Reports a mistake in the form of all other errors, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise _Mistake(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    summary = "Draw samples from diffusion models, train and measure them."
    parser = _Parser(prog=PROG, description=summary)
    add_commands(parser, COMMANDS, "command")
    add_config(parser)
    return parser
