"""The hardware: which device to run on, in which precision, whether code can be compiled for it,
what its maker promises, its memory. Found, not configured: each choice comes with its reason."""
import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from itertools import product
from pathlib import Path

import torch

from files import InputError, atomic_write

# dense FLOP/s with sums in fp32, (in bf16, in fp32 without TF32), from NVIDIA's data sheets
PEAK_FLOPS = {"B200": (2250e12, 75e12), "H200 NVL": (835e12, 60e12), "H200": (989e12, 67e12),
              "H100 NVL": (835e12, 60e12), "H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12),
              "A100": (312e12, 19.5e12), "A40": (149.7e12, 37.4e12), "A10": (125e12, 31.2e12),
              "L40S": (362e12, 91.6e12), "L4": (121e12, 30.3e12), "T4": (None, 8.1e12),
              "GeForce RTX 5090": (209.5e12, 104.8e12), "GeForce RTX 4090": (165.2e12, 82.6e12),
              "GeForce RTX 3090": (71e12, 35.6e12)}


def find_device():
    """The accelerator, else the CPU. Exits where there is an NVIDIA GPU that this PyTorch was built
    for and cannot use: the CPU would take years for the same run."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if not torch.version.cuda:
        return device
    try:
        if device.type == "cuda":
            (major, minor), archs = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
            # sm_86 is code for 8.6 to 8.9, sm_90a for 9.0, compute_86 is compiled for all from 8.6
            fits = {f"sm_{major}{minor}a", *(f"sm_{major}{n}" for n in range(minor + 1)),
                    *(f"compute_{n}" for n in range(10 * major + minor + 1))}
            if archs and not fits & set(archs):
                raise RuntimeError(f"it has compute capability {major}.{minor}, and this PyTorch "
                                   f"has code for {', '.join(archs)}")
        elif device.type == "cpu" and nvidia_gpu():
            torch.cuda.init()
    except Exception as error:                     # PyTorch's own words say which driver it wants
        version, index = torch.__version__.split("+")[0], "https://download.pytorch.org/whl/"
        sys.exit(f"there is an NVIDIA GPU, and torch {torch.__version__} cannot use it: {error}\n"
                 f"What may help: pip install torch=={version} --index-url {index} and cu126 at "
                 "its end for drivers from 525 on and compute capabilities 5.0 to 9.0, or cu130 "
                 "for drivers from 580 on and 7.5 to 12.0. To go on without the GPU: "
                 "CUDA_VISIBLE_DEVICES= python ...")
    return device


def nvidia_gpu():
    """Whether this machine has an NVIDIA GPU that nobody has hidden from the program."""
    if not re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0")):
        return False                               # empty, -1, or what a scheduler says for none
    with suppress(OSError, subprocess.TimeoutExpired):
        return any(Path("/dev").glob("nvidia[0-9]*")) or b"GPU" in subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=30).stdout
    return False


def find_dtype(device, wanted="auto"):
    """(dtype to compute in on that device, why): as wanted, or bf16 where it is not emulated, else
    fp32."""
    if device.type == "mps" and wanted == "bfloat16" and torch.__version__ < (2, 13):
        return torch.float32, "before PyTorch 2.13 attention in bfloat16 on MPS sees later tokens"
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                 or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, "the CPU has it"
    return torch.float32, f"bfloat16 is not taken by itself on this {device.type}"


def choose_compile(device, wanted, pays, why, find_error=None):
    """(whether to compile, why): as `wanted`, or, where that is None, if it `pays`. Exits where
    compiling is wanted and does not work, as find_error or compile_error say of the device."""
    if wanted is False or wanted is None and not pays:
        return False, why if wanted is None else "as asked"
    error = (find_error or compile_error)(device)
    if error and wanted:
        sys.exit(f"--compile=True does not work here: {error}. Install what is missing (gcc and "
                 "g++ for a CPU; gcc and python3-dev for a GPU), or give --compile=False")
    return not error, error or ("as asked" if wanted else why)


@lru_cache
def compile_error(device):
    """Why torch.compile does not work for the device, None if it does. It needs a C++ compiler for
    a CPU, a C compiler and triton for a GPU, Python's headers for both, and each may be missing or
    broken. So something small is compiled, of a size that no cache has."""
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile is not used on {device.type}"
    try:
        x = torch.ones(2 + time.time_ns() % 2 ** 20, device=device)
        torch.compile(lambda x: x.cos() + 1, dynamic=False)(x)
    except Exception as error:
        lines = str(error).splitlines() or [repr(error)]
        return next((line for line in lines if "error: " in line), lines[0])[:200]


def compile_c(source, **macros):
    """The library of a C file, compiled for this CPU with these macros and kept in the user's cache
    folder. Raises InputError where that does not work."""
    compiler = os.environ.get("CC", "").split() or ["cc"]
    definitions = [f"-D{name}={value}" for name, value in macros.items()]
    home = os.environ.get("HOME") or os.devnull            # a container's user may have none
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"), "tinyllama")
    # sums may be added up in any order, as vectors are
    always = ["-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    # Apple's compiler has no OpenMP: one thread computes then, which is no error of the code
    every_flags = ["-march=native", "-fopenmp"], ["-march=native"], []
    with tempfile.TemporaryDirectory() as temporary:
        for folder, flags in product((cache, Path(temporary)), every_flags):
            command = [*compiler, *always, *flags, *definitions, source]
            try:
                # all macros, also of the compiler and the CPU: another one is another library
                known = subprocess.run([*command, "-dM", "-E"], capture_output=True, check=True)
                key = known.stdout + source.read_bytes() + str(command).encode()
                name = sha256(key).hexdigest()[:20] + ".so"
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / name).exists():
                    with atomic_write(folder / name) as path:
                        subprocess.run([*command, "-shared", "-fPIC", "-o", path, "-lm"],
                                       capture_output=True, check=True)
                library = ctypes.CDLL(str(folder / name))
            except (OSError, subprocess.CalledProcessError) as error:
                failure = error
                continue
            if folder != cache:
                print(f"note: {cache} cannot keep compiled code ({failure}), which is compiled "
                      "again each time", file=sys.stderr)
            return library
    lines = [str(failure), *getattr(failure, "stderr", b"").decode(errors="replace").splitlines()]
    reason = next((line for line in lines if "error" in line), lines[0])
    raise InputError(f"{compiler[0]} does not compile {source.name}: {reason}")


def compile_function(function, **options):
    """The function, compiled as one graph for each combination of shapes. With dynamic shapes, the
    code would depend on the order in which shapes come, and so would its rounding."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


