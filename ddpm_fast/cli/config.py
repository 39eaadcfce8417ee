"""``--config FILE``: the options of a command, read from TOML or YAML."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Values = Mapping[str, Any]
Tables = Mapping[str, "Tables"]


class ConfigurableParser(argparse.ArgumentParser):
    """A parser of which :func:`add_config` can make one that reads ``--config``."""

    command: tuple[str, ...] = ()
    tables: Tables | None = None

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse does, after the file has been read."""
        argv = sys.argv[1:] if args is None else list(args)
        if self.tables is None:
            return super().parse_known_args(argv, namespace)
        try:
            path = use_config(self, self.command, self.tables, argv)
        except (ImportError, ValueError) as error:
            self.error(str(error))
        parsed, rest = super().parse_known_args(argv, namespace)
        if parsed.config != path:
            self.error("--config cannot be abbreviated")
        return parsed, rest


def add_config(parser: ConfigurableParser) -> None:
    """Add ``--config`` to the parser's commands, or to the commands that these have in turn."""
    tables = _tables(parser)
    for command, leaf in _leaves(parser):
        leaf.command, leaf.tables = command, tables
        leaf.add_argument(
            "--config",
            metavar="FILE",
            help="take options from a .toml or .yaml file (num = 12); those given here come first",
        )


def commands_of(parser: argparse.ArgumentParser) -> dict[str, ConfigurableParser]:
    """The commands of a parser by their names; none where it is that of a command itself."""
    found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for action in found for name, command in action.choices.items()}


def _tables(parser: argparse.ArgumentParser) -> Tables:
    return {name: _tables(command) for name, command in commands_of(parser).items()}


def _leaves(
    parser: ConfigurableParser, command: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], ConfigurableParser]]:
    commands = commands_of(parser)
    if not commands:
        yield command, parser
    for name, inner in commands.items():
        yield from _leaves(inner, (*command, name))


def use_config(
    parser: argparse.ArgumentParser, command: Sequence[str], tables: Tables, argv: Sequence[str]
) -> str | None:
    """Make what the file of ``--config`` in ``argv`` says the defaults of a command's parser.

    The file's keys are the long options without their dashes, and the names of positional
    arguments; ``_`` may stand for ``-``. A table named after a command holds keys for it alone,
    which come before those outside. Each value goes through the converter and the choices of its
    option. A flag is true or false, and a list the same as its elements with commas between them.

    Args:
        parser: of the command, to be changed.
        command: its words, such as ``("sample",)``.
        tables: the names of all commands, nested as they are.
        argv: what comes behind the command.

    Returns:
        The file's path, if there is one.

    Raises:
        ValueError: The file is missing, or is neither TOML nor YAML; it has a key that the command
            does not know, two keys for one option, or a value that the option does not take. The
            message is one sentence that begins with the file's name.
        ImportError: The file is YAML, and PyYAML is not installed.
    """
    path = _config_path(argv)
    if path is None:
        return None
    actions = _actions_by_key(parser)
    given: dict[argparse.Action, tuple[str, object]] = {}
    for values, inner in _tables_of(command, tables, read(path)):
        try:
            given |= _by_action(values, actions, inner)
        except ValueError as error:
            raise ValueError(f"{path}: {' '.join(command)} {error}") from None
    for action, (key, value) in given.items():
        try:
            _set_default(parser, action, value)
        except argparse.ArgumentError as error:
            raise ValueError(f"{path}: {key}: {error.message}") from None
    return path


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
        text = Path(path).read_text(encoding="utf-8-sig")
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

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        """A safe loader to which a repeated key is a mistake, as YAML says it is."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key.value for key, _ in node.value]
            for i, (key, _) in enumerate(node.value):
                if key.value in keys[:i]:
                    repeated = f"the key {key.value} is repeated"
                    raise yaml.MarkedYAMLError(problem=repeated, problem_mark=key.start_mark)
            return node

    try:
        found = yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # a date of no calendar is a ValueError
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    return {} if found is None else found  # an empty file


def _config_path(argv: Sequence[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
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


def _tables_of(
    command: Sequence[str], tables: Tables, values: Values
) -> Iterator[tuple[Values, Tables]]:
    """What stands outside tables, then in the command's own, each with the tables it may hold."""
    outside = {
        str(key): value
        for key, value in values.items()
        if key not in tables or not isinstance(value, dict)
    }
    yield outside, tables
    inside = values.get(command[0]) if command else None
    if isinstance(inside, dict):
        yield from _tables_of(command[1:], tables[command[0]], inside)


def _by_action(
    values: Values, actions: Mapping[str, argparse.Action], tables: Tables
) -> dict[argparse.Action, tuple[str, object]]:
    """The keys and values of one table by the options that they set.

    Raises:
        ValueError: a key that is no option, or two that are the same.
    """
    found: dict[argparse.Action, tuple[str, object]] = {}
    for key, value in values.items():
        action = actions.get(key.replace("_", "-"))
        if action is None:
            known = tables if tables and isinstance(value, dict) else actions
            raise ValueError(f"has no option {key}; {_names_like(key, known)}")
        if action in found:
            raise ValueError(f"has one option for {found[action][0]} and {key}; give one of them")
        found[action] = key, value
    return found


def _names_like(key: str, known: Collection[str]) -> str:
    near = get_close_matches(key.replace("_", "-"), known)
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
