"""``--config FILE``: the same options, whether a file or the command line says them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_fast import cli
from ddpm_fast.cli.config import ConfigurableParser, add_config, commands_of


def commands(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Each command, and each that a command has in turn, with its words."""
    inner = commands_of(parser)
    if not inner:
        yield words, parser
    for name, command in inner.items():
        yield from commands(command, (*words, name))


COMMANDS = dict(commands(cli._parser()))


def options_of(words: tuple[str, ...]) -> list[argparse.Action]:
    """All that the command takes, apart from ``--help`` and ``--config``."""
    return [action for action in COMMANDS[words]._actions if action.dest not in ("help", "config")]


OPTIONS = [
    pytest.param(words, action, id=" ".join([*words, *(action.option_strings or [action.dest])]))
    for words in COMMANDS
    for action in options_of(words)
]


def key_of(action: argparse.Action) -> str:
    return action.option_strings[-1].lstrip("-") if action.option_strings else action.dest


def value_for(action: argparse.Action) -> object:
    """A value that the option takes, and that is not its default."""
    if action.nargs == 0:
        return True
    if action.choices:
        return next(choice for choice in action.choices if choice != action.default)
    if action.type is None:
        return "3"
    assert callable(action.type)
    try:
        action.type("0.125")
    except (ValueError, argparse.ArgumentTypeError):
        return 3
    return 0.125


def words_for(action: argparse.Action, value: object) -> list[str]:
    if not action.option_strings:
        return [str(value)]
    flag = action.option_strings[-1]
    return [flag] if action.nargs == 0 else [flag, str(value)]


def parse(*words: str) -> dict[str, object]:
    values = vars(cli._parser().parse_args(words))
    values.pop("config")
    return values


def write(path: Path, values: dict[str, object]) -> str:
    """As TOML or, by the extension, as YAML, of which JSON is a part."""
    separator = " = " if path.suffix == ".toml" else ": "
    lines = [f"{key}{separator}{json.dumps(value)}\n" for key, value in values.items()]
    path.write_text("".join(lines))
    return str(path)


