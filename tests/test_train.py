"""Proofs of train.py: the schedule, the step, and that a run that was stopped ends as one that
never was."""
import errno
import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_data import random_stages
from test_prepare import AWKWARD, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoint
import device
import metrics
import plan as planning
import train
from checkpoint import checkpoints, warn_numerics_changed
from conversations import Conversation, encode_conversation
from data import IGNORED, Source, parse_stages, sequences, stage_ends, tokens_after
from files import InputError, write_json
from model import Llama
from parallel import World, init_weights, split_batch
from plan import choose_training_compile, fill_vocab_size, open_sources
from prepare import hash_to_unit, train_tokenizer, write_source
from sample import Tokenizer
from tokenizer import Encoder
from train import (
    TrainConfig,
    build_optimizer,
    lr_at,
    parse_mixture,
    read_batch,
    read_recipe,
    train_step,
)

HERE = Path(__file__).parents[1]
RECIPE = """
n_layer, d_model, n_head, n_kv_head, d_ff, context = 2, 32, 4, 2, 48, 16
stages = [{"tokens": 640, "batch": 64, "mixture": {"prose": 1}},
          {"tokens": 1280, "batch": 64, "mixture": {"prose": 0.5, "code": 0.5}, "ramp": 320},
          {"tokens": 640, "batch": 128, "mixture": {"prose": 0.5, "code": 0.5}}]
learning_rate, min_lr, warmup_steps = 1e-2, 1e-3, 3
micro_batch, log_every, eval_every, save_every, keep = 2, 1, 10, 4, 2
dtype = "float32"
"""
STEPS = 10 + 20 + 5
SHORT = "--stages=[{'tokens': 320, 'batch': 64, 'mixture': {'prose': 1}}]"             # five steps


def random_conversations(n):
    """Conversations of 1 to 20 words and answers of 1 to 11."""
    rng = random.Random(0)
    for k in range(n):
        question, answer = (" ".join(rng.choices(TEXT.split(), k=1 + k % most))
                            for most in (20, 11))
        yield Conversation((("user", question), ("assistant", answer)), f"{question} {answer}")


