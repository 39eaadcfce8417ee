"""``--config FILE``: the options of a command, read from TOML or YAML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Values = Mapping[str, Any]


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config``, for :func:`use_config`."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="take options from a .toml or .yaml file: steps = 50; the command line comes first",
    )


def use_config(
    parser: argparse.ArgumentParser, command: str, commands: Collection[str], argv: Sequence[str]
) -> None:
    """Make what the file of ``--config`` in ``argv`` says the defaults of a command's parser.

    The file's keys are the long options without their dashes, and the names of positional
    arguments; ``_`` may stand for ``-``. A table named after a command holds keys for it alone,
    which come before those outside. Each value goes through the converter and the choices of its
    option. A flag is true or false, and a list the same as its elements with commas between them.

    Raises:
        ValueError: The file is missing, or is neither TOML nor YAML; it has a key that the command
            does not know, or a value that the option does not take. The message is one sentence
            that begins with the file's name.
        ImportError: The file is YAML, and PyYAML is not installed.
    """
    path = _config_path(argv)
    if path is None:
        return
    actions = _actions_by_key(parser)
    for key, value in _values_for(command, commands, read(path)).items():
        if key not in actions:
            known = commands if isinstance(value, dict) else actions
            raise ValueError(f"{path}: {command} has no option {key}; {_names_like(key, known)}")
        try:
            _set_default(parser, actions[key], value)
        except argparse.ArgumentError as error:
            raise ValueError(f"{path}: {key}: {error.message}") from None


def read(path: str) -> Values:
    """What a TOML or YAML file holds, by its extension.

    Raises:
        ValueError: no such file, another extension, or not what the extension says.
        ImportError: PyYAML is not installed.
    """
    extension = Path(path).suffix.lower()
    if extension not in (".toml", ".yaml", ".yml"):
        raise ValueError(f"{path}: a file of options is .toml, .yaml or .yml")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file in UTF-8") from None
    values = _parse_toml(text, path) if extension == ".toml" else _parse_yaml(text, path)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: must hold options by their names")
    return values


def _parse_toml(text: str, path: str) -> object:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def _parse_yaml(text: str, path: str) -> object:
    try:
        import yaml
    except ImportError:
        raise ImportError(f"{path}: YAML needs PyYAML: pip install 'ddpm_fast[yaml]'") from None
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _config_path(argv: Sequence[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        found, _ = finder.parse_known_args(argv)
    except argparse.ArgumentError:  # the command's own parser will say what is wrong
        return None
    return str(found.config) if found.config is not None else None


def _actions_by_key(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options by what a file calls them, without ``--help`` and ``--config``."""
    actions = {}
    for action in parser._actions:
        if action.default is not argparse.SUPPRESS and action.dest != "config":
            for name in action.option_strings or [action.dest]:
                if name.startswith("--") or not action.option_strings:
                    actions[name.lstrip("-").replace("_", "-")] = action
    return actions


def _values_for(command: str, commands: Collection[str], values: Values) -> Values:
    """The command's own table over what stands outside of tables."""
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    outside = {key: value for key, value in values.items() if key not in tables.keys() & commands}
    merged: dict[str, object] = {}
    for part in (outside, tables.get(command, {})):
        merged |= {str(key).replace("_", "-"): value for key, value in part.items()}
    return merged


def _names_like(key: str, known: Collection[str]) -> str:
    near = get_close_matches(key, known)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def _set_default(parser: argparse.ArgumentParser, action: argparse.Action, value: object) -> None:
    """Let the parser behave as if the command line had given the value."""
    action.default = _converted(parser, action, value)
    action.required = False
    if not action.option_strings:  # a positional argument falls back on its default only so
        action.nargs = "*" if action.nargs == "+" else action.nargs or "?"


def _converted(parser: argparse.ArgumentParser, action: argparse.Action, value: object) -> Any:
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise argparse.ArgumentError(action, f"must be true or false; got {value!r}")
        return action.const if value else action.default
    if isinstance(value, bool | dict | None):
        raise argparse.ArgumentError(action, f"must be a value; got {value!r}")
    words = [str(word) for word in value] if isinstance(value, list) else [str(value)]
    if action.nargs in (None, "?"):
        words = [",".join(words)]
    return parser._get_values(action, words)
