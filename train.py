"""Pretraining: python train.py RECIPE.py [--key=value ...]

The model learns to predict the next token. A step reads the batch that follows from its number
(data.py), runs it forward and backward in micro-batches whose gradients add up, clips the gradient,
and lets AdamW move the weights. Everything is counted in tokens: a batch has so many, the learning
rate is that of so many seen, and the number of micro-batches is derived:

    batch 16,384 tokens = 64 sequences of 256 = 4 micro-batches of 16

There is no state but the weights, Adam's moments and the step. So when the same command is given
again, a run that was stopped, by Ctrl-C or by force, continues from its newest checkpoint. It ends
with the weights that it would have had: to the bit on a CPU, and up to rounding on a GPU, where
attention's backward pass adds up in an order that varies.

    torchrun --nproc-per-node=8 train.py RECIPE.py      the same on 8 GPUs (parallel.py)
    python train.py RECIPE.py --plan [--gpus=8]         what it will do, without doing it (plan.py)
"""
import math
import os
import signal
import sys
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
import data
import parallel
from config import load_config
from device import disable_malloc_trim, memory_used
from files import Output, run_program
from metrics import Metrics, format_record
from model import WITHOUT_CUDNN, ModelConfig
from parallel import broadcast_from_rank0, full_tensor, grad_sync, is_sharded
from plan import format_memory, print_plan, resolve


@dataclass(frozen=True)
class RunOptions:
    """Where a run begins, how it is computed, what it writes. Runs that differ only in these may
    continue each other's checkpoints."""
    data_dir: str = "data"                 # the folder of the sources
    out_dir: str = ""                      # "": out/ and the recipe's name
    fork_from: str = ""                    # start from this checkpoint at the end of a stage
    init_from: str = ""                    # initial weights: those of this Llama folder
    strategy: str = "auto"                 # of several processes: ddp, fsdp, hsdp
    micro_batch: int = 8                   # the most sequences in one forward pass of a GPU
    activation_checkpointing: bool = False # recompute blocks: a third more compute, less memory
    dtype: str = "auto"                    # of matmuls: float32, bfloat16, auto (bf16 if supported)
    compile: bool | None = None            # None: where it pays
    log_every: int = 10                    # steps between two log lines
    eval_every: int = 1000                 # steps between evaluations; stage ends have one, too
    eval_tokens: int = 2 ** 21             # the most tokens of each source in an evaluation
    save_every: int = 1000                 # steps between checkpoints; stage ends have one, too
    keep: int = 3                          # newest checkpoints to keep (stage ends stay); 0: all
    keep_every: int = 0                    # keep one every so many steps, too; 0: no others
    plan: bool = False                     # print what the run will do, instead of doing it
    gpus: int = 1                          # that the plan is for
    tokens_per_second: float = 0.0         # of one GPU, for the plan; 0: the paper's speed only