def device_name(device):
    """What it is called, for people."""
    return (torch.cuda.get_device_name() if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads")


def peak_flops(name, dtype):
    """The FLOP/s that the maker of a device so named promises in dtype, None if unknown. A name may
    go on with a form and a size, but RTX 4090 Laptop GPU and RTX A4000 are other cards."""
    for card, (bf16, fp32) in PEAK_FLOPS.items():
        if re.fullmatch(rf"(NVIDIA |Tesla )*{card}([ -](SXM\d|PCIE|HBM\d\w?|\d+GB))*", name, re.I):
            return fp32 if dtype == torch.float32 else bf16


def device_memory(device):
    """Bytes of memory: of the GPU, else of the machine, or of the container if it may use less."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *cgroup_limits()])


def cgroup_limits(root="/"):
    """Yields the limits of the groups that this process is in, as of a container or a Slurm job."""
    with suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controller, group = line.split(":", 2)          # "memory" in cgroup v1, "" in v2
            folder = Path(root, "sys/fs/cgroup", controller, group.lstrip("/"))
            for path in folder, *folder.parents:
                for name in "memory.limit_in_bytes", "memory.max":
                    with suppress(OSError, ValueError):                     # none there, or "max"
                        yield int((path / name).read_text())


def memory_used(device):
    """Peak bytes of this process: on the GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def disable_malloc_trim():
    """Lets glibc keep what is freed for the next step. It would give it back to the kernel, which
    hands it out again page by page, each cleared: up to a tenth of a step on a CPU."""
    with suppress(OSError, AttributeError):                  # not everywhere is there a glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)                                      # M_TRIM_THRESHOLD: nothing is trimmed
        mallopt(-4, 0)                                       # M_MMAP_MAX: no block has its own map


def format_bytes(n):
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"