CONVERSATIONS = [*random_conversations(120)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two small sources and a recipe of three stages over them; and a source of
    conversations, whose windows of 16 tokens have none to be learned, or a few, or only such."""
    world = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = TEXT.split()
    texts = [" ".join(rng.choices(words, k=30)) for _ in range(150)]
    model = train_tokenizer([TEXT, *texts], 320)
    for name, part in ("prose", texts[:75]), ("code", texts[75:]):
        write_source(world / "data" / name, part, model, 0.2, "a test")
    write_source(world / "data/chat", CONVERSATIONS, model, 0.2, "a test", chat=True)
    (world / "config_tiny.py").write_text(RECIPE)
    return world


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """run(options...) trains in this process and returns what it printed; its out_dir is
    tmp_path / "out"."""
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.chdir(world)

    def run(*options):
        train.main(["config_tiny.py", f"--out_dir={tmp_path / 'out'}", *options])
        return capsys.readouterr().out

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(checkpoint):
    return {**load_file(checkpoint / "model.safetensors"),
            **load_file(checkpoint / "training/optimizer.safetensors")}


def assert_same_bits(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --------------------------------------------------------------------------------------------------
# Arithmetic

def test_lr_endpoints():
    """The original's minimum was its maximum for the first 0.5T tokens, and its schedule counted
    micro-batches."""
    cfg = TrainConfig(learning_rate=4e-4, min_lr=4e-5, warmup_steps=2)
    total, warmup = 1000, 200
    assert lr_at(100, total, warmup, cfg) == pytest.approx(2e-4)              # the first step moves
    assert lr_at(200, total, warmup, cfg) == 4e-4
    assert lr_at(600, total, warmup, cfg) == pytest.approx(2.2e-4)      # half way down the cosine
    assert lr_at(1000, total, warmup, cfg) == 4e-5
    rates = [lr_at(t, total, warmup, cfg) for t in range(200, 1001, 10)]
    assert rates == sorted(rates, reverse=True) and lr_at(10, total, 0, cfg) < 4e-4


def reference(stages, cfg):
    """[(stage, tokens at its end, learning rate)] of every step, as one would do it by hand."""
    steps = [(k, s["batch"]) for k, s in enumerate(stages, 1)
             for _ in range(math.ceil(s["tokens"] / s["batch"]))]
    total, warmup = sum(batch for _, batch in steps), cfg.warmup_steps * stages[0]["batch"]
    seen, done = 0, []
    for k, batch in steps:
        seen += batch
        cosine = math.cos(math.pi * (seen - warmup) / (total - warmup))
        done.append((k, seen, cfg.learning_rate * seen / warmup if seen < warmup else
                     cfg.min_lr + (cfg.learning_rate - cfg.min_lr) * (1 + cosine) / 2))
    return done


@pytest.mark.parametrize("seed", range(40))
def test_the_schedule_is_the_reference(seed):
    """Where stages meet, off by one is easy and invisible: step, stage and learning rate at any
    token."""
    rng = random.Random(seed)
    raw, T, _ = random_stages(rng)
    stages = parse_stages(raw, T)
    ends, total = stage_ends(stages), tokens_after(stages, math.inf, T)
    cfg = TrainConfig(warmup_steps=rng.randrange(max(1, total // raw[0]["batch"])))
    expected = reference(raw, cfg)
    assert ends[-1] == len(expected) and total == expected[-1][1]
    for step, (stage, seen, lr) in enumerate(expected, 1):
        assert (bisect_left(ends, step) + 1, tokens_after(stages, step, T)) == (stage, seen)
        assert lr_at(seen, total, cfg.warmup_steps * raw[0]["batch"], cfg) == pytest.approx(lr)
    assert lr_at(total, total, cfg.warmup_steps * raw[0]["batch"], cfg) == cfg.min_lr


@pytest.mark.parametrize("seed", range(40))
def test_batches_do_not_depend_on_ranks_or_micro_batch(seed):
    """Ranks that read the same sequences, or none, change the data in silence: whatever their
    number, they and their micro-batches make up the step's batch."""
    rng = random.Random(seed)
    raw, T, windows = random_stages(rng)
    stages = parse_stages(raw, T)
    for step in rng.choices(range(stage_ends(stages)[-1]), k=10):
        rows = sequences(stages, windows, 3407, step)
        for ranks in (r for r in range(1, len(rows) + 1) if len(rows) % r == 0):
            micro, many = split_batch(len(rows), ranks, rng.randint(1, 9))
            parts = [rows[r::ranks][i * micro:(i + 1) * micro]
                     for r in range(ranks) for i in range(many)]
            assert {len(part) for part in parts} == {micro}
            assert sorted(sum(parts, [])) == sorted(rows)


@pytest.mark.parametrize("batch, ranks, limit, expected", [
    (64, 1, 16, (16, 4)), (896, 64, 16, (14, 1)), (896, 1, 16, (16, 56)), (7, 1, 4, (1, 7)),
    (12, 2, 4, (3, 2)), (4, 4, 99, (1, 1))])
def test_accumulation_is_derived(batch, ranks, limit, expected):
    """The original's batch was per node and doubled in silence with two nodes."""
    micro, many = split_batch(batch, ranks, limit)
    assert (micro, many) == expected and micro * many * ranks == batch


def test_a_batch_the_ranks_cannot_divide_is_refused():
    """Ranks with unequal shares would weigh sequences differently."""
    with pytest.raises(SystemExit, match="batch of 896.*among 60 processes; nearest: 56 and 64"):
        split_batch(896, 60, 16)
    with pytest.raises(SystemExit, match="batch of 3.*among 4 processes; nearest: 3"):
        split_batch(3, 4, 16)


def test_mixtures_from_the_command_line():
    """A name given twice would keep one share and lose the other."""
    for text in ",", "a:1,a:2", ":3":
        with pytest.raises(SystemExit, match="leaves out a name, or gives"):
            parse_mixture(text)
    assert parse_mixture("my") == {"my": 1} and parse_mixture("a:0.7,b:0.3") == {"a": 0.7, "b": 0.3}
    with pytest.raises(SystemExit, match="'x' is not a number"):
        parse_mixture("a:x")


def test_choices_are_made_from_recipe_and_machine(monkeypatch):
    """Compiling a short run costs more than it brings; and what the program chose by itself must
    not end in the compiler's errors: Python's headers, or the compiler, may be missing."""
    cpu = torch.device("cpu")
    assert not choose_training_compile(TrainConfig(), cpu, 1e13)[0]
    assert choose_training_compile(TrainConfig(compile=False), cpu, 1e20) == (False, "as asked")
    monkeypatch.setattr(device, "compile_error", lambda device: None)
    assert choose_training_compile(TrainConfig(compile=True), cpu, 1)[0]
    assert choose_training_compile(TrainConfig(), cpu, 1e20) == (True, "a long run")
    assert choose_training_compile(TrainConfig(), torch.device("cuda"), 1)[0]
    monkeypatch.setattr(device, "compile_error", lambda device: "no Python.h")
    assert choose_training_compile(TrainConfig(), cpu, 1e20) == (False, "no Python.h")
    assert choose_training_compile(TrainConfig(), torch.device("cuda"), 1) == (False, "no Python.h")
    with pytest.raises(SystemExit, match="does not work here: no Python.h.*--compile=False"):
        choose_training_compile(TrainConfig(compile=True), cpu, 1)


# --------------------------------------------------------------------------------------------------
# The step

def setup(world, **changes):
    cfg, stages = read_recipe([
        str(world / "config_tiny.py"), f"--data_dir={world / 'data'}",
        *(f"--{key}={value}" for key, value in changes.items())])
    sources, _ = open_sources(cfg.data_dir, ["code", "prose"], cfg.context)
    cfg = fill_vocab_size(cfg, sources)
    torch.manual_seed(0)
    model = Llama(cfg).init_weights()
    return cfg, stages, sources, model, build_optimizer(model, cfg)


def step_of(world, micro, dtype=torch.float32, **changes):
    """Losses, norms and weights after ten steps in micro-batches of `micro`."""
    cfg, stages, sources, model, optimizer = setup(world, **changes)
    windows, found = {name: source.windows for name, source in sources.items()}, []
    for step in range(10):
        x, y = read_batch(sources, sequences(stages, windows, cfg.seed, step), torch.device("cpu"))
        found.append(train_step(model, optimizer, x, y, 1e-2, micro, dtype, cfg.grad_clip)[:2])
    return torch.tensor(found), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro", [1, 2])
def test_accumulation_equals_the_big_batch(world, micro):
    """A mean of means with the wrong divisor changes the learning rate, and clipping each
    micro-batch the gradient."""
    (losses, weights), (expected, same) = step_of(world, micro), step_of(world, 4)
    assert torch.allclose(losses, expected, rtol=1e-4)
    # Adam divides rounding by small second moments
    assert (weights - same).norm() < 1e-3 * same.norm()


def test_bf16_follows_fp32(world):
    """Weights rounded to bf16, or a loss computed in it, would drift away within a few steps."""
    (losses, _), (expected, _) = step_of(world, 4, torch.bfloat16), step_of(world, 4)
    assert (losses[:, 0] - expected[:, 0]).abs().max() < 0.02


def test_evaluation_does_without_cudnn(world, monkeypatch):
    """cuDNN's attention, PyTorch's first choice on Hopper and Blackwell, has been wrong in silence;
    a validation loss by another kernel than training's would show it."""
    used = []
    cfg, _, _, model, _ = setup(world)
    _, val = open_sources(cfg.data_dir, ["code", "prose"], cfg.context)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *x: used.append(
        torch.backends.cuda.cudnn_sdp_enabled()) or forward(*x))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    train.evaluate(model, SimpleNamespace(val=val, cfg=cfg, dtype=torch.float32,
                                          world=World(torch.device("cpu"))))
    assert used and not any(used) and torch.backends.cuda.cudnn_sdp_enabled() == before


def test_clipping_bounds_the_step(world):
    """The norm that is reported is the one before clipping."""
    losses, _ = step_of(world, 4)
    assert (losses[:, 1] > 0.1).all()
    cfg, stages, sources, model, _ = setup(world)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = read_batch(sources, sequences(stages, {n: s.windows for n, s in sources.items()}, 0, 0),
                      torch.device("cpu"))
    _, norm, _ = train_step(model, torch.optim.SGD(model.parameters()), x, y, 1.0, 4, torch.float32,
                         0.01)
    moved = torch.stack([(p - b).norm() for p, b in zip(model.parameters(), before)]).norm()
    assert norm > 0.1 and moved.item() == pytest.approx(0.01, rel=1e-2)


