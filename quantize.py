"""Weights that are only read: in full, or in 8 or 4 bits.

    python quantize.py CHECKPOINT --bits=4 --out=DIR

writes a folder that sample.py, chat.py and eval.py load; their --quantize does the same at each
load. To generate one token of one text, each weight is multiplied with one number. Arithmetic is
not the limit then, reading the weights is: TinyLlama's 2.07 GB in bf16, at some 45 GB/s on two CPU
cores and 4,300 on an H200. So a weight in fewer bits is a faster weight.

A row of a weight is cut into groups of 64 neighbours, each whole numbers times one scale, in bf16:
8.25 or 4.25 bits a weight. On a CPU the input of a layer is rounded in the same way, to int8. Then
the products in a group are whole numbers, which CPUs have an instruction for (decode.c).
"""
import argparse
import math
import mmap
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file

from device import disable_malloc_trim, format_bytes
from files import InputError, as_path, atomic_write, read_json, run_program, write_json
from hf import (
    config_from_hf,
    find_model,
    hf_name,
    open_weights,
    read_config,
    safetensors_files,
)
from model import Llama, ModelConfig

GROUP = 64                 # weights that share a scale
CACHED = 2 ** 18           # weights that are rounded at a time, to stay in a CPU's cache
PART = 2 ** 21             # weights that are floats at a time, in a matmul of a CPU
GEMV_ROWS = 8              # up to so many rows a GPU reads a weight as it is stored
# what is tried for the largest weight of a group: beyond -8 it is cut off, and others more exact
LARGEST_BECOMES = {8: (-128,), 4: (-7, -7.5, -8, -8.5, -9, -9.5)}


def in_large_pages(tensor):
    """The tensor, on Linux copied to pages of 2 MB instead of 4 kB: a CPU then reads it a sixth
    faster, as it looks up 500 times fewer addresses."""
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes < 2 ** 21:
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):                                        # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


# --------------------------------------------------------------------------------------------------
# Rounding

def in_groups(x):
    """x (..., I) -> (..., G, GROUP), with zeros where the last group is not full."""
    return F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def round_input(x):
    """x (..., I), in each group int8 times a scale, as decode.c rounds it, but as floats again."""
    groups = in_groups(x.float())
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = groups * (1 / scale).where(scale > 1e-37, 0)
    return rounded.round_().mul_(scale).flatten(-2)[..., :x.shape[-1]]


def round_weight(weight, bits):
    """A weight (O, I) as whole numbers of so many bits, (O, G, GROUP) in int8, and their scales
    (O, G) in bf16: for each group the one, of those tried, with the least sum of squared errors."""
    w, most = in_groups(weight.float()), 2 ** (bits - 1)
    largest = w.gather(2, w.abs().argmax(2, keepdim=True))
    scale, best = largest / -most, torch.zeros_like(largest)
    for number in LARGEST_BECOMES[bits]:
        q = (w / largest * number).round_().clamp_(-most, most - 1)
        # |w - s q|² is smallest at s = wq / q², where it is w² - (wq)² / q²
        wq, qq = (torch.linalg.vecdot(x, q)[..., None] for x in (w, q))
        better = wq ** 2 / qq > best                         # never where a weight is not finite
        scale, best = (wq / qq).where(better, scale), (wq ** 2 / qq).where(better, best)
    scale = scale.bfloat16()
    scale = scale.where(scale != 0, 1)                       # all weights of the group are 0
    return (w / scale).round_().clamp_(-most, most - 1).to(torch.int8), scale[..., 0]


# --------------------------------------------------------------------------------------------------
# Layers

class FrozenLinear(nn.Module):
    """One or several layers x @ weightᵀ of the same x as a single one. Their weights (O, I) are
    only read from now on. Several give several outputs."""
    bits = 0                   # of a whole number, if there are any
    max_tokens = 3             # at a time in decode.c, before a matmul is faster

    def __init__(self, *weights):
        super().__init__()
        self.sizes, self.width = [*map(len, weights)], weights[0].shape[1]
        self.dtype = weights[0].dtype
        weight = weights[0].new_empty(sum(self.sizes), self.width)
        if not weight.is_meta:                   # where cat would import 80 MB
            torch.cat(weights, out=weight)
        for name, tensor in self.pack(weight).items():
            self.register_buffer(name, in_large_pages(tensor))

    def pack(self, weight):
        return {"weight": weight}

    def matmul(self, x):
        """x (..., I) -> (..., O)."""
        return F.linear(x.to(self.dtype), self.weight)

    def forward(self, x):
        y = self.matmul(x)
        return y.split(self.sizes, dim=-1) if len(self.sizes) > 1 else y


