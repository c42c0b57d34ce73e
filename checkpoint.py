"""Checkpoints: what a run leaves on disk, and where a run begins.

A checkpoint is a Hugging Face folder, with what training needs besides the model in training/:

    out/demo/step_00001345/
        config.json, model.safetensors, tokenizer.model, ...    what sample.py and others read
        training/optimizer.safetensors                          Adam's two moments
        training/state.json           recipe, step, versions, and the SHA-256 of every other file

It is written under a temporary name and then renamed. A run killed in the middle of a save leaves a
folder *.tmp, which the next start removes, and the checkpoints before it are untouched.

A run continues from its own newest checkpoint. Or it forks: it starts from a checkpoint that
another recipe wrote at the end of a stage, if the two have the same lineage up to there. That is
everything that weights and moments depend on.
"""
import os
import shutil
import socket
import subprocess
import sys
import time
from bisect import bisect_left
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import parse_stages, source_names, stage_ends, tokens_after
from files import InputError, atomic_write, read_json, remove, sha256_file, write_json
from hf import checkpoints, hf_name, newest, read_config, safetensors_files
from model import ModelConfig
from parallel import broadcast_from_rank0, full_tensor, local_shard

# --------------------------------------------------------------------------------------------------
# Save and load

def save(step, model, optimizer, run, metadata):
    """Writes out_dir/step_00000000/, whole or not at all. All processes gather one tensor after the
    other, and rank 0 writes."""
    weights, moments = {}, {}
    for name, p in model.named_parameters():
        for key, value in {"": p, **optimizer.state[p]}.items():
            value = full_tensor(value.detach())
            if run.world.rank == 0 and key:
                moments[f"{hf_name(name)}.{key}"] = value.cpu()
            elif run.world.rank == 0:
                weights[name] = value.cpu()
    state = metadata | {"step": step, "tokens": tokens_after(run.stages, step, run.cfg.context),
                        "time": time.time()}
    broadcast_from_rank0(run.world, lambda: write_checkpoint(run, model, weights, moments, state))


def write_checkpoint(run, model, weights, moments, state):
    path = run.out_dir / f"step_{state['step']:08d}"
    # all have the same tokenizer, but only conversations a chat template
    source = max(run.train.values(), key=lambda source: bool(source.masks))
    try:
        with atomic_write(path) as folder:
            (folder / "training").mkdir(parents=True)
            model.save_pretrained(folder, source.header.bos_id, source.header.eos_id, weights)
            for name in "tokenizer.model", "tokenizer.json", "tokenizer_config.json":
                if (file := Path(run.cfg.data_dir) / source.name / name).exists():
                    shutil.copyfile(file, folder / name)
            save_file(moments, folder / "training/optimizer.safetensors")
            shutil.copymode(folder / "config.json", folder / "training/optimizer.safetensors")
            files = {str(file.relative_to(folder)): {"bytes": file.stat().st_size,
                                                     "sha256": sha256_file(file)}
                     for file in sorted(folder.rglob("*")) if file.is_file()}
            write_json(folder / "training/state.json", state | {"files": files})
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path} could not be saved: {error}. The checkpoints before it are whole; "
                 "the same command continues from the newest")


def load(path, model, optimizer):
    """Reads weights and moments of a checkpoint, each process its own part."""
    model.load_tensors(path, local_shard)
    with safe_open(path / "training/optimizer.safetensors", framework="pt") as file:
        # there are no moments where no step so far had anything to learn
        for name, p in model.named_parameters() if file.keys() else ():
            state = optimizer.state[p]
            state["step"] = file.get_tensor(f"{hf_name(name)}.step").to(p.device)
            for key in "exp_avg", "exp_avg_sq":
                state[key] = torch.empty_like(p, requires_grad=False)
                local, rows = local_shard(state[key])
                local.copy_(file.get_slice(f"{hf_name(name)}.{key}")[rows])


def read_state(path):
    """state.json of a checkpoint, after comparing every file that it names with what is there.
    Raises InputError."""
    state = read_json(path / "training/state.json")
    if (not all(isinstance(state.get(k), dict) for k in ("files", "recipe", "sources", "run"))
            or not {"stages", "context"} <= set(state["recipe"]) or "step" not in state):
        raise InputError(f"{path / 'training/state.json'} is damaged: it lacks what save wrote")
    for name, written in state["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{path} lacks {name}")
        if sha256_file(file) != written["sha256"]:
            raise InputError(f"{file} is damaged: its bytes are not those that were written")
    return state