def test_weights_stay_where_a_loss_is_not_finite(world):
    """One step with NaN and every weight is NaN: nothing is left to save."""
    cfg, stages, sources, model, optimizer = setup(world)
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.zeros(4, 16, dtype=torch.long)
    loss, _, _ = train_step(model, optimizer, x, x, 1.0, 4, torch.float32, 1.0)
    assert not math.isfinite(loss) and all(
        torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_compiled_equals_plain(run, tmp_path):
    """Compiled blocks keep their parameters' names, train to the same loss, and their checkpoint is
    the same folder."""
    run(SHORT, "--compile=True")
    compiled = [r["loss"] for r in records(tmp_path / "out")[1:]]
    names = weights(tmp_path / "out/step_00000005").keys()
    shutil.rmtree(tmp_path / "out")
    run(SHORT, "--compile=False")
    assert [r["loss"] for r in records(tmp_path / "out")[1:]] == pytest.approx(compiled, rel=1e-4)
    assert names == weights(tmp_path / "out/step_00000005").keys()


def test_weights_stay_fp32_under_bf16(run, tmp_path):
    """Weights kept in bf16 lose every update below 1/256 of them, which late in training is all."""
    printed = run(SHORT, "--dtype=bfloat16")
    assert "bfloat16: as asked" in printed
    assert {t.dtype for t in weights(tmp_path / "out/step_00000005").values()} == {torch.float32}


# --------------------------------------------------------------------------------------------------
# Targets that are not learned

def uneven(world):
    """A model and a batch of four windows of conversations: two with nothing to be learned, one
    with a few tokens, one with most of them."""
    _, _, _, model, _ = setup(world)
    source = Source(world / "data/chat", "train", 16)
    order = sorted(range(source.windows), key=lambda i: source.learned(i).sum())
    few = next(i for i in order if 2 <= source.learned(i).sum() <= 4)
    rows = [("chat", i) for i in (order[0], few, order[1], order[-1])]
    x, y = read_batch({"chat": source}, rows, torch.device("cpu"))
    learned = (y != IGNORED).sum(1).tolist()
    assert learned[0] == learned[2] == 0 < 3 * learned[1] < learned[3]
    return model, x, y


def reference_loss(model, x, y):
    """Cross-entropy on whole logits, by PyTorch alone."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_is_a_mean_over_learned_tokens(micro, world):
    """A mean of the means of micro-batches weighs a token in a short answer many times as much as
    one in a long answer; and one micro-batch without any answer makes NaN of all."""
    model, x, y = uneven(world)
    expected, found = reference_loss(model, x, y), []
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    recorder = SimpleNamespace(
        param_groups=[], zero_grad=lambda set_to_none: None,
        step=lambda: found.extend(p.grad.clone() for p in model.parameters()))
    loss, norm, _ = train_step(model, recorder, x, y, 1e-2, micro, torch.float32, math.inf,
                               learned=(y >= 0).sum().item())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.cat([g.flatten() for g in some]) for some in (found, gradients))
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    assert norm == pytest.approx(theirs.norm().item(), rel=1e-5)


def with_masks(source, out, learn):
    """Copies a source, with masks: learn(split, n) are those of the n tokens of a split."""
    shutil.copytree(source, out)
    info = json.loads((out / "source.json").read_text())
    for split in "train", "val":
        mask = np.asarray(learn(split, info[split]["tokens"]), np.uint8)
        mask.tofile(out / f"{split}_00000.mask")
        info[split] |= {"learned_tokens": int(mask.sum()), "learned_bytes": info[split]["bytes"]}
    write_json(out / "source.json", info)


def test_masks_of_ones_change_nothing(run, world, tmp_path):
    """A source of which all is learned is plain text: to the bit, or conversations and text in one
    run would not be weighed alike."""
    with_masks(world / "data/prose", tmp_path / "data/prose", lambda split, n: np.ones(n))
    shutil.copytree(world / "data/code", tmp_path / "data/code")
    for out, data in ("plain", "data"), ("masked", tmp_path / "data"):
        run(SHORT, "--data=prose,code", f"--data_dir={data}", f"--out_dir={tmp_path / out}")
    assert_same_bits(tmp_path / "plain/step_00000005", tmp_path / "masked/step_00000005")
    keys = "loss", "grad_norm", "val_loss", "bits_per_byte"
    plain, masked = ([[r.get(key) for key in keys] for r in records(tmp_path / out)]
                     for out in ("plain", "masked"))
    assert plain == masked


def test_conversations_and_text_in_one_run(run, world, tmp_path):
    """A window of text has 16 targets and one of conversations three: each counts for what it has.
    And without its template nobody knows how to talk to a checkpoint; the first source has none."""
    for name, new in ("prose", "a-text"), ("chat", "z-chat"):
        shutil.copytree(world / "data" / name, tmp_path / "data" / new)
    options = SHORT, "--data=a-text:0.5,z-chat:0.5", f"--data_dir={tmp_path / 'data'}"
    run(*options, "--micro_batch=1")
    cfg, stages = read_recipe(["config_tiny.py", *options])
    sources, _ = open_sources(cfg.data_dir, ["a-text", "z-chat"], cfg.context)
    model = Llama(fill_vocab_size(cfg, sources))
    init_weights(model, cfg.seed)
    rows = sequences(stages, {name: s.windows for name, s in sources.items()}, cfg.seed, 0)
    x, y = read_batch(sources, rows, torch.device("cpu"))
    assert {name for name, _ in rows} == {*sources} and len({*(y >= 0).sum(1).tolist()}) > 2
    lines, folder = records(tmp_path / "out"), tmp_path / "out/step_00000005"
    assert lines[1]["loss"] == pytest.approx(reference_loss(model, x, y).item(), rel=1e-5)
    assert all(lines[-1]["val_loss"][name] < lines[0]["val_loss"][name] for name in sources)
    messages = CONVERSATIONS[5].messages
    ids, _ = encode_conversation(messages, Encoder((folder / "tokenizer.model").read_bytes()))
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], return_dict=False) == ids


def test_evaluation_is_of_answers(world):
    """Nats per token of the questions, or bits per byte of their bytes, are of another text; a mean
    of the means of micro-batches is of none."""
    cfg, _, _, model, _ = setup(world, micro_batch=3)
    _, val = open_sources(cfg.data_dir, ["chat"], cfg.context)
    run = SimpleNamespace(val=val, cfg=cfg, dtype=torch.float32, world=World(torch.device("cpu")))
    losses, bits = train.evaluate(model, run)
    # all of it in one row, from the conversations themselves
    encoder = Encoder((world / "data/chat/tokenizer.model").read_bytes())
    held_out = [conversation.messages for conversation in CONVERSATIONS
                if hash_to_unit(conversation.key.encode()) < 0.2]
    ids, mask = (sum(parts, []) for parts in zip(*(encode_conversation(messages, encoder)
                                                   for messages in held_out)))
    n = (len(ids) - 1) // 16 * 16
    x, y, learned = (torch.tensor(row) for row in (ids[:n], ids[1:n + 1], mask[1:n + 1]))
    y = y.where(learned == 1, IGNORED).view(-1, 16)
    with torch.no_grad():
        expected = reference_loss(model, x.view(-1, 16), y).item()
    assert losses["chat"] == pytest.approx(expected, rel=1e-5)
    size = sum(len(answer.encode()) for _, (_, answer) in held_out)
    assert bits["chat"] == pytest.approx(expected / math.log(2) * sum(mask) / size, rel=1e-5)


@pytest.mark.parametrize("skipped", [1, 3])
def test_a_batch_with_nothing_to_learn_is_skipped(skipped, run, world, tmp_path):
    """Its loss is 0/0, or 0 and then AdamW moves all weights by old moments and weight decay. A run
    that begins with one has no moments to save, nor to continue from."""
    stages = read_recipe(["config_tiny.py", SHORT])[1]
    windows = {"prose": Source(world / "data/prose", "train", 16).windows}
    batch = sequences(stages, windows, TrainConfig.seed, skipped - 1)

    def learn(split, n):
        mask = np.ones(n)
        for _, i in batch if split == "train" else []:
            mask[i * 16 + 1:i * 16 + 17] = 0
        return mask

    with_masks(world / "data/prose", tmp_path / "data/prose", learn)
    options = SHORT, "--save_every=1", "--keep=0", f"--data_dir={tmp_path / 'data'}"
    out, whole = tmp_path / "out", tmp_path / "whole"
    printed = run(*options)
    assert f"step {skipped} is skipped: in its 4 windows, the first of them {batch[0]}" in printed
    assert printed.count("is skipped") == 1
    assert [r["step"] for r in records(out) if "loss" in r] == [
        step for step in range(1, 6) if step != skipped]
    shutil.copytree(out, whole)
    if skipped > 1:
        assert_same_bits(out / f"step_{skipped:08d}", out / f"step_{skipped - 1:08d}")
        assert weights(out / "step_00000005")["model.norm.weight.step"] == 4
    for last in (3, 2) if skipped > 1 else (1,):     # it goes on after it, and it does so over it
        for step, path in checkpoints(out).items():
            if step > last:
                shutil.rmtree(path)
        assert "continuing from" in run(*options)
        assert_same_bits(out / "step_00000005", whole / "step_00000005")


def test_a_damaged_mask_ends_a_run_with_its_name(run, world, tmp_path):
    """It is read in another thread, long after the start."""
    shutil.copytree(world / "data/chat", tmp_path / "data/chat")
    path = tmp_path / "data/chat/train_00000.mask"
    path.write_bytes(path.read_bytes().replace(b"\1", b"\2"))
    with pytest.raises(InputError, match=f"{path}: 2 between tokens"):
        run("--data=chat", f"--data_dir={tmp_path / 'data'}")


# --------------------------------------------------------------------------------------------------
# A run

@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """The out_dir of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = start(world, out)
    assert done.wait(120) == 0, done.stderr.read()
    return out


def start(world, out, *options):
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), "config_tiny.py",
                             f"--out_dir={out}", *options], cwd=world, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def test_a_run_writes_what_it_should(finished):
    """Stage ends are kept for good and evaluated; the learning rate ends at min_lr; every step is
    logged once."""
    lines = records(finished)
    assert [r["step"] for r in lines] == list(range(STEPS + 1))
    assert set(lines[0]) == {"step", "tokens", "val_loss", "bits_per_byte"}
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu",
            "memory", "stage", "mixture"} <= set(lines[1])
    assert [r["stage"] for r in lines[1:]] == [1] * 10 + [2] * 20 + [3] * 5
    assert [r["step"] for r in lines if "val_loss" in r] == [0, 10, 20, 30, 35]
    assert (lines[-1]["lr"] == pytest.approx(1e-3) and lines[-1]["tokens"] == 2560
            and lines[1]["lr"] == pytest.approx(1e-2 / 3))
    assert (set(lines[-1]["val_loss"]) == {"prose", "code"}
            and lines[-1]["val_loss"]["code"] < lines[0]["val_loss"]["code"] - 0.5)
    assert list(checkpoints(finished)) == [10, 30, 32, 35]  # the ends of the stages, and two newest
    state = json.loads((finished / "step_00000035/training/state.json").read_text())
    assert state["step"] == 35 and state["tokens"] == 2560 and state["recipe"]["seed"] == 3407
    files = [path for path in (finished / "step_00000035").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1            # save_file's are private
    assert set(state["sources"]) == {"prose", "code"} and "model.safetensors" in state["files"]


def test_bits_per_byte_are_nats_times_tokens_over_bytes(finished, world):
    """Per token for per byte would make a larger vocabulary look worse."""
    info = json.loads((world / "data/prose/source.json").read_text())["val"]
    last = records(finished)[-1]
    assert last["bits_per_byte"]["prose"] == pytest.approx(
        last["val_loss"]["prose"] / math.log(2) * info["tokens"] / info["bytes"])


def test_a_checkpoint_opens_with_transformers(finished):
    """A folder of ours is a Hugging Face folder: same logits, same ids, so whatever reads those
    reads ours."""
    folder = finished / "step_00000035"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder), Llama.from_pretrained(folder)
    fast, sp = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in [*AWKWARD, TEXT]:
        assert fast.encode(text, add_special_tokens=False) == sp.encode(text)
    idx = torch.tensor([fast.encode("The quick brown fox")])
    with torch.no_grad():
        a, b = theirs(idx).logits, ours(idx)
    assert ((a - b).abs().max() / b.std()).item() < 1e-5
    assert theirs.generation_config.eos_token_id == 2 and theirs.generation_config.bos_token_id == 1
    assert theirs.dtype == torch.float32


