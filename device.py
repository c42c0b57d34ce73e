"""The hardware: which device to run on, in which precision, whether code for it can be compiled,
what its maker promises, and its memory. Found, not configured: each choice comes with its reason."""
import ctypes
import os
import resource
import shutil
import sys
from contextlib import suppress

import torch

# dense bf16 FLOP/s, from the makers' data sheets
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 149.7e12,
              "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def find_device():
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def find_dtype(device):
    """(dtype to compute in on that device, why). What it would only emulate does not count."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU has it"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                 or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, "the CPU has it"
    return torch.float32, f"this {device.type} has no bfloat16 of its own"


def can_compile(device):
    """Whether there is a compiler of what torch.compile writes for the device."""
    return any(map(shutil.which, {"cpu": ("g++", "clang++"), "cuda": ("gcc", "clang")}.get(
        device.type, ())))


def device_name(device):
    """What it is called, for people."""
    return (torch.cuda.get_device_name() if device.type == "cuda"
            else f"{device.type}, {torch.get_num_threads()} threads")


def peak_flops(name):
    """The FLOP/s in bf16 that the maker of a device so named promises, None if unknown."""
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def device_memory(device):
    """Bytes of memory: of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
