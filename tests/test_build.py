"""What setup.py decides to compile, and how a build that does not fit is explained."""

import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.cpp_extension import include_paths

from ddpm_fast import _extension
from ddpm_fast._extension import explain_mismatch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ddpm_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nvcc_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An nvcc on the PATH that answers as the one of a toolkit elsewhere; returns that toolkit."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    answers = f"""case "$1" in
        --dryrun) echo "#$ _HERE_={toolkit}/bin" >&2; echo "#$ TOP={toolkit}/bin/.." >&2 ;;
        --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
        --list-gpu-arch) printf "compute_50\\ncompute_75\\ncompute_80\\ncompute_90\\n" ;;
    esac"""
    real = write_script(toolkit / "bin" / "nvcc", answers)
    (tmp_path / "path").mkdir()
    write_script(tmp_path / "path" / "nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return toolkit


@pytest.mark.parametrize("mode", ["auto", "cpu", "cuda", "off"])
def test_build_mode_is_read(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("DDPM_FAST_BUILD", mode)
    assert setup_py.build_mode() == mode


def test_build_mode_unknown(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_FAST_BUILD", "gpu")
    sentence = "DDPM_FAST_BUILD must be one of auto, cpu, cuda, off; got 'gpu'"
    with pytest.raises(SystemExit, match=f"^{re.escape(sentence)}$"):
        setup_py.build_mode()


@pytest.mark.parametrize(
    ("mode", "no_cpu", "no_cuda", "kernels"),
    [
        ("auto", "", "", "cuda"),
        ("auto", "", "no nvcc", "cpu"),
        ("auto", "no compiler", "", "off"),
        ("cpu", "", "", "cpu"),
        ("cpu", "", "no nvcc", "cpu"),
        ("cuda", "", "", "cuda"),
        ("off", "", "", "off"),
        ("off", "no compiler", "no nvcc", "off"),
    ],
)
def test_toolchain_decides(
    setup_py: ModuleType, mode: str, no_cpu: str, no_cuda: str, kernels: str
) -> None:
    assert setup_py.choose_kernels(mode, no_cpu, no_cuda) == kernels


@pytest.mark.parametrize(
    ("mode", "no_cpu", "no_cuda", "named"),
    [
        ("cpu", "no compiler", "", "no compiler"),
        ("cuda", "no compiler", "no nvcc", "no compiler"),
        ("cuda", "", "no nvcc", "no nvcc"),
    ],
)
def test_what_was_asked_for_and_is_missing(
    setup_py: ModuleType, mode: str, no_cpu: str, no_cuda: str, named: str
) -> None:
    with pytest.raises(SystemExit, match=f"^DDPM_FAST_BUILD={mode} cannot be had: {named}$"):
        setup_py.choose_kernels(mode, no_cpu, no_cuda)


def test_no_compiler(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert setup_py.missing_for_cpu() == ("the C++ compiler 'no-such-compiler -m64' was not found")


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "missing"),
    [
        ("13.0", "13.0", ""),
        ("13.2", "13.0", ""),
        (None, "13.0", "torch 2.13.0 is a build without CUDA"),
        ("13.0", None, "nvcc was not found on the PATH or under CUDA_HOME"),
        ("12.8", "13.0", "nvcc is of CUDA 13.0, but torch 2.13.0 of CUDA 12.8"),
    ],
)
def test_missing_for_cuda(
    setup_py: ModuleType, torch_cuda: str | None, nvcc: str | None, missing: str
) -> None:
    toolkit = None if nvcc is None else setup_py.Toolkit("/toolkit", nvcc, [])
    assert setup_py.missing_for_cuda("2.13.0", torch_cuda, toolkit) == missing


def test_toolkit_behind_a_wrapper(setup_py: ModuleType, nvcc_wrapper: Path) -> None:
    toolkit = setup_py.find_toolkit()
    assert toolkit == (str(nvcc_wrapper), "12.4", ["50", "75", "80", "90"])


def test_cuda_home_goes_first(
    setup_py: ModuleType, nvcc_wrapper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(nvcc_wrapper))
    assert setup_py.find_toolkit().home == str(nvcc_wrapper)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    assert setup_py.find_toolkit() is None


def test_architectures_that_nvcc_knows(
    setup_py: ModuleType, nvcc_wrapper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit = setup_py.find_toolkit()
    assert setup_py.architecture_list(toolkit) == "7.5;8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert setup_py.architecture_list(toolkit) == "9.0a"


def test_every_source_is_compiled(setup_py: ModuleType) -> None:
    """Those of csrc/cuda for CUDA alone, its host code as well as its kernels."""
    present = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu")
    )
    in_cuda = [name for name in present if name.startswith("csrc/cuda/")]
    assert {Path(name).suffix for name in in_cuda} == {".cpp", ".cu"}
    assert setup_py.source_files(with_cuda=True) == present
    assert setup_py.source_files(with_cuda=False) == sorted(set(present) - set(in_cuda))


def test_clang_takes_the_vectors(tmp_path: Path) -> None:
    """It once refused the assembly in them."""
    compiler = shutil.which("clang++")
    if compiler is None:
        pytest.skip("no clang++")
    flags = ["-std=c++20", "-O1", "-w", "-c", *(f"-I{path}" for path in include_paths())]
    source = ROOT / "csrc" / "cpu" / "normals.cpp"
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "normals.o")], check=True)


@pytest.fixture
def isolated(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in pip's isolated build environment, torch cannot be imported."""
    monkeypatch.setattr(setup_py, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize(
    ("version", "found"), [("2.10.0", True), ("2.13.0+cpu", True), ("2.9.1", False), (None, False)]
)
@pytest.mark.usefixtures("isolated")
def test_torch_of_the_installing_environment(
    setup_py: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    found: bool,
) -> None:
    answer = "exit 1" if version is None else f"echo '{json.dumps([version, ['/host']])}'"
    host = write_script(tmp_path / "python", f'test "$1" = -E || exit 1\n{answer}')
    monkeypatch.setattr(sys, "executable", str(host))
    assert setup_py.find_torch() is found
    assert ("/host" in sys.path) is found


@pytest.fixture
def arguments(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What main() hands to setup()."""
    received: dict[str, object] = {}
    monkeypatch.setattr(setup_py, "setup", received.update)
    return received


@pytest.mark.parametrize(
    ("mode", "has_torch", "required"),
    [
        ("auto", True, []),
        ("auto", False, ["torch>=2.10"]),
        ("cuda", False, ["torch>=2.10"]),
        ("off", False, []),
    ],
)
def test_a_build_requires_torch_only_where_there_is_none(
    setup_py: ModuleType,
    arguments: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    has_torch: bool,
    required: list[str],
) -> None:
    monkeypatch.setenv("DDPM_FAST_BUILD", mode)
    monkeypatch.setattr(sys, "argv", ["setup.py", "egg_info"])
    monkeypatch.setattr(setup_py, "find_torch", lambda: has_torch)
    setup_py.main()
    assert arguments == {"setup_requires": required}


def test_pure_python_install_says_why(
    setup_py: ModuleType,
    arguments: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["setup.py", "bdist_wheel"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("DDPM_FAST_BUILD", raising=False)
    setup_py.main()
    assert arguments == {}
    assert capsys.readouterr().err == (
        "warning: ddpm_fast is built without compiled kernels: "
        "the C++ compiler 'no-such-compiler' was not found\n"
    )
    monkeypatch.setenv("DDPM_FAST_BUILD", "cpu")
    with pytest.raises(SystemExit, match=r"^DDPM_FAST_BUILD=cpu cannot be had: the C\+\+"):
        setup_py.main()


def test_oldest_torch_is_stated_once(setup_py: ModuleType) -> None:
    oldest = ".".join(map(str, setup_py.OLDEST_TORCH))
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={oldest}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("built", "running"),
    [
        (("2.13.0+cpu", ""), ("2.13.1", "")),
        (("2.13.0+cu130", "13.0"), ("2.13.0+cu132", "13.2")),
    ],
)
def test_builds_that_fit(built: tuple[str, str], running: tuple[str, str]) -> None:
    assert explain_mismatch({"torch": built[0], "cuda": built[1]}, *running) is None


@pytest.mark.parametrize(
    ("built", "running", "sentence"),
    [
        (
            ("2.12.1+cpu", ""),
            ("2.13.0+cpu", ""),
            "the extension was compiled against torch 2.12.1+cpu (without CUDA), "
            "but this is torch 2.13.0+cpu (without CUDA)",
        ),
        (
            ("2.13.0+cpu", ""),
            ("2.13.0+cu130", "13.0"),
            "the extension was compiled against torch 2.13.0+cpu (without CUDA), "
            "but this is torch 2.13.0+cu130 (CUDA 13.0)",
        ),
        (
            ("2.13.0+cu130", "13.0"),
            ("2.13.0+cu128", "12.8"),
            "the extension was compiled against torch 2.13.0+cu130 (CUDA 13.0), "
            "but this is torch 2.13.0+cu128 (CUDA 12.8)",
        ),
    ],
)
def test_builds_that_do_not_fit(
    built: tuple[str, str], running: tuple[str, str], sentence: str
) -> None:
    assert explain_mismatch({"torch": built[0], "cuda": built[1]}, *running) == sentence


IMPORT_EXTENSION = """
import sys, types
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]  # not an editable install's
version = types.SimpleNamespace(cuda=None)
sys.modules["torch"] = types.SimpleNamespace(__version__="2.13.0+cpu", version=version)
package = sys.modules["ddpm_fast"] = types.ModuleType("ddpm_fast")
package.__path__ = [sys.argv[1]]
from ddpm_fast import _extension
print(sorted(_extension.native_devices), _extension.build_info, _extension.reason, sep="|")
"""


def import_extension(package: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Import _extension.py in a fresh interpreter whose torch is in name only."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT_EXTENSION, str(package)],
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "DDPM_FAST_EXTENSION"}
        | environ,
    )


NUMBERS_ARE_WRONG = """
import sys, torch
import ddpm_fast
from ddpm_fast import ops
assert ddpm_fast.__path__ == [sys.argv[1]]
x, rows, step = torch.zeros(1, 1), torch.zeros(1, 13), torch.tensor(0)
for call in (
    lambda: ops.philox(*torch.zeros(2, 2, 3, dtype=torch.int64), backend="native"),
    lambda: ops.reverse_step(x, x, rows, step, clip=-0.5, backend="native"),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


@pytest.mark.slow
def test_errors_of_an_extension_with_a_cpp_library_of_its_own(tmp_path: Path) -> None:
    """Its streams cannot format numbers; with a toolchain on an H200's machine some crashed."""
    found = subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True)
    if not Path(found.stdout.strip()).is_absolute():
        pytest.skip("no static C++ library")
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    for folder in ("csrc", "ddpm_fast"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    flags = "-static-libstdc++ -Wl,-Bsymbolic-functions"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"DDPM_FAST_BUILD": "cpu", "CXX": "g++", "LDFLAGS": flags},
        check=True,
    )
    (library,) = (tmp_path / "ddpm_fast").glob("_C*.so")
    assert b"libstdc++.so" not in library.read_bytes()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NUMBERS_ARE_WRONG, str(tmp_path / "ddpm_fast")],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "DDPM_FAST_EXTENSION"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines() == [
        "philox: counter must have shape [K, 4]; got [2, 3]",
        "reverse_step: clip must be positive, or None; got -0.5",
    ]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    shutil.copy(_extension.__file__, tmp_path)
    return tmp_path