def test_a_finished_run_says_so(finished, world):
    """Given again, the command must neither train on nor start over."""
    before = (finished / "metrics.jsonl").read_bytes()
    again = start(world, finished)
    assert again.wait(60) == 0 and "is the end of this recipe" in again.stdout.read()
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_stopped_and_started_again_is_the_same(finished, world, tmp_path):
    """A resume that forgets a moment, a count or its place in the data ends elsewhere: bit for bit
    is the only proof."""
    out, rng = tmp_path / "out", random.Random(5)
    for number in signal.SIGKILL, signal.SIGINT:
        process, seen = start(world, out), len(records(out)) if out.exists() else 0
        while process.poll() is None and (
                not (out / "metrics.jsonl").exists()
                or len((out / "metrics.jsonl").read_text().splitlines()) < seen + 6):
            time.sleep(0.01)
        time.sleep(rng.random() / 20)
        process.send_signal(number)
        process.wait(60)
        assert process.returncode in (
            (-signal.SIGKILL, 0) if number == signal.SIGKILL else (0,)), process.stderr.read()
    (out / "step_00000099.tmp").mkdir()                     # as a save that was killed leaves it
    (out / "metrics.jsonl.77.tmp").touch()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')                                               # and a line
    process = start(world, out)
    assert process.wait(60) == 0, process.stderr.read()
    assert_same_bits(out / "step_00000035", finished / "step_00000035")
    keys = "step", "tokens", "loss", "lr", "grad_norm", "val_loss"
    assert [[r.get(k) for k in keys] for r in records(out)] == [
        [r.get(k) for k in keys] for r in records(finished)]
    assert not list(out.glob("*.tmp"))


def test_a_second_signal_ends_the_program(monkeypatch):
    """A closing terminal hangs up twice, and must not interrupt the save. Under nohup it is ignored
    as before."""
    installed = {}
    monkeypatch.setattr(signal, "signal", installed.__setitem__)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    stop = train.StopRequest()
    stop.listen()
    assert installed == {signal.SIGINT: stop, signal.SIGTERM: stop} and not stop
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    stop.listen()
    for number in signal.SIGHUP, signal.SIGHUP, signal.SIGINT, signal.SIGHUP, signal.SIGTERM:
        installed[number](number, None)
    assert stop
    with pytest.raises(SystemExit) as error:
        stop(signal.SIGINT, None)
    assert error.value.code == 130


