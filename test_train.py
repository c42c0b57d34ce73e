"""Proofs of train.py: the schedule, the step, and that a run that was stopped ends as one that
never was."""
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from config import load
from data import DataError, parse_stages, sequences
from model import Llama, ModelError
from prepare import train_tokenizer, write_source
from sample import Tokenizer
from test_prepare import AWKWARD, TEXT
from train import (TrainConfig, build_optimizer, checkpoints, choose_compile, choose_dtype, lr_at,
                   mixture_of, read_batch, split_batch, tokens_after, train_step)

HERE = Path(__file__).parent
RECIPE = """
n_layer, d_model, n_head, n_kv_head, d_ff, context = 2, 32, 4, 2, 48, 16
stages = [{"tokens": 640, "batch": 64, "mixture": {"prose": 1}},
          {"tokens": 1280, "batch": 64, "mixture": {"prose": 0.5, "code": 0.5}, "ramp": 320},
          {"tokens": 640, "batch": 128, "mixture": {"prose": 0.5, "code": 0.5}}]
learning_rate, min_lr, warmup_steps = 1e-2, 1e-3, 3
micro_batch, log_every, eval_every, save_every, keep = 2, 1, 10, 4, 2
"""
STEPS = 10 + 20 + 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with two small sources and a recipe of three stages over them."""
    world = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = TEXT.split()
    texts = [" ".join(rng.choices(words, k=30)) for _ in range(150)]
    model = train_tokenizer([TEXT, *texts], 320)
    for name, part in ("prose", texts[:75]), ("code", texts[75:]):
        write_source(world / "data" / name, part, model, 0.2, "a test")
    (world / "config_tiny.py").write_text(RECIPE)
    return world


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """run(options...) trains in this process and returns what it printed; its out_dir is
    tmp_path / "out"."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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


def test_lr_of_v1_1():
    """One cosine over 2T tokens whatever the batch: at the joints 9.3e-5 and 4.5e-5, in the end
    4e-5."""
    cfg = load([str(HERE / "config_base.py")], TrainConfig)
    stages = parse_stages(cfg.stages, cfg.context)
    ends = [sum(stage.steps for stage in stages[:k]) for k in (1, 2, 3)]
    seen = [tokens_after(stages, step, cfg.context) for step in ends]
    assert seen[0] == 817_436 * 1_835_008 and seen[2] - seen[1] == 20_436 * 7_340_032
    rates = [lr_at(t, seen[2], 2000 * 1_835_008, cfg) for t in seen]
    assert ([round(rate * 1e5, 1) for rate in rates] == [9.2, 4.5, 4.0]
            or [round(rate * 1e5, 1) for rate in rates] == [9.3, 4.5, 4.0])


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
            mixture_of(text)
    assert mixture_of("my") == {"my": 1} and mixture_of("a:0.7,b:0.3") == {"a": 0.7, "b": 0.3}
    with pytest.raises(SystemExit, match="'x' is no number"):
        mixture_of("a:x")


def test_choices_are_made_from_recipe_and_machine():
    """Emulated bf16 is ten times slower than fp32, and compiling a short run costs more than it
    brings."""
    cpu = torch.device("cpu")
    assert choose_dtype(TrainConfig(dtype="bfloat16"), cpu) == (torch.bfloat16, "as asked")
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert choose_dtype(TrainConfig(), cpu)[0] == (torch.bfloat16 if has else torch.float32)
    assert (choose_compile(TrainConfig(compile=True), cpu, 1)[0]
            and not choose_compile(TrainConfig(), cpu, 1e13)[0])
    assert not choose_compile(TrainConfig(compile=False), cpu, 1e20)[0]


# --------------------------------------------------------------------------------------------------
# The step

def setup(world, **changes):
    cfg, stages, sources, _ = train.read_recipe([
        str(world / "config_tiny.py"), f"--data_dir={world / 'data'}",
        *(f"--{key}={value}" for key, value in changes.items())])
    torch.manual_seed(0)
    model = Llama(cfg).init_weights()
    return cfg, stages, sources, model, build_optimizer(model, cfg)


def step_of(world, micro, dtype=torch.float32, **changes):
    """Losses, norms and weights after ten steps in micro-batches of `micro`."""
    cfg, stages, sources, model, optimizer = setup(world, **changes)
    windows, found = {name: source.windows for name, source in sources.items()}, []
    for step in range(10):
        x, y = read_batch(sources, sequences(stages, windows, cfg.seed, step), torch.device("cpu"))
        found.append(train_step(model, optimizer, x, y, 1e-2, micro, dtype, cfg.grad_clip))
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