class Int8(FrozenLinear):
    """Whole numbers from -128 to 127, each as a byte with 128 added, times a scale per group.

    On a GPU, few rows x, one token each, are multiplied by sums over the bytes, which the compiler
    turns into one kernel. For more rows, or without the compiler, a matmul needs the whole weight
    in floats, which each step writes to memory and reads again: then it is slower than bf16.
    """
    bits, offset, max_tokens = 8, 128, 32

    def pack(self, weight):
        O, groups, n = len(weight), math.ceil(self.width / GROUP), max(1, CACHED // self.width)
        packed = weight.new_empty(O, groups, GROUP * self.bits // 8, dtype=torch.uint8)
        scale = weight.new_empty(O, groups, dtype=torch.bfloat16)
        for start in range(0, 0 if weight.is_meta else O, n):
            rows = slice(start, start + n)
            integers, scale[rows] = round_weight(weight[rows], self.bits)
            packed[rows] = self.join(integers.view(torch.uint8) + self.offset)    # modulo 256
        return {"weight": packed, "scale": scale}

    def join(self, integers):
        """(rows, G, GROUP) whole numbers, too large by the offset, as they are stored."""
        return integers

    def split(self, packed):
        return packed

    def gemv(self, x):
        """One row x (G, GROUP) -> (O,), both in fp32."""
        return ((self.weight * x - self.offset * x) * self.scale[..., None]).sum((1, 2))

    def matmul(self, x):
        rows, n = x.shape[:-1], len(self.weight)
        if x.is_cuda and rows.numel() <= GEMV_ROWS and torch.compiler.is_compiling():
            groups = in_groups(x.float().reshape(rows.numel(), -1))          # (R, G, GROUP)
            # the compiler does not look through as_strided. So it computes x once, not, say, the
            # norm that x comes from again for each row of the weight
            groups = groups.as_strided(groups.shape, groups.stride())
            return torch.stack([self.gemv(row) for row in groups]).view(*rows, -1)
        if not x.is_cuda:                                    # as floats, in parts
            x, n = round_input(x), max(1, PART // self.width)
        return torch.cat([F.linear(x.to(self.dtype), self.to_floats(*part)) for part in zip(
            self.weight.split(n), self.scale.split(n))], dim=-1)

    def to_floats(self, packed, scale):
        """Rows as they are stored and their scales -> (rows, I)."""
        floats = self.split(packed).to(self.dtype).sub_(self.offset)
        return floats.mul_(scale[..., None]).flatten(1)[:, :self.width]


class Int4(Int8):
    """Whole numbers from -8 to 7, with 8 added. A byte holds two: one of the first half of a group,
    and 16 times one of the second."""
    bits, offset = 4, 8

    def join(self, integers):
        first, second = integers.chunk(2, dim=2)
        return first + 16 * second                                           # (rows, G, GROUP / 2)

    def split(self, packed):
        return torch.cat((packed & 15, packed >> 4), dim=2)

    def gemv(self, x):
        # a byte b = first + 16 second is multiplied as it is, so that `first` is not unpacked:
        # first x1 + second x2 = b x1 + second (x2 - 16 x1)
        (x1, x2), b = x.chunk(2, dim=1), self.weight
        sums = b * x1 + (b >> 4) * (x2 - 16 * x1) - self.offset * (x1 + x2)
        return (sums * self.scale[..., None]).sum((1, 2))


LINEAR_TYPES = {None: FrozenLinear, "int8": Int8, "int4": Int4}


def precision(model):
    """How the weights of a frozen model are stored: bfloat16, int4, ..."""
    layer = model.blocks[0].attn.o
    return f"int{layer.bits}" if layer.bits else str(layer.dtype).removeprefix("torch.")


def freeze_for_inference(model, quantize=None):
    """The model, for reading only from now on: its linear layers become LINEAR_TYPES[quantize], and
    those that share their input one."""
    torch.backends.cuda.enable_cudnn_sdp(False)              # see model.WITHOUT_CUDNN
    model.requires_grad_(False)
    frozen = LINEAR_TYPES[quantize]
    # the residual stream stays in fp32, as it did in training
    model.embed.register_forward_hook(lambda module, args, x: x.float())
    for block in model.blocks:                  # each full weight is freed before the next is read
        attn, mlp = block.attn, block.mlp
        attn.qkv = frozen(attn.q.weight, attn.k.weight, attn.v.weight)
        attn.q = attn.k = attn.v = None
        attn.o = frozen(attn.o.weight)
        mlp.gate_up = frozen(mlp.gate.weight, mlp.up.weight)
        mlp.gate = mlp.up = None
        mlp.down = frozen(mlp.down.weight)
    # in int4 the head alone would make two thirds of all errors
    head = model.embed if model.config.tie_embeddings else model.head
    model.head = LINEAR_TYPES[quantize and "int8"](head.weight)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Folders of rounded weights

def stored_kind(folder):
    """The kind of the weights in a folder that this program has written, None for any other."""
    config = read_json(Path(folder) / "config.json").get("quantization_config")
    if not isinstance(config, dict) or config.get("quant_method") != "tinyllama":
        return None
    kind = f"int{config.get('bits')}"
    if kind not in LINEAR_TYPES or config.get("group_size") != GROUP:
        raise InputError(f"{folder} has weights of {config.get('bits')} bits in groups of "
                         f"{config.get('group_size')}: only 4 and 8 are read, in groups of {GROUP}")
    return kind


def frozen_config(folder):
    """The ModelConfig of a model folder, also of one that this program has written."""
    if stored_kind(folder) is None:
        return read_config(Path(folder), ModelConfig)
    hf = read_json(Path(folder) / "config.json")
    return config_from_hf(hf | {"quantization_config": None}, ModelConfig)


def load_frozen(folder, device, dtype=torch.float32, quantize=None):
    """The model of a folder, frozen for inference. Raises InputError."""
    kind = stored_kind(folder)
    if kind is None:
        model = freeze_for_inference(Llama.from_pretrained(folder, device, dtype), quantize)
    elif quantize in (None, kind):
        model = load_packed(Path(folder), device, dtype, kind)
    else:
        raise InputError(f"the weights in {folder} are {kind}: for {quantize} give the folder that "
                         "they were made from")
    disable_malloc_trim()                        # what the floats of a prompt take is kept
    return model


def load_packed(folder, device, dtype, kind):
    """The model of a folder that save_frozen has written. It is never in memory in full."""
    with torch.device("meta"):
        model = freeze_for_inference(Llama(frozen_config(folder)).to(dtype), kind)
    model, embed = model.to_empty(device=device), model.embed.weight
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            for name, buffer in layer.named_buffers():
                setattr(layer, name, in_large_pages(buffer))
    # of the embedding few rows are read: on a CPU it stays in the file, of which these are mapped
    model.load_tensors(folder, lambda p: (p[:0], slice(0)) if p is embed else (p, slice(None)))
    with open_weights(folder / "model.safetensors") as file:
        embed.data = file.get_tensor(hf_name("embed.weight")).to(device, dtype)
    return model


def save_frozen(model, source, out):
    """Writes a folder `out`: the weights of a frozen model, and what else is in `source`."""
    with atomic_write(out) as folder:
        folder.mkdir(parents=True)
        for file in Path(source).iterdir():
            if file.suffix in (".json", ".model", ".jinja") and "safetensors" not in file.name:
                shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", read_json(folder / "config.json") | {
            "quantization_config": {"quant_method": "tinyllama", "group_size": GROUP,
                                    "bits": model.blocks[0].attn.o.bits}})
        tensors = (*model.named_parameters(), *model.named_buffers())
        try:
            save_file({hf_name(name): tensor for name, tensor in tensors},
                      folder / "model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"{out} cannot be written: {error}") from None
        shutil.copymode(folder / "config.json", folder / "model.safetensors")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="quantize.py", description="Write the folder of a model with its weights in 8 or 4 "
        "bits, which sample.py, chat.py and eval.py load like any other.")
    add = parser.add_argument
    add("checkpoint", type=as_path, help="folder or hub name")
    add("--bits", type=int, choices=[4, 8], default=4, help="of a weight (%(default)s)")
    add("--out", type=as_path, required=True, help="the folder to write")
    return parser.parse_args(argv)


def main(argv):
    args = parse_args(argv)
    folder, out = find_model(args.checkpoint), Path(args.out)
    if out.exists():
        sys.exit(f"{out} exists: remove it, or give another --out")
    model = load_frozen(folder, torch.device("cpu"), torch.bfloat16, f"int{args.bits}")
    save_frozen(model, folder, out)
    before, after = (format_bytes(sum(file.stat().st_size for file in safetensors_files(path)))
                     for path in (folder, out))
    print(f"{out}: {before} of weights are {after} now; python sample.py {out} generates with them")


if __name__ == "__main__":
    run_program(main)
