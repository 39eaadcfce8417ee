"""The documentation: what it quotes is in the code, and what is public is documented."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import ddpm_fast
from ddpm_fast import cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = Path(ddpm_fast.__file__).parent

# Modules that serve the others; each of the rest has its place in docs/reference.
INTERNAL = {
    "atomic",
    "checks",
    "conditioning",
    "data.fingerprint",
    "evaluating",
    "gaussians",
    "graphs",
    "guidance",
    "integrations",
    "integrations.weights",
    "intermediates",
    "memory",
    "network",
    "options",
    "processes",
    "reference",
}
PROGRAMS = ("cli", "bench")


# --- quotations -------------------------------------------------------------------------------


def quotations(page: Path) -> Iterator[tuple[Path, str]]:
    """The code that a page quotes (```py, ```cpp), each with the file last linked to before it."""
    file = None
    pieces = re.compile(r"\]\((\.\./[\w./]+)\)|```(\w+)\n(.*?)```", re.DOTALL)
    for link, language, code in pieces.findall(page.read_text()):
        if link:
            file = page.parent / link
        elif language in ("py", "cpp"):
            assert file is not None, f"{page.name} does not say where this is from:\n{code}"
            yield file, code


def unindented(code: str) -> str:
    return "\n".join(["", *(line.strip() for line in code.strip().splitlines()), ""])


QUOTATIONS = [
    pytest.param(file, code, id=f"{file.name}-{number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, (file, code) in enumerate(quotations(page))
]


@pytest.mark.parametrize(("file", "code"), QUOTATIONS)
def test_quotations_are_in_their_files(file: Path, code: str) -> None:
    assert unindented(code) in unindented(file.read_text())


def functions_of(file: Path) -> set[str]:
    """Their names, a method's behind that of its class."""
    tree = ast.parse(file.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        prefix + node.name
        for prefix, owner in [("", tree), *((f"{node.name}.", node) for node in classes)]
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
    }


# As in "`q_sample`, [ddpm_fast/reference.py](...)", or in "`normals` in `ddpm_fast/reference.py`".
NAMED = re.compile(r"`([\w.]+)`[\w ]*(?:,\s\[| in `)(ddpm_fast/[\w/]+\.py)")
FUNCTIONS = {
    (file, name.removeprefix(f"{Path(file).stem}."))
    for page in DOCS.glob("*.md")
    for name, file in NAMED.findall(page.read_text())
}


@pytest.mark.parametrize(("file", "name"), sorted(FUNCTIONS))
def test_functions_are_in_the_files_that_pages_name(file: str, name: str) -> None:
    assert name in functions_of(ROOT / file)


def test_every_formula_has_its_lines() -> None:
    """Between a formula of docs/equations.md and the next heading, code of Python and a kernel."""
    assert len(QUOTATIONS) > 30 and len(FUNCTIONS) > 15
    text = (DOCS / "equations.md").read_text()
    formulas = text.split("$$\n")
    assert len(formulas) % 2 == 1, "a formula is not closed"
    for after in formulas[2::2]:
        assert "```py" in after, after


# --- the command line -------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    text = (DOCS / "command-line.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_command_lines_parse() -> None:
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        assert cli._parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize("language", ["toml", "yaml"])
def test_files_of_options_are_read(language: str, tmp_path: Path) -> None:
    if language == "yaml":
        pytest.importorskip("yaml")
    (text,) = blocks(language)
    path = tmp_path / f"run.{language}"
    path.write_text(text)
    args = cli._parser().parse_args(["sample", "--config", str(path)])
    expected = {"toml": ("dpmpp_2m", 20, "0,2,2", 3), "yaml": ("ddim", 50, "0-9", 0)}
    assert (args.sampler, args.steps, args.classes, args.seed) == expected[language]
    if language == "toml":
        args = cli._parser().parse_args(["train", "--config", str(path)])
        assert (args.data, args.learning_rate, args.seed) == ("photos/", 1e-4, 3)


def test_the_error_that_is_shown_is_the_one_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("stpes = 3")
    with pytest.raises(SystemExit):
        cli.main(["sample", "--config", "run.toml"])
    assert blocks("text") == [capsys.readouterr().err]


