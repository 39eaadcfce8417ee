"""The package as a whole: which module may import which, and which backend serves."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import ddpm_fast
from cases import reverse_step_case
from ddpm_fast import _extension, ops

PACKAGE = Path(ddpm_fast.__file__).parent

# From the outermost to the innermost: a module imports only what stands further down.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["cli.sample", "cli.train", "cli.eval", "cli.bench", "cli.info"],
    ["cli.film", "cli.eval.bpd", "cli.eval.frechet", "cli.eval.npz"],
    ["cli.eval.pictures"],
    ["cli.options", "cli.config"],
    ["integrations.schedulers"],
    ["integrations"],
    ["__init__"],
    ["bench"],
    ["bench.checking"],
    ["bench.contenders"],
    ["bench.timing"],
    ["training", "sharding"],
    ["training.loop", "training.recipes"],
    ["training.logs"],
    ["training.run"],
    ["training.averaging", "training.batches", "training.learning_rate", "training.parallel"],
    ["training.config", "training.interruption", "training.seeds"],
    ["data", "checkpoint", "image_io", "shards"],
    ["data.opening"],
    ["data.folder", "data.huggingface", "data.npz", "data.scikit_learn"],
    ["data.dataset", "data.pictures"],
    ["data.fingerprint"],
    ["image_io.animation", "image_io.npz", "image_io.stills"],
    ["image_io.painting", "image_io.pixels"],
    ["atomic", "memory", "processes"],
    ["integrations.diffusers_models", "integrations.openai_models"],
    ["integrations.weights"],
    ["integrations"],
    ["editing", "continuous", "likelihood"],
    ["frechet", "sampler", "resampling"],
    ["options"],
    ["conditioning", "evaluating", "graphs", "guidance", "intermediates", "network"],
    ["solvers"],
    ["diffusion", "thresholding"],
    ["gaussians", "losses", "schedules"],
    ["ops"],
    ["reference"],
    ["checks"],
    ["_extension"],
    ["models", "models.lightweight", "models.unet", "models.pictures"],
]
LAYER_OF = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_modules(path: Path) -> set[str]:
    """The modules of this package that a module's source imports."""
    package = module_name(path).split(".")[: len(path.relative_to(PACKAGE).parts) - 1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
            found |= {name if name in LAYER_OF else ".".join(base) for name in names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found |= {
                name.removeprefix("ddpm_fast").lstrip(".")
                for name in names
                if name.split(".")[0] == "ddpm_fast"
            }
    return {name or "__init__" for name in found}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)
def test_imports_run_downwards(path: Path) -> None:
    name = module_name(path)
    assert name in LAYER_OF, f"say in LAYERS where {name} belongs"
    for imported in imported_modules(path):
        within_models = name.startswith("models") and imported.startswith("models")
        assert within_models or LAYER_OF[imported] > LAYER_OF[name], f"{name} imports {imported}"


def test_the_layers_are_those_of_the_package() -> None:
    assert set(LAYER_OF) == {module_name(path) for path in PACKAGE.rglob("*.py")}


def test_models_stand_apart() -> None:
    """They import nothing of the package but each other."""
    for path in (PACKAGE / "models").rglob("*.py"):
        assert all(name.startswith("models") for name in imported_modules(path))


@pytest.mark.parametrize(
    "path", sorted((PACKAGE.parent / "csrc").glob("*.h")), ids=lambda p: p.name
)
def test_arithmetic_is_torch_free(path: Path) -> None:
    if path.name in ("portable.h", "philox.h", "step_math.h", "layout.h"):
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not any("ATen" in line or "torch" in line or "c10" in line for line in includes)


def test_streams_and_rows_are_those_of_the_kernels() -> None:
    csrc = PACKAGE.parent / "csrc"
    if not csrc.exists():
        pytest.skip("installed without its sources")
    header = (csrc / "noise_source.h").read_text()
    for name, number in ops.STREAMS.items():
        assert f"k{name.capitalize()} = {number}" in header
    struct = (csrc / "step_math.h").read_text().split("struct StepRow {")[1].split("}")[0]
    words = struct.replace(",", " ").replace(";", " ").split()
    assert [word for word in words if word != "T"] == list(ops.ROW)


def test_diffusers_is_imported_by_its_adapters_only() -> None:
    code = "import sys, ddpm_fast, ddpm_fast.integrations; print('diffusers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_public_names_are_documented() -> None:
    for name in ddpm_fast.__all__:
        assert getattr(ddpm_fast, name).__doc__, name


def test_info_tells_which_backend_serves() -> None:
    info = ddpm_fast.info()
    assert info["version"] == ddpm_fast.__version__ and info["torch"] == torch.__version__
    expected = "native" if "cpu" in _extension.native_devices else "reference"
    assert info["backends"]["cpu"] == expected
    assert expected == "native" or info["reason"]


def test_auto_takes_the_native_backend_where_it_serves(native: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.serves_natively(torch.device("cpu"))
        assert not ops.serves_natively(torch.device("cpu"), "reference")


HIDDEN = """
import warnings, torch
from ddpm_fast import info, sample
model = lambda x, t: x
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        sample(model, (1, 1, 4, 4), num_steps=2, seed=0)
print(len(caught), caught[0].message)
try:
    sample(model, (1, 1, 4, 4), backend="native")
except RuntimeError as error:
    print(error)
print(info()["backends"]["cpu"], info()["reason"])
"""


def test_without_the_extension_the_fallback_serves_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DDPM_FAST_EXTENSION", "off")
    run = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=True)
    why = "the extension is hidden by DDPM_FAST_EXTENSION=off"
    assert run.stdout.splitlines() == [
        f"1 ddpm_fast computes on cpu in plain PyTorch: {why}",
        f"backend 'native' cannot serve cpu tensors: {why}",
        f"reference {why}",
    ]


def test_native_refuses_a_device_without_kernels() -> None:
    case = reverse_step_case()
    arguments = [tensor.to("meta") for tensor in case.args]
    with pytest.raises(RuntimeError, match=r"^backend 'native' cannot serve meta tensors: "):
        ops.reverse_step(*arguments, backend="native")
