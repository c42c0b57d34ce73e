"""Many processes that train together, one per GPU: who they are, what they send, what fits.

Each process computes its rows of the batch. Where the weights are depends on the strategy:

    none   one process: nothing is sent
    ddp    every process has all weights; after the last micro-batch gradients are averaged, bucket
           by bucket, while the backward pass still runs (torch DistributedDataParallel)
    fsdp   every process owns 1/N of each weight, its gradient and its moments; a block's weights
           are gathered while the block before computes; after the last micro-batch its gradients
           are averaged and scattered (FSDP2's fully_shard; ZeRO, arXiv 1910.02054)
    hsdp   fsdp within a machine, where links are fast, and ddp between machines

Neither model.py nor data.py knows of it, and the result does not depend on it but for rounding.
"""
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from device import compile_function, device_memory, find_device, format_bytes
from model import LOSS_CHUNK, QUERY_CHUNK


@dataclass(frozen=True)
class World:
    """The processes that train together. A single one is rank 0 of 1 and runs the same code."""
    device: torch.device
    rank: int = 0
    size: int = 1
    local_world_size: int = 1      # processes on each machine


def init_distributed():
    """The World in which torchrun started this process, or a world of one."""
    device = find_device()
    if "RANK" not in os.environ:
        return World(device)
    keys = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if missing := sorted(set(keys) - set(os.environ)):
        sys.exit(f"RANK is set, and {', '.join(missing)} is not: start many processes by torchrun, "
                 "which sets them all, or unset RANK")
    rank, size, local_rank, local_world_size = (int(os.environ[key]) for key in keys[:4])
    if device.type == "cuda":
        if local_world_size > torch.cuda.device_count():
            sys.exit(f"{local_world_size} processes on a machine with {torch.cuda.device_count()} "
                     "GPUs: torchrun --nproc-per-node takes as many as there are")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")                              # the only one that gloo serves
    # After a restart torchrun's store still holds the addresses of the dead processes
    # (pytorch/pytorch#135712), so each start gets keys of its own. We count the starts ourselves:
    # TORCHELASTIC_RESTART_COUNT differs between machines.
    store, _, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {store.add(f'starts of rank {rank}', 1)}", store)
    # one hour: all others wait while rank 0 writes a checkpoint to a slow disk
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=size, timeout=timedelta(hours=1))
    return World(device, rank, size, local_world_size)


def broadcast_from_rank0(world, decide):
    """What `decide()` returns on rank 0, on every rank. If it fails there, all ranks exit."""
    if world.size == 1:
        return decide()
    answer, error = [None, False], None
    if world.rank == 0:
        try:
            answer[0] = decide()
        except (SystemExit, Exception) as raised:
            answer[1], error = True, raised
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        dist.destroy_process_group()     # its threads could abort a process that is exiting
        raise error or SystemExit(1)
    return answer[0]


def split_batch(batch, ranks, micro_batch):
    """(sequences per micro-batch, micro-batches per rank) with which `ranks` processes make up a
    batch of `batch` sequences: all micro-batches alike, and as large as `micro_batch` allows."""
    if batch % ranks:
        fits = [r for r in range(1, batch + 1) if batch % r == 0]
        nearest = [*[r for r in fits if r < ranks][-1:], *[r for r in fits if r > ranks][:1]]
        sys.exit(f"a batch of {batch} sequences cannot be divided among {ranks} processes; "
                 f"nearest: {' and '.join(map(str, nearest))}")
    share = batch // ranks
    micro = max(n for n in range(1, min(share, micro_batch) + 1) if share % n == 0)
    return micro, share // micro


