"""Proofs of device.py: GPUs are described by stand-ins, so that they run without one."""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import device
from device import (
    cgroup_limits,
    compile_c,
    compile_error,
    device_memory,
    find_device,
    find_dtype,
    nvidia_gpu,
    peak_flops,
)
from files import InputError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cuda_build(monkeypatch):
    """PyTorch as it is built for CUDA, on a machine with a GPU that answers or does not."""
    def build(answers, capability=(8, 0), visible=None, archs="sm_75 sm_80 sm_90a sm_100 sm_120"):
        def init():
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040)")

        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.accelerator, "current_accelerator",
                            lambda check_available: GPU if answers else None)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "get_arch_list", archs.split)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(device.Path, "glob", lambda *_: [Path("/dev/nvidia0")])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return build


def test_a_gpu_that_cannot_be_used_is_not_passed_over(cuda_build):
    """Too old a driver, and the run of days on a GPU began on the CPU, without a word."""
    cuda_build(answers=False)
    with pytest.raises(SystemExit, match=r"driver on your system is too old(.|\n)*cu126"):
        find_device()


def test_a_gpu_without_code_for_it_is_named(cuda_build):
    """A V100 with a new PyTorch answers, and so does a B200 with an old one, and both fail at the
    first kernel."""
    for capability, archs in ((7, 0), "sm_75 sm_80"), ((10, 0), "sm_80 sm_90a"):
        cuda_build(answers=True, capability=capability, archs=archs)
        with pytest.raises(SystemExit, match=f"capability {capability[0]}.0, and this PyTorch"):
            find_device()
    for capability, archs in (((8, 9), "sm_80"), ((10, 3), "sm_100"), ((9, 0), "sm_90a"),
                              ((12, 0), "sm_90 compute_90"), ((8, 0), "")):
        cuda_build(answers=True, capability=capability, archs=archs)
        assert find_device() == GPU


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_a_hidden_gpu_may_stay_hidden(cuda_build, visible):
    """Who hides the GPU wants the CPU."""
    cuda_build(answers=False, visible=visible)
    assert find_device() == CPU


def test_a_gpu_is_seen_without_pytorch(monkeypatch):
    """In WSL there is no /dev/nvidia0; on a login node nvidia-smi is there and lists nothing."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device.Path, "glob", lambda *_: [])
    for listed, expected in (b"GPU 0: NVIDIA L4 (UUID: ...)", True), (b"No devices found", False):
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
        assert nvidia_gpu() is expected

    def absent(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    assert not nvidia_gpu()


def test_precision_follows_the_hardware(monkeypatch):
    """Emulated bf16 is ten times slower than fp32. On MPS, attention in bf16 saw later tokens
    before PyTorch 2.13: a loss that falls to nothing, and a model that has learned nothing."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert find_dtype(CPU)[0] == (torch.bfloat16 if has else torch.float32)
    assert find_dtype(CPU, "bfloat16") == (torch.bfloat16, "as asked")
    mps = torch.device("mps")
    assert find_dtype(mps)[0] == torch.float32
    for version, expected in ("2.11.0", torch.float32), ("2.13.0", torch.bfloat16):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        assert find_dtype(mps, "bfloat16")[0] == expected


@pytest.mark.parametrize("name, bf16, fp32", [
    ("NVIDIA H100 80GB HBM3", 989e12, 67e12), ("NVIDIA H100 PCIe", 756e12, 51e12),
    ("NVIDIA H100 NVL", 835e12, 60e12), ("NVIDIA H200", 989e12, 67e12),
    ("NVIDIA B200", 2250e12, 75e12), ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
    ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12), ("NVIDIA A100-PCIE-40GB", 312e12, 19.5e12),
    ("NVIDIA A40", 149.7e12, 37.4e12), ("NVIDIA A10", 125e12, 31.2e12),
    ("NVIDIA L4", 121e12, 30.3e12), ("NVIDIA L40S", 362e12, 91.6e12), ("Tesla T4", None, 8.1e12),
    ("NVIDIA GeForce RTX 5090", 209.5e12, 104.8e12),
    ("NVIDIA GeForce RTX 3090", 71e12, 35.6e12), ("NVIDIA RTX A4000", None, None),
    ("NVIDIA A10G", None, None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
    ("NVIDIA GeForce RTX 3090 Ti", None, None), ("NVIDIA L40", None, None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None), ("cpu, 2 threads", None, None)])
def test_promises_are_those_of_the_card(name, bf16, fp32):
    """An RTX A4000 was taken for an A40, and fp32 measured by the promise for bf16: an MFU of other
    hardware."""
    assert peak_flops(name, torch.bfloat16) == bf16 and peak_flops(name, torch.float32) == fp32