def checkpoints_to_keep(steps, cfg, ends):
    """Of the steps that have a checkpoint, oldest first, those that keep it: the newest `keep`, the
    ends of stages, and every `keep_every` steps."""
    newest = set(steps[-cfg.keep:])                                          # all where keep is 0
    return [step for step in steps if step in newest or step in ends
            or cfg.keep_every and step % cfg.keep_every == 0]


def delete_old(run):
    found = checkpoints(run.out_dir)
    for step in found.keys() - set(checkpoints_to_keep(list(found), run.cfg, run.ends)):
        remove(found[step])


@contextmanager
def lock_run(run):
    """Keeps other runs out of out_dir while this one writes there, and removes what a killed save
    left. The kernel releases the lock however a process ends. A folder in which nothing was written
    is removed again."""
    is_new, path = not run.out_dir.exists(), run.out_dir / "lock"
    # a killed predecessor may still be dying; a soft lock would outlive it
    lock = FileLock(path, timeout=5, fallback_to_soft=False)

    def acquire():
        run.out_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            sys.exit(f"another run is writing {run.out_dir}: {path.read_text()}; stop it, or take "
                     "another --out_dir")
        except OSError as error:                       # as of a file system that has no locks
            if error.filename:                         # it could not be opened: somebody else's
                raise
            print(f"note: {path} cannot be locked ({error.strerror}): start no other run there")
        with suppress(OSError):                        # what it says is for people only
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}, {time.ctime()}")
        for partial in run.out_dir.glob("*.tmp"):
            remove(partial)

    broadcast_from_rank0(run.world, acquire)
    try:
        yield
    finally:
        if run.world.rank == 0:
            remove(path)
            lock.release()
            if is_new and not any(run.out_dir.iterdir()):
                run.out_dir.rmdir()


# --------------------------------------------------------------------------------------------------
# Where a run begins

@dataclass(frozen=True)
class Start:
    step: int = 0
    checkpoint: Path | None = None     # to read weights and moments from
    resuming: bool = False             # that checkpoint is this run's own
    origin: dict | None = None         # where the weights came from, for state.json


def find_start(run):
    """The Start of a run: its own newest checkpoint, else the one it forks from, else the weights
    of a model, else step 0. Exits where that is damaged, or of another lineage."""
    cfg, own = run.cfg, list(checkpoints(run.out_dir).values())
    sources = dataset_fingerprints(run.train)
    if own:
        path = own[-1]
        try:
            state = read_state(path)
        except InputError as error:
            then = f"continue from {own[-2]}" if own[:-1] else "start over"
            sys.exit(f"{error}\nRemove {path} to {then}")
        check_lineage(state, cfg, sources, inf, f"{path} was trained by another recipe",
                      "Use the same recipe, or another --out_dir")
        warn_numerics_changed(state, run)
        return Start(state["step"], path, True, state.get("origin"))
    if cfg.fork_from:
        path = Path(cfg.fork_from)
        state = read_fork(path)
        check_fork(path, state, cfg, sources)
        warn_numerics_changed(state, run)
        return Start(state["step"], path, False, {
            "fork_from": str(path), "step": state["step"],
            "weights": state["files"]["model.safetensors"]["sha256"]})
    if cfg.init_from:
        path = Path(cfg.init_from)
        check_init(path, cfg, run.train)
        return Start(origin={"init_from": cfg.init_from, "weights": {
            file.name: sha256_file(file) for file in safetensors_files(path)}})
    return Start()


def lineage(recipe, sources, step):
    """{what: value} of everything that determines weights and moments at `step`, the end of a
    stage, or, with infinity, of the whole run. Two runs with equal lineage may continue each
    other."""
    stages = parse_stages(recipe["stages"], recipe["context"])
    done = stages[:bisect_left(stage_ends(stages), step) + 1]
    found = {key: value for key, value in recipe.items() if key != "stages"}
    found |= {f"stage {k}": stage for k, stage in enumerate(done, 1)}
    found |= {f"{key} of {name}": value for name in source_names(done)
              for key, value in sources.get(name, {}).items()}
    # the learning rate follows from the tokens of all stages, those to come included
    found["tokens of the learning-rate curve"] = tokens_after(stages, inf, recipe["context"])
    return found