def complaint(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence that a command line ends with; the exit code is 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.removeprefix("ddpm-fast: error: ")
    sentence, see = message.rsplit(" (see ", 1)
    assert see == f"ddpm-fast {words[0]} --help)\n"
    return sentence


@pytest.mark.parametrize("extension", ["toml", "yaml"])
@pytest.mark.parametrize("spell", ["-", "_"])
@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_a_file_says_what_the_command_line_says(
    command: tuple[str, ...], action: argparse.Action, spell: str, extension: str, tmp_path: Path
) -> None:
    if extension != "toml":
        pytest.importorskip("yaml")
    words = [*command]
    for other in options_of(command):
        if other.required and other.dest != action.dest:
            words += words_for(other, value_for(other))
    value = value_for(action)
    path = write(tmp_path / f"run.{extension}", {key_of(action).replace("-", spell): value})
    from_file = parse(*words, "--config", path)
    assert from_file == parse(*words, *words_for(action, value))
    assert from_file[action.dest] != action.default


def test_one_file_serves_several_commands(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'seed = 3\ndevice = "cpu"\n'
        "[sample]\nsteps = 50\nclasses = [1, 7, 7]\nseed = 4\n"
        '[train]\ndata = "digits"\nout = "m.safetensors"\nsteps = 7\n'
    )
    line = "sample --seed 4 --device cpu --steps 50 --classes 1,7,7"
    assert parse("sample", "--config", str(path)) == parse(*line.split())
    line = "train digits --seed 3 --device cpu --out m.safetensors --steps 7"
    assert parse("train", f"--config={path}") == parse(*line.split())


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    values: dict[str, object] = {"data": "digits", "out": "a", "steps": 5, "lr": 0.5}
    path = write(tmp_path / "run.toml", values)
    expected = "train photos --out b --steps 6 --lr 0.5"
    for line in (
        f"train photos --steps 6 --config {path} --out b",
        f"train --config {path} --out b photos --steps 6",
    ):
        assert parse(*line.split()) == parse(*expected.split())


def test_a_flag_may_be_false(tmp_path: Path) -> None:
    path = write(tmp_path / "run.toml", {"resume": False})
    words = ("train", "digits", "--out", "a")
    assert parse(*words, "--config", path) == parse(*words)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps = 0", "steps: must be at least 1; got 0"),
        ("steps = 2.5", "steps: must be a whole number; got '2.5'"),
        ("steps = true", "steps: must be a value; got True"),
        ("eta = 'much'", "eta: invalid float value: 'much'"),
        ("stps = 3", "sample has no option stps; did you mean steps or strip?"),
        ("qqq = 3", "sample has no option qqq; known are checkpoint, num, "),
        ("help = true", "sample has no option help; known are "),
        ("config = 'b.toml'", "sample has no option config; known are "),
        ("[trian]\nlr = 1", "sample has no option trian; did you mean train?"),
        ("[sample.steps]\nn = 1", "steps: must be a value; got {'n': 1}"),
        ("[sample.stps]\nn = 1", "sample has no option stps; did you mean steps or strip?"),
        ("first_indx = 3", "sample has no option first_indx; did you mean first-index?"),
        (
            "num = 1\nnum-samples = 2",
            "sample has one option for num and num-samples; give one of them",
        ),
        (
            "[sample]\nnum-samples = 1\nnum_samples = 2",
            "sample has one option for num-samples and num_samples; give one of them",
        ),
        ("sampler = 'euler'", "sampler: invalid choice: 'euler' (choose from "),
        ("steps", "not TOML: "),
    ],
)
def test_mistakes_name_the_file_and_the_key(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    said = complaint("sample", "--config", str(path), capsys=capsys)
    assert said.startswith(f"{path}: {sentence}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("table", "near"),
    [
        ("eval.bdp", "bdp; did you mean bpd?"),
        ("eval.qqq", "qqq; known are bpd, frechet, npz"),
        ("evl.bpd", "evl; did you mean eval?"),
        ("eval.bpd.stps", "stps; did you mean steps?"),
    ],
)
def test_a_table_is_like_those_of_its_command(
    table: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(f"[{table}]\nnum = 1")
    with pytest.raises(SystemExit):
        cli.main(["eval", "bpd", "--config", str(path)])
    said = capsys.readouterr().err
    assert said.startswith(f"ddpm-fast: error: {path}: eval bpd has no option {near}")


def test_a_commands_own_table_comes_first_by_whatever_name(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    for outside, inside in (("num", "num-samples"), ("num_samples", "num")):
        path.write_text(f"{outside} = 1\n[sample]\n{inside} = 2")
        assert parse("sample", "--config", str(path)) == parse("sample", "--num", "2")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """As Windows' editors write it."""
    path = tmp_path / "run.toml"
    path.write_text("num = 2", encoding="utf-8-sig")
    assert parse("sample", "--config", str(path)) == parse("sample", "--num", "2")


def test_a_flag_is_true_or_false(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.toml", {"resume": "yes"})
    said = complaint("train", "digits", "--out", "a", "--config", path, capsys=capsys)
    assert said == f"{path}: resume: must be true or false; got 'yes'"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("steps: [", "not YAML: "),
        ("- steps", "must hold options by their names"),
        ("3: 4", "must hold options by their names"),
        ("false", "must hold options by their names"),
        ("num: 2021-99-99", "not YAML: month must be in 1..12"),
        ("steps:", "steps: must be a value; got None"),
        ("seed: 1\nseed: 2", "not YAML: the key seed is repeated in "),
        ("sample: {seed: 1, seed: 2}", "not YAML: the key seed is repeated in "),
        ("num: 1\nnum_samples: 2", "sample has one option for num and num_samples; give one of"),
        ("out: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
    ],
)
def test_mistakes_of_yaml(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text(text)
    said = complaint("sample", "--config", str(path), capsys=capsys)
    assert said.startswith(f"{path}: {sentence}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [("--c", "ambiguous option: --c could match"), ("--conf", "--config cannot be abbreviated")],
)
def test_the_option_is_written_in_full(
    flag: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.toml", {"steps": 3})
    assert complaint("sample", flag, path, capsys=capsys).startswith(sentence)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    for name in ("run.toml", "run.yml"):
        path = write(tmp_path / name, {})
        assert parse("sample", "--config", path) == parse("sample")


def test_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff")
    for path, sentence in (
        (tmp_path / "no.toml", "No such file or directory"),
        (tmp_path / "run.json", "a file of options is .toml, .yaml or .yml"),
        (binary, "not a text file in UTF-8"),
    ):
        said = complaint("sample", "--config", str(path), capsys=capsys)
        assert said == f"{path}: {sentence}"
    assert complaint("info", "--config", capsys=capsys) == (
        "argument --config: expected one argument"
    )


def test_yaml_without_pyyaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = write(tmp_path / "run.yaml", {"seed": 3})
    said = complaint("sample", "--config", path, capsys=capsys)
    assert said == f"{path}: YAML needs PyYAML: pip install 'ddpm_fast[yaml]'"


def test_help_shows_the_values_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "run.toml", {"num": 17})
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", "--config", path, "--help"])
    assert end.value.code == 0
    assert "number of samples (default: 17)" in capsys.readouterr().out


def test_commands_of_commands_have_tables_of_tables(tmp_path: Path) -> None:
    parser = ConfigurableParser(prog="program")
    outer = parser.add_subparsers().add_parser("outer").add_subparsers()
    for name in ("first", "second"):
        outer.add_parser(name).add_argument("--num", type=int)
    add_config(parser)
    path = tmp_path / "run.toml"
    path.write_text("num = 1\n[outer]\nnum = 2\n[outer.second]\nnum = 3\n")
    for name, num in (("first", 2), ("second", 3)):
        args = parser.parse_args(["outer", name, "--config", str(path)])
        assert args.num == num