@pytest.mark.parametrize("what", ["stdout", "metrics"])
def test_output_that_fails_ends_with_a_save(what, run, tmp_path, monkeypatch, capsys):
    """`python train.py ... | head`, or a log on a full disk, lost all steps since the last save; a
    full disk for metrics.jsonl was named nowhere."""
    if what == "stdout":
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(sys, "stdout", open(write, "w"))
    else:
        monkeypatch.setattr(metrics, "open", lambda *_, **__: open("/dev/full", "w"), raising=False)
    train.main(["config_tiny.py", f"--out_dir={tmp_path / 'out'}"])
    name = {"stdout": r"\d+", "metrics": "/dev/full"}[what]
    assert re.fullmatch(rf"{name} cannot be written \(.*\), stopped after step 1; the same command "
                        rf"continues from {tmp_path}/out/step_00000001\n", capsys.readouterr().err)


def test_what_a_file_system_cannot_do(run, tmp_path, monkeypatch):
    """Without locks (NFS, Lustre), or with a checkpoint that cannot be deleted, a run trains."""
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: "00004" in str(path)
                        or rmtree(path, **how))
    printed = run("--keep=1")
    assert f"note: {tmp_path}/out/lock cannot be locked (No locks available)" in printed
    assert printed.count("cannot be removed") == 1 and "step_00000004 cannot be rem" in printed
    assert list(checkpoints(tmp_path / "out")) == [4, 10, 30, 35]
    assert not (tmp_path / "out/lock").exists()


def test_too_little_memory_is_known_before(run, monkeypatch):
    """In a container the kernel killed the run without a word."""
    for memory, warns in (10 ** 9, False), (10 ** 5, True):
        monkeypatch.setattr(planning, "device_memory", lambda device, memory=memory: memory)
        line = next(line for line in run("--save_every=1000").splitlines() if "memory: " in line)
        assert ("this is too little. What helps: a --micro_batch below 2" in line) == warns


def test_what_rounds_otherwise_is_noted(capsys):
    """A resume on other hardware is not the same to the bit, and one from before a choice existed
    is, where the choice is what was always done."""
    here = {"dtype": "bfloat16", "compile": True, "recompute": True}
    run = SimpleNamespace(numerics=lambda: here)
    warn_numerics_changed({"run": {"dtype": "bfloat16", "compile": True}}, run)
    assert capsys.readouterr().out == ""
    run = SimpleNamespace(numerics=lambda: here | {"recompute": False})
    warn_numerics_changed({"run": here}, run)
    assert "note: recompute was True before and is False now" in capsys.readouterr().out


def test_another_recipe_is_refused(run, finished, tmp_path):
    """Continuing with another learning rate or mixture gives a run that no recipe describes."""
    shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        run("--learning_rate=0.02", "--seed=1")
    assert ("learning_rate: 0.01 there, 0.02 here" in str(error.value)
            and "seed: 3407 there, 1 here" in str(error.value))
    with pytest.raises(SystemExit, match="stage 2: 20 steps of 4 sequences, prose 0.5, code 0.5, "
                                         "with a ramp over 20 sequences there, 20 steps"):
        run("--data=prose")
    shutil.rmtree(tmp_path / "out/step_00000035")
    printed = run("--log_every=3", "--micro_batch=1", "--keep=1")  # these change rounding at most
    assert "micro_batch was [2, 2, 2] before and is [1, 1, 1] now" in printed
    assert records(tmp_path / "out")[-1]["step"] == STEPS


def test_checkpoints_of_other_versions_of_the_code(run, finished, tmp_path):
    """A key that is newer than a checkpoint had its default value then, which must not make it
    another recipe's; but one that this code does not know may have changed what was learned."""
    state_json = tmp_path / "out/step_00000032/training/state.json"
    shutil.copytree(finished / "step_00000032", state_json.parents[1])
    state = json.loads(state_json.read_text())
    write_json(state_json, state | {"recipe": state["recipe"] | {"z_loss": 1e-4}})
    with pytest.raises(SystemExit, match="z_loss: 0.0001 there, None here"):
        run()
    for key in "tie_embeddings", "weight_decay", "plan":
        del state["recipe"][key]
    write_json(state_json, state)
    assert "continuing from" in run()


def test_damaged_checkpoints_are_named(run, finished, tmp_path):
    """Half a file loads as far as it goes in some formats; a flipped bit loads in all of them."""
    out = tmp_path / "out"
    for name, harm, words in [
            ("model.safetensors", lambda b: b[:-8], "damaged"),
            ("config.json", lambda b: b[:9], "damaged"),
            ("training/optimizer.safetensors", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:],
             "its bytes are not those that were written"),
            ("training/state.json", lambda b: b[:50], "state.json cannot be read"),
            ("model.safetensors", None, "lacks model.safetensors"),
            ("training/state.json", lambda b: b"{}", "lacks what save wrote"),
            ("training/state.json", lambda b: b.replace(b'"stages"', b'"stagse"'), "lacks what"),
            ("training/state.json", None, "state.json")]:
        shutil.copytree(finished, out)
        file = out / "step_00000035" / name
        file.write_bytes(harm(file.read_bytes())) if harm else file.unlink()
        with pytest.raises(SystemExit, match=words) as error:
            run()
        assert "continue from" in str(error.value) and "step_00000032" in str(error.value)
        shutil.rmtree(out)


def test_milestones_are_kept(run, tmp_path):
    """Housekeeping that deletes one checkpoint too many cannot be undone."""
    run("--keep=1", "--keep_every=8")
    assert list(checkpoints(tmp_path / "out")) == [8, 10, 16, 24, 30, 32, 35]


def test_checkpoints_are_ordered_by_number(tmp_path):
    """Sorted as text, step 100,000,000 comes before 99,999,999: the original would have resumed
    from the wrong one."""
    for step in 99_999_999, 100_000_000, 7:
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "step_00000009.tmp").mkdir()
    assert list(checkpoints(tmp_path)) == [7, 99_999_999, 100_000_000]


def test_a_failed_save_leaves_nothing_behind(run, tmp_path, monkeypatch):
    """A full disk must not leave a folder that looks like a checkpoint."""
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SystemExit, match="step_00000004 could not be saved: .*No space left"):
        run()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.jsonl"]


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    """A run that goes on with NaN wastes days and its own checkpoints."""
    with pytest.raises(SystemExit, match=r"step 2 is not finite: .*nan.*"
                                         r"Last good checkpoint: none yet"):
        run("--learning_rate=1e30", "--save_every=100")
    assert not checkpoints(tmp_path / "out")


# --------------------------------------------------------------------------------------------------
# Forks, and weights from elsewhere

FORK = """--stages=[{"tokens": 640, "batch": 64, "mixture": {"prose": 1}},
                   {"tokens": 1280, "batch": 64, "mixture": {"prose": 0.1, "code": 0.9}},
                   {"tokens": 640, "batch": 128, "mixture": {"code": 1}}]"""


def origin(checkpoint):
    return json.loads((checkpoint / "training/state.json").read_text())["origin"]


