"""Proofs of config.py and of the recipes: every mistake is found, every recipe loads, every key
does something."""
import ast
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest
import torch

import bench
import chat
import eval as evaluation
import plot
import prepare
import sample
from checkpoint import lineage
from config import load_config, usage
from data import parse_stages, sequences_per_source, stage_ends, tokens_after
from model import Llama, ModelConfig
from train import RunOptions, TrainConfig, lr_at, read_recipe

HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    layers: int = 2
    rate: float = 0.5
    name: str = ""
    fast: bool = False
    maybe: bool | None = None
    stages: list = field(default_factory=list)


def test_the_last_argument_wins(tmp_path):
    """Options that depend on their place in surprising ways give runs nobody asked for."""
    recipe = tmp_path / "config_x.py"
    recipe.write_text("import math\n_half = 3\nlayers = 2 * _half\n"
                      "rate = 1\nname = 'x'\ndef helper(): pass\n")
    assert load_config([], Config) == Config()
    assert load_config([str(recipe)], Config) == Config(layers=6, rate=1.0, name="x")
    assert load_config([str(recipe), "--layers=7", "--rate=2e-3", "--name=a=b", "--fast"],
                Config) == Config(7, 2e-3, "a=b", True)
    assert load_config(["--layers=7", str(recipe)], Config).layers == 6
    assert load_config(["--layers=3e2", "--rate=3", "--fast=False", "--maybe=True",
                        "--stages=[{'a': 1}]", "--name=12"],
                       Config) == Config(300, 3.0, "12", False, True, [{"a": 1}])
    assert load_config(["--name=~/x"], Config).name == os.path.expanduser("~/x") != "~/x"
    assert (type(load_config(["--rate=3"], Config).rate) is float
            and load_config(["--maybe=None"], Config).maybe is None)


@pytest.mark.parametrize("text, words", [
    ("--layer=3", "no key 'layer'; nearest: layers"), ("--zzz=3", "the keys are layers, rate"),
    ("--layers=2.5", "layers must be int, got 2.5"), ("--layers=two", "must be int, got 'two'"),
    ("--layers=True", "must be int, got True"), ("--fast=1", "fast must be bool, got 1"),
    ("--rate=fast", "must be float, got 'fast'"), ("--layers", "--layers needs a value: --layers="),
    ("--maybe=1", "maybe must be bool"), ("--layers=1e999", "must be int, got inf"),
    ("nowhere.py", "no recipe 'nowhere.py'"), ("layers = 2.5", "layers must be int, got 2.5"),
    ("layer = 2", "no key 'layer'; nearest: layers"), ("name = 3", "name must be str, got 3"),
    ("layers = (", "SyntaxError"), ("layers = 1 / 0", "ZeroDivisionError")])
def test_mistakes_are_named(text, words, tmp_path):
    """A misspelt key in a recipe would be a variable that nobody reads, and the run one with the
    defaults."""
    arg = text
    if " = " in text:
        arg = str(tmp_path / "config_x.py")
        Path(arg).write_text(text)
    with pytest.raises(SystemExit) as error:
        load_config([arg], Config)
    assert words in str(error.value) and arg in str(error.value)


# --------------------------------------------------------------------------------------------------
# The project's own recipes and words

