"""Proofs that every command is one, in README.md, docs/, scripts, and the docstrings of programs
and recipes: its options parse, its recipes load, its files exist."""
import ast
import io
import re
import shlex
import tomllib
from contextlib import chdir, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import bench
from train import read_recipe

HERE = Path(__file__).parents[1]
README = HERE / "README.md"
PAGES = [README, *sorted(HERE.glob("docs/*.md"))]
SCRIPTS = [*sorted(HERE.glob("runs/*.sh")), *HERE.glob(".github/workflows/*"), HERE / ".ci/run"]
CODE = {path.name: path.read_text() for path in sorted([*HERE.glob("*.py"), HERE / "decode.c"])}
EXERCISES = (HERE / "docs/exercises.md").read_text()           # brings tests along, as patches
ADDED = re.findall(r"^--- /dev/null\n\+\+\+ b/(.*)", EXERCISES, re.M)
TESTS = EXERCISES + "".join(
    path.read_text() for path in [*HERE.glob("test*.py"), *HERE.glob("tests/*.py")])
TEXTS = {path: re.sub(r"^```diff.*?^```", "", path.read_text(), flags=re.M | re.S)
         for path in [*PAGES, *SCRIPTS]} | {                            # of code, the docstrings
    HERE / name: ast.get_docstring(ast.parse(text)) for name, text in CODE.items() if ".py" in name}
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
MARKERS = [line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]

COMMAND = re.compile(
    r"python3? (?:-m pytest|\w+\.py)|torchrun (?=-|\w+\.py)|bash (?=\w+/)|pip install"
    r"|(?<=- run: )\S+|(?<=`)\w+\.py (?=[\w-])|(?:(?<=`)|(?<=\n))pytest(?=[ `])")
PLACEHOLDERS = {                       # what readers fill in, or leave out as in [--out=FILE.png]
    r"(?<= )\[([^]{}]+)\]": r"\1", r'"\$@"': "", r"\$\(\(.*?\)\)|\$\w+|(?<==)(N|ROWS)\b": "8",
    r"=TOKENS": "=2048", r"=SUITE": "=piqa", r"--key=value": "--seed=1", r" NAME": " mixture",
    r"train\.py (\.\.\.|RECIPE\.py)": "train.py config_demo.py",
    r" RECIPE\.py": " config_demo.py", r"FILES\.\.\.": "my.txt",
    r"(prepare\.py (tokenize|chat))( \.\.\.|$)": r"\1 my.txt --tokenizer=my.model --out=data/my",
    r"prepare\.py tokenizer$": "prepare.py tokenizer my.txt --out=my.model",
    r"prepare\.py inspect$": "prepare.py inspect data/my", r"--text$": "--text=my.txt",
    r"^(torchrun \S+)$": r"\1 train.py config_demo.py", r" \.\.\.": ""}


def one_line(text):
    return re.sub(r"\s+", " ", text)


def find_commands(text):
    """The commands in a text: each to the end of its backticks, or of its line, or to a comment or
    two spaces, after which a docstring explains."""
    text = re.sub(r" *\\\n *|(?<=\},)\n *", " ", text)
    text = re.sub(r"(?<!`)`[^`]+`(?!`)", lambda span: one_line(span[0]), text)
    for match in COMMAND.finditer(text):
        quoted = text[match.start() - 1] == "`"
        command = re.split("`" if quoted else r"\n| #|  ", text[match.start():])[0]
        for pattern, filled in PLACEHOLDERS.items():
            command = re.sub(pattern, filled, command)
        yield command


def check_commands(text):
    """Fails at the first command of a text that is refused."""
    for command in find_commands(text):
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            with chdir(HERE), redirect_stdout(io.StringIO()):
                parse(*takewhile(lambda word: not set(word) <= set("();<>|&"), lexer))
        except (Exception, SystemExit) as error:
            assert not getattr(error, "code", error), f"{command}: {error!r}"     # 0 after --help


def parse(program, *arguments):
    if program.startswith("python"):
        program, *arguments = arguments
    if program == "torchrun":
        args = get_args_parser().parse_args(arguments)
        program, arguments = args.training_script, args.training_script_args
    if program == "train.py":
        read_recipe(arguments)
    elif program == "check.py":
        assert not arguments
    elif program.endswith(".py"):
        args = import_module(program.removesuffix(".py")).parse_args(arguments)
        if program == "bench.py" and args.command == "train":
            bench.resolve_training(args, torch.device("cpu"))
    elif program == "bash":                                # "$@" is what the script was given
        script = re.sub(r"^#.*\n", "", Path(arguments[0]).read_text(), flags=re.M)
        check_commands(script.replace('"$@"', shlex.join(arguments[1:])))
    elif program == "pip":
        for word in arguments[1:]:
            if word.endswith(".txt"):
                check_commands(f"pip install {one_line(Path(word).read_text())}")
            elif word.startswith("."):
                assert {*word[2:-1].split(",")} <= {"", *EXTRAS}, word
            elif word[0] != "-":
                version(re.match(r"[\w-]+", word)[0])      # an error if it is not installed
    elif program in ("-m", "pytest"):
        for before, word in zip(["", *arguments], arguments):
            file, _, name = word.partition("::")
            if before in ("-m", "-k"):
                names = word.split(" or ")
                assert word in MARKERS if before == "-m" else all(
                    re.search(rf"def \w*{name}|{name}\w*\.py", TESTS) for name in names)
            elif word[0] != "-" and word != "pytest":
                assert f"def {name}(" in Path(file).read_text() if name else (
                    Path(file).exists() or file in ADDED)
    else:
        assert Path(program).exists(), program


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(HERE)))
def test_commands_parse(path):
    """Documentation whose commands are refused teaches distrust; and a script that fails at its
    last command, after days, costs more."""
    check_commands(TEXTS[path])


def test_commands_are_found():
    """A pattern that finds no command proves nothing. Here is one of each kind, to be filled in."""
    assert sum(len([*find_commands(text)]) for text in TEXTS.values()) > 150
    text = ("See `pytest\n-m slow`, and\n\n    $ srun torchrun --nproc-per-node=N \\\n        "
            "train.py RECIPE.py [--key=value ...]   the rest\n- run: x.sh")
    assert [*find_commands(text)] == [
        "pytest -m slow", "torchrun --nproc-per-node=8 train.py config_demo.py --seed=1", "x.sh"]


@pytest.mark.parametrize("command", [
    "python train.py config_demo.py --layers=3", "python train.py config_no.py",
    "python train.py config_demo.py --data=a:x", "python sample.py --promt=a",
    "python sample.py a \\\n    --promt=b", "python bench.py train --layers=3", "python no.py",
    "python prepare.py tokenize my.txt --out=data/my", "python check.py --fast",
    "python experiments.py stage", "torchrun --nprocs=8 train.py config_demo.py",
    "torchrun --nproc-per-node=N train.py config_demo.py --layers=3", "bash runs/no.sh",
    "bash runs/demo.sh --layers=3", "bash runs/test.sh -m slwo", "`pytest tests/test_no.py`",
    "`pytest tests/test_plot.py::test_no`", "python -m pytest -k no_such_test", "- run: .ci/no",
    "pip install -r no.txt", 'pip install ".[data,evals]"', "pip install hugingface_hub"])
def test_a_wrong_command_is_found(command):
    """Each would be a command that the check above lets pass."""
    with pytest.raises(AssertionError):
        check_commands(command)