@dataclass(frozen=True)
class TrainConfig(RunOptions, ModelConfig):
    """Everything a recipe may say. The model's shape is inherited, and so are the options."""
    vocab_size: int = 0                    # 0: that of the data
    # a stage is a dict; its tokens, batch and ramp are counted in tokens, ramp may be left out
    stages: list = field(default_factory=list)   # [{tokens, batch, mixture {source: share}, ramp}]
    data: str = ""                         # NAME or NAME:SHARE,... in place of every mixture
    seed: int = 3407                       # of the initial weights and the order of the data
    learning_rate: float = 4e-4            # the highest, reached after the warm-up
    min_lr: float = 4e-5                   # that of the last step
    warmup_steps: int = 2000               # counted in batches of the first stage
    weight_decay: float = 0.1              # of every parameter, as in the original
    beta1: float = 0.9                     # AdamW averages gradients over some 10 steps
    beta2: float = 0.95                    # and their squares over some 20, fewer than usual
    grad_clip: float = 1.0                 # the largest norm of the gradient

    def __post_init__(self):
        super().__post_init__()
        for key in ("micro_batch", "log_every", "eval_every", "eval_tokens", "save_every",
                    "learning_rate", "grad_clip", "gpus"):
            if not 0 < getattr(self, key) < math.inf:
                sys.exit(f"{key} must be above 0, got {getattr(self, key)}")
        limits = {"min_lr": self.learning_rate, "beta1": 1, "beta2": 1, "seed": 2 ** 63}
        for key in (*limits, "weight_decay", "warmup_steps", "keep", "keep_every",
                    "tokens_per_second"):
            if not 0 <= getattr(self, key) < limits.get(key, math.inf):
                of = " (learning_rate)" if key == "min_lr" else ""
                sys.exit(f"{key} must be at least 0 and below {limits.get(key, math.inf)}{of}, "
                         f"got {getattr(self, key)}")
        for key, allowed in (("dtype", ("auto", "float32", "bfloat16")),
                             ("strategy", ("auto", "ddp", "fsdp", "hsdp"))):
            if getattr(self, key) not in allowed:
                sys.exit(f"{key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}")
        if not self.data_dir:
            sys.exit("data_dir names nothing: give the folder of the sources, such as data")
        if self.fork_from and self.init_from:
            sys.exit(f"a run has one origin: fork_from {self.fork_from} or init_from "
                     f"{self.init_from}; --fork_from= takes back the recipe's")
        if not self.plan and (self.gpus != 1 or self.tokens_per_second):
            sys.exit("gpus and tokens_per_second go with --plan; to train on many GPUs: torchrun "
                     "--nproc-per-node=N train.py ...")

    def learned(self):
        """{key: value} of the keys that what is learned depends on."""
        return {k: v for k, v in vars(self).items() if k not in RunOptions.__annotations__}


# --------------------------------------------------------------------------------------------------
# The step

def lr_at(tokens, total, warmup, cfg):
    """The learning rate of the step that ends with so many tokens seen. It grows linearly for
    `warmup` tokens, while Adam's moments are still poor estimates, then falls along a cosine and
    reaches min_lr with the last step."""
    if tokens < warmup:
        return cfg.learning_rate * tokens / warmup
    progress = (tokens - warmup) / (total - warmup)
    return cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def train_step(model, optimizer, x, y, lr, micro, dtype, grad_clip, stop=False, learned=None):
    """One optimizer step on x, y (rows, T), this process's rows of the batch, in micro-batches of
    `micro` rows. `learned` are the whole batch's targets to learn, per process; None: all are.
    Returns
        the mean loss of the whole batch, nats per learned token,
        the norm of its gradient before clipping,
        whether any process was asked to stop.
    Where loss or norm is not finite, no weight is moved.
    """
    total_loss = torch.zeros((), device=x.device)
    micro_batches = list(zip(x.split(micro), y.split(micro)))
    for i, (inputs, targets) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with grad_sync(model, last):                 # ranks exchange gradients once per step
            with autocast(x.device, dtype):
                # over the batch's learned targets: it is no mean of the micro-batches' means
                loss = model(inputs, targets) * ((targets >= 0).sum() / (learned or y.numel()))
            loss.backward()                          # adds to the gradients that are there
        total_loss += loss.detach()

    # one unusual batch must not throw the weights far off
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))

    # all ranks agree on loss, norm and stop; this is the only wait for the device in a step
    numbers = torch.stack((total_loss, norm, torch.full_like(total_loss, bool(stop))))
    if dist.is_initialized():
        dist.all_reduce(numbers)
        numbers /= dist.get_world_size()
    loss, norm, stop = numbers.tolist()

    if math.isfinite(loss) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    # DDP's gradients live in the buckets it sends: new ones would be as large again
    optimizer.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))
    return loss, norm, stop > 0


