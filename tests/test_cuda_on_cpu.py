"""The sources of csrc/cuda as C++, in place of csrc/cpu, under the tests of the ops.

What nvcc alone compiles, the few lines under ``__CUDA_ARCH__``, is not reached; all else is: which
thread takes which elements, in every layout and dtype, and what it does with them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from conftest import needs_native
from ddpm_fast import _extension

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("reverse_step", "bound_reverse_step", "q_sample", "philox", "parity", "sampler", "editing")
# So that less is a large batch, which takes several launches or vectors a thread.
SIZES = {
    "kMaxItems = int64_t{1} << 31": "kMaxItems = 1 << 17",
    "kManyElements = int64_t{1} << 20": "kManyElements = 1 << 12",
}
LAUNCH = re.compile(r"(\w+(?:<[\w, ]*>)?)<<<(.*?)>>>\((.*?)\);", re.DOTALL)

BUILD = """
import sys
from pathlib import Path
from torch.utils.cpp_extension import load
build, csrc, shim = map(Path, sys.argv[1:])
load(
    "_C",
    [*map(str, csrc.glob("*.cpp")), *map(str, csrc.glob("cuda/*.cpp"))],
    extra_cflags=["-O1", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
    extra_include_paths=[str(shim), str(csrc)],
    build_directory=str(build),
    is_python_module=False,
)
"""


def as_cpp(source: str) -> str:
    """A launch becomes a call of run_grid, and the ops are those of CPU tensors."""
    source = LAUNCH.sub(r"run_grid(\2, [&] { \1(\3); });", source)
    for size, smaller in SIZES.items():
        source = source.replace(size, smaller)
    source = source.replace("c10::kCUDA", "c10::kCPU")
    return source.replace(
        "TORCH_LIBRARY_IMPL(ddpm_fast, CUDA,", "TORCH_LIBRARY_IMPL(ddpm_fast, CPU,"
    )


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of ddpm_fast whose kernels for CPU tensors are those of csrc/cuda."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    items = (csrc / "cuda" / "items.cuh").read_text()
    assert all(size in items for size in SIZES)
    for path in list((csrc / "cuda").iterdir()):
        compiled = path.suffix in (".cu", ".cpp")
        target = path.with_name(f"cuda_{path.stem}.cpp") if compiled else path
        target.write_text(as_cpp(path.read_text()))
        if compiled:
            path.unlink()
    (folder / "build").mkdir()
    command = [sys.executable, "-c", BUILD, folder / "build", csrc, ROOT / "tests/cuda_on_cpu"]
    subprocess.run(command, check=True)

    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(Path(_extension.__file__).parent, folder / "ddpm_fast", ignore=ignored)
    extension = folder / "ddpm_fast" / f"_C{EXTENSION_SUFFIXES[0]}"
    shutil.copy(folder / "build" / "_C.so", extension)
    record = Path(_extension.module.__file__).with_suffix(".json")
    shutil.copy(record, extension.with_suffix(".json"))
    return folder


@pytest.mark.slow
@needs_native
def test_every_kernel_passes_the_tests_of_the_ops(package: Path) -> None:
    launches = package / "launches.txt"
    environment = {
        **os.environ,
        "PYTHONPATH": str(package),
        "CUDA_ON_CPU_LAUNCHES": str(launches),
    }
    files = [ROOT / "tests" / f"test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, cwd=package, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]

    counts: Counter[str] = Counter()
    for line in launches.read_text().splitlines():
        count, kernel = line.split(" ", 1)
        counts[kernel] += int(count)
    assert [kernel for kernel, count in counts.items() if count == 0] == []
