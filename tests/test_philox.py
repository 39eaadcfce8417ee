"""The noise contract: the words, the normals, and what they may depend on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy import stats

from cases import reverse_step_case
from ddpm_fast import ops, reference

# Random123's published known-answer vectors for philox4x32-10 (its tests/kat_vectors).
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str, device: torch.device) -> torch.Tensor:
    return torch.tensor([[int(word, 16) for word in text.split()]], device=device)


def normals(
    shape: tuple[int, ...],
    device: torch.device,
    backend: str,
    *,
    seed: int = 0,
    first_index: int = 0,
    timestep: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    return ops.philox_normal(
        shape,
        seed=ops.seed_tensor(seed, device),
        sample_index=torch.arange(first_index, first_index + shape[0], device=device),
        timestep=torch.tensor(timestep, device=device),
        stream=stream,
        dtype=dtype,
        backend=backend,
    )


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    counter: str, key: str, answer: str, device: torch.device, backend: str
) -> None:
    result = ops.philox(words(counter, device), words(key, device), backend=backend)
    assert torch.equal(result, words(answer, device))


def test_words_equal_the_reference(device: torch.device, native: str) -> None:
    generator = torch.Generator().manual_seed(0)
    counter = torch.randint(0, 2**32, (10_000, 4), generator=generator).to(device)
    key = torch.randint(0, 2**32, (10_000, 2), generator=generator).to(device)
    assert torch.equal(ops.philox(counter, key, backend=native), reference.philox(counter, key))


def test_layout_version_1_is_pinned(device: torch.device, backend: str) -> None:
    """Changing these numbers changes every picture that anyone has drawn: a breaking change."""
    z = normals(
        (2, 6), device, backend, seed=2**63 + 5, first_index=2**40 - 1, timestep=999, stream=1
    )
    golden = [
        [-0.03160491, 2.0670102, 0.35004148, -1.2917864, 0.48749822, 1.2358464],
        [0.3282124, -0.06329986, 2.0443263, -0.5598161, 0.6696604, -0.4981791],
    ]
    torch.testing.assert_close(z.cpu(), torch.tensor(golden), rtol=3e-7, atol=0)


def test_counter_layout(device: torch.device, backend: str) -> None:
    """A normal is made of the words at (call, sample, timestep, stream), as csrc/philox.h says."""
    seed, index, timestep, stream = 2**63 + 5, 2**40 + 3, 17, 2
    z = normals(
        (1, 8), device, backend, seed=seed, first_index=index, timestep=timestep, stream=stream
    )
    counter = [[call, index % 2**32, timestep, stream + (index >> 32 << 16)] for call in (0, 1)]
    key = [[seed % 2**32, seed >> 32]] * 2
    w = ops.philox(torch.tensor(counter), torch.tensor(key), backend="reference").double()
    radius = (-2 * ((w[:, ::2] / 2).floor() * 2.0**-31 + 2.0**-32).log()).sqrt()
    angle = (w[:, 1::2] / 64).floor() * 2.0**-26 * 2 * torch.pi
    expected = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).reshape(1, 8)
    torch.testing.assert_close(z.cpu().double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_every_word_gives_an_accurate_normal(tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    here, program = Path(__file__).parent, tmp_path / "accuracy"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", f"-I{here.parent / 'csrc'}"]
    source = here / "accuracy_of_normals.cpp"
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    radius, direction = (float(error) for error in run.stdout.split())
    assert 1 <= radius <= 1.55 and 1 <= direction <= 1.24


@pytest.mark.parametrize("stream", [0, 1, 65535])
def test_normals_agree_to_2_ulp(stream: int, device: torch.device, native: str) -> None:
    ours = normals((7, 300_001), device, native, seed=stream, stream=stream, timestep=3)
    spec = normals((7, 300_001), device, "reference", seed=stream, stream=stream, timestep=3)
    assert int((ours.view(torch.int32) - spec.view(torch.int32)).abs().max()) <= 2


def test_normals_are_normal(device: torch.device, backend: str) -> None:
    z = normals((4, 100_000), device, backend, seed=1).cpu()
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    for power, moment in {1: 0, 2: 1, 3: 0, 4: 3}.items():
        spread = (z**power).std() / z.numel() ** 0.5
        assert abs((z**power).mean() - moment) < 4 * spread
    # Neither neighbours in a sample, nor samples, are correlated.
    assert abs((z[:, :-1] * z[:, 1:]).mean()) < 4 / z.numel() ** 0.5
    assert abs((z[0] * z[1]).mean()) < 4 / z.shape[1] ** 0.5


@pytest.mark.parametrize("what", ["seed", "first_index", "timestep", "stream"])
def test_every_part_of_the_key_counts(what: str, device: torch.device, backend: str) -> None:
    plain = normals((1, 64), device, backend)
    for value in (1, 2**15) + ((2**32, 2**47) if what in ("seed", "first_index") else ()):
        other = normals((1, 64), device, backend, **{what: value})
        assert not torch.isclose(plain, other).any()


@pytest.mark.parametrize("shape", [(3, 33), (3, 32)])
def test_dtypes_round_the_same_numbers(
    shape: tuple[int, ...], device: torch.device, backend: str
) -> None:
    z = normals(shape, device, backend)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert torch.equal(normals(shape, device, backend, dtype=dtype), z.to(dtype))


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0), (1, 1), (2, 31), (2, 1025), (1,)])
def test_prefix_and_batch_do_not_matter(
    shape: tuple[int, ...], device: torch.device, backend: str
) -> None:
    """Nor, on a GPU, how many multiprocessors share the work: pytorch#87992, #196613."""
    whole = normals((5, 5000), device, backend)
    part = normals(shape, device, backend)
    assert part.shape == shape
    flat = part.reshape(shape[0], -1) if part.numel() else part.new_empty(shape[0], 0)
    assert torch.equal(flat, whole[: shape[0], : flat.shape[1]])


def test_threads_do_not_matter(native: str) -> None:
    case = reverse_step_case((3, 3, 129, 65), noise="drawn")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(ops.reverse_step(*case.args, **case.kwargs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from cases import reverse_step_case
from ddpm_fast import ops
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in ("contiguous", "channels_last"):
        for learned in (False, True):
            case = reverse_step_case(
                (3, 3, 33, 31), dtype=dtype, layout=layout, noise="drawn", learned=learned,
                x0_prev=True, seed=4,
            )
            out = ops.reverse_step(*case.args, **case.kwargs, backend="native").contiguous()
            digest.update(out.view(torch.uint8).numpy().tobytes())
print(torch.backends.cpu.get_cpu_capability(), digest.hexdigest())
"""


def test_instruction_sets_agree_bit_for_bit(native: str, tmp_path: Path) -> None:
    """Plain, AVX2 and AVX-512 builds of the same source give the same bytes."""
    seen = {}
    capabilities = ["default", "avx2", "avx512"]
    # torch takes the machine at its word, and dies of an instruction that it lacks.
    best = torch.backends.cpu.get_cpu_capability().lower()
    known = capabilities.index(best) if best in capabilities else 0
    for capability in capabilities[: known + 1]:
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", DIGEST, os.path.dirname(__file__)]
        # From elsewhere, so that a checkout does not hide the package installed.
        run = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        used, digest = run.stdout.split()
        seen[used] = digest
    assert len(seen) > 1 or seen.keys() == {"DEFAULT"}
    assert len(set(seen.values())) == 1
