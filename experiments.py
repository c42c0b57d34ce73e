"""What each choice of the recipe brings, in miniature: python experiments.py [NAME ...]

The paper says what was done, and hardly what each choice brought. With the demo's model anyone can
ask. Each experiment trains variants that differ in one choice, with three seeds (of the initial
weights and the order of the data), and prints a table of bits per byte of held-out code and prose:
mean and standard deviation, and the difference from the first row, or "not told apart" where seeds
alone differ as much. docs/log.md has the tables and says what they mean.

    python experiments.py mixture     stages, mixture, epochs or details, after prepare.py demo
    python experiments.py             all four: an hour and a half on two cores

A run is train.py's own, in a process with one thread, and as many run at a time as there are cores.
Their results are kept in results.json, so what is done is not done again.
"""
import argparse
import math
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean, stdev, variance

import torch

import config_demo
import data
import model
import train
from checkpoint import git_commit
from data import Source
from files import read_json, remove, run_program, write_json
from plot import plot_dots, read_metrics
from train import build_optimizer, lr_at

CODE, PROSE = "demo-code", "demo-prose"


def find_experiments(tokens):
    """{experiment: {variant: (stages, change)}}. A variant has about so many tokens ("epochs" 0.72
    times as many: the code that there is). A change is () or (object, attribute, value), to be set
    before training. The first variant is what the others are compared with."""
    scale = tokens / sum(stage["tokens"] for stage in config_demo.stages)
    three = [stage | {key: round(stage[key] * scale) for key in ("tokens", "ramp") if key in stage}
             for stage in config_demo.stages]
    batch, few = three[0]["batch"], round(0.72 * tokens)
    constant, total = [stage | {"batch": batch} for stage in three], Counter()
    for stage in data.parse_stages(constant, config_demo.context):
        total.update(data.sequences_per_source(stage, stage.steps * stage.batch))

    def one_stage(code, prose, tokens=tokens):
        return [{"tokens": tokens, "batch": batch, "mixture": {CODE: code, PROSE: prose}}]

    def repeated(epochs):
        return data, "Source", partial(every_nth, n=epochs, most=few // config_demo.context)

    lowered = partial(lower_rate_at_the_end, last=three[-1]["tokens"])
    return {
        "stages": {
            "three stages": (three, ()),
            "one stage": (one_stage(total[CODE], total[PROSE]), ()),
            "no ramp": ([stage | {"ramp": 0} for stage in three], ()),
            "no cooldown": (constant, ()),
            "lower rate, no cooldown": (constant, (train, "lr_at", lowered))},
        "mixture": {f"{p}% code": (one_stage(p, 100 - p), ()) for p in (0, 10, 30, 50, 70)},
        "epochs": {f"{n} x {few / n / 1e6:.2f}M tokens": (one_stage(1, 0, few), repeated(n))
                   for n in (1, 2, 3, 8)},
        "details": {
            "three stages": (three, ()),
            "no decay of norms": (three, (train, "build_optimizer", exempt_norms)),
            "PyTorch's init": (three, (model.Llama, "init_parameter", pytorch_init)),
            "linear decay": (three, (train, "lr_at", decay_linearly)),
            "Muon": (three, (train, "build_optimizer", build_muon))}}


# --------------------------------------------------------------------------------------------------
# What variants change

def lower_rate_at_the_end(tokens, total, warmup, cfg, last):
    """A quarter of the learning rate for the last tokens, in place of four times the batch."""
    return lr_at(tokens, total, warmup, cfg) / (4 if tokens > total - last else 1)


def decay_linearly(tokens, total, warmup, cfg):
    """WSD, warm-up, stable, decay (arXiv 2404.06395): the highest rate, then for the last fifth of
    the tokens a straight line down to min_lr."""
    left = min(1, (total - tokens) / (total / 5))
    return min(1, tokens / warmup) * (cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr))


