"""Proofs of config.py and of the recipes: every mistake is found, every recipe loads, every key
does something."""
import ast
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

import prepare
import sample
from config import load
from data import parse_stages
from train import FREE, TrainConfig

HERE = Path(__file__).parent


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
    assert load([], Config) == Config()
    assert load([str(recipe)], Config) == Config(layers=6, rate=1.0, name="x")
    assert load([str(recipe), "--layers=7", "--rate=2e-3", "--name=a=b", "--fast"],
                Config) == Config(7, 2e-3, "a=b", True)
    assert load(["--layers=7", str(recipe)], Config).layers == 6
    assert load(["--layers=3e2", "--rate=3", "--fast=False", "--maybe=True", "--stages=[{'a': 1}]",
                 "--name=12"], Config) == Config(300, 3.0, "12", False, True, [{"a": 1}])
    assert (type(load(["--rate=3"], Config).rate) is float
            and load(["--maybe=None"], Config).maybe is None)


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
        load([arg], Config)
    assert words in str(error.value) and arg in str(error.value)


# --------------------------------------------------------------------------------------------------
# The project's own recipes and words

@pytest.mark.parametrize("path", sorted(HERE.glob("config_*.py")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    """A recipe nobody ran since a key was renamed fails on the day somebody needs it."""
    cfg = load([str(path)], TrainConfig)
    stages = parse_stages(cfg.stages, cfg.context)
    assert cfg.warmup_steps < stages[0].steps
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_base_recipe_is_the_papers():
    """A digit lost in a recipe costs weeks of GPUs before anybody sees it."""
    cfg = load([str(HERE / "config_base.py")], TrainConfig)
    stages = parse_stages(cfg.stages, cfg.context)
    assert [stage.steps for stage in stages] == [817_436, 190_735, 20_436]
    assert [stage.batch * cfg.context for stage in stages] == [1_835_008, 1_835_008, 7_340_032]
    assert (cfg.learning_rate, cfg.min_lr, cfg.warmup_steps) == (4e-4, 4e-5, 2000)
    assert (cfg.weight_decay, cfg.beta1, cfg.beta2, cfg.grad_clip) == (0.1, 0.9, 0.95, 1.0)


def test_every_config_field_is_used():
    """A key that is accepted and ignored is a lie."""
    text = (HERE / "train.py").read_text() + (HERE / "model.py").read_text()
    for f in fields(TrainConfig):
        assert re.search(rf"\b(cfg|config|self)\.{f.name}\b", text), f.name
    assert FREE < {f.name for f in fields(TrainConfig)}


def test_readme_commands_parse():
    """A README whose commands are refused teaches distrust."""
    commands = re.findall(r"^(?:\$ )?python (\w+)\.py(?: (.*?))?(?:\s+#.*)?$",
                          (HERE / "README.md").read_text(), re.M)
    assert len(commands) > 8
    for script, arguments in commands:
        arguments = [a.strip("'\"") for a in re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""",
                                                        arguments)]
        if script == "train":
            load([str(HERE / a) if a.endswith(".py") else a for a in arguments], TrainConfig)
        else:
            {"prepare": prepare, "sample": sample}[script].parse_args(arguments)