def choose_strategy(wanted, world, parameters, memory):
    """(none, ddp, fsdp or hsdp, why) for a model of so many parameters on GPUs with so many bytes
    of `memory` each. Exits where the wanted strategy is impossible."""
    if not dist.is_initialized():
        if wanted != "auto":
            sys.exit(f"strategy {wanted} is one of processes that torchrun starts: "
                     "torchrun --nproc-per-node=N train.py ...")
        return "none", "one process"
    if wanted == "hsdp" and world.size == world.local_world_size:
        sys.exit(f"strategy hsdp needs several machines, and all {world.size} processes are on one:"
                 " take fsdp")
    if wanted != "auto":
        return wanted, "as asked"
    state = 16 * parameters      # weight, gradient and two moments, in fp32
    sizes = f"{format_bytes(state)} of state, {format_bytes(memory)} on each GPU"
    if state < 0.4 * memory:
        return "ddp", f"it fits, {sizes}"
    return "hsdp" if world.size > world.local_world_size else "fsdp", f"it hardly fits, {sizes}"


def shard_count(world, strategy):
    """How many processes share one copy of the weights."""
    return {"fsdp": world.size, "hsdp": world.local_world_size}.get(strategy, 1)


# --------------------------------------------------------------------------------------------------
# The model, wrapped

def parallelize(model, world, strategy="none", dtype=torch.float32, compiled=False,
                activation_checkpointing=False, recompute=True):
    """The wrapped model, to be called in place of `model`, which is on the meta device and gets its
    memory here. Weights are set afterwards, in `model` itself.

    The order matters: compile each block, checkpoint it, shard it, then the root; DDP comes last.
    """
    # 1. Each block is compiled by itself. All are alike, so they share one graph.
    if compiled:
        from torch._functorch import config as functorch_config  # torch does not load it
        functorch_config.activation_memory_budget = 0.9 if recompute else 1.0
        torch._dynamo.config.optimize_ddp = False      # it would cut blocks where buckets end
        model.cross_entropy_and_grad = compile_function(model.cross_entropy_and_grad)
    for block in model.blocks:
        if compiled:
            block.forward = compile_function(block.forward)
        # 2. Checkpointing runs the (compiled) block once more in the backward pass.
        if activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    # 3. Sharding goes from the inside out: one block's weights are gathered while the block before
    #    it computes, and only embedding, last norm and head belong to the root.
    if strategy in ("fsdp", "hsdp"):
        shard_model(model, world, strategy, dtype)
    model.to_empty(device=world.device)
    # 4. DDP reads the weights' memory, so that must exist. Gradients that exist now, too, become
    #    views into DDP's buckets; later they would be a second copy of them.
    if strategy == "ddp":
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def shard_model(model, world, strategy, dtype):
    # imported here, as it takes a second that runs of one process need not wait for
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    shape = {"shard": world.size}
    if strategy == "hsdp":
        shape = {"replicate": world.size // world.local_world_size, "shard": world.local_world_size}
    mesh = dist.init_device_mesh(world.device.type, tuple(shape.values()),
                                 mesh_dim_names=tuple(shape))
    for module in (*model.blocks, model):
        # blocks are gathered in the dtype they compute in; the root in fp32, like the residual
        param_dtype = torch.float32 if module is model else dtype
        fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(
            param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False))


def grad_sync(model, last):
    """The context of a micro-batch's backward pass: gradients are exchanged in the last only."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@torch.no_grad()
def init_weights(model, seed):
    """Draws the initial weights. Every process draws all of each matrix and keeps its rows, so they
    are the same for any number of processes."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        local, rows = local_shard(p)
        full = torch.empty(p.shape, device=local.device) if is_sharded(p) else p
        model.init_parameter(name, full)
        local.copy_(full[rows])


def is_sharded(x):
    """Whether a model went through fully_shard, or a tensor is a DTensor, of which each process
    holds some rows."""
    return hasattr(x, "reshard") or hasattr(x, "full_tensor")


def local_shard(p):
    """(the part of a parameter or moment that this process holds, which rows of the whole it is)"""
    if not is_sharded(p):
        return p, slice(None)
    mesh = p.device_mesh
    return p.to_local(), shard_rows(p.shape[0], mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))


