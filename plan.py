"""From a recipe to a run: everything that is decided before the first step.

`resolve` decides for train.py. `print_plan` says what a recipe will do, without doing it: `python
train.py RECIPE.py --plan` prints steps, tokens and epochs, checkpoints, FLOPs and hours, by
arithmetic alone. The data may be missing, and so may the checkpoint to fork from. What is there is
refused as training would refuse it.
"""
import sys
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import torch

import checkpoint
import data
import parallel
from device import choose_compile, device_memory, device_name, find_dtype, format_bytes
from files import read_json
from model import Llama, ModelConfig, attention_backend


@dataclass(frozen=True)
class Run:
    """A recipe with everything decided."""
    cfg: object                  # a train.TrainConfig
    stages: list                 # of data.Stage
    train: dict                  # {name: Source}
    val: dict
    world: parallel.World
    strategy: str
    dtype: torch.dtype
    compiled: bool
    recompute: bool              # in the backward pass, see parallel.choose_recompute
    micro_batches: list          # sequences per micro-batch, for each stage

    @property
    def out_dir(self):
        return Path(self.cfg.out_dir)

    @property
    def ends(self):
        return data.stage_ends(self.stages)

    @property
    def steps(self):
        return self.ends[-1]

    @property
    def total_tokens(self):
        return data.tokens_after(self.stages, self.steps, self.cfg.context)

    def numerics(self):
        """What decides rounding, for state.json."""
        return {"device": self.world.device.type, "dtype": str(self.dtype).removeprefix("torch."),
                "compile": self.compiled, "recompute": self.recompute,
                "micro_batch": self.micro_batches, "processes": self.world.size,
                "strategy": self.strategy}


def open_sources(data_dir, names, context):
    """({name: training Source}, {name: validation Source}, of those that have one), checked against
    each other."""
    train, val = ({name: data.Source(Path(data_dir) / name, split, context) for name in names}
                  for split in ("train", "val"))
    for name, source in train.items():
        data.require(source.windows, f"the source {name} has {source.header.tokens} tokens, less "
                     f"than one window of context + 1 = {context + 1}: give it more text, or "
                     "--context a smaller value")
        ours, first = (s.header.tokenizer_sha256 for s in (source, train[names[0]]))
        data.require(ours == first, f"the sources {names[0]} and {name} were written with "
                     f"different tokenizers ({first[:12]} and {ours[:12]}): tokenize both with one")
    return train, {name: source for name, source in val.items() if source.windows}


def resolve(cfg, stages, world):
    """(the Run, its model on the meta device). Rank 0 decides for all, as others might find other
    hardware, and prints what it decided, and why."""
    sources, val = open_sources(cfg.data_dir, data.source_names(stages), cfg.context)
    cfg = fill_vocab_size(cfg, sources)
    with torch.device("meta"):
        model = Llama(cfg)
    parameters, flops = sum(p.numel() for p in model.parameters()), model.flops_per_token()

    def decide():
        strategy, why_strategy = parallel.choose_strategy(cfg.strategy, world, parameters,
                                                          device_memory(world.device))
        dtype, why_dtype = find_dtype(world.device, cfg.dtype)
        compiled, why_compiled = choose_training_compile(
            cfg, world.device, flops * data.tokens_after(stages, inf, cfg.context))
        micro = [parallel.split_batch(stage.batch, world.size, cfg.micro_batch)[0]
                 for stage in stages]
        recompute = parallel.choose_recompute(model, cfg, parallel.shard_count(world, strategy),
                                              max(micro), dtype, world.device, compiled)
        backend, why_backend = attention_backend(world.device, dtype, cfg.head_dim)
        print(f"commit {checkpoint.git_commit()}, torch {torch.__version__}, "
              f"{device_name(world.device)}")
        print(f"{str(dtype).removeprefix('torch.')}: {why_dtype}; "
              f"{'compiled' if compiled else 'not compiled'}: {why_compiled}; "
              f"attention by {backend}: {why_backend}")
        if world.size > 1:
            print(f"{world.size} processes, {world.local_world_size} per machine; "
                  f"{strategy}: {why_strategy}")
        return strategy, dtype, compiled, recompute, micro

    run = Run(cfg, stages, sources, val, world, *parallel.broadcast_from_rank0(world, decide))
    print(f"{parameters:,} parameters, {flops:,} FLOPs per token")
    processes = f"{world.size} processes x " if world.size > 1 else ""
    for k, (stage, micro) in enumerate(zip(stages, run.micro_batches), 1):
        mixture = ", ".join(f"{name} {float(share):.4g}" for name, share in stage.shares.items())
        print(f"stage {k}: {stage.steps} steps of {stage.batch * cfg.context:,} tokens = "
              f"{processes}{stage.batch // micro // world.size} x {micro} sequences of "
              f"{cfg.context}; {mixture}")
    print(format_memory(run, model))
    for name in sources.keys() - val.keys():
        print(f"{name} has no validation split of a whole window: it trains without one")
    return run, model