def test_a_fork_is_its_recipe_from_the_start(run, finished, tmp_path, world):
    """A fork that forgets Adam's moments, restarts the cosine or numbers the windows anew trains
    something that no recipe describes: it must end with the bits of its own recipe run from step 0,
    also when it was stopped and continued, by when its parent may be gone."""
    run(FORK)
    out, whole = tmp_path / "out", tmp_path / "whole"
    out.rename(whole)
    parent = shutil.copytree(finished / "step_00000010", tmp_path / "parent/step_00000010")
    printed = run(FORK, f"--fork_from={parent}", "--keep=0")
    assert f"forking from {parent}\n" in printed
    assert_same_bits(out / "step_00000035", whole / "step_00000035")
    assert records(out)[0]["val_loss"] == records(whole)[10]["val_loss"]
    keys = "step", "tokens", "loss", "lr", "grad_norm", "stage", "mixture", "val_loss"
    assert [[r.get(k) for k in keys] for r in records(out)[1:]] == [
        [r.get(k) for k in keys] for r in records(whole)[11:]]
    was = origin(out / "step_00000035")
    assert was["fork_from"] == str(parent) and was["step"] == 10 and len(was["weights"]) == 64

    for step in 28, 30, 32, 35:
        shutil.rmtree(out / f"step_{step:08d}")
    shutil.rmtree(parent)
    printed = run(FORK, f"--fork_from={parent}")                    # its own checkpoint wins
    assert f"continuing from {out / 'step_00000024'}" in printed and "forking" not in printed
    assert_same_bits(out / "step_00000035", whole / "step_00000035")
    assert origin(out / "step_00000035") == was and origin(whole / "step_00000035") is None
    assert [r["step"] for r in records(out)] == list(range(10, STEPS + 1))


@pytest.mark.parametrize("options, words", [
    (["--seed=1"], "seed: 3407 there, 1 here"), (["--d_ff=64"], "d_ff: 48 there, 64 here"),
    (["--vocab_size=400"], "vocab_size: 320 there, 400 here"),
    (["--weight_decay=0.2"], "weight_decay: 0.1 there, 0.2 here"),
    (["--beta2=0.9", "--grad_clip=2"], "beta2: 0.95 there, 0.9 here.*grad_clip: 1.0 there, 2.0"),
    (["--min_lr=0.002"], "min_lr: 0.001 there, 0.002 here"),
    (["--warmup_steps=2"], "warmup_steps: 3 there, 2 here"),
    ([FORK.replace("64,", "32,")], "stage 1: 10 steps of 4 .* there, 20 steps of 2 .* here"),
    ([FORK.replace("640,", "704,", 1)], "stage 1: 10 steps .* there, 11 steps .* here"),
    ([FORK.replace("1280", "1344")], "of the learning-rate curve: 2560 there, 2624 here"),
    (["--data=code"], "stage 1: .*prose 1 there, .*code 1 here.*windows of code: None there"),
    (["--data_dir=data2"], "bytes of prose: [0-9]+ there, [0-9]+ here")])
def test_a_fork_with_another_past_is_refused(options, words, run, finished, world, tmp_path):
    """Each would go on from weights that its own recipe could not have reached."""
    if "--data_dir=data2" in options and not (world / "data2").exists():
        model = (world / "data/prose/tokenizer.model").read_bytes()
        for name in "prose", "code":
            write_source(world / "data2" / name, [name + TEXT * 3] * 20, model, 0, "a test")
    for plan in [], ["--plan"]:                      # a plan refuses what it can already see
        with pytest.raises(SystemExit, match=f"(?s)a different history than this recipe.*{words}"):
            run(FORK, *options, f"--fork_from={finished / 'step_00000010'}", *plan)
    assert not (tmp_path / "out").exists()


def test_a_fork_may_change_its_future(run, finished, tmp_path):
    """Sources that only the parent's later stages read are no part of the past, nor is how it
    runs; and a past said in other words is the same."""
    same = FORK.replace("640,", "639,", 1).replace('"prose": 1}', '"prose": 3}, "ramp": 0')
    assert "forking" in run(same, f"--fork_from={finished / 'step_00000010'}")
    shutil.rmtree(tmp_path / "out")
    printed = run(FORK.replace("code", "prose").replace('"prose": 0.1, ', ""), "--micro_batch=1",
                  f"--fork_from={finished / 'step_00000010'}")
    assert "micro_batch was [2, 2, 2] before and is [1, 1, 1] now" in printed
    assert checkpoints(tmp_path / "out")


def test_only_the_end_of_a_stage_is_a_fork(run, finished, tmp_path):
    """Within a stage the new mixture would have had to begin earlier; and a folder without a
    state has no moments to go on with."""
    fork = [FORK, "--fork_from"]
    for path, words in ((finished / "step_00000032", "step 32, within a stage.*10, 30, 35"),
                        (finished, f"is no checkpoint. .* the end of a stage, of {finished}/step_"
                                   f"00000010, {finished}/step_00000030"),
                        (finished / "step_00000012", f"a stage, of {finished}/step_00000010"),
                        (tmp_path / "no", "no is no checkpoint. .* train up to it first")):
        with pytest.raises(SystemExit, match=words):
            run(*fork[:-1], f"{fork[-1]}={path}")
    broken = shutil.copytree(finished / "step_00000010", tmp_path / "step_00000010")
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="fork_from .*model.safetensors is damaged.*restore it"):
        run(FORK, f"--fork_from={broken}")
    assert not (tmp_path / "out").exists()


def test_weights_from_elsewhere(run, finished, tmp_path):
    """init_from takes weights alone, from a folder of ours or of transformers: the first evaluation
    is that of the weights, and the schedule begins at step 0."""
    theirs = AutoModelForCausalLM.from_pretrained(finished / "step_00000035")
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    for folder in finished / "step_00000035", tmp_path / "hf":
        printed = run(f"--init_from={folder}")
        assert f"starting from the weights in {folder}" in printed
        first, last = records(tmp_path / "out")[0], records(finished)[-1]
        assert first["step"] == 0 and first["val_loss"] == pytest.approx(last["val_loss"])
        was = origin(tmp_path / "out/step_00000035")
        assert was["init_from"] == str(folder)
        assert set(was["weights"]) == {p.name for p in folder.glob("*.safetensors")}
        assert records(tmp_path / "out")[1]["lr"] == pytest.approx(1e-2 / 3)
        shutil.rmtree(tmp_path / "out/step_00000035")
        assert "continuing from" in run(f"--init_from={folder}")            # its own wins
        assert origin(tmp_path / "out/step_00000035") == was
        shutil.rmtree(tmp_path / "out")