@pytest.mark.parametrize("path", sorted(HERE.glob("config_*.py")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    """A recipe nobody ran since a key was renamed fails on the day somebody needs it."""
    cfg = load_config([str(path)], TrainConfig)
    stages = parse_stages(cfg.stages, cfg.context)
    assert cfg.warmup_steps < stages[0].steps
    assert ast.get_docstring(ast.parse(path.read_text()))


def recipe(name):
    """(config, stages, ends of stages, tokens of the warm-up, of the run) of config_NAME.py."""
    cfg, stages = read_recipe([str(HERE / f"config_{name}.py")])
    return (cfg, stages, stage_ends(stages), cfg.warmup_steps * stages[0].batch * cfg.context,
            tokens_after(stages, float("inf"), cfg.context))


@pytest.mark.parametrize("name", ["base", "v1", "math_code", "chinese", "120m"])
def test_what_the_original_fixed_is_as_it_was(name):
    """A digit lost in a recipe costs weeks of GPUs before anybody sees it. Shapes by their numbers
    of parameters; AdamW and the end of the cosine at a tenth."""
    cfg = recipe(name)[0]
    with torch.device("meta"):
        model = Llama(cfg)
    assert (sum(p.numel() for p in model.parameters())
            == (121_129_728 if name == "120m" else 1_100_048_384))
    assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.grad_clip) == (0.1, 0.9, 0.95, 1.0)
    assert cfg.min_lr == pytest.approx(cfg.learning_rate / 10)
    if name != "120m":
        assert asdict(cfg).items() >= asdict(ModelConfig()).items()
        assert (cfg.learning_rate, cfg.min_lr, cfg.warmup_steps) == (4e-4, 4e-5, 2000)


@pytest.mark.parametrize("name", ["base", "math_code", "chinese"])
def test_v1_1_has_the_papers_numbers(name):
    """1.835M tokens a step and four times that in the cooldown, which must not bend the cosine:
    a schedule that counts steps would."""
    cfg, stages, ends, warmup, total = recipe(name)
    assert [stage.steps for stage in stages] == [817_436, 190_735, 20_436]
    assert [stage.batch * cfg.context for stage in stages] == [1_835_008, 1_835_008, 7_340_032]
    seen = [tokens_after(stages, end, cfg.context) for end in ends]
    assert [round(tokens / 1e9, 3) for tokens in seen] == [1500.002, 1850.002, 2000.003]
    rates = [lr_at(tokens, total, warmup, cfg) for tokens in (1.5e12, 1.85e12, total)]
    assert rates == pytest.approx([9.29e-5, 4.50e-5, 4e-5], rel=1e-3) and rates[-1] == 4e-5


def test_v1_0_has_the_papers_numbers():
    """One stage of 2M tokens a step, sources in proportion to their size."""
    cfg, stages, ends, _, total = recipe("v1")
    assert ends == [1_430_512] and total == 3_000_001_101_824
    given = sequences_per_source(stages[0], ends[0] * stages[0].batch)
    assert given["slimpajama"] * 306_416 == pytest.approx(given["starcoder"] * 693_584, rel=1e-6)


@pytest.mark.parametrize("name, shares", [
    ("math_code", {"slimpajama": 75, "starcoder-python": 15, "proof-pile-2": 10}),
    ("chinese", {"slimpajama": 50, "skypile": 50})])
def test_the_ramp_has_the_papers_shares(name, shares):
    """0, 3B and 6B tokens into the second stage: SlimPajama alone, half way, all the way; the third
    stage has no ramp and the same shares."""
    cfg, (_, second, third), _, _, _ = recipe(name)
    for at, done in (0, 0), (3e9, 0.5), (6e9, 1), (300e9, 1):
        n = round(at / cfg.context)
        # two million tokens on either side of this place, but where the stage begins
        a, b = (sequences_per_source(second, at) for at in (max(0, n - 1000), n + 1000))
        for source, percent in shares.items():
            share = percent / 100 * done + (source == "slimpajama") * (1 - done)
            given = (b[source] - a[source]) / (n + 1000 - max(0, n - 1000))
            assert given == pytest.approx(share, abs=2e-3)
    x = second.ramp                                  # its integral: half of the share on average
    for source, percent in shares.items():
        start = source == "slimpajama"
        assert sequences_per_source(second, int(x))[source] == pytest.approx(
            float(x) * (start + percent / 100) / 2, abs=2)
    n = 100 * third.batch
    assert ({source: sequences_per_source(third, n)[source] for source in shares}
            == pytest.approx({source: n * percent / 100 for source, percent in shares.items()},
                             abs=2))


@pytest.mark.parametrize("path", [path for path in sorted(HERE.glob("config_*.py"))
                                  if "fork_from =" in path.read_text()], ids=lambda p: p.stem)
def test_forks_share_their_parents_past(path):
    """A recipe that forks from a checkpoint its parent never writes, or that it must refuse, is
    found out after the weeks of the parent."""
    cfg, _ = read_recipe([str(path)])
    parent, step = re.fullmatch(r"out/(\w+)/step_0*(\d+)", cfg.fork_from).groups()
    theirs, _, ends, _, _ = recipe(parent)
    assert int(step) == ends[0] and theirs.out_dir == f"out/{parent}"
    ours, theirs = (lineage(c.learned(), {}, int(step)) for c in (cfg, theirs))
    assert ours == theirs


def test_the_demo_learns_to_answer_from_its_last_checkpoint():
    """A recipe that starts from a checkpoint which the demo never writes is refused after the
    demo's minutes."""
    cfg, _ = read_recipe([str(HERE / "config_demo_chat.py")])
    _, _, ends, _, _ = recipe("demo")
    assert cfg.init_from == f"out/demo/step_{ends[-1]:08d}"


def test_every_config_field_is_used():
    """A key that is accepted and ignored is a lie."""
    text = "".join((HERE / f"{name}.py").read_text() for name in (
        "train", "model", "plan", "parallel", "checkpoint"))
    for f in fields(TrainConfig):
        assert re.search(rf"\b(cfg|config|self)\.{f.name}\b", text), f.name
    assert RunOptions.__annotations__.keys() < {f.name for f in fields(TrainConfig)}


def test_help_says_what_every_key_means():
    """A list of names and defaults leaves a reader to guess what `keep` keeps."""
    lines = usage(TrainConfig).splitlines()
    assert len(lines) == len(fields(TrainConfig))
    for line, (key, value) in zip(lines, vars(TrainConfig()).items()):
        assert line.startswith(f"  --{key}={value!r} ") and line.split("  ")[-1].strip(), line


@pytest.mark.parametrize("program, line", [
    (sample, "PATH --draft=PATH --prompts=PATH"),
    (evaluation, "PATH --text=PATH --include_path=PATH --out=PATH.png"),
    (plot, "PATH --out=PATH.png"), (bench, "generate PATH --json=PATH"),
    (bench, "prepare PATH --tokenizer=PATH"), (prepare, "demo --data_dir=PATH"),
    (prepare, "tokenizer PATH --out=PATH"), (prepare, "tokenize PATH --tokenizer=PATH --out=PATH"),
    (prepare, "chat PATH --tokenizer=PATH --out=PATH"), (prepare, "inspect PATH"), (chat, "PATH")])
def test_every_path_of_a_program_is_one(program, line):
    """Behind `=` no shell expands ~, and an unset variable leaves nothing of a path."""
    assert "~" not in str(program.parse_args(line.replace("PATH", "~/x").split()))
    words = line.split()
    for k, word in enumerate(words):
        if "PATH" in word:
            empty = re.sub(r"PATH(\.png)?", "", word)
            with pytest.raises(SystemExit, match="names nothing"):
                program.parse_args([*words[:k], empty, *words[k + 1:]])