def shard_rows(rows, shards, shard):
    """The slice of `rows` rows that FSDP gives to a shard: the parts are those of torch.chunk."""
    most = -(-rows // shards)
    return slice(min(rows, most * shard), min(rows, most * (shard + 1)))


def full_tensor(p):
    """A parameter with the parts of all processes. All must call this together."""
    return p.full_tensor() if is_sharded(p) else p


# --------------------------------------------------------------------------------------------------
# Memory

RESERVE = 5e9       # bytes of a GPU for CUDA, NCCL and the gaps between tensors


def choose_recompute(model, cfg, shards, micro, dtype, device, compiled):
    """Whether a compiled block recomputes in its backward pass what takes few operations: norms,
    RoPE, SwiGLU. That saves a third of a block's memory and costs reading and writing it once more,
    so a GPU does it only where memory would not suffice otherwise."""
    return compiled and (device.type != "cuda" or RESERVE + sum(estimate_memory(
        model, cfg, shards, micro, dtype, device, compiled, False)) > device_memory(device))


def estimate_memory(model, cfg, shards, micro, dtype, device, compiled, recompute):
    """(bytes of weights, gradients and moments, bytes of a micro-batch) per process, at the peak of
    a step of several micro-batches; within 3 % of what is measured on GPUs. `model` may be on the
    meta device; `micro` are sequences, `shards` the processes that share the weights.

    The peak is in the loss, or in the last block's backward pass, whichever is larger.
    """
    C, F, kv, size = cfg.d_model, cfg.d_ff, cfg.n_kv_head * cfg.head_dim, dtype.itemsize
    gpu, tokens = device.type == "cuda", micro * cfg.context
    parameters = sum(p.numel() for p in model.parameters())
    in_blocks = sum(p.numel() for p in model.blocks.parameters())

    # weight, gradient and two moments in fp32, 4 bytes each
    state = 16 * parameters
    if shards > 1:      # but gradients not yet reduced are whole, and so are embedding and head
        state = 12 * parameters // shards + 4 * parameters + 4 * (parameters - in_blocks)
    if not cfg.activation_checkpointing:
        # weights that wait for the backward pass in the matmuls' dtype: the fused ones, which are
        # concatenated in each forward pass; others too, unless they are cast a second time
        fused = cfg.n_layer * C * (C + 2 * kv + 2 * F)
        cast_again = shards > 1 or size == 4 or compiled and recompute
        state += size * (fused if cast_again else in_blocks)

    # bytes per token that a block keeps for its backward pass
    if compiled:        # its input in fp32; q, k, v, attention's output, o, gate, up
        block = 4 * C + size * (3 * C + 2 * kv + 2 * F)
        if not recompute:                               # both normed inputs, and SwiGLU's output
            block += size * (2 * C + F)
    else:               # residuals and norms, what goes into each matmul, SwiGLU's parts
        heads = C if gpu and size == 4 else kv          # in fp32, k and v are repeated for SDPA
        block = (8 if gpu else 16) * C + size * (4 * C + 2 * heads + 4 * F)
    if not gpu and size == 2:                           # attention probabilities, half masked away
        block += size * cfg.n_head * (cfg.context + QUERY_CHUNK) // 2
    checkpointed = cfg.activation_checkpointing
    activations = tokens * cfg.n_layer * (4 * C if checkpointed else block)

    # the loss adds hidden states and their gradient, a chunk of logits, the head's gradient
    head, logits = cfg.vocab_size * C, cfg.vocab_size * min(tokens, LOSS_CHUNK)
    loss = 12 * C * tokens + (2 * size if compiled else 2 * size + 6) * logits + (4 + size) * head
    backward = tokens * (4 * C + 3 * size * F + (block if checkpointed else 0)) + 4 * head
    return state, activations + max(loss, backward)