@pytest.mark.slow
@pytest.mark.parametrize("headers", [None, False, True])
def test_what_compiles_is_found_by_compiling(headers, tmp_path):
    """A compiler that is there may lack Python's headers: training began, and ended at its first
    step in a page of errors. Without a compiler (None), with one that finds no headers; with all.
    """
    if headers is not None:
        (tmp_path / "g++").write_text(f"""#!/bin/bash
            for a in "$@"; do
                [[ $a == -I*/include/python3{"-" if headers else ""}* ]] || args+=("$a")
            done
            PATH={os.environ["PATH"]} exec g++ "${{args[@]}}"
            """)
        (tmp_path / "g++").chmod(0o755)
    found = subprocess.run(
        [sys.executable, "-c", "import torch; from device import compile_error as error; "
         "print(error(torch.device('cpu')), error(torch.device('mps')))"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env=os.environ | {"PATH": f"{tmp_path}:/nowhere" if headers is None else
                          f"{tmp_path}:{os.environ['PATH']}",
                          "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}).stdout
    assert found.endswith("torch.compile is not used on mps\n")
    assert {None: "No working C++ compiler", False: "Python.h", True: "None"}[headers] in found


@pytest.mark.parametrize("groups, files, limits", [
    ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "700"}, [700]),
    ("0::/\n", {"memory.max": "5"}, [5]),
    ("4:memory:/docker/1\n1:cpu:/\n0::/\n", {"memory/memory.limit_in_bytes": "9"}, [9]),
    ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "7", "memory/memory.limit_in_bytes": "8"},
     [7, 8]), ("", {}, []), (None, {}, [])])
def test_a_container_may_have_less_memory(groups, files, limits, tmp_path, monkeypatch):
    """The plan counted the machine's memory, and the kernel killed the run."""
    for name, text in {f"sys/fs/cgroup/{name}": text + "\n" for name, text in files.items()
                       }.items() | ({} if groups is None else {"proc/self/cgroup": groups}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(cgroup_limits(tmp_path)) == limits
    monkeypatch.setattr(device, "cgroup_limits", lambda: iter(limits))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert device_memory(CPU) == min([machine, *limits]) > 0


COMPILER = os.environ.get("CC") or "cc"


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """compiled(N) is what a library returns that was compiled with N; its compiler notes in a file
    what it has made, and fails where `shell` says so."""
    if not shutil.which(shlex.split(COMPILER)[0]):
        pytest.skip("there is no C compiler")
    source, calls = tmp_path / "answer.c", tmp_path / "calls"
    source.write_text("int answer(void) { return N; }")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(tmp_path / "compiler"))

    def compiled(N, shell=""):
        (tmp_path / "compiler").write_text(f"""#!/bin/sh
            {shell}
            case "$*" in *-shared*) echo "$*" >> {calls};; esac
            exec {COMPILER} "$@"
            """)
        (tmp_path / "compiler").chmod(0o755)
        return compile_c(source, N=N).answer()

    compiled.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    compiled.cache = tmp_path / "cache/tinyllama"
    return compiled


def test_code_is_compiled_once(compiled):
    """Again at each start, or the library of another model."""
    assert [compiled(N) for N in (5, 6, 5)] == [5, 6, 5]
    assert len(compiled.calls()) == 2 and all("-fopenmp" in call for call in compiled.calls())
    assert len(list(compiled.cache.iterdir())) == 2


def test_compilers_differ(compiled):
    """Apple's has no OpenMP, some know no -march=native, and a GPU's machine may have none at all:
    what works is taken, and what does not is one sentence."""
    refuse = 'case "$*" in *{}*) echo "error: no {}" >&2; exit 1;; esac'
    assert compiled(1, refuse.format("-fopenmp", "OpenMP")) == 1
    assert "-march=native" in compiled.calls()[-1] and "-fopenmp" not in compiled.calls()[-1]
    assert compiled(2, refuse.format("-march", "-march")) == 2
    assert "-march" not in compiled.calls()[-1]
    with pytest.raises(InputError, match="compiler does not compile answer.c: error: no luck$"):
        compiled(3, refuse.format("", "luck"))
    with pytest.raises(InputError, match="compile answer.c: .*error: .*nonsense.* undeclared"):
        compiled("nonsense")
    assert len(list(compiled.cache.iterdir())) == 2


def test_a_cache_that_cannot_be_written(compiled, capsys, monkeypatch):
    """It costs time, not the text; nor does a user without a home, as in a container."""
    compiled.cache.parent.write_text("a file")
    assert compiled(4) == 4
    assert capsys.readouterr().err.startswith(f"note: {compiled.cache} cannot keep compiled code (")
    for name in "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert compiled(5) == 5
    assert "null/.cache/tinyllama cannot keep compiled code (" in capsys.readouterr().err


def test_one_answer_for_a_device(monkeypatch):
    """Compiling twice to know would take seconds at each question."""
    calls = []

    def compile(*_, **__):
        calls.append(1)
        raise RuntimeError("first line\n/tmp/x.cpp:1: fatal error: omp.h: no such file\nlast line")

    monkeypatch.setattr(torch, "compile", compile)
    compile_error.cache_clear()
    assert compile_error(CPU) == compile_error(CPU) and "omp.h" in compile_error(CPU)
    assert len(calls) == 1
    compile_error.cache_clear()