def test_weights_that_do_not_fit_are_refused(run, finished, world, tmp_path):
    """A shape that does not fit fails late or, with another rope_theta, never; with another
    tokenizer every id means another piece."""
    weights = f"--init_from={finished / 'step_00000035'}"
    for options, words in (
            (["--d_ff=64", "--rope_theta=5e5", weights], "d_ff: 48 there, 64 here.*rope_theta"),
            ([f"--init_from={finished}"], f"a run: name a checkpoint, such as {finished}/step_"),
            ([f"--init_from={tmp_path / 'no'}"], "no folder of a model: it has no config.json"),
            ([f"--init_from={finished / 'step_00000099'}"], "Train up to it first; .*_00000035 so"),
            ([weights, "--fork_from=x"], "a run has one origin: fork_from x or init_from")):
        with pytest.raises(SystemExit, match=f"(?s){words}"):
            run(*options)
    other = shutil.copytree(finished / "step_00000035", tmp_path / "other")
    (other / "tokenizer.model").write_bytes(train_tokenizer([TEXT], 310))
    with pytest.raises(SystemExit, match="tokenizer: [0-9a-f]{64} there, [0-9a-f]{64} here"):
        run(f"--init_from={other}")
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SystemExit, match=f"init_from {other}: .*gpt2"):
        run(f"--init_from={other}")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# The plan

def test_the_plan_is_what_a_run_does(finished, world, monkeypatch, capsys):
    """A plan that reckons otherwise than the loop is worse than none: steps, tokens, micro-batches,
    learning rates, sequences of each source, checkpoints, size."""
    monkeypatch.chdir(world)
    cfg, stages = read_recipe(["config_tiny.py", "--plan"])
    plan, lines = planning.plan(cfg, stages, lr_at), records(finished)
    state = json.loads((finished / "step_00000035/training/state.json").read_text())
    assert plan["ends"] == list({r["stage"]: r["step"] for r in lines[1:]}.values())
    assert plan["tokens"] == lines[-1]["tokens"]
    assert plan["lr"] == [lines[end]["lr"] for end in plan["ends"]]
    assert [micro for micro, _ in plan["micro_batches"]] == state["run"]["micro_batch"]
    sizes = [r["tokens"] - before["tokens"] for before, r in zip(lines, lines[1:])]
    for name, given in plan["given"].items():
        assert given == [round(sum(size * r["mixture"].get(name, 0) for size, r in
                                   zip(sizes, lines[1:]) if r["stage"] == k)) for k in (1, 2, 3)]
        assert plan["epochs"][name] == sum(given) / 16 / state["sources"][name]["windows"]
    assert plan["kept"] == list(checkpoints(finished))
    tensors = weights(finished / "step_00000035")
    assert plan["checkpoint_bytes"] == sum(4 * t.numel() for name, t in tensors.items()
                                           if not name.endswith(".step"))
    train.main(["config_tiny.py", "--plan", "--tokens_per_second=2"])
    printed = re.sub(" +", " ", capsys.readouterr().out)
    for words in (f"2 20 1,280 64 1 x 2 x 2 x 16 30 {lines[30]['lr']:.2e}\n", "35 2,560",
                  "prose 640 720 320 1,680",
                  "0.36 GPU-hours, 21.3 minutes on 1, at 2 tokens/s each = 4.57e-07 TFLOP/s, as",
                  "stage 2 comes to its mixture by a ramp of 320 tokens"):
        assert words in printed


def test_a_plan_without_data_has_the_vocabulary_of_its_fork(finished, world, tmp_path, capsys):
    """Where the checkpoint is here and the data are elsewhere, a plan for another vocabulary would
    be wrong in parameters, FLOPs and hours."""
    train.main([str(world / "config_tiny.py"), "--plan", f"--data_dir={tmp_path}",
                f"--fork_from={finished}/step_00000010"])
    assert "36,000 parameters" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(HERE.glob("config_*.py")), ids=lambda path: path.stem)
def test_every_recipe_has_a_plan_without_data(path, tmp_path, monkeypatch, capsys):
    """Who wonders what a recipe costs has neither its data nor its GPUs nor the run it forks
    from."""
    monkeypatch.chdir(tmp_path)
    train.main([str(path), "--plan", "--gpus=4"])
    printed = capsys.readouterr().out
    assert "no data yet" in printed and "GPU-hours" in printed and not list(tmp_path.iterdir())
    assert ("where it forks" in printed) == ("fork_from =" in path.read_text())


def test_the_plan_has_the_papers_hours(tmp_path, monkeypatch, capsys):
    """300B tokens are 3,456 A100-hours in the paper; at its rounded 24,000 tokens/s they are
    3,472."""
    monkeypatch.chdir(tmp_path)
    train.main([str(HERE / "config_v1.py"), "--plan", "--gpus=16", "--stages=[{'tokens': 300e9, "
                "'batch': 2097152, 'mixture': {'slimpajama': 1}}]"])
    printed = capsys.readouterr().out
    assert "3,472 GPU-hours, 9.0 days on 16, at 24,000 tokens/s each = 185 TFLOP/s" in printed


@pytest.mark.parametrize("options, words", [
    (["--gpus=3"], "batch of 4 sequences.*among 3 processes; nearest: 2 and 4"),
    (["--gpus=0"], "gpus must be above 0, got 0"),
    (["--tokens_per_second=-1"], "tokens_per_second must be at least 0 and below inf, got -1"),
    (["--fork_from=out/x/step_00000011"], "step_00000011 is not at the end of a stage.*00000010"),
    (["--vocab_size=9"], "vocab_size 9 is below that of the data, 320"),
    (["--min_lr=0.1"], "min_lr must be at least 0 and below 0.01 .learning_rate., got 0.1")])
def test_a_plan_refuses_what_training_would(options, words, world, monkeypatch):
    """A plan of something impossible sends people to rent GPUs."""
    monkeypatch.chdir(world)
    with pytest.raises((SystemExit, InputError), match=words):
        train.main(["config_tiny.py", "--plan", *options])


# --------------------------------------------------------------------------------------------------
# Bad input: one sentence, before anything is written

def stage(**changes):
    return f"--stages={[{'tokens': 640, 'batch': 64, 'mixture': {'prose': 1}} | changes]}"


@pytest.mark.parametrize("options, words", [
    (["--data=nowhere"], "no folder .*nowhere: make it with"),
    (["--data_dir=elsewhere"], "no folder elsewhere/"),
    (["--context=65536", "--stages=[{'tokens': 1e6, 'batch': 65536, 'mixture': {'prose': 1}}]",
      "--warmup_steps=1"], "prose has .* tokens, less than one window"),
    (["--vocab_size=319"], "vocab_size 319 is below that of the data, 320"),
    (["--context=24"], "batch of 64.*sequences of 24"), (["--n_head=3"], "d_model 32"),
    (["--min_lr=0.1"], "min_lr must be at least 0 and below 0.01 .learning_rate., got 0.1"),
    (["--beta2=1"], "beta2"), (["--keep=-1"], "keep"),
    (["--stages=[1]", "--data=prose"], "stage 1"),
    (["--seed=-1"], "seed"), (["--learning_rate=nan"], "learning_rate"),
    (["--rope_theta=0"], "rope_theta must be above 0, got 0.0"),
    (["--warmup_steps=40"], "warmup_steps 40"), (["--learning_rte=1"], "nearest: learning_rate"),
    (["--micro_batch=0"], "micro_batch must be above 0"), (["--gpus=4"], "go with --plan"),
    (["--out_dir=config_tiny.py"], "out_dir config_tiny.py is a file"),
    (["--stages=[{'tokens': 640"], "is not valid Python: '{' was never closed"),
    (["--dtype=float16"], "auto, float32, bfloat16"), (["--stages=[]"], "no stages"),
    (["--data=prose:0"], "not all zero"),
    ([stage(tokens=0)], "stage 1 has 0 tokens in batches of 64"),
    ([stage(batch=72)], "batch of 72 tokens .*sequences of 16; the next that is: 80"),
    ([stage(mixture={"prose": 1, "code": -0.5})], r"'code': -0.5.*none negative"),
    ([stage(mixture={"prose": 0, "code": 0})], "not all zero"),
    ([stage(mixture={"rpose": 1})], "no folder data/rpose"),
    ([stage(mixture={"../prose": 1})], "'../prose' is not a plain folder name"),
    ([stage(ramp=64)], "ramp of 64 tokens.*the first stage has none"),
    ([FORK.replace('0.9}}', '0.9}, "ramp": 1296}')], "ramp of 1296 tokens.*stage, 1280"),
    (["--data_dir="], "data_dir names nothing"),
    (["--out_dir=run_caf\udce9"], "out_dir run_caf.* is not UTF-8"),
    (["--min_lr=0.01"], "min_lr must be at least 0 and below 0.01 .learning_rate., got 0.01")])