def fill_vocab_size(cfg, sources):
    """The config with the vocabulary of its data, unless the recipe gives a larger one."""
    size = max((source.header.vocab_size for source in sources.values()), default=0)
    if 0 < cfg.vocab_size < size:
        sys.exit(f"vocab_size {cfg.vocab_size} is below that of the data, {size}: leave it out, or "
                 "tokenize with another")
    return replace(cfg, vocab_size=cfg.vocab_size or size)


def choose_training_compile(cfg, device, flops):
    """(whether to compile, why) for a run of so many FLOPs. On a CPU compiling takes up to half a
    minute and then wins a tenth to a half in bf16, a twentieth in fp32: it pays in runs of
    minutes."""
    if device.type != "cpu":
        return choose_compile(device, cfg.compile, True, "it pays on a GPU")
    pays = flops >= 2e13 * torch.get_num_threads()
    return choose_compile(device, cfg.compile, pays,
                          "a long run" if pays else "too short a run to repay it")


def format_memory(run, model, failed=False):
    device, micro = run.world.device, max(run.micro_batches)
    state, activations = parallel.estimate_memory(
        model, run.cfg, parallel.shard_count(run.world, run.strategy), micro, run.dtype, device,
        run.compiled, run.recompute)
    text = (f"memory: {format_bytes(state)} of weights, gradients and moments and at most about "
            f"{format_bytes(activations)} for a micro-batch, of "
            f"{format_bytes(device_memory(device))} per "
            f"{'GPU' if device.type == 'cuda' else 'machine'}")
    text = f"{text}; cheap operations are recomputed" if run.recompute else text
    sharing = 1 if device.type == "cuda" else run.world.local_world_size
    if failed or (state + activations) * sharing > device_memory(device):
        hints = [f"a --micro_batch below {micro}"] if micro > 1 else []
        hints += [] if run.cfg.activation_checkpointing else ["--activation_checkpointing"]
        hints += ["more GPUs with --strategy=fsdp" if device.type == "cuda" else "a smaller model"]
        text += f". Warning: this is too little. What helps: {', '.join(hints)}"
    return text


# --------------------------------------------------------------------------------------------------
# --plan

def plan(cfg, stages, lr_at):
    """What training will do, as a dict. `lr_at` is train.py's learning rate."""
    names, ends = data.source_names(stages), data.stage_ends(stages)
    present = [name for name in names if (Path(cfg.data_dir) / name).is_dir()]
    sources, _ = open_sources(cfg.data_dir, present, cfg.context)
    cfg = fill_vocab_size(cfg, sources)
    cfg, start = find_planned_start(cfg, ends, sources)
    if cfg.init_from and cfg.vocab_size and Path(cfg.init_from).exists():
        checkpoint.check_init(Path(cfg.init_from), cfg, sources)
    with torch.device("meta"):
        model = Llama(replace(cfg, vocab_size=cfg.vocab_size or ModelConfig.vocab_size))
        tinyllama = Llama(ModelConfig())
    flops, parameters = model.flops_per_token(), sum(p.numel() for p in model.parameters())
    seen = [data.tokens_after(stages, step, cfg.context) for step in (start, *ends)]
    warmup = cfg.warmup_steps * stages[0].batch * cfg.context
    given = [data.sequences_per_source(stage, stage.steps * stage.batch) for stage in stages]
    saved = [step for step in range(start + 1, ends[-1] + 1)
             if step % cfg.save_every == 0 or step in ends]
    return {
        "vocab_size": cfg.vocab_size, "parameters": parameters, "flops_per_token": flops,
        "start": start, "ends": ends, "tokens": seen[-1] - seen[0],
        "lr": [lr_at(tokens, seen[-1], warmup, cfg) for tokens in seen[1:]],
        "micro_batches": [parallel.split_batch(stage.batch, cfg.gpus, cfg.micro_batch)
                          for stage in stages],
        "given": {name: [count.get(name, 0) * cfg.context for count in given] for name in names},
        "epochs": {name: sum(count.get(name, 0) for count in given) / source.windows
                   for name, source in sources.items()},
        "saved": saved, "kept": checkpoint.checkpoints_to_keep(saved, cfg, ends),
        "checkpoint_bytes": 12 * parameters,           # weights and two moments, in fp32
        # another shape at the FLOP/s of 24,000 tokens/s of TinyLlama, of one A100-40G
        # (arXiv 2401.02385v2, section 2.3)
        "paper_rate": 24_000 * tinyllama.flops_per_token() / flops}


