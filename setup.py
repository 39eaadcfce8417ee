"""Compiles the kernels of ddpm_fast; all else about the package stands in pyproject.toml.

The toolchain decides what is compiled, never a visible GPU. DDPM_FAST_BUILD says what is wanted:

    auto (default)  CUDA kernels where torch is a CUDA build and nvcc fits it, CPU kernels where
                    there is a C++ compiler, a pure-Python install where there is none
    cpu, cuda       these kernels, or an error that says what is missing
    off             a pure-Python install

A compiled extension serves only the torch it was compiled against. Therefore the torch of the
installing environment is taken, even from within pip's isolated build environment. Only where
there is none does the build require one: the newest, as the installation itself then does too.
TORCH_CUDA_ARCH_LIST, CUDA_HOME, CXX and MAX_JOBS mean what they mean to torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)  # as in pyproject.toml
MODES = ("auto", "cpu", "cuda", "off")
# setuptools runs this file for these commands too; they compile nothing, so they need no torch.
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist"}
# What torch itself is compiled for; 8.7 and 8.9 run the code of 8.6.
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


def warn(message: str) -> None:
    """Say it where pip -v and a failing build show it."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


class Toolkit(NamedTuple):
    """A CUDA toolkit, as its nvcc describes it."""

    home: str
    version: str
    architectures: list[str]


def build_mode() -> str:
    """DDPM_FAST_BUILD, checked."""
    mode = os.environ.get("DDPM_FAST_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"DDPM_FAST_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
    return mode


def missing_for_cpu() -> str:
    """What is missing to compile an extension of Python, or an empty string."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if shutil.which(compiler.split()[0]) is None:
        return f"the C++ compiler {compiler!r} was not found"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"the Python header {header} was not found"


def missing_for_cuda(torch_version: str, torch_cuda: str | None, toolkit: Toolkit | None) -> str:
    """What is missing to compile CUDA kernels for this torch, or an empty string."""
    if torch_cuda is None:
        return f"torch {torch_version} is a build without CUDA"
    if toolkit is None:
        return "nvcc was not found on the PATH or under CUDA_HOME"
    if toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {toolkit.version}, but torch {torch_version} of CUDA {torch_cuda}"
    return ""


def choose_kernels(mode: str, no_cpu: str, no_cuda: str) -> str:
    """The most that the mode allows of what can be compiled: "cuda" (and CPU), "cpu" or "off"."""
    missing = no_cpu if mode == "cpu" else no_cpu or no_cuda
    if mode in ("cpu", "cuda") and missing:
        raise SystemExit(f"DDPM_FAST_BUILD={mode} cannot be had: {missing}")
    if mode == "off" or no_cpu:
        return "off"
    return "cpu" if mode == "cpu" or no_cuda else "cuda"


def find_toolkit() -> Toolkit | None:
    """Ask nvcc where it lives: it may be a wrapper script, so that its own folder tells nothing."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else f"{os.environ.get('PATH', os.defpath)}:/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        return None

    def ask(pattern: str, *question: str) -> list[str]:
        answer = subprocess.run([nvcc, *question], capture_output=True, text=True)
        return re.findall(pattern, answer.stdout + answer.stderr)

    top = ask(r"TOP=(\S+)", "--dryrun", "-x", "cu", os.devnull)
    version = ask(r"release (\d+\.\d+)", "--version")
    architectures = ask(r"compute_(\d+)", "--list-gpu-arch")
    if not top or not version:
        return None
    return Toolkit(home or os.path.realpath(top[0]), version[0], architectures)


def architecture_list(toolkit: Toolkit) -> str:
    """TORCH_CUDA_ARCH_LIST, for which torch has no default where no GPU is visible."""
    known = [name for name in ARCHITECTURES if name.replace(".", "") in toolkit.architectures]
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(known) + "+PTX"


def find_torch() -> bool:
    """Make torch importable, if need be the installing environment's; False where there is none."""
    if find_spec("torch") is not None:
        return True
    # pip isolates a build through PYTHONPATH: with -E, the interpreter sees its own packages again.
    script = "import json, sys; from importlib.metadata import version; "
    script += "print(json.dumps([version('torch'), sys.path[1:]]))"
    host = subprocess.run([sys.executable, "-E", "-c", script], capture_output=True, text=True)
    if host.returncode != 0:
        return False
    version, path = json.loads(host.stdout)
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST_TORCH:
        return False
    sys.path += path
    return True


def source_files(with_cuda: bool) -> list[str]:
    """What is compiled into ddpm_fast._C."""
    patterns = ["csrc/*.cpp", "csrc/cpu/*.cpp"]
    if with_cuda:
        patterns += ["csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
    return sorted(str(path.relative_to(ROOT)) for each in patterns for path in ROOT.glob(each))


def extension(toolkit: Toolkit | None) -> Any:
    """ddpm_fast._C, with CUDA kernels where a toolkit is given."""
    macros: list[tuple[str, str | None]] = []
    if toolkit:
        # torch reads the first when cpp_extension is imported, the second when it compiles.
        os.environ["CUDA_HOME"] = toolkit.home
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures = architecture_list(toolkit)
        macros = [
            ("WITH_CUDA", None),
            ("DDPM_FAST_CUDA_VERSION", f'"{toolkit.version}"'),
            ("DDPM_FAST_CUDA_ARCHS", f'"{architectures}"'),
        ]
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    # A product is rounded before it is added, on every backend, so that the backends agree.
    cxx = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", *openmp]
    return (CUDAExtension if toolkit else CppExtension)(
        "ddpm_fast._C",
        source_files(with_cuda=toolkit is not None),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "--fmad=false"]},
        extra_link_args=openmp,
    )


def compiled_parts(mode: str) -> dict[str, Any]:
    """Arguments of setup() that compile the kernels chosen; warns where they are not all."""
    import torch

    toolkit = find_toolkit()
    no_cuda = missing_for_cuda(torch.__version__, torch.version.cuda, toolkit)
    kernels = choose_kernels(mode, "", no_cuda)
    if kernels == "cpu" and mode == "auto" and torch.version.cuda is not None:
        warn(f"ddpm_fast is built without CUDA kernels: {no_cuda}")
    module = extension(toolkit if kernels == "cuda" else None)
    from torch.utils.cpp_extension import BuildExtension

    class BuildWithRecord(BuildExtension):
        """Leaves beside _C which torch it was built for, to be read before _C is loaded."""

        def finalize_options(self) -> None:
            super().finalize_options()
            self.force = True  # what an earlier build left in build/ may be for another torch

        def run(self) -> None:
            super().run()
            record = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
            path = Path(self.get_ext_fullpath(module.name)).with_suffix(".json")
            path.write_text(json.dumps(record), encoding="utf-8")

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildWithRecord}}


def main() -> None:
    """Describe the package, or build it with what this machine can compile."""
    mode = build_mode()
    missing = "" if mode == "off" else missing_for_cpu()
    want_torch = mode != "off" and not missing
    has_torch = want_torch and find_torch()
    if METADATA_COMMANDS.intersection(sys.argv):
        setup(setup_requires=["torch>=2.10"] if want_torch and not has_torch else [])
    elif has_torch:
        setup(**compiled_parts(mode))
    else:
        missing = missing or "there is no torch in this environment to compile against"
        choose_kernels(mode, missing, "")  # refuses what was asked for
        if mode == "auto":
            warn(f"ddpm_fast is built without compiled kernels: {missing}")
        setup()


if __name__ == "__main__":
    main()