def exempt_norms(model, cfg):
    """AdamW without weight decay of the norms' weights."""
    optimizer = build_optimizer(model, cfg)
    weights = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = [p for p in weights if p.ndim > 1]
    optimizer.add_param_group({"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0})
    return optimizer


def build_muon(model, cfg):
    """Muon for the matrices of the blocks: the mean of the gradients, all its singular values made
    about 1 (Jordan et al. 2024). Scaled to the size of AdamW's updates, it takes AdamW's learning
    rate and decay (arXiv 2502.16982). AdamW moves the other weights."""
    def step(adamw, args, kwargs):
        muon.param_groups[0]["lr"] = adamw.param_groups[0]["lr"]
        muon.step()
        muon.zero_grad()                      # AdamW leaves alone what has no gradient
    muon = torch.optim.Muon([p for p in model.blocks.parameters() if p.ndim == 2],
                            weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
    optimizer = build_optimizer(model, cfg)
    optimizer.register_step_pre_hook(step)
    return optimizer


def pytorch_init(self, name, p):
    """What nn.Linear and nn.Embedding do by themselves, with which by all signs v1.0 began."""
    if p.ndim == 1:
        p.fill_(1.0)
    elif name == "embed.weight":
        p.normal_()
    else:
        p.uniform_(-p.shape[1] ** -0.5, p.shape[1] ** -0.5)


def every_nth(folder, split, context, n, most):
    """A Source with every nth of at most `most` windows, to be read n times instead of once."""
    source = Source(folder, split, context)
    if split == "train":
        window, source.windows = source.window, min(source.windows, most) // n
        source.window = lambda i: window(i * n)
    return source


# --------------------------------------------------------------------------------------------------
# Runs and tables

def run_variant(experiment, variant, tokens, seed, folder):
    """Trains a variant with one seed, in a process of its own, and returns what it came to."""
    started, (stages, change) = time.perf_counter(), find_experiments(tokens)[experiment][variant]
    torch.set_num_threads(1)
    if change:
        setattr(*change)
    remove(folder)
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        train.main(["config_demo.py", f"--stages={stages}", f"--seed={seed}",
                    f"--out_dir={folder}", "--eval_every=1000000", "--save_every=1000000"])
    last = read_metrics(folder)[-1]
    if last["step"] < data.stage_ends(data.parse_stages(stages, config_demo.context))[-1]:
        raise KeyboardInterrupt                             # Ctrl-C, of which train.py took care
    return {"stages": stages, "bits_per_byte": last["bits_per_byte"], "commit": git_commit(),
            "minutes": (time.perf_counter() - started) / 60}


def run_experiment(experiment, args, folder):
    """{variant: {seed: result}}, after the runs that results.json does not have yet."""
    variants, runs = find_experiments(args.tokens)[experiment], {}
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    pool = ProcessPoolExecutor(args.jobs, max_tasks_per_child=1)
    try:
        for variant, (stages, _) in variants.items():
            for seed in map(str, range(1, args.seeds + 1)):
                if results.setdefault(variant, {}).get(seed, {}).get("stages") != stages:
                    run = pool.submit(run_variant, experiment, variant, args.tokens, seed,
                                      folder / f"{variant.replace(' ', '_')}-{seed}")
                    runs[run] = variant, seed
        for k, run in enumerate(as_completed(runs), 1):
            variant, seed = runs[run]
            results[variant][seed] = run.result()
            write_json(folder / "results.json", results)
            print(f"run {k} of {len(runs)} is done: {variant}, seed {seed}")
    finally:
        pool.shutdown(cancel_futures=True)
    return {variant: results[variant] for variant in variants}


def read_bits(results, source):
    """{variant: bits per byte of its runs}"""
    return {variant: [run["bits_per_byte"][source] for run in runs.values()]
            for variant, runs in results.items()}


def format_table(results):
    """Markdown of {variant: {seed: result}}, with a line on where that is from."""
    runs = [run for seeds in results.values() for run in seeds.values()]
    lines = [f"Seeds {', '.join(next(iter(results.values())))}; commit "
             f"{', '.join(sorted({str(run['commit']) for run in runs}))}; "
             f"{sum(run['minutes'] for run in runs):.0f} minutes of one core.", "",
             "| | code | | prose | |", "|---|---|---|---|---|"]
    for variant in results:
        cells = [variant]
        for source in CODE, PROSE:
            (first, *_), bits = (found := read_bits(results, source)).values(), found[variant]
            gain = fmean(bits) - fmean(first)
            noise = math.sqrt(variance(bits) / len(bits) + variance(first) / len(first))
            # Student's t for three seeds each: by chance one in twenty would be larger
            apart = "" if abs(gain) > 2.78 * noise else ", not told apart"
            cells += [f"{fmean(bits):.3f} ± {stdev(bits):.3f}",
                      f"{gain:+.3f}{apart}" if bits is not first else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add, names = parser.add_argument, ["stages", "mixture", "epochs", "details"]
    add("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; by default all")
    add("--tokens", type=int, default=3_200_000, help="of each run (%(default)s)")
    add("--seeds", type=int, default=3, help="runs of each variant (%(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (%(default)s)")
    args = parser.parse_args(argv)
    args.names = args.names or names
    if args.seeds < 3 or args.jobs < 1 or args.tokens < 20_000 or not set(args.names) <= set(names):
        parser.error(f"names are {', '.join(names)}; at least 3 seeds, 1 job, 20,000 tokens")
    return args


def main(argv):
    args = parse_args(argv)
    folder = Path(f"out/experiments/{args.tokens}")
    for name in args.names:
        results = run_experiment(name, args, folder)
        plot_dots({source: read_bits(results, source) for source in (CODE, PROSE)},
                  folder / f"{name}.png")
        print(f"\n{name}\n\n{format_table(results)}\n")


if __name__ == "__main__":
    run_program(main)
