"""Pretraining: python train.py RECIPE.py [--key=value ...]

A step reads the batch that follows from its number (data.py), adds up the gradients of its
micro-batches, clips them and lets AdamW move the weights. Everything is counted in tokens: a batch
has so many, the learning rate is that of so many seen, and how many micro-batches make up a batch
is derived:

    batch 16,384 tokens = 64 sequences of 256 = 4 micro-batches of 16

Under torchrun there are many processes, one a GPU, that share the rows of a batch and add up their
gradients: they train what one trains. What they must agree on stands in one part of this file, and
neither model.py nor data.py knows of it.

There is no state but weights, Adam's moments and the step. So a run stopped anywhere, by Ctrl-C or
by force, goes on from its newest checkpoint when the same command is given again, and ends with the
weights it would have had: to the bit on a CPU, and but for rounding on a GPU, where attention's
backward pass adds up in an order that varies. And a run may fork: another recipe takes over at the
end of a stage, as if it had been its own from the start, if up to there the two are the same.

    python train.py RECIPE.py --plan [--gpus=N] [--tokens_per_second=N]

says what a recipe will do, without doing it: steps, tokens and epochs, checkpoints, hours.
"""
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from hashlib import file_digest
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from config import load
from data import Source, parse_stages, sequences, sequences_per_source
from device import (
    compile_error,
    device_memory,
    device_name,
    disable_malloc_trim,
    find_device,
    find_dtype,
    memory_used,
    peak_flops,
)
from files import InputError, read_json, write_json
from model import (
    LOSS_CHUNK,
    QUERY_CHUNK,
    WITHOUT_CUDNN,
    Llama,
    ModelConfig,
    attention_backend,
    config_from_hf,
    hf_name,
    safetensors_files,
)


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Everything a recipe may say; the shape of the model is inherited."""
    vocab_size: int = 0                          # 0: that of the data
    # what to train on, and for how long
    stages: list = field(default_factory=list)   # dicts of tokens, batch (tokens),
                                                 # mixture {source: share}, ramp (tokens)
    data: str = ""                               # NAME or NAME:SHARE,... instead of every mixture
    data_dir: str = "data"                       # the folder of the sources
    out_dir: str = ""                            # "": out/ and the recipe's name
    fork_from: str = ""                          # go on from this checkpoint at the end of a stage
    init_from: str = ""                          # start from the weights of this Llama folder
    seed: int = 3407                             # of the initial weights and the order of the data
    # optimization
    learning_rate: float = 4e-4                  # reached after the warm-up
    min_lr: float = 4e-5                         # that of the last step, below learning_rate
    warmup_steps: int = 2000                     # counted in batches of the first stage
    weight_decay: float = 0.1                    # of every parameter, as the original's
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0                       # largest norm of the gradient
    # how it runs: what comes out is the same but for rounding
    strategy: str = "auto"                       # of many processes: ddp, fsdp, hsdp
    micro_batch: int = 8                         # most sequences a GPU takes at once
    activation_checkpointing: bool = False       # a third more computing, a quarter of the memory
    dtype: str = "auto"                          # of the computation: float32, bfloat16, auto
                                                 # (bfloat16 where hardware has it)
    compile: bool | None = None                  # None: where it pays
    # what is written
    log_every: int = 10                          # steps
    eval_every: int = 1000                       # steps; at the end of a stage always
    eval_tokens: int = 2 ** 21                   # most tokens of each source in an evaluation
    save_every: int = 1000                       # steps; at the end of a stage always
    keep: int = 3                                # newest kept (those at stage ends always); 0: all
    keep_every: int = 0                          # of every so many steps one is kept, too; 0: none

    def __post_init__(self):
        super().__post_init__()
        for key in ("micro_batch", "log_every", "eval_every", "eval_tokens", "save_every",
                    "learning_rate", "grad_clip"):
            if not 0 < getattr(self, key) < math.inf:
                sys.exit(f"{key} must be above 0, got {getattr(self, key)}")
        for key, limit in (("min_lr", self.learning_rate), ("beta1", 1), ("beta2", 1),
                           ("weight_decay", math.inf), ("warmup_steps", math.inf),
                           ("keep", math.inf), ("keep_every", math.inf), ("seed", 2 ** 63)):
            if not 0 <= getattr(self, key) < limit:
                sys.exit(f"{key} must be at least 0 and below {limit}, got {getattr(self, key)}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            sys.exit(f"dtype must be auto, float32 or bfloat16, got {self.dtype!r}")
        if self.strategy not in ("auto", "ddp", "fsdp", "hsdp"):
            sys.exit(f"strategy must be auto, ddp, fsdp or hsdp, got {self.strategy!r}")
        if self.fork_from and self.init_from:
            sys.exit(f"a run has one origin: fork_from {self.fork_from} or init_from "
                     f"{self.init_from}; --fork_from= takes back the recipe's")


# keys that change what is written or how fast, and nothing that is learned but by rounding
FREE = {"data_dir", "out_dir", "fork_from", "init_from", "strategy", "micro_batch",
        "activation_checkpointing", "dtype", "compile", "log_every", "eval_every", "eval_tokens",
        "save_every", "keep", "keep_every"}


# --------------------------------------------------------------------------------------------------
# Arithmetic of a run

def parse_mixture(text):
    """{"NAME": share} of NAME or NAME:SHARE,NAME:SHARE."""
    mixture = {}
    for part in text.split(","):
        name, _, share = part.partition(":")
        try:
            if not name or name in mixture:
                sys.exit(f"--data={text} leaves out a name, or gives {name!r} twice")
            mixture[name] = float(share or 1)
        except ValueError:
            sys.exit(f"--data={text}: {share!r} is no number; give NAME or NAME:SHARE,NAME:SHARE")
    return mixture


def stage_ends(stages):
    """The steps after which the stages are done."""
    return list(accumulate(stage.steps for stage in stages))


def tokens_after(stages, step, context):
    """Tokens seen when `step` steps are done."""
    tokens = 0
    for stage in stages:
        done = min(step, stage.steps)
        tokens, step = tokens + done * stage.batch * context, step - done
    return tokens


def lr_at(tokens, total, warmup, cfg):
    """The learning rate of the step that ends with so many tokens seen: linear up to `warmup`
    tokens, then a cosine that reaches min_lr with the last step."""
    if tokens < warmup:
        return cfg.learning_rate * tokens / warmup
    progress = (tokens - warmup) / (total - warmup)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def split_batch(batch, ranks, micro_batch):
    """(micro-batch, how many) for each of `ranks` processes to make up `batch` sequences: all
    alike, as large as allowed."""
    if batch % ranks:
        fits = [r for r in range(1, batch + 1) if batch % r == 0]
        nearest = [*[r for r in fits if r < ranks][-1:], *[r for r in fits if r > ranks][:1]]
        sys.exit(f"a batch of {batch} sequences cannot be divided among {ranks} processes; "
                 f"nearest: {' and '.join(map(str, nearest))}")
    share = batch // ranks
    micro = max(n for n in range(1, min(share, micro_batch) + 1) if share % n == 0)
    return micro, share // micro


# --------------------------------------------------------------------------------------------------
# Hardware

def choose_compile(cfg, device, flops):
    """(whether to compile, why). On a CPU it takes up to half a minute and wins a tenth to a half
    in bf16, the most in small models, and a twentieth in fp32: it pays in runs of minutes."""
    if cfg.compile is False:
        return False, "as asked"
    if cfg.compile is None and device.type == "cpu" and flops < 2e13 * torch.get_num_threads():
        return False, "too short a run to repay it"
    error = compile_error(device)
    if error and cfg.compile:
        sys.exit(f"--compile=True does not work here: {error}. Install what is missing (g++ for a "
                 "CPU; gcc and python3-dev for a GPU), or train with --compile=False")
    return not error, error or ("as asked" if cfg.compile else "a long run" if device.type == "cpu"
                                else "it pays on a GPU")


# --------------------------------------------------------------------------------------------------
# Many processes

@dataclass(frozen=True)
class World:
    """The processes that train together, one a GPU; alone, rank 0 of 1 runs the same code."""
    device: torch.device
    rank: int = 0
    size: int = 1
    local_world_size: int = 1                                # how many of them are on each machine


def init_distributed():
    """The World that torchrun started this process in, or a world of one."""
    device = find_device()
    if "RANK" not in os.environ:
        return World(device)
    keys = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if not set(keys) <= set(os.environ):
        sys.exit(f"RANK is set, and {', '.join(sorted(set(keys) - set(os.environ)))} is not: "
                 "start many processes by torchrun, which sets them all, or unset RANK")
    rank, size, local, local_world_size = (int(os.environ[key]) for key in keys[:4])
    if device.type != "cuda":
        device = torch.device("cpu")                                      # what gloo can send
    else:
        if local_world_size > torch.cuda.device_count():
            sys.exit(f"{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                     "torchrun --nproc-per-node takes as many as there are")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives its processes, with the addresses of those before a restart
        # still in it (pytorch/pytorch#135712). How often a rank was started is the same for all of
        # them; TORCHELASTIC_RESTART_COUNT is not, on another machine than the one that failed
        start = store.add(f"starts of rank {rank}", 1)
        store = dist.PrefixStore(f"start {start}", store)
    # longer than a save to a slow disk, for which all others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=size, timeout=timedelta(hours=1))
    return World(device, rank, size, local_world_size)


def broadcast_from_rank0(world, decide):
    """What `decide()` returns on rank 0, on every rank. Where it fails, all end."""
    if world.size == 1:
        return decide()
    answer, failed = [None, False], None
    if world.rank == 0:
        try:
            answer[0] = decide()
        except (SystemExit, Exception) as error:
            answer[1], failed = True, error
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        dist.destroy_process_group()     # else its threads may abort a process that is ending
        raise failed or SystemExit(1)
    return answer[0]


def choose_strategy(cfg, world, parameters, memory):
    """(ddp, fsdp, hsdp or none, why)."""
    if not dist.is_initialized():
        if cfg.strategy != "auto":
            sys.exit(f"strategy {cfg.strategy} is one of processes that torchrun starts: "
                     "torchrun --nproc-per-node=N train.py ...")
        return "none", "one process"
    if cfg.strategy == "hsdp" and world.size == world.local_world_size:
        sys.exit(f"strategy hsdp needs several machines, and all {world.size} processes are on one:"
                 " take fsdp")
    if cfg.strategy != "auto":
        return cfg.strategy, "as asked"
    state = 16 * parameters
    if state < 0.4 * memory:
        return "ddp", f"{format_bytes(state)} of state fit each GPU's {format_bytes(memory)}"
    return ("hsdp" if world.size > world.local_world_size else "fsdp",
            f"{format_bytes(state)} of state are much for each GPU's {format_bytes(memory)}")


def shard_count(world, strategy):
    """How many processes share one set of weights."""
    return {"fsdp": world.size, "hsdp": world.local_world_size}.get(strategy, 1)


def parallelize(model, world, strategy="none", dtype=torch.float32, compiled=False,
                activation_checkpointing=False, recompute=True):
    """Puts on a model that has no memory yet all that it does not know of, gives it memory, and
    returns what to call in its place. Weights are set afterwards, in the model itself.

    The order matters. What a block computes is compiled first, each block for itself: alike, they
    share one graph. Checkpointing comes around it, to run it again in the backward pass. What is
    sharded is wrapped from the inside out, each block before the root, so that one block's weights
    are gathered while the one before computes, and only embedding, norm and head belong to the
    root. DDP comes last: it reads the weights' memory.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = 64           # a graph for each size of a micro-batch
        torch._functorch.config.activation_memory_budget = 0.9 if recompute else 1.0
        torch._dynamo.config.optimize_ddp = False           # else blocks are cut where buckets end
        # dynamic: what is computed must not depend on the order in which shapes come
        compile_it = partial(torch.compile, fullgraph=True, dynamic=False)
        model.cross_entropy_and_grad = compile_it(model.cross_entropy_and_grad)
    for block in model.blocks:
        if compiled:
            block.forward = compile_it(block.forward)
        if activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if strategy in ("fsdp", "hsdp"):
        # imported here: a second at every start that needs none of it
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        shape = {"shard": world.size} if strategy == "fsdp" else {
            "replicate": world.size // world.local_world_size, "shard": world.local_world_size}
        mesh = dist.init_device_mesh(world.device.type, tuple(shape.values()),
                                     mesh_dim_names=tuple(shape))
        # blocks are gathered in the dtype they compute in; the root in fp32, as is the residual
        for module in (*model.blocks, model):
            gathered = dtype if module is not model else torch.float32
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(
                gathered, reduce_dtype=torch.float32, cast_forward_inputs=False))
    model.to_empty(device=world.device)
    if strategy == "ddp":
        for p in model.parameters():     # gradients that are there now get places in DDP's buckets
            p.grad = torch.zeros_like(p)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    return model