def check_lineage(state, cfg, sources, step, what, fix):
    """Exits where a checkpoint's state and a recipe differ in their lineage up to `step`."""
    ours, defaults = cfg.learned(), type(cfg)().learned()
    options = vars(cfg).keys() - ours.keys()
    # a key that is newer than the checkpoint had its default value then
    theirs = defaults | {k: v for k, v in state["recipe"].items() if k not in options}
    lines = diff_lines(lineage(theirs, state["sources"], step), lineage(ours, sources, step))
    if lines:
        sys.exit("\n".join([f"{what}:", *lines, fix]))


def check_fork(path, state, cfg, sources):
    """Exits unless a recipe could have written this checkpoint, at the end of one of its stages."""
    ends = stage_ends(parse_stages(state["recipe"]["stages"], state["recipe"]["context"]))
    if state["step"] not in ends:
        sys.exit(f"{path} was written at step {state['step']}, within a stage: a fork starts where "
                 f"one ends, and that run's end at {', '.join(map(str, ends))}")
    check_lineage(state, cfg, sources, state["step"],
                  f"{path} has a different history than this recipe",
                  "Make these the same; or take only the weights, --init_from")


def read_fork(path):
    """state.json of a checkpoint to fork from. Exits where it is none, or damaged."""
    if not (path / "training/state.json").exists():
        run = path if checkpoints(path) else path.parent
        found = [str(p) for p in checkpoints(run).values()
                 if (p / "training/state.json").exists()]
        sys.exit(f"fork_from {path} is no checkpoint. Name one at the end of a stage, of "
                 f"{', '.join(found) or 'a run that you train up to it first'}; for the weights "
                 "of a model only: --init_from")
    try:
        return read_state(path)
    except InputError as error:
        sys.exit(f"fork_from {error}: restore it, or train up to it again")


def check_init(path, cfg, sources):
    """Exits where the weights in a folder are of another shape or tokenizer than the recipe's."""
    if not (path / "config.json").exists():
        hint = "A model from the hub has to be downloaded first"
        if checkpoints(path):
            hint = f"It is a run: name a checkpoint, such as {newest(path)}"
        elif path.name.startswith("step_"):
            hint = f"Train up to it first; {path.parent} has {newest(path.parent) or 'none'} so far"
        sys.exit(f"init_from {path} is no folder of a model: it has no config.json. {hint}")
    try:
        theirs = dict(vars(read_config(path, ModelConfig)))
    except InputError as error:
        sys.exit(f"init_from {path}: {error}")
    del theirs["context"]                                          # no weight depends on it
    ours = {key: getattr(cfg, key) for key in theirs}
    if (path / "tokenizer.model").exists() and sources:
        theirs["tokenizer"] = sha256_file(path / "tokenizer.model")
        ours["tokenizer"] = next(iter(sources.values())).header.tokenizer_sha256
    lines = sorted(diff_lines(theirs, ours))
    if lines:
        sys.exit("\n".join([f"the weights in {path} are not of this recipe's model:", *lines,
                            "Only weights of the same shape and tokenizer can be taken"]))


def diff_lines(theirs, ours):
    """The entries in which two dicts differ, as lines of text."""
    return [f"  {key}: {theirs.get(key)} there, {ours.get(key)} here"
            for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]


def warn_numerics_changed(state, run):
    before = {"recompute": state["run"].get("compile")} | state["run"]   # before it was a choice
    for key, now in run.numerics().items():
        if before.get(key) != now:
            print(f"note: {key} was {before.get(key)} before and is {now} now: rounding will "
                  "differ")


# --------------------------------------------------------------------------------------------------
# What state.json records

def run_metadata(run, start):
    """The part of state.json that is the same in every checkpoint of a run: its recipe, its data,
    where its weights came from, and what decides its rounding."""
    return {"recipe": vars(run.cfg), "sources": dataset_fingerprints(run.train),
            "run": run.numerics(), "origin": start.origin, "commit": git_commit(),
            "versions": {"python": sys.version.split()[0], "torch": torch.__version__}}


def dataset_fingerprints(sources):
    """Enough of each source to see that another one is not the same."""
    return {name: {"windows": source.windows, "tokenizer": source.header.tokenizer_sha256}
            | source.info for name, source in sources.items()}


@lru_cache      # printed at the start, recorded in each checkpoint: the code that was loaded
def git_commit():
    """The commit of this code, with a + where files differ from it; None outside a checkout."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=+",
               "--exclude=*"]                                      # no names of tags
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None