LINK = re.compile(r":(?:func|meth|class):`")

# --- docstrings -------------------------------------------------------------------------------


def documented_modules() -> list[str]:
    """The modules on the pages of the reference."""
    text = "".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.rst")))
    return re.findall(r"automodule:: (\S+)", text)


def public_names() -> Iterator[tuple[str, Any]]:
    """Functions, classes and their methods, by the name under which the reference has them."""
    for module_name in documented_modules():
        if module_name.endswith("schedulers"):
            pytest.importorskip("diffusers")
        module = importlib.import_module(module_name)
        own = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name
        ]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            yield f"{module_name}.{name}", value
            if inspect.isclass(value) and value.__module__.startswith("ddpm_fast"):
                for method, function in vars(value).items():
                    function = getattr(function, "__func__", function)
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{module_name}.{name}.{method}", function


def test_every_module_has_its_place_in_the_reference() -> None:
    """Its own, or that of the package which it is a part of."""
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    assert modules >= INTERNAL
    documented = {name.removeprefix("ddpm_fast.") for name in documented_modules()}
    for name in sorted(modules - INTERNAL):
        program_or_private = name.startswith("_") or name.split(".")[0] in PROGRAMS
        parents = set(itertools.accumulate(name.split("."), "{}.{}".format))
        assert program_or_private or parents & documented, f"{name} is not in docs/reference"


def test_public_names_have_docstrings_that_name_their_parameters() -> None:
    """Or else the function or class, as a link, whose parameters they are."""
    missing = []
    for name, value in public_names():
        if not callable(value):
            continue
        text = inspect.getdoc(value) or ""
        words = set(re.findall(r"\w+", text))
        if inspect.isclass(value) and issubclass(value, Exception):
            assert text, name
            continue
        parameters = set(inspect.signature(value).parameters) - {"self", "cls", "args", "kwargs"}
        if not text or (parameters - words and not LINK.search(text)):
            missing.append(f"{name}: {sorted(parameters - words)}")
    assert not missing, "\n".join(missing)


def written(function: object) -> bool:
    """Whether it is a function of the package's source, and no dataclass's or protocol's own."""
    return inspect.isfunction(function) and function.__code__.co_filename.startswith(str(PACKAGE))


def raised_by(function: Callable[..., object]) -> set[str]:
    """The exceptions that a function raises itself."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [
        node.exc.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return {call.id for call in calls if isinstance(call, ast.Name)}


def test_docstrings_tell_what_is_raised() -> None:
    missing = []
    for name, value in public_names():
        if inspect.isclass(value):
            makers = [vars(value).get(method) for method in ("__init__", "__post_init__")]
        else:
            makers = [value]
        raised = set().union(*(raised_by(maker) for maker in makers if written(maker)))
        text = inspect.getdoc(value) or ""
        if unsaid := {error for error in raised if error not in text}:
            missing.append(f"{name}: {sorted(unsaid)}")
    assert not missing, "\n".join(missing)


def test_docstrings_give_the_shape_of_tensors() -> None:
    """As ``[N, C, ...]``, or like another, or with a link to where it stands."""
    missing = []
    for name, value in public_names():
        if not inspect.isfunction(value):
            continue
        kinds = [str(kind) for kind in value.__annotations__.values()]
        takes = any("Tensor" in kind and "Mapping" not in kind for kind in kinds)
        text = inspect.getdoc(value) or ""
        shape = re.search(r"\[.*\]|\blike\b|\bbroadcast\b|\bshape\b", text)
        if takes and not shape and not LINK.search(text):
            missing.append(name)
    assert not missing, "\n".join(missing)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "pages"),
    [("pictures", ["editing", "output"]), ("pictures_of_equations", ["equations"])],
)
def test_the_pictures_of_a_page_are_drawn_by_its_script(
    script: str, pages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    assert importlib.import_module(f"benchmarks.{script}").main(["--out", str(tmp_path)]) == 0
    shown = "".join((DOCS / f"{page}.md").read_text(encoding="utf-8") for page in pages)
    wanted = set(re.findall(r"\]\(images/([\w.-]+)\)", shown))
    assert {path.name for path in tmp_path.iterdir()} == wanted
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 20