def autocast(device, dtype):
    """The context of a forward pass: weights stay in fp32, matmuls are computed in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def build_optimizer(model, cfg, fused=True):
    return torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                             weight_decay=cfg.weight_decay, fused=fused)


def read_batch(sources, rows, device):
    """rows, a list of (source, window) -> inputs x and targets y, both (rows, T), on the device. y
    is x one token later, and data.IGNORED where that is not to be learned."""
    examples = [sources[name].example(i) for name, i in rows]
    batch = torch.from_numpy(np.stack(examples, 1))                          # (2, rows, T)
    if device.type == "cuda":
        with torch.cuda.device(device):       # of this thread: else all ranks pin through GPU 0
            batch = batch.pin_memory()                                # so that the copy can overlap
    return batch.to(device, non_blocking=True).unbind()


@torch.no_grad()
def evaluate(model, run):
    """{source: nats per learned token} and {source: bits per byte} over at most eval_tokens of each
    validation split: the same windows every time, spread evenly over it. A source is left out where
    they teach nothing. (There is no dropout, so no model.eval() either.)"""
    losses, bits, world = {}, {}, run.world
    for name, source in run.val.items():
        n = min(source.windows, max(1, run.cfg.eval_tokens // source.context))
        rows = [(name, i * source.windows // n) for i in range(n)]
        learned = {row: int(source.learned(row[1]).sum()) for row in rows}
        if not any(learned.values()):
            continue
        total = torch.zeros((), device=world.device)
        for i in range(0, n, run.cfg.micro_batch * world.size):
            group = rows[i:i + run.cfg.micro_batch * world.size]
            mine = group[world.rank::world.size]
            # a rank without rows runs a dummy one: under FSDP all ranks must join the all-gather
            x, y = read_batch(run.val, mine or group[:1], world.device)
            # not compiled: a graph for these shapes alone would cost more than it saves
            with torch.compiler.set_stance("force_eager"), autocast(world.device, run.dtype), \
                    sdpa_kernel(WITHOUT_CUDNN):
                total += model(x, y) * (sum(map(learned.get, mine)) / sum(learned.values()))
        if is_sharded(model):
            model.reshard()       # without a backward pass the root's weights would stay gathered
        if world.size > 1:
            dist.all_reduce(total)
        losses[name] = total.item()
        # the whole part's tokens and bytes turn nats per token into nats of all its bytes
        bits[name] = data.bits_per_byte(losses[name] * source.learned_tokens, source.learned_bytes)
    return losses, bits


# --------------------------------------------------------------------------------------------------
# The loop

def train(run, start, model, wrapped_model, optimizer, stop_request):
    """Trains until the last step or a stop request, and returns how many steps are done.
        run             the recipe with everything decided (plan.Run)
        start           the step and checkpoint from which it begins (checkpoint.Start)
        wrapped_model   what to call: the model in what parallelize put around it
    """
    cfg, world, context = run.cfg, run.world, run.cfg.context
    metadata = checkpoint.run_metadata(run, start) if world.rank == 0 else {}
    metrics = None if world.rank else Metrics(run, start, model.flops_per_token(), stop_request)
    windows = {name: source.windows for name, source in run.train.items()}
    warmup = cfg.warmup_steps * run.stages[0].batch * context
    record, stopping = {}, False

    def read_step(step):
        rows = data.sequences(run.stages, windows, cfg.seed, step)
        learned = sum(int(run.train[name].learned(i).sum()) for name, i in rows)
        return rows, learned, *read_batch(run.train, rows[world.rank::world.size], world.device)

    with ThreadPoolExecutor(1) as prefetcher, tqdm(
            total=run.total_tokens, initial=data.tokens_after(run.stages, start.step, context),
            unit="tok", unit_scale=True, disable=True if world.rank else None) as bar:
        prefetched = prefetcher.submit(read_step, start.step)
        # Here `step` steps are done: evaluate, log and save that state, then do one more step.
        # The last turn has no step left to do.
        for step in range(start.step, run.steps + 1):
            is_end, trained = step in run.ends, step > start.step

            # evaluate on held-out text, at the end of each stage in any case
            if run.val and (trained or not start.resuming) and (
                    step % cfg.eval_every == 0 or is_end):
                record["val_loss"], record["bits_per_byte"] = evaluate(model, run)

            # log what the last turn's step recorded, to metrics.jsonl and to the terminal
            if metrics and record and (step % cfg.log_every == 0 or is_end or "val_loss" in record):
                seen = data.tokens_after(run.stages, step, context)
                metrics.write({"step": step, "tokens": seen} | record, memory_used(world.device))
                bar.write(format_record(metrics.last, run.steps), file=sys.stdout)

            # save a checkpoint
            if trained and (step % cfg.save_every == 0 or is_end or stopping):
                started = time.perf_counter()
                checkpoint.save(step, model, optimizer, run, metadata)
                if world.rank == 0:
                    bar.write(f"saved {checkpoint.newest(run.out_dir)} in "
                              f"{time.perf_counter() - started:.1f} s", file=sys.stdout)
                    checkpoint.delete_old(run)
            if step == run.steps or stopping:
                return step

            # one more step; the batch after it is read in the background meanwhile
            started = time.perf_counter()
            rows, learned, x, y = prefetched.result()
            if step + 1 < run.steps:
                prefetched = prefetcher.submit(read_step, step + 1)
            if not learned:
                bar.write(f"step {step + 1} is skipped: in its {len(rows)} windows, the first of "
                          f"them {rows[0]}, nothing is to be learned", file=sys.stdout)
                record = {}
                continue
            seen = data.tokens_after(run.stages, step + 1, context)
            lr = lr_at(seen, run.total_tokens, warmup, cfg)
            stage = bisect_left(run.ends, step + 1)
            loss, norm, stopping = train_step(wrapped_model, optimizer, x, y, lr,
                                              run.micro_batches[stage], run.dtype, cfg.grad_clip,
                                              stop_request, learned / world.size)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                sys.exit(1 if world.rank else f"step {step + 1} is not finite: loss {loss}, "
                         f"norm of the gradient {norm}; stopped before the weights moved. "
                         f"Last good checkpoint: {checkpoint.newest(run.out_dir) or 'none yet'}. "
                         "A smaller --learning_rate or more --warmup_steps may help")
            record = {"loss": loss, "lr": lr, "grad_norm": norm, "stage": stage + 1}
            if metrics:
                metrics.record_step(rows, context, time.perf_counter() - started)
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update(len(rows) * context)


class StopRequest:
    """True once Ctrl-C, SIGTERM or the SIGHUP of a closing terminal came, or an Output failed: the
    step is then finished and saved. A second Ctrl-C or SIGTERM ends the program immediately; but
    torchrun passes on each signal it gets, so there repeats mean nothing."""
    received, failure = None, ""               # the last signal; what happened to an Output

    def listen(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:   # by nohup
                signal.signal(number, self)

    def __call__(self, number, frame):
        if {self.received, number} <= {signal.SIGINT, signal.SIGTERM} and "RANK" not in os.environ:
            sys.exit(128 + number)
        self.received = number

    def __bool__(self):
        return bool(self.received or self.failure)


# --------------------------------------------------------------------------------------------------
# From a command line to the loop

def read_recipe(argv):
    """(TrainConfig, stages) of a command line, after every check that needs no data."""
    cfg = load_config(argv, TrainConfig)
    recipes = [Path(arg).stem.removeprefix("config_") for arg in argv if not arg.startswith("--")]
    stages = data.parse_stages(cfg.stages, cfg.context)
    if cfg.data:                           # one's own text with another recipe's stages
        cfg = replace(cfg, data="", stages=[
            {"tokens": stage["tokens"], "batch": stage["batch"], "mixture": parse_mixture(cfg.data)}
            for stage in cfg.stages])
        stages = data.parse_stages(cfg.stages, cfg.context)
    cfg = replace(cfg, out_dir=cfg.out_dir or f"out/{recipes[-1] if recipes else 'run'}")
    if Path(cfg.out_dir).exists() and not Path(cfg.out_dir).is_dir():
        sys.exit(f"out_dir {cfg.out_dir} is a file: name a folder, or what is to become one")
    if cfg.out_dir != cfg.out_dir.encode("utf-8", "replace").decode():
        sys.exit(f"out_dir {cfg.out_dir} is not UTF-8: a checkpoint there could not be read")
    most = (sum(stage.steps * stage.batch for stage in stages) - 1) // stages[0].batch
    if cfg.warmup_steps > most:
        sys.exit(f"warmup_steps {cfg.warmup_steps} must end before the run does: at most {most}, "
                 "in batches of the first stage")
    return cfg, stages


def parse_mixture(text):
    """{"NAME": share} of NAME or NAME:SHARE,NAME:SHARE."""
    mixture = {}
    for part in text.split(","):
        name, _, share = part.partition(":")
        if not name or name in mixture:
            sys.exit(f"--data={text} leaves out a name, or gives {name!r} twice")
        try:
            mixture[name] = float(share or 1)
        except ValueError:
            sys.exit(f"--data={text}: {share!r} is not a number; give NAME or "
                     "NAME:SHARE,NAME:SHARE")
    return mixture


def build(run, model, start):
    """(the wrapped model, optimizer), with the weights and moments with which the run begins."""
    cfg = run.cfg
    wrapped_model = parallel.parallelize(model, run.world, run.strategy, run.dtype, run.compiled,
                                         cfg.activation_checkpointing, run.recompute)
    optimizer = build_optimizer(model, cfg)
    if start.checkpoint:
        print(f"{'continuing' if start.resuming else 'forking'} from {start.checkpoint}")
        checkpoint.load(start.checkpoint, model, optimizer)
    elif cfg.init_from:
        print(f"starting from the weights in {cfg.init_from}")
        model.load_tensors(Path(cfg.init_from), parallel.local_shard)
    else:
        parallel.init_weights(model, cfg.seed)
    return wrapped_model, optimizer


def main(argv):
    cfg, stages = read_recipe(argv)
    if cfg.plan:
        return print_plan(cfg, stages, lr_at)
    # under torchrun, install handlers only when training starts: a rank that is blocked in a
    # collective cannot react
    stop_request = StopRequest()
    if "RANK" not in os.environ:
        stop_request.listen()
    disable_malloc_trim()
    world = parallel.init_distributed()
    # rank 0 speaks for all
    sys.stdout = open(os.devnull, "w") if world.rank else Output(sys.stdout, stop_request)
    run, model = resolve(cfg, stages, world)
    with checkpoint.lock_run(run):
        start = broadcast_from_rank0(world, lambda: checkpoint.find_start(run))
        if start.step == run.steps:
            print(f"{start.checkpoint} is the end of this recipe, all {run.steps} steps are done: "
                  f"python sample.py {start.checkpoint}")
            return
        try:
            wrapped_model, optimizer = build(run, model, start)
            stop_request.listen()
            last = train(run, start, model, wrapped_model, optimizer, stop_request)
        except torch.OutOfMemoryError as error:
            sys.exit(f"out of memory. {format_memory(run, model, failed=True)}. "
                     f"({str(error).splitlines()[0]})")
        path = checkpoint.newest(run.out_dir)
        end = f"{path} is the end of the run" if last == run.steps else (
            f"stopped after step {last}; the same command continues from {path}")
        print(stop_request.failure + end, file=sys.stderr if stop_request.failure else sys.stdout)


if __name__ == "__main__":
    run_program(main)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)      # DDP keeps threads of the group alive, which may abort an exiting process
