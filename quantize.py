"""Weights that are only read: in full, int8 or int4, and how a CPU reads them at the speed of
memory.

To generate one token of one text, each weight is multiplied with one number. Arithmetic is not the
limit then, reading the weights is: TinyLlama's 2.07 GB in bf16, at some 45 GB/s on two CPU cores
and 4,300 on an H200. So a weight stored in 8 or 4 bits is a faster weight, if turning it back into
floats costs nothing: the compiler does that in registers, between reading and multiplying.
"""
import math
import mmap
from contextlib import suppress

import torch
import torch.nn as nn
import torch.nn.functional as F

from files import InputError
from model import Linear

STREAMS = 4         # parts of a weight that are read at the same time
GROUP = 64          # int4: this many weights share a scale


def in_large_pages(tensor):
    """The tensor, on Linux copied to pages of 2 MB instead of 4 kB: a CPU then reads it a sixth
    faster, as it looks up 500 times fewer addresses."""
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes < 2 ** 21:
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):                                        # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def dot(x, w):
    """x (I,) times w (N, I) -> (N,), as sums that the compiler turns into one loop. Its loop is
    slower for rows of more than 4,096, so these are first added in pairs, or in fours."""
    I, n = len(x), 1
    while 4096 * n < I and I % (128 * n) == 0:
        n *= 2
    lanes = 64 if n > 1 else I
    x, w = x.view(-1, n, lanes), w.view(len(w), -1, n, lanes)
    return sum(x[:, k] * w[:, :, k] for k in range(n)).sum((-1, -2))


class FrozenLinear(nn.Module):
    """A linear layer x @ weightᵀ whose weight (O, I) is only read from now on, stored as it is.

    Many rows x, a prompt, are a matmul, which reads the weight once for all of them. Few rows, one
    token each, take as long as reading the weight. F.linear reads at half the speed of a CPU's
    memory or less; sums over x * weight, compiled, at nearly all of it (gemv: matrix times vector).
    """
    max_gemv_rows = 2          # up to so many rows the sums are faster

    def __init__(self, weight):
        super().__init__()
        self.dtype = weight.dtype
        self.store(weight)

    def store(self, weight):
        self.register_buffer("weight", in_large_pages(weight.data))

    def matmul(self, x):
        """x (..., I) -> (..., O)."""
        return F.linear(x, self.weight)

    def gemv(self, x):
        """One row x (I,) -> (O,) in fp32, for the compiler. It reads several parts of the weight at
        the same time: in one chain of sums each addition would wait for the one before."""
        return torch.cat([dot(x, part) for part in self.weight.chunk(STREAMS)])

    def forward(self, x):
        shape = x.shape[:-1]
        if shape.numel() > self.max_gemv_rows or not torch.compiler.is_compiling():
            return self.matmul(x.to(self.dtype))
        x = x.float().reshape(shape.numel(), -1)
        # the compiler does not look through as_strided. So it computes x once, instead of, say, the
        # norm that x comes from again for each row of the weight
        x = x.as_strided(x.shape, x.stride())
        return torch.stack([self.gemv(row) for row in x]).view(*shape, -1)


class Int8(FrozenLinear):
    """Each row of the weight as integers from -127 to 127, times a scale."""
    max_gemv_rows = 8          # a matmul must first turn all of them into floats

    def store(self, weight):
        weight = weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127                  # (O,)
        integers = (weight / scale[:, None]).round_().to(torch.int8)
        self.register_buffer("weight", in_large_pages(integers))
        self.register_buffer("scale", scale)

    def matmul(self, x):
        return (F.linear(x, self.weight.to(self.dtype)) * self.scale).to(self.dtype)

    def gemv(self, x):
        return super().gemv(x) * self.scale


class Int4(FrozenLinear):
    """Groups of GROUP neighbours in a row as integers from -8 to 7, times a scale that makes the
    largest of them -8. A byte holds two: 16 * second + (first + 8), where `first` is from the first
    half of a group and `second` from the second."""
    max_gemv_rows = 8

    def store(self, weight):
        O, I = weight.shape
        group = math.gcd(I, GROUP)
        if group % 2:
            raise InputError(f"int4 stores two numbers a byte: a width of {I} is odd")
        groups = weight.float().view(O, -1, group)
        scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
        scale[scale == 0] = 1
        first, second = (groups / scale).round_().clamp_(-8, 7).to(torch.int8).chunk(2, dim=2)
        self.register_buffer("weight", in_large_pages(16 * second + (first + 8)))
        self.register_buffer("scale", in_large_pages(scale[..., 0].contiguous()))

    def matmul(self, x):
        first, second = (self.weight & 15) - 8, self.weight >> 4
        groups = torch.cat((first, second), dim=2).to(self.dtype)
        return F.linear(x, (groups * self.scale[..., None].to(self.dtype)).flatten(1))

    def gemv(self, x):
        # Multiply the packed byte b = 16 second + first + 8 once instead of unpacking both halves:
        # first x1 + second x2 = b x1 + second (x2 - 16 x1) - 8 x1
        x1, x2 = x.view(self.weight.shape[1], 2, -1).unbind(1)
        x2 = x2 - 16 * x1
        sums = []
        for b, scale in zip(self.weight.chunk(STREAMS), self.scale.chunk(STREAMS)):
            b = b.to(torch.int32)
            sums.append(((b * x1 + ((b >> 4) * x2 - 8 * x1)) * scale[..., None]).sum((-1, -2)))
        return torch.cat(sums)


LINEAR_TYPES = {None: FrozenLinear, "int8": Int8, "int4": Int4}


def freeze_for_inference(model, quantize=None):
    """The model, for reading only from now on: its linear layers become LINEAR_TYPES[quantize]."""
    torch.backends.cuda.enable_cudnn_sdp(False)              # see model.WITHOUT_CUDNN
    model.requires_grad_(False)
    if model.config.tie_embeddings:
        model.head = LINEAR_TYPES[quantize](model.embed.weight)
    # the residual stream stays in fp32, as it did in training
    model.embed.register_forward_hook(lambda module, args, x: x.float())
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear)]:
        # each full weight is freed before the next is read
        model.set_submodule(name, LINEAR_TYPES[quantize](model.get_submodule(name).weight))
    return model.eval()