def find_planned_start(cfg, ends, sources):
    """(the config, with the vocabulary of the checkpoint it forks from where there is no data, the
    step at which the run will begin)"""
    if not cfg.fork_from:
        return cfg, 0
    path = Path(cfg.fork_from)
    if (path / "training/state.json").exists():
        state = read_json(path / "training/state.json")
        cfg = replace(cfg, vocab_size=cfg.vocab_size or state["recipe"]["vocab_size"])
        checkpoint.check_fork(path, state, cfg, state["sources"]
                              | checkpoint.dataset_fingerprints(sources))
        return cfg, state["step"]
    steps = {f"step_{end:08d}": end for end in ends}
    if path.name not in steps:
        sys.exit(f"fork_from {path} is not at the end of a stage of this recipe: "
                 f"these are {', '.join(steps)}")
    return cfg, steps[path.name]


def print_plan(cfg, stages, lr_at):
    found = plan(cfg, stages, lr_at)
    note = "" if found["vocab_size"] else (f", with a vocabulary of {ModelConfig.vocab_size:,} "
                                           "until the data exist")
    print(f"{found['parameters']:,} parameters, {found['flops_per_token']:,} FLOPs per token{note}")

    rows = [("stage", "steps", "tokens", "per step", "made of", "ends at step", "learning rate")]
    for k, (stage, end, lr, (micro, count)) in enumerate(zip(
            stages, found["ends"], found["lr"], found["micro_batches"]), 1):
        batch = stage.batch * cfg.context
        rows.append((f"{k}, where it forks" if end == found["start"] else f"{k}",
                     f"{stage.steps:,}", f"{stage.steps * batch:,}", f"{batch:,}",
                     f"{cfg.gpus} x {count} x {micro} x {cfg.context}", f"{end:,}", f"{lr:.2e}"))
    rows.append(("", f"{found['ends'][-1]:,}",
                 f"{data.tokens_after(stages, inf, cfg.context):,}", "", "", "", ""))
    print_columns(rows)
    print("(per step = GPUs x accumulation x micro-batch x context; the learning rate is the last "
          f"step's, and {cfg.learning_rate:.2e} after {cfg.warmup_steps:,} steps)")

    rows = [("tokens of", *(f"stage {k}" for k in range(1, len(stages) + 1)), "in all", "epochs")]
    for name, given in found["given"].items():
        rows.append((name, *(f"{n:,}" for n in given), f"{sum(given):,}",
                     f"{found['epochs'][name]:.2f}" if name in found["epochs"] else "no data yet"))
    print_columns(rows)
    for k, stage in enumerate(stages, 1):
        if stage.ramp:
            print(f"stage {k} comes to its mixture by a ramp of "
                  f"{float(stage.ramp * cfg.context):,.0f} tokens")

    size, stay = found["checkpoint_bytes"], len(found["kept"])
    print(f"\ncheckpoints: {len(found['saved']):,} of {format_bytes(size)} are written, {stay:,} "
          f"stay; {format_bytes((stay + 1) * size)} of disk, with one being written")
    print(f"compute: {found['tokens']:,} tokens to train on, "
          f"{found['tokens'] * found['flops_per_token']:.3g} FLOPs")
    for rate, whose in ((found["paper_rate"], "at the MFU of the paper's A100"),
                        (cfg.tokens_per_second, "as given")):
        if rate:
            seconds = found["tokens"] / rate
            hours = f"{seconds / 3600:,.0f}" if seconds > 36_000 else f"{seconds / 3600:.2g}"
            print(f"time: {hours} GPU-hours, {format_duration(seconds / cfg.gpus)} on {cfg.gpus}, "
                  f"at {rate:,.0f} tokens/s each = "
                  f"{rate * found['flops_per_token'] / 1e12:,.3g} TFLOP/s, {whose}")


def print_columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]).rstrip())


def format_duration(seconds):
    for unit, length in ("days", 86_400), ("hours", 3600), ("minutes", 60):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} seconds"