def test_clipping_bounds_the_step(world):
    """The norm that is reported is the one before clipping."""
    losses, _ = step_of(world, 4)
    assert (losses[:, 1] > 0.1).all()
    cfg, stages, sources, model, _ = setup(world)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = read_batch(sources, sequences(stages, {n: s.windows for n, s in sources.items()}, 0, 0),
                      torch.device("cpu"))
    _, norm = train_step(model, torch.optim.SGD(model.parameters()), x, y, 1.0, 4, torch.float32,
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
    loss, norm = train_step(model, optimizer, x, x, 1.0, 4, torch.float32, 1.0)
    assert not math.isfinite(loss) and all(
        torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_compiled_equals_plain(run, tmp_path):
    """Compiled blocks keep their parameters' names, train to the same loss, and their checkpoint is
    the same folder."""
    short = "--stages=[{'tokens': 320, 'batch': 64, 'mixture': {'prose': 1}}]"
    run(short, "--compile=True")
    compiled = [r["loss"] for r in records(tmp_path / "out")[1:]]
    names = weights(tmp_path / "out/step_00000005").keys()
    shutil.rmtree(tmp_path / "out")
    run(short, "--compile=False")
    assert [r["loss"] for r in records(tmp_path / "out")[1:]] == pytest.approx(compiled, rel=1e-4)
    assert names == weights(tmp_path / "out/step_00000005").keys()


def test_weights_stay_fp32_under_bf16(run, tmp_path):
    """Weights kept in bf16 lose every update below 1/256 of them, which late in training is all."""
    printed = run("--stages=[{'tokens': 320, 'batch': 64, 'mixture': {'prose': 1}}]",
                  "--dtype=bfloat16")
    assert "bfloat16: as asked" in printed
    assert {t.dtype for t in weights(tmp_path / "out/step_00000005").values()} == {torch.float32}


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
            "memory"} <= set(lines[1])
    assert [r["step"] for r in lines if "val_loss" in r] == [0, 10, 20, 30, 35]
    assert (lines[-1]["lr"] == pytest.approx(1e-3) and lines[-1]["tokens"] == 2560
            and lines[1]["lr"] == pytest.approx(1e-2 / 3))
    assert (set(lines[-1]["val_loss"]) == {"prose", "code"}
            and lines[-1]["val_loss"]["code"] < lines[0]["val_loss"]["code"] - 0.5)
    assert list(checkpoints(finished)) == [10, 30, 32, 35]  # the ends of the stages, and two newest
    state = json.loads((finished / "step_00000035/training/state.json").read_text())
    assert state["step"] == 35 and state["tokens"] == 2560 and state["recipe"]["seed"] == 3407
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
    assert again.wait(60) == 0 and "is the end of this run" in again.stdout.read()
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("signals", [[signal.SIGINT, signal.SIGKILL],
                                     [signal.SIGKILL, signal.SIGTERM]])
def test_stopped_and_started_again_is_the_same(signals, finished, world, tmp_path):
    """A resume that forgets a moment, a count or its place in the data ends elsewhere: bit for bit
    is the only proof."""
    out, rng = tmp_path / "out", random.Random(len(signals) + signals[0])
    for number in signals:
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
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')                                               # and a line
    process = start(world, out)
    assert process.wait(60) == 0, process.stderr.read()
    assert_same_bits(out / "step_00000035", finished / "step_00000035")
    keys = "step", "tokens", "loss", "lr", "grad_norm", "val_loss"
    assert [[r.get(k) for k in keys] for r in records(out)] == [
        [r.get(k) for k in keys] for r in records(finished)]
    assert not list(out.glob("*.tmp"))


def test_another_recipe_is_refused(run, finished, tmp_path):
    """Continuing with another learning rate or mixture gives a run that no recipe describes."""
    shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        run("--learning_rate=0.02", "--seed=1")
    assert ("learning_rate: 0.01 there, 0.02 here" in str(error.value)
            and "seed: 3407 there, 1 here" in str(error.value))
    with pytest.raises(SystemExit, match="stages"):
        run("--data=prose")
    shutil.rmtree(tmp_path / "out/step_00000035")
    printed = run("--log_every=3", "--micro_batch=1", "--keep=1")  # these change rounding at most
    assert "micro_batch was [2, 2, 2] before and is [1, 1, 1] now" in printed
    assert records(tmp_path / "out")[-1]["step"] == STEPS


def test_damaged_checkpoints_are_named(run, finished, tmp_path):
    """Half a file loads as far as it goes in some formats; a flipped bit loads in all of them."""
    out = tmp_path / "out"
    for name, harm, words in [
            ("model.safetensors", lambda b: b[:-8], "damaged"),
            ("config.json", lambda b: b[:9], "damaged"),
            ("training/optimizer.safetensors", lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:],
             "other content"),
            ("training/state.json", lambda b: b[:50], "state.json cannot be read"),
            ("model.safetensors", None, "lacks model.safetensors"),
            ("training/state.json", lambda b: b"{}", "lacks what save wrote"),
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

    monkeypatch.setattr(train, "save_file", full)
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
# Bad input: one sentence, before anything is written

@pytest.mark.parametrize("options, words", [
    (["--data=nowhere"], "no folder .*nowhere: make it with"),
    (["--data_dir=elsewhere"], "no folder elsewhere/"),
    (["--context=65536", "--stages=[{'tokens': 1e6, 'batch': 65536, 'mixture': {'prose': 1}}]",
      "--warmup_steps=1"], "prose has .* tokens, less than one window"),
    (["--vocab_size=319"], "vocab_size 319 is below that of the data, 320"),
    (["--context=24"], "batch of 64.*sequences of 24"), (["--n_head=3"], "d_model 32"),
    (["--min_lr=0.1"], "min_lr must be at least 0 and below 0.01, got 0.1"),
    (["--beta2=1"], "beta2"), (["--keep=-1"], "keep"), (["--stages=[1]", "--data=prose"], "stage 1"),
    (["--seed=-1"], "seed"), (["--learning_rate=nan"], "learning_rate"),
    (["--rope_theta=0"], "rope_theta must be above 0, got 0.0"),
    (["--warmup_steps=40"], "warmup_steps 40"), (["--learning_rte=1"], "nearest: learning_rate"),
    (["--micro_batch=0"], "micro_batch must be above 0"),
    (["--dtype=float16"], "float32 or bfloat16"), (["--stages=[]"], "no stages"),
    (["--data=prose:0"], "not all zero")])
def test_bad_recipes_are_refused(options, words, run, tmp_path):
    """Found after an hour of allocation and loading, a typo is expensive."""
    with pytest.raises((SystemExit, DataError, ModelError), match=f"(?s){words}") as error:
        run(*options)
    assert len(str(error.value).splitlines()) <= 2 and not (tmp_path / "out").exists()


def test_a_refusal_is_no_stack_trace(world, tmp_path):
    """Errors of data.py, model.py and train.py alike end the program with a sentence."""
    for option in "--data=nowhere", "--n_head=3", "--learning_rte=1":
        process = start(world, tmp_path / "out", option)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and "Traceback" not in err and err.strip()


def test_sources_of_two_tokenizers_are_refused(run, world):
    """The same id would mean two pieces, and the loss would fall all the same."""
    write_source(world / "data/other", ["some other text " * 40],
                 train_tokenizer([TEXT], 310), 0, "a test")
    with pytest.raises(SystemExit, match="other and prose were written with different tokenizers"):
        run("--data=prose,other")


def test_a_source_without_validation_trains(run, world, tmp_path):
    """Small data must not crash: the original failed on an empty validation part."""
    model = (world / "data/prose/tokenizer.model").read_bytes()
    shutil.rmtree(world / "data/mine", ignore_errors=True)
    write_source(world / "data/mine", ["one long text " * 200], model, 0, "a test")
    printed = run("--data=mine")
    assert ("mine has no validation part of a whole window" in printed
            and "val_loss" not in records(tmp_path / "out")[-1])


def test_more_than_one_process_is_refused(run, monkeypatch):
    """Two processes that each believe to be alone would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="one process"):
        run()


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
        loss, _ = train_step(model, optimizer, x, y, 1e-2, 4, torch.bfloat16, cfg.grad_clip)
        assert abs(loss - expected[step, 0].item()) < 0.05


# --------------------------------------------------------------------------------------------------
# Long proofs

@pytest.mark.slow
def test_killed_at_random_moments(finished, world, tmp_path):
    """Whatever moment a run dies at, inside a save too, it continues and ends with the same
    bits."""
    out, rng, kills = tmp_path / "out", random.Random(7), 0
    for attempt in range(40):
        process = start(world, out)
        try:
            process.wait(rng.uniform(1, 4 + attempt))   # on a slow machine the first get nowhere
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    assert process.returncode == 0 and kills > 1
    assert_same_bits(out / "step_00000035", finished / "step_00000035")
    assert ([r["step"] for r in records(out)] == list(range(STEPS + 1))
            and not list(out.glob("*.tmp")))


@pytest.mark.slow
def test_own_text_from_file_to_sample(tmp_path):
    """The README's way from a text file to a model of it, command by command."""
    (tmp_path / "my.txt").write_text(TEXT * 300)

    def command(line):
        script, *arguments = line.split()
        done = subprocess.run([sys.executable, str(HERE / script), *arguments], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shutil.copy(HERE / "config_demo.py", tmp_path)
    command("prepare.py tokenizer my.txt --vocab_size=320 --out=my.model")
    command("prepare.py tokenize my.txt --tokenizer=my.model --out=data/my")
    assert "1 documents" in command("prepare.py inspect data/my")
    stages = "[{'tokens':100_000,'batch':2048,'mixture':{'demo-prose':1}}]"
    command(f"train.py config_demo.py --data=my --out_dir=out/my --stages={stages} "
            "--d_model=64 --n_head=2 --n_kv_head=1")
    assert "brown fox jumps over" in command("sample.py out/my --prompt=The --temperature=0")