def leave_extension(package: Path, record: str | None) -> None:
    """What is no library at all stands for one whose symbols are undefined."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / f"_C{suffix}").write_bytes(b"not a library")
    if record is not None:
        (package / f"_C{suffix}").with_suffix(".json").write_text(record, encoding="utf-8")


REMEDY = (
    "to build it anew, run `{}pip install --force-reinstall --no-deps .` in a checkout of ddpm_fast"
)


def test_no_extension(package: Path) -> None:
    run = import_extension(package)
    remedy = REMEDY.format("DDPM_FAST_BUILD=cpu ")
    assert run.stdout == f"[]|{{}}|ddpm_fast was installed without its extension; {remedy}\n"


def test_extension_of_another_torch_is_not_loaded(package: Path) -> None:
    leave_extension(package, '{"torch": "1.13.1", "cuda": "11.7"}')
    run = import_extension(package)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (
        "[]|{}|the extension was compiled against torch 1.13.1 (CUDA 11.7), but this is torch "
        f"2.13.0+cpu (without CUDA); {REMEDY.format('')}\n"
    )


@pytest.mark.parametrize("record", [None, "", "[]"])
def test_extension_without_a_record_is_not_loaded(package: Path, record: str | None) -> None:
    leave_extension(package, record)
    run = import_extension(package)
    assert run.stdout.startswith("[]|{}|the extension lacks the record of its build, _C.")


def test_extension_that_does_not_load(package: Path) -> None:
    leave_extension(package, '{"torch": "2.13.0+cpu", "cuda": ""}')
    run = import_extension(package)
    assert run.stdout.startswith("[]|{}|the extension does not load (")


def test_hidden_extension(package: Path) -> None:
    leave_extension(package, None)
    run = import_extension(package, DDPM_FAST_EXTENSION="off")
    assert run.stdout == "[]|{}|the extension is hidden by DDPM_FAST_EXTENSION=off\n"


def test_unknown_switch(package: Path) -> None:
    run = import_extension(package, DDPM_FAST_EXTENSION="no")
    assert run.stderr.endswith(
        "ValueError: DDPM_FAST_EXTENSION must be one of auto, off; got 'no'\n"
    )