def test_bad_recipes_are_refused(options, words, run, tmp_path):
    """Found after an hour of allocation and loading, a typo is expensive."""
    with pytest.raises((SystemExit, InputError), match=f"(?s){words}") as error:
        run(*options)
    assert len(str(error.value).splitlines()) <= 2 and not (tmp_path / "out").exists()


def test_a_refusal_is_no_stack_trace(world, tmp_path):
    """An error raised deep inside, as by model.py, ends the program with a sentence."""
    process = start(world, tmp_path / "out", "--n_head=3")
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Traceback" not in err and err.strip()


def test_sources_of_two_tokenizers_are_refused(run, world):
    """The same id would mean two pieces, and the loss would fall all the same."""
    write_source(world / "data/other", ["some other text " * 40],
                 train_tokenizer([TEXT], 310), 0, "a test")
    with pytest.raises(InputError, match="other and prose were written with different tokenizers"):
        run("--data=prose,other")


def test_a_source_without_validation_trains(run, world, tmp_path):
    """Small data must not crash: the original failed on an empty validation part."""
    model = (world / "data/prose/tokenizer.model").read_bytes()
    shutil.rmtree(world / "data/mine", ignore_errors=True)
    write_source(world / "data/mine", ["one long text " * 200], model, 0, "a test")
    printed = run("--data=mine")
    assert ("mine has no validation split of a whole window" in printed
            and "val_loss" not in records(tmp_path / "out")[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_losses_follow_the_cpus(world):
    """The same batches on a GPU in bf16, compiled or not, must train to the same losses."""
    cfg, stages, sources, model, _ = setup(world)
    model.cuda()
    optimizer = build_optimizer(model, cfg)
    expected, _ = step_of(world, 4)
    for step in range(10):
        x, y = read_batch(
            sources, sequences(stages, {n: s.windows for n, s in sources.items()}, cfg.seed, step),
            torch.device("cuda"))
        loss, _, _ = train_step(model, optimizer, x, y, 1e-2, 4, torch.bfloat16, cfg.grad_clip)
        assert abs(loss - expected[step, 0].item()) < 0.05


# --------------------------------------------------------------------------------------------------
# Long proofs

@pytest.fixture
def command(tmp_path):
    """command("script.py arguments") runs it in tmp_path, on all cores, and returns what it
    printed."""
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}

    def command(line):
        script, *arguments = line.split()
        done = subprocess.run([sys.executable, str(HERE / script), *arguments], cwd=tmp_path,
                              capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return command


@pytest.mark.slow
def test_the_demo_its_plan_and_its_fork(command, tmp_path, monkeypatch):
    """The README's own runs, of a tenth of their length: the plan says what the demo then does,
    and the demo's fork is better at code than the demo and worse at prose, at the same place;
    mixtures that are recorded but not followed would pass every shorter test."""
    for recipe in "config_demo.py", "config_demo_code.py":
        shutil.copy(HERE / recipe, tmp_path)
    monkeypatch.chdir(tmp_path)
    command("prepare.py demo")
    stages = {}
    for name in "config_demo.py", "config_demo_code.py":
        found = [{key: value if key in ("batch", "mixture") else int(value * 0.1)
                  for key, value in stage.items()} for stage in read_recipe([name])[0].stages]
        stages[name] = "--stages=" + repr(found).replace(" ", "")
    plan = command(f"train.py config_demo.py --plan {stages['config_demo.py']}")
    # evaluated at the ends of stages, too
    command(f"train.py config_demo.py --eval_every=1000 {stages['config_demo.py']}")
    fork, = [path for step, path in checkpoints(tmp_path / "out/demo").items() if step < 100]
    command(f"train.py config_demo_code.py --eval_every=1000 {stages['config_demo_code.py']} "
            f"--fork_from={fork}")
    lines, fork = records(tmp_path / "out/demo"), records(tmp_path / "out/demo_code")
    ends = {r["stage"]: r for r in lines if "stage" in r}
    for record in ends.values():
        assert re.search(rf" {record['step']} +{record['lr']:.2e}\n", plan)
    assert f"{ends[3]['tokens']:,} tokens to train on" in plan
    assert fork[0]["step"] == ends[1]["step"] and fork[0]["val_loss"] == ends[1]["val_loss"]
    for k in 2, 3:
        ours, = (r for r in fork if r["step"] == ends[k]["step"])
        assert ours["bits_per_byte"]["demo-code"] < ends[k]["bits_per_byte"]["demo-code"] - 0.02
        assert ours["bits_per_byte"]["demo-prose"] > ends[k]["bits_per_byte"]["demo-prose"] + 0.02
    found = checkpoints(tmp_path / "out/demo")
    written = sum(p.stat().st_size for p in found[ends[3]["step"]].rglob("*.safetensors")) / 1e6
    assert f"of {written:,.1f} MB are written, {len(found)} stay" in plan


@pytest.mark.slow
def test_own_text_from_file_to_sample(command, tmp_path):
    """The README's way from a text file to a model of it, command by command."""
    (tmp_path / "my.txt").write_text(TEXT * 300)

    shutil.copy(HERE / "config_demo.py", tmp_path)
    command("prepare.py tokenizer my.txt --vocab_size=320 --out=my.model")
    command("prepare.py tokenize my.txt --tokenizer=my.model --out=data/my")
    assert "1 documents" in command("prepare.py inspect data/my")
    stages = "[{'tokens':100_000,'batch':2048,'mixture':{'demo-prose':1}}]"
    command(f"train.py config_demo.py --data=my --out_dir=out/my --stages={stages} "
            "--d_model=64 --n_head=2 --n_kv_head=1")
    assert "brown fox jumps over" in command("sample.py out/my --prompt=The --temperature=0")