def is_sharded(x):
    """Whether a model was given to fully_shard, or a tensor is a DTensor of which each process
    holds some rows."""
    return hasattr(x, "reshard") or hasattr(x, "full_tensor")


def local_shard(p):
    """(what of a parameter or its moments this process holds, the rows of the whole it is)."""
    if not is_sharded(p):
        return p, slice(None)
    mesh = p.device_mesh
    return p.to_local(), shard_rows(p.shape[0], mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1))


def shard_rows(rows, shards, shard):
    """The slice of so many rows that FSDP gives to a shard: as equal as torch.chunk makes them."""
    most = -(-rows // shards)
    return slice(min(rows, most * shard), min(rows, most * (shard + 1)))


def full_tensor(p):
    """A parameter with the parts of all processes, which must all ask for it."""
    return p.full_tensor() if is_sharded(p) else p


@torch.no_grad()
def init_weights(model, cfg):
    """Draws the initial weights: each process all of them, one after the other, and keeps its own,
    so that they are the same for any number of processes."""
    torch.manual_seed(cfg.seed)
    for name, p in model.named_parameters():
        own, rows = local_shard(p)
        drawn = torch.empty(p.shape, device=own.device) if is_sharded(p) else p
        model.init_parameter(name, drawn)
        own.copy_(drawn[rows])


def grad_sync(model, last):
    """The context of a micro-batch's backward pass. Gradients are summed over the processes with
    the last one only."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


# --------------------------------------------------------------------------------------------------
# The step

def autocast(device, dtype):
    """The context of a forward pass: weights stay in fp32, products are computed in `dtype`."""
    return torch.autocast(device.type, dtype) if dtype is not torch.float32 else nullcontext()


def build_optimizer(model, cfg, fused=True):
    return torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                             weight_decay=cfg.weight_decay, fused=fused)


def read_batch(sources, rows, device):
    """rows [(source, window)] -> x, y (rows, T) on the device."""
    tokens = torch.from_numpy(np.stack([sources[name].window(w)
                                        for name, w in rows]))       # (rows, T + 1)
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    tokens = tokens.to(device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train_step(model, optimizer, x, y, lr, micro, dtype, grad_clip, stop=False):
    """One optimizer step on x, y (rows, T), this process's part of the batch, in micro-batches of
    `micro` rows. (mean loss of the whole batch, norm of its gradient, whether any process wishes to
    stop); where a number is not finite the weights of all are left as they were."""
    total = torch.zeros((), device=x.device)
    parts = list(zip(x.split(micro), y.split(micro)))
    for i, (xs, ys) in enumerate(parts):
        with grad_sync(model, last=i == len(parts) - 1):
            with autocast(x.device, dtype):
                loss = model(xs, ys) * (len(xs) / len(x))
            loss.backward()
        total += loss.detach()
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    numbers = torch.stack((total, norm, torch.full_like(total, bool(stop))))
    if dist.is_initialized():
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    loss, norm, stop = numbers.tolist()                 # the only wait for the device in a step
    if math.isfinite(loss) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    # DDP sends gradients in buckets: new ones beside these would be as large again
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    return loss, norm, stop > 0


@torch.no_grad()
def evaluate(model, sources, cfg, world, dtype):
    """{source: nats per token} and {source: bits per byte} over at most eval_tokens of each
    validation part, the same windows every time, spread evenly over it. Bits per byte do not depend
    on the tokenizer, nats per token do; the whole part's tokens and bytes turn one to the other."""
    losses, bits = {}, {}
    for name, source in sources.items():
        n = min(source.windows, max(1, cfg.eval_tokens // source.context))
        rows = [(name, i * source.windows // n) for i in range(n)]
        total = torch.zeros((), device=world.device)
        for i in range(0, n, cfg.micro_batch * world.size):
            group = rows[i:i + cfg.micro_batch * world.size]
            part = group[world.rank::world.size]
            # a process without a row left computes one for nothing: under FSDP others need its part
            x, y = read_batch(sources, part or group[:1], world.device)
            # a graph for this alone would take longer to compile than it saves
            with torch.compiler.set_stance("force_eager"), autocast(world.device, dtype), \
                    sdpa_kernel(WITHOUT_CUDNN):
                total += model(x, y) * (len(part) / n)
        if is_sharded(model):
            model.reshard()       # the root's parameters stay gathered without a backward pass
        if world.size > 1:
            dist.all_reduce(total)
        losses[name] = total.item()
        bits[name] = losses[name] / math.log(2) * source.info["tokens"] / source.info["bytes"]
    return losses, bits


# --------------------------------------------------------------------------------------------------
# Checkpoints: a Hugging Face folder, with what training needs beside the model in training/

TOKENIZER_FILES = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"


def save(step, model, optimizer, cfg, state, sources, world):
    """Writes out_dir/step_00000000/, whole or not at all: under another name, then renamed. All
    processes gather each tensor in turn, and the first one writes."""
    weights, moments = {}, {}
    for name, p in model.named_parameters():
        checkpoints_to_keep = {"": p, **{f".{key}": value for key, value in optimizer.state[p].items()}}
        for key, value in checkpoints_to_keep.items():
            value = full_tensor(value.detach())
            if world.rank == 0:
                (moments if key else weights)[(hf_name(name) if key else name) + key] = value.cpu()
    broadcast_from_rank0(world, lambda: write_checkpoint(step, model, weights, moments, cfg, state, sources))


def write_checkpoint(step, model, weights, moments, cfg, state, sources):
    path = Path(cfg.out_dir) / f"step_{step:08d}"
    temporary = path.with_suffix(".tmp")
    name, source = next(iter(sources.items()))                      # all have the same tokenizer
    try:
        (temporary / "training").mkdir(parents=True)
        model.save_pretrained(temporary, source.header.bos_id, source.header.eos_id, weights)
        for file in TOKENIZER_FILES:
            if (Path(cfg.data_dir) / name / file).exists():
                shutil.copyfile(Path(cfg.data_dir) / name / file, temporary / file)
        save_file(moments, temporary / "training/optimizer.safetensors")
        written = sorted(file for file in temporary.rglob("*") if file.is_file())
        described = {str(file.relative_to(temporary)):
                     {"bytes": file.stat().st_size, "sha256": digest(file)} for file in written}
        write_json(temporary / "training/state.json", state | {"step": step, "files": described})
        for file in (*written, temporary / "training/state.json", temporary / "training",
                     temporary):
            flush(file)
        temporary.rename(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path} could not be saved: {error}. The checkpoints before it are whole; "
                 "the same command continues from the newest")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)         # renamed by now, unless it failed


def digest(path):
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def flush(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def checkpoints(out_dir):
    """The checkpoints in out_dir, {step: path}, in order."""
    found = {int(p.name[5:]): p for p in out_dir.glob("step_*")
             if re.fullmatch(r"step_\d+", p.name)}
    return dict(sorted(found.items()))


def newest(out_dir):
    return next(reversed(checkpoints(out_dir).values()), None)


def read_state(path):
    """state.json of a checkpoint, after comparing every file it names with what is there. Raises
    InputError."""
    state = read_json(path / "training/state.json")
    if (not all(isinstance(state.get(k), dict) for k in ("files", "recipe", "sources", "run"))
            or not {"stages", "context"} <= set(state["recipe"]) or "step" not in state):
        raise InputError(f"{path / 'training/state.json'} is damaged: it lacks what save wrote")
    for name, about in state["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{path} lacks {name}")
        if file.stat().st_size != about["bytes"]:
            raise InputError(f"{file} is damaged: it has {file.stat().st_size} bytes, "
                             f"and {about['bytes']} were written")
        if digest(file) != about["sha256"]:
            raise InputError(f"{file} is damaged: its bytes are not those that were written")
    return state


def resume(path, model, optimizer):
    """Weights and optimizer of a checkpoint, into a model and an optimizer that have not moved yet.
    Each process reads its own part."""
    model.load_tensors(path, local_shard)
    with safe_open(path / "training/optimizer.safetensors", framework="pt") as file:
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            state["step"] = file.get_tensor(f"{hf_name(name)}.step").to(p.device)
            for key in "exp_avg", "exp_avg_sq":
                state[key] = torch.empty_like(p, requires_grad=False)
                own, rows = local_shard(state[key])
                own.copy_(file.get_slice(f"{hf_name(name)}.{key}")[rows])


def checkpoints_to_keep(steps, cfg, ends):
    """Of the steps with a checkpoint, in order, those that keep it: the newest `keep`, the ends of
    stages, and every keep_every."""
    newest = set(steps[-cfg.keep:])                                          # all where keep is 0
    return [step for step in steps if step in newest or step in ends
            or cfg.keep_every and step % cfg.keep_every == 0]


def delete_old(cfg, ends):
    found = checkpoints(Path(cfg.out_dir))
    for step in found.keys() - set(checkpoints_to_keep(list(found), cfg, ends)):
        shutil.rmtree(found[step])


# --------------------------------------------------------------------------------------------------
# The plan: what will happen, by arithmetic alone

# of one A100-40G, arXiv 2401.02385v2, section 2.3
PAPER_TOKENS_PER_SECOND = 24_000


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """What --plan takes besides the keys of a recipe."""
    plan: bool = False
    gpus: int = 1
    tokens_per_second: float = 0.0               # of one GPU; 0: the paper's alone

    def __post_init__(self):
        super().__post_init__()
        if self.gpus < 1:
            sys.exit(f"gpus must be at least 1, got {self.gpus}")
        if not 0 <= self.tokens_per_second < math.inf:
            sys.exit(f"tokens_per_second must be at least 0, got {self.tokens_per_second}")


def plan(cfg, stages):
    """What training will do, as a dict, from the recipe alone. The data and what it forks or starts
    from may be missing; what is there is refused as training would refuse it."""
    names, ends = source_names(stages), stage_ends(stages)
    cfg, there, _ = read_sources(cfg, [n for n in names if (Path(cfg.data_dir) / n).is_dir()])
    start, path = 0, Path(cfg.fork_from)
    if cfg.fork_from and (path / "training/state.json").exists():
        state = read_json(path / "training/state.json")
        cfg = replace(cfg, vocab_size=cfg.vocab_size or state["recipe"]["vocab_size"])
        start = check_fork(path, state, {"recipe": recipe_of(cfg),
                                         "sources": state["sources"] | dataset_fingerprints(there)})
    elif cfg.fork_from:
        start = next((end for end in ends if path.name == f"step_{end:08d}"), None)
        if start is None:
            sys.exit(f"fork_from {path} is not at the end of a stage of this recipe: "
                     f"these are {', '.join(f'step_{end:08d}' for end in ends)}")
    if cfg.init_from and cfg.vocab_size and Path(cfg.init_from).exists():
        check_init(cfg, there)
    with torch.device("meta"):
        model = Llama(replace(cfg, vocab_size=cfg.vocab_size or ModelConfig.vocab_size))
        tinyllama = Llama(ModelConfig())
    flops, parameters = model.flops_per_token(), sum(p.numel() for p in model.parameters())
    seen = [tokens_after(stages, step, cfg.context) for step in (start, *ends)]
    warmup = cfg.warmup_steps * stages[0].batch * cfg.context
    given = [sequences_per_source(stage, stage.steps * stage.batch) for stage in stages]
    every = cfg.save_every
    saved = sorted({*range(start // every * every + every, ends[-1] + 1, every),
                    *(end for end in ends if end > start)})
    return {
        "vocab_size": cfg.vocab_size, "parameters": parameters, "flops_per_token": flops,
        "start": start, "ends": ends, "tokens": seen[-1] - seen[0],
        "lr": [lr_at(tokens, seen[-1], warmup, cfg) for tokens in seen[1:]],
        "micro_batches": [split_batch(stage.batch, cfg.gpus, cfg.micro_batch) for stage in stages],
        "given": {name: [count.get(name, 0) * cfg.context for count in given] for name in names},
        "epochs": {name: sum(count.get(name, 0) for count in given) / source.windows
                   for name, source in there.items()},
        "saved": saved, "kept": checkpoints_to_keep(saved, cfg, ends),
        "checkpoint_bytes": 12 * parameters,           # weights and two moments, in fp32
        # another shape at the same rate of work, FLOPs a second
        "paper_rate": PAPER_TOKENS_PER_SECOND * tinyllama.flops_per_token() / flops}


def announce_plan(cfg, stages, plan):
    print(f"{plan['parameters']:,} parameters, {plan['flops_per_token']:,} FLOPs a token"
          + ("" if plan["vocab_size"] else f", with a vocabulary of {ModelConfig.vocab_size:,} "
             "until there are data to say"))
    rows = [("stage", "steps", "tokens", "a step", "of", "ends at step", "learning rate")]
    for k, (stage, end, lr, (micro, many)) in enumerate(zip(
            stages, plan["ends"], plan["lr"], plan["micro_batches"]), 1):
        batch = stage.batch * cfg.context
        rows.append((f"{k}" + ", where it forks" * (end == plan["start"]),
                     f"{stage.steps:,}", f"{stage.steps * batch:,}", f"{batch:,}",
                     f"{cfg.gpus} x {many} x {micro} x {cfg.context}", f"{end:,}", f"{lr:.2e}"))
    rows.append(("", f"{sum(stage.steps for stage in stages):,}",
                 f"{tokens_after(stages, math.inf, cfg.context):,}", "", "", "", ""))
    print_columns(rows)
    print("(a step = GPUs x accumulation x micro-batch x context; the learning rate is the last "
          f"step's, and {cfg.learning_rate:.2e} after {cfg.warmup_steps:,} steps)")
    rows = [("tokens of", *(f"stage {k}" for k in range(1, len(stages) + 1)), "in all", "epochs")]
    for name, given in plan["given"].items():
        rows.append((name, *(f"{n:,}" for n in given), f"{sum(given):,}",
                     f"{plan['epochs'][name]:.2f}" if name in plan["epochs"] else "no data yet"))
    print_columns(rows)
    for k, stage in enumerate(stages, 1):
        if stage.ramp:
            print(f"stage {k} comes to its mixture by a ramp of "
                  f"{float(stage.ramp * cfg.context):,.0f} tokens")
    size, stay = plan["checkpoint_bytes"], len(plan["kept"])
    print(f"\ncheckpoints: {len(plan['saved']):,} of {format_bytes(size)} are written, {stay:,} stay; "
          f"{format_bytes((stay + 1) * size)} of room, with one being written")
    print(f"compute: {plan['tokens']:,} tokens to train on, "
          f"{plan['tokens'] * plan['flops_per_token']:.3g} FLOPs")
    for rate, whose in ((plan["paper_rate"], "as busy as the paper's A100"),
                        (cfg.tokens_per_second, "as given")):
        if rate:
            seconds = plan["tokens"] / rate
            hours = f"{seconds / 3600:,.0f}" if seconds > 36_000 else f"{seconds / 3600:.2g}"
            print(f"time: {hours} GPU-hours, {format_duration(seconds / cfg.gpus)} on {cfg.gpus}, "
                  f"at {rate:,.0f} tokens/s each = "
                  f"{rate * plan['flops_per_token'] / 1e12:,.3g} TFLOP/s, {whose}")


def print_columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())


def format_bytes(n):
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB"


def format_duration(seconds):
    for unit, length in ("days", 86_400), ("hours", 3600), ("minutes", 60):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


# --------------------------------------------------------------------------------------------------
# The run

@contextmanager
def lock_run(out_dir):
    """Keeps other runs out of a folder, by a lock that ends with this process however it ends, and
    removes from it what a killed save left. A folder in which nothing was written goes again."""
    made, path = not out_dir.exists(), out_dir / "lock"
    out_dir.mkdir(parents=True, exist_ok=True)
    for attempt in range(25):                      # a predecessor may be dying: five seconds
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                break                              # else it was removed by who held it before
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
        file.close()
        time.sleep(0.2)
    else:
        sys.exit(f"another run is writing {out_dir}: {holder}; stop it, or take another --out_dir")
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
        file.flush()
        for half in out_dir.glob("step_*.tmp"):
            shutil.rmtree(half)
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if made and not any(out_dir.iterdir()):
            out_dir.rmdir()


class Stop:
    """True once Ctrl-C or SIGTERM came: the step is finished and saved then. A second one ends the
    program at once; but torchrun passes on what it gets itself, so there repeats mean nothing."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        if self.asked and "RANK" not in os.environ:
            sys.exit(128 + number)
        self.asked = True

    def __bool__(self):
        return self.asked


class Metrics:
    """metrics.jsonl: a line a record. What an earlier run wrote beyond `step` (None: at all), and a
    line torn by its end, is cut off."""

    def __init__(self, path, step, tokens_per_second_at_peak):
        checkpoints_to_keep, lines = [], []
        if path.exists() and step is not None:
            lines = path.read_text("utf-8", errors="replace").splitlines(keepends=True)
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step and line.endswith("\n"):
                    checkpoints_to_keep.append(line)
        path.with_suffix(".tmp").write_text("".join(checkpoints_to_keep), "utf-8")
        os.replace(path.with_suffix(".tmp"), path)
        self.file, self.peak = open(path, "a", encoding="utf-8"), tokens_per_second_at_peak
        self.tokens, self.seconds, self.given = 0, 0, Counter()

    def took(self, rows, context, seconds):
        """Counts a step: speed and mixture are those of the steps since the last record, without
        evaluations and saves."""
        self.given.update(name for name, _ in rows)
        self.tokens, self.seconds = self.tokens + len(rows) * context, self.seconds + seconds

    def write(self, record, memory):
        if self.tokens:
            rate = self.tokens / self.seconds
            record |= {"tokens_per_second": rate, "mfu": rate / self.peak if self.peak else None,
                       "memory": memory, "mixture": {name: count / self.given.total()
                                                     for name, count in self.given.items()}}
            self.tokens, self.seconds, self.given = 0, 0, Counter()
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.last = record


def read_recipe(argv):
    """(config, stages) of a command line, after every check that needs no data. The config is a
    PlanConfig where a plan is wanted."""
    cfg = load(argv, PlanConfig)
    if not cfg.plan:
        if cfg.gpus != 1 or cfg.tokens_per_second:
            sys.exit("gpus and tokens_per_second go with --plan")
        cfg = TrainConfig(**recipe_of(cfg))
    recipes = [Path(arg).stem.removeprefix("config_") for arg in argv if not arg.startswith("--")]
    if not recipes and not cfg.stages:
        sys.exit("usage: python train.py RECIPE.py [--key=value ...] [--plan], e.g. "
                 "python train.py config_demo.py")
    if not cfg.out_dir:
        cfg = replace(cfg, out_dir=f"out/{recipes[-1] if recipes else 'run'}")
    stages = parse_stages(cfg.stages, cfg.context)
    if cfg.data:
        cfg = replace(cfg, data="", stages=[
            {"tokens": stage["tokens"], "batch": stage["batch"], "mixture": parse_mixture(cfg.data)}
            for stage in cfg.stages])
        stages = parse_stages(cfg.stages, cfg.context)
    if Path(cfg.out_dir).exists() and not Path(cfg.out_dir).is_dir():
        sys.exit(f"out_dir {cfg.out_dir} is a file: name a folder, or what is to become one")
    if cfg.warmup_steps * stages[0].batch >= sum(stage.steps * stage.batch for stage in stages):
        sys.exit(f"warmup_steps {cfg.warmup_steps} must end before the run does, which has "
                 f"{sum(stage.steps for stage in stages)} steps")
    return cfg, stages


def read_sources(cfg, names):
    """(config, training sources, those of them with a validation part), {name: Source}, checked
    against each other. vocab_size 0 becomes theirs."""
    train = {name: Source(Path(cfg.data_dir) / name, "train", cfg.context) for name in names}
    val = {name: Source(Path(cfg.data_dir) / name, "val", cfg.context) for name in names}
    for source in train.values():
        if not source.windows:
            sys.exit(f"the source {source.name} has {source.header.tokens} tokens, "
                     f"less than one window of context + 1 = {cfg.context + 1}: "
                     "give it more text, or --context a smaller value")
        if source.header.tokenizer != train[names[0]].header.tokenizer:
            sys.exit(f"the sources {names[0]} and {source.name} were written with different "
                     f"tokenizers ({train[names[0]].header.tokenizer[:12]} and "
                     f"{source.header.tokenizer[:12]}): tokenize both with one")
        if 0 < cfg.vocab_size < source.header.vocab_size:
            sys.exit(f"vocab_size {cfg.vocab_size} is below that of the data, "
                     f"{source.header.vocab_size}: leave it out, or tokenize with another")
        cfg = replace(cfg, vocab_size=cfg.vocab_size or source.header.vocab_size)
    return cfg, train, {name: source for name, source in val.items() if source.windows}


def recipe_of(cfg):
    """The keys of a recipe, {key: value}, without what --plan adds."""
    return {f.name: getattr(cfg, f.name) for f in fields(TrainConfig)}


def source_names(stages):
    return sorted({name for stage in stages for name in stage.names})


# --------------------------------------------------------------------------------------------------
# Where a run begins: at its own newest checkpoint, else at another run's, else with other weights,
# else with none

def diff_lines(theirs, ours):
    """The entries of two dicts that are not the same, in lines for people."""
    return [f"  {key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]


def warn_numerics_changed(state, description):
    """Says what rounds otherwise than before."""
    before = {"recompute": state["run"].get("compile")} | state["run"]     # before it was a choice
    for key, here in description["run"].items():
        if before.get(key) != here:
            print(f"note: {key} was {before.get(key)} before and is {here} now: rounding will "
                  "differ")


def find_checkpoint(out_dir, description):
    """(path, state) of the newest checkpoint to continue from, or (None, None). Exits where it is
    damaged or of another recipe."""
    found = list(checkpoints(out_dir).values())
    if not found:
        return None, None
    try:
        state = read_state(found[-1])
    except InputError as error:
        sys.exit(f"{error}\nRemove {found[-1]} to "
                 + (f"continue from {found[-2]}" if found[:-1] else "start over"))
    lines = diff_lines(*(lineage(d, math.inf) for d in (state, description)))
    if lines:
        sys.exit("\n".join([f"{found[-1]} was trained by another recipe:", *lines,
                            "Take the same, or another --out_dir"]))
    warn_numerics_changed(state, description)
    return found[-1], state


def lineage(description, step):
    """{what: value} of all that a run's weights at `step`, the end of one of its stages, and Adam's
    use of them from there depend on; of the whole run for infinity."""
    recipe, sources = description["recipe"], description["sources"]
    stages = parse_stages(recipe["stages"], recipe["context"])
    done = stages[:bisect_left(stage_ends(stages), step) + 1]
    return {key: value for key, value in recipe.items() if key not in FREE | {"stages"}} | {
        f"stage {k}": stage for k, stage in enumerate(done, 1)} | {
        f"{what} of {name}": value for name in source_names(done)
        for what, value in sources.get(name, {}).items()} | {
        "tokens of the learning-rate curve": tokens_after(stages, math.inf, recipe["context"])}


def find_fork(path, description):
    """(path, state) of the checkpoint to fork from, which this recipe could have written at the end
    of a stage. Exits with what differs."""
    if not (path / "training/state.json").exists():
        run = path if checkpoints(path) else path.parent
        sys.exit(f"fork_from {path} is no checkpoint: name the end of a stage, "
                 + (", ".join(map(str, stage_end_checkpoints(run))) or "and train up to it first")
                 + ("; the weights of a model alone: --init_from" if path.is_dir() else ""))
    try:
        state = read_state(path)
    except InputError as error:
        sys.exit(f"fork_from {error}: restore it, or train up to it again")
    check_fork(path, state, description)
    warn_numerics_changed(state, description)
    return path, state


def stage_end_checkpoints(run):
    """The checkpoints of a run's folder that were written at the end of a stage."""
    found = checkpoints(run)
    for path in reversed(found.values()):
        with suppress(InputError, KeyError, TypeError):
            recipe = read_json(path / "training/state.json")["recipe"]
            ends = stage_ends(parse_stages(recipe["stages"], recipe["context"]))
            return [found[end] for end in ends if end in found]
    return []


def check_fork(path, state, description):
    """The step of a checkpoint, if a run so described can fork from it. Exits with what differs."""
    ends = stage_ends(parse_stages(state["recipe"]["stages"], state["recipe"]["context"]))
    if state["step"] not in ends:
        sys.exit(f"{path} was written at step {state['step']}, within a stage: a fork starts where "
                 f"one ends, and that run's end at {', '.join(map(str, ends))}")
    lines = diff_lines(*(lineage(d, state["step"]) for d in (state, description)))
    if lines:
        sys.exit("\n".join([f"{path} has another past than this recipe:", *lines,
                            "Make these the same; or take the weights alone, --init_from"]))
    return state["step"]


def check_init(cfg, sources):
    """Exits where the weights in cfg.init_from are of another shape or tokenizer."""
    path = Path(cfg.init_from)
    if not (path / "config.json").exists():
        sys.exit(f"init_from {path} is no folder of a model: it has no config.json. "
                 + (f"It is a run: name a checkpoint, such as {newest(path)}" if checkpoints(path)
                    else "A model from the hub has to be downloaded first"))
    try:
        there = config_from_hf(read_json(path / "config.json"))
    except InputError as error:
        sys.exit(f"init_from {path}: {error}")
    keys = {f.name for f in fields(ModelConfig)} - {"context"}         # no weight depends on it
    theirs, ours = ({key: getattr(c, key) for key in keys} for c in (there, cfg))
    tokenizer = path / "tokenizer.model"
    if tokenizer.exists() and sources:
        theirs["tokenizer"] = digest(tokenizer)
        ours["tokenizer"] = next(iter(sources.values())).header.tokenizer
    lines = sorted(diff_lines(theirs, ours))
    if lines:
        sys.exit("\n".join([f"the weights in {path} are not of this recipe's model:", *lines,
                            "Only weights of the same shape and tokenizer can be taken"]))


def find_start(cfg, train, description):
    """(checkpoint to go on from, its step, whether it is this run's own): the newest of this run,
    else the one to fork from, else (None, 0, False). Adds to the description where the run came
    from."""
    path, state = find_checkpoint(Path(cfg.out_dir), description)
    own = path is not None
    if own:
        description["origin"] = state.get("origin")
    elif cfg.fork_from:
        path, state = find_fork(Path(cfg.fork_from), description)
        description["origin"] = {"fork_from": str(path), "step": state["step"],
                                 "weights": state["files"]["model.safetensors"]["sha256"]}
    elif cfg.init_from:
        check_init(cfg, train)
        description["origin"] = {"init_from": cfg.init_from, "weights": {
            file.name: digest(file) for file in safetensors_files(Path(cfg.init_from))}}
    return path, state["step"] if state else 0, own


def commit():
    """The commit of this code, with + behind it where files differ from it; None outside a
    checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True,
                              text=True, check=True).stdout.strip()
        return head + ("+" if subprocess.run([*git, "diff", "--quiet", "HEAD"],
                                             capture_output=True).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def dataset_fingerprints(sources):
    """What state.json records of sources, enough to see that others are not the same."""
    return {name: {"windows": source.windows, "tokenizer": source.header.tokenizer} | source.info
            for name, source in sources.items()}


def run_metadata(cfg, stages, train, world, model, strategy, dtype, compiled):
    """What state.json records of a run: its recipe, its data, where its weights came from, and what
    decides its rounding."""
    micro = [split_batch(stage.batch, world.size, cfg.micro_batch)[0] for stage in stages]
    return {
        "recipe": recipe_of(cfg),
        "sources": dataset_fingerprints(train),
        "run": {"device": world.device.type, "dtype": str(dtype).removeprefix("torch."),
                "compile": compiled, "recompute": choose_recompute(
                    model, cfg, shard_count(world, strategy), max(micro), dtype, world.device,
                    compiled), "micro_batch": micro, "processes": world.size,
                "strategy": strategy},
        "origin": None,
        "commit": commit(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}


def estimate_memory(model, cfg, shards, micro, dtype, device, compiled, recompute):
    """(bytes of weights, gradients and moments, bytes of a micro-batch) of one process, counted, of
    a model on the meta device, at the peak of a step of several micro-batches.

    Four numbers of fp32 a parameter, a shard of them where sharded; then embedding and head whole,
    and the gradients of micro-batches not yet reduced. Joined weights wait for the backward pass in
    the dtype of their product, others too unless they are cast again. Of a token, a compiled block
    keeps its input in fp32 and what comes out of products: q, k, v, attention, o, gate and up; and
    what goes into them, where nothing is computed again. Uncompiled it keeps both residuals, what
    goes into each product, SwiGLU's parts; a CPU both norms and, in bf16, the weights of attention.

    The peak is within the loss, which has some rows of logits and their gradient, in fp32 in
    between; or in the last block's backward pass, at the gradients of gate and up.
    """
    C, F, kv, size = cfg.d_model, cfg.d_ff, cfg.n_kv_head * cfg.head_dim, dtype.itemsize
    gpu, again, tokens = device.type == "cuda", cfg.activation_checkpointing, micro * cfg.context
    parameters = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for p in model.blocks.parameters())

    # bytes a parameter; of a sharded model the gradients of a shard come when activations go
    state = 16 * parameters
    if shards > 1:
        state = 12 * parameters // shards + 4 * parameters + 4 * (parameters - inner)
    joined = cfg.n_layer * C * (C + 2 * kv + 2 * F)
    if not again:
        state += size * (joined if shards > 1 or size == 4 or compiled and recompute else inner)

    # bytes a token that a block keeps
    if compiled:
        block = 4 * C + size * (3 * C + 2 * kv + 2 * F)
        if not recompute:
            block += size * (2 * C + F)
    else:
        heads = C if gpu and size == 4 else kv           # in fp32 k and v are repeated for SDPA
        block = (8 if gpu else 16) * C + size * (4 * C + 2 * heads + 4 * F)
    if not gpu and size == 2:
        block += size * cfg.n_head * (cfg.context + QUERY_CHUNK) // 2
    checkpoints_to_keep = tokens * cfg.n_layer * (4 * C if again else block)

    # what comes on top in the loss: embeddings, norm, their gradient; logits; the head's gradient
    head, logits = cfg.vocab_size * C, cfg.vocab_size * min(tokens, LOSS_CHUNK)
    loss = 12 * C * tokens + (2 * size if compiled else 2 * size + 6) * logits + (4 + size) * head
    backward = tokens * (4 * C + 3 * size * F + (block if again else 0)) + 4 * head
    return state, checkpoints_to_keep + max(loss, backward)


RESERVE = 5e9       # of a GPU, for CUDA, NCCL and the gaps between tensors


def choose_recompute(model, cfg, shards, micro, dtype, device, compiled):
    """Whether a compiled block computes again in its backward pass what follows from products by a
    few operations: norms, rotation, SwiGLU. It saves a third of a block's memory and costs reading
    and writing it once more, so on a GPU it is done where memory would not suffice without."""
    return compiled and (device.type != "cuda" or RESERVE + sum(estimate_memory(
        model, cfg, shards, micro, dtype, device, compiled, False)) > device_memory(device))


def main(argv):
    cfg, stages = read_recipe(argv)
    if isinstance(cfg, PlanConfig):
        return announce_plan(cfg, stages, plan(cfg, stages))
    # among many, a wish to stop is heard once they train: one that waits for others hears nothing
    stop = Stop() if "RANK" not in os.environ else None
    cfg, train, val = read_sources(cfg, source_names(stages))
    disable_malloc_trim()
    world = init_distributed()
    if world.rank:
        sys.stdout = open(os.devnull, "w")             # one speaks for all
    steps, out_dir = stage_ends(stages)[-1], Path(cfg.out_dir)
    with torch.device("meta"):
        model = Llama(cfg)
    flops, there = model.flops_per_token(), device_memory(world.device)
    parameters = sum(p.numel() for p in model.parameters())
    # decided by one for all, who might find other hardware
    (strategy, why_strategy), (dtype, why_dtype), (compiled, why_compiled) = broadcast_from_rank0(world, lambda: (
        choose_strategy(cfg, world, parameters, there), find_dtype(world.device, cfg.dtype),
        choose_compile(cfg, world.device, flops * tokens_after(stages, steps, cfg.context))))
    description = broadcast_from_rank0(world, lambda: run_metadata(cfg, stages, train, world, model, strategy, dtype,
                                                compiled))
    micro, recompute = (description["run"][key] for key in ("micro_batch", "recompute"))
    backend, why_backend = attention_backend(world.device, dtype, cfg.head_dim)
    with ExitStack() as held:
        path, first, own = broadcast_from_rank0(world, lambda: (held.enter_context(lock_run(out_dir))
                                                 or find_start(cfg, train, description)))
        if first == steps:
            print(f"{path} is the end of this recipe, all {steps} steps are done: "
                  f"python sample.py {path}")
            return
        card = device_name(world.device)
        print(f"commit {description['commit']}, torch {torch.__version__}, {card}")
        print(f"{description['run']['dtype']}: {why_dtype}; {'' if compiled else 'not '}compiled: "
              f"{why_compiled}; attention by {backend}: {why_backend}")
        if world.size > 1:
            print(f"{world.size} processes, {world.local_world_size} a machine; {strategy}: {why_strategy}")
        print(f"{parameters:,} parameters, {flops:,} FLOPs a token")
        for k, stage in enumerate(stages, 1):
            print(f"stage {k}: {format_stage(stage, micro[k - 1], world.size, cfg.context)}")
        state, activations = estimate_memory(model, cfg, shard_count(world, strategy), max(micro),
                                           dtype, world.device, compiled, recompute)
        memory = (f"memory: {format_bytes(state)} of weights, gradients and moments and at most about "
                  f"{format_bytes(activations)} of a micro-batch, of {format_bytes(there)} a "
                  + ("GPU" if world.device.type == "cuda" else "machine")
                  + "; what is quickly computed again is not kept" * recompute)
        print(memory)
        for name in train.keys() - val.keys():
            print(f"{name} has no validation part of a whole window: it trains without one")

        try:
            called = parallelize(model, world, strategy, dtype, compiled,
                                 cfg.activation_checkpointing, recompute)
            optimizer = build_optimizer(model, cfg)
            if path:
                print(f"{'continuing' if own else 'forking'} from {path}")
                resume(path, model, optimizer)
            elif cfg.init_from:
                print(f"starting from the weights in {cfg.init_from}")
                model.load_tensors(Path(cfg.init_from), local_shard)
            else:
                init_weights(model, cfg)
            peak = peak_flops(card, dtype)
            metrics = world.rank == 0 and Metrics(
                out_dir / "metrics.jsonl", first if own else None, peak and
                peak * world.size / flops)
            last = loop(cfg, stages, train, val, model, called, optimizer, dtype, world, first, own,
                        description, metrics, stop if stop is not None else Stop())
        except torch.OutOfMemoryError as error:
            sys.exit(f"out of memory. {memory}. What helps: a --micro_batch below {max(micro)}"
                     + (", --strategy=fsdp" if strategy == "ddp" else "")
                     + (", --activation_checkpointing" if not cfg.activation_checkpointing else "")
                     + f"; none changes what is learned. ({str(error).splitlines()[0]})")
        if last == steps:
            print(f"{newest(out_dir)} is the end of the run")
        else:
            print(f"stopped after step {last}; the same command continues from {newest(out_dir)}")


def format_stage(stage, micro, ranks, context):
    return (f"{stage.steps} steps of {stage.batch * context:,} tokens = "
            + f"{ranks} processes x " * (ranks > 1)
            + f"{stage.batch // micro // ranks} x {micro} sequences of {context}; "
            + ", ".join(f"{name} {float(share):.4g}" for name, share in stage.shares.items()))


def loop(cfg, stages, train, val, model, called, optimizer, dtype, world, first, own, description,
         metrics, stop):
    """The steps from `first` on, until the last or a wish to stop. Returns how many are done.
    `called` is the model in what parallelize put around it."""
    windows = {name: source.windows for name, source in train.items()}
    ends = stage_ends(stages)
    steps, total = ends[-1], tokens_after(stages, ends[-1], cfg.context)
    warmup = cfg.warmup_steps * stages[0].batch * cfg.context
    line, stopping = {}, False

    def batch_of(step):
        rows = sequences(stages, windows, cfg.seed, step)
        return rows, *read_batch(train, rows[world.rank::world.size], world.device)

    # the current GPU is each thread's own: else the first one would hold the pinning of all
    here = (partial(torch.cuda.set_device, world.device)
            if world.device.type == "cuda" and world.size > 1 else None)
    with ThreadPoolExecutor(1, initializer=here) as ahead, tqdm(
            total=total, initial=tokens_after(stages, first, cfg.context), unit="tok",
            unit_scale=True, disable=True if world.rank else None) as bar:
        upcoming = ahead.submit(batch_of, first)
        for step in range(first, steps + 1):  # one turn more, to evaluate and save the last step
            seen, new = tokens_after(stages, step, cfg.context), step > first
            if val and (new or not own) and (step % cfg.eval_every == 0 or step in ends):
                line["val_loss"], line["bits_per_byte"] = evaluate(model, val, cfg, world, dtype)
            if metrics and line and (step % cfg.log_every == 0 or step in ends
                                     or "val_loss" in line):
                metrics.write({"step": step, "tokens": seen} | line, memory_used(world.device))
                bar.write(format_record(metrics.last, steps), file=sys.stdout)
            if new and (step % cfg.save_every == 0 or step in ends or stopping):
                start = time.perf_counter()
                save(step, model, optimizer, cfg, description | {"tokens": seen}, train, world)
                if world.rank == 0:
                    bar.write(f"saved {newest(Path(cfg.out_dir))} in "
                              f"{time.perf_counter() - start:.1f} s", file=sys.stdout)
                    delete_old(cfg, ends)
            if step == steps or stopping:
                return step
            start = time.perf_counter()
            rows, x, y = upcoming.result()
            if step + 1 < steps:
                upcoming = ahead.submit(batch_of, step + 1)
            lr = lr_at(tokens_after(stages, step + 1, cfg.context), total, warmup, cfg)
            micro, _ = split_batch(len(rows), world.size, cfg.micro_batch)
            loss, norm, stopping = train_step(called, optimizer, x, y, lr, micro, dtype,
                                              cfg.grad_clip, stop)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                sys.exit(1 if world.rank else f"step {step + 1} is not finite: loss {loss}, "
                         f"norm of the gradient {norm}; stopped before the weights moved. "
                         f"Last good checkpoint: {newest(Path(cfg.out_dir)) or 'none yet'}. "
                         "A smaller --learning_rate or more --warmup_steps may help")
            line = {"loss": loss, "lr": lr, "grad_norm": norm,
                    "stage": bisect_left(ends, step + 1) + 1}
            if metrics:
                metrics.took(rows, cfg.context, time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(len(rows) * cfg.context)


def format_record(line, steps):
    """A record for people."""
    text = f"step {line['step']}/{steps}"
    if "loss" in line:
        text += (f"  loss {line['loss']:.3f}  lr {line['lr']:.2e}  norm {line['grad_norm']:.2f}  "
                 f"{line['tokens_per_second']:,.0f} tok/s"
                 + (f"  MFU {line['mfu']:.1%}" if line["mfu"] else ""))
    for name, bits in line.get("bits_per_byte", {}).items():
        text += f"  | {name} {line['val_loss'][name]:.3f} nats, {bits:.3f} bits/byte"
    return text


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)      # DDP keeps threads of the group alive, which may abort a process that ends
