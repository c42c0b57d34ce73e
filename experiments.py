"""What each choice of the recipe brings, in miniature: python experiments.py [NAME ...]

The paper says what was done, and hardly what each choice brought. With the demo's model anyone can
ask. Each experiment trains variants with three seeds (of weights and order of the data), and prints
bits per byte of held-out code and prose, mean and standard deviation, then those of the differences
from the first row, "not told apart" where chance may have made them. docs/log.md has the tables.

    python experiments.py mixture     or recipe, or epochs; by default all: 90 minutes on two cores
    rm -r out/experiments             to start over: what is done is not done again
"""
import argparse
import os
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import torch

import config_demo
import model
import train
from checkpoint import git_commit
from data import Source, parse_stages, require, stage_ends
from files import read_json, remove, run_program, write_json
from plot import new_figure, plot_dots, read_metrics
from train import build_optimizer, lr_at

CODE, PROSE, SEEDS = "demo-code", "demo-prose", ("1", "2", "3")
NAMES = ["recipe", "mixture", "epochs"]


def find_variants(experiment, tokens):
    """{variant: (stages, change)}, of so many tokens each ("epochs" 0.72 times: there is no more
    code). A change is () or (object, attribute, value), to be set before training."""
    scale = tokens / sum(stage["tokens"] for stage in config_demo.stages)
    three = [stage | {key: round(stage[key] * scale) for key in ("tokens", "ramp") if key in stage}
             for stage in config_demo.stages]
    batch, few = three[0]["batch"], round(0.72 * tokens)
    constant = [stage | {"tokens": -(-stage["tokens"] // stage["batch"]) * stage["batch"],
                         "batch": batch} for stage in three]    # the total decides all rates

    def one_stage(code, prose, tokens=tokens):
        return [{"tokens": tokens, "batch": batch, "mixture": {CODE: code, PROSE: prose}}]

    return {
        "recipe": {
            "three stages": (three, ()),
            "one stage": (one_stage(1, 2), ()),              # the shares that three stages come to
            "no ramp": ([stage | {"ramp": 0} for stage in three], ()),
            "no cooldown": (constant, ()),
            "lower rate, no cooldown": (constant, (train, "lr_at", lower_last_rate)),
            "no decay of norms": (three, (train, "build_optimizer", exempt_norms)),
            "PyTorch's init": (three, (model.Llama, "init_parameter", pytorch_init)),
            "linear decay": (three, (train, "lr_at", decay_linearly)),
            "Muon": (three, (train, "build_optimizer", build_muon))},
        "mixture": {f"{p}% code": (one_stage(p, 100 - p), ()) for p in (0, 10, 30, 50, 70)},
        "epochs": {f"{n} x {few / n / 1e6:.2f}M tokens": (one_stage(1, 0, few), (
            train.data, "Source", partial(every_nth, n=n, most=few // config_demo.context)))
                   for n in (1, 2, 3, 8)}}[experiment]


def lower_last_rate(tokens, total, warmup, cfg):
    """A quarter of the learning rate in the last stage, in place of four times the batch."""
    is_last = tokens > total - cfg.stages[-1]["tokens"]
    return lr_at(tokens, total, warmup, cfg) / (4 if is_last else 1)


def decay_linearly(tokens, total, warmup, cfg):
    """WSD (arXiv 2404.06395): the highest rate, then for the last fifth a line down to min_lr."""
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
    """Muon for the matrices of the blocks (Jordan et al. 2024): the mean of the gradients, with all
    singular values about 1, at the size of AdamW's updates (arXiv 2502.16982); else AdamW."""
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
    p.fill_(1.0)
    if p.ndim == 2:
        torch.nn.init.kaiming_uniform_(p, a=5 ** 0.5)
    if name == "embed.weight":
        p.normal_()


def every_nth(folder, split, context, n, most):
    """A Source. Of `most` windows of code it has every nth, to be read n times instead of once."""
    source = Source(folder, split, context)
    if (split, source.name) == ("train", CODE):
        require(source.windows >= most, f"{folder} has less than {most} windows: fewer --tokens")
        window, source.windows = source.window, most // n
        source.window = lambda i: window(i * n)
    return source


def run_variant(experiment, variant, tokens, seed):
    """Trains a variant with one seed, in a process of its own, and returns what it came to."""
    started, (stages, change) = time.perf_counter(), find_variants(experiment, tokens)[variant]
    folder = Path(f"out/experiments/{tokens}/{variant.replace(' ', '_')}-{seed}")
    torch.set_num_threads(1)
    if change:
        setattr(*change)
    remove(folder)
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
        train.main(["config_demo.py", f"--stages={stages}", f"--seed={seed}",
                    f"--out_dir={folder}", "--eval_every=1000000", "--save_every=1000000"])
    last_step = stage_ends(parse_stages(stages, config_demo.context))[-1]
    if not (folder / f"step_{last_step:08d}").exists():    # stopped: the pool must begin no other
        os._exit(130)
    return {"stages": stages, "bits_per_byte": read_metrics(folder)[-1]["bits_per_byte"],
            "commit": git_commit(), "minutes": (time.perf_counter() - started) / 60}


def run_experiment(experiment, args):
    """{variant: {seed: result}}, after the runs that results.json does not have yet."""
    path = Path(f"out/experiments/{args.tokens}/results.json")
    results = read_json(path) if path.exists() else {}
    variants = find_variants(experiment, args.tokens)
    missing = [(experiment, variant, args.tokens, seed) for variant, (stages, _) in variants.items()
               for seed in SEEDS
               if results.setdefault(variant, {}).get(seed, {}).get("stages") != stages]
    with ProcessPoolExecutor(args.jobs, max_tasks_per_child=1) as pool:
        for (_, variant, _, seed), run in zip(missing, pool.map(run_variant, *zip(*missing))):
            results[variant][seed] = run
            write_json(path, results)
            print(f"{variant}, seed {seed}: {run['minutes']:.1f} minutes")
    return {variant: results[variant] for variant in variants}


def read_bits(results):
    """{source: {variant: bits per byte of its runs}} of {variant: {seed: result}}."""
    return {source: {variant: [runs[seed]["bits_per_byte"][source] for seed in SEEDS]
                     for variant, runs in results.items()} for source in (CODE, PROSE)}


def format_table(results):
    """Markdown of {variant: {seed: result}}. 4.30: Student's t, three seeds, two-sided, 5 %."""
    rows = ["| | code | - first row | prose | - first row | minutes | commit |", "|---" * 7 + "|"]
    by_source = read_bits(results).values()
    for variant, runs in results.items():
        cells = [variant]
        for found in by_source:
            first, bits = next(iter(found.values())), found[variant]
            differences = [b - a for a, b in zip(first, bits)]         # of seeds: they begin alike
            mean, spread = fmean(differences), stdev(differences)
            note = "" if abs(mean) > 4.30 * spread / 3 ** 0.5 else ", not told apart"
            cells += [f"{fmean(bits):.3f} ± {stdev(bits):.3f}",
                      f"{mean:+.3f} ± {spread:.3f}{note}" if bits is not first else ""]
        minutes = sum(runs[seed]["minutes"] for seed in SEEDS)
        rows.append(f"| {' | '.join(cells)} | {minutes:.0f} | {runs['1']['commit']} |")
    return "\n".join(rows)


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--tokens", type=int, default=3_200_000, help="of a run (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (%(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.tokens < 60_000 or not set(args.names) <= set(NAMES):
        parser.error(f"needed: names of {NAMES}, --jobs of at least 1, --tokens of at least 60000")
    return args


def main(argv):
    args = parse_args(argv)
    new_figure()                                            # without matplotlib it ends here
    for name in args.names or NAMES:
        results = run_experiment(name, args)
        print(f"\n{name}\n\n{format_table(results)}\n")
        plot_dots(read_bits(results), f"out/experiments/{args.tokens}/{name}.png")


if __name__ == "__main__":
    run_program(main)
