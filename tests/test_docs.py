"""Proofs of README.md and docs/: what is named exists, examples run, and numbers that can be
computed, or are of a run that is kept in docs/, are those numbers. Each check takes a page and its
text. CHECKS, at the end, says which pages it is for, and gives it mistakes to find."""
import doctest
import hashlib
import io
import re
import shlex
from contextlib import chdir, redirect_stdout
from dataclasses import fields

import pytest
import torch
from test_commands import ADDED, CODE, HERE, PAGES, README, TESTS, TEXTS, find_commands, one_line

import bench
import experiments
import plot
from config import load_config
from files import read_json, to_json
from metrics import format_record
from model import Llama, ModelConfig
from plan import print_plan
from train import TrainConfig, lr_at, read_recipe

# Files of ours have one of these endings, or lie in one of these folders. What a user or a run
# makes does not: my.txt, config.json, data/NAME/train_00000.bin, out/RUN/metrics.jsonl.
OURS = re.compile(r"(?<![\w/.:~-])((?:docs|runs|tests)/[\w./*-]*|[\w*][\w./*]*\.(?:py|c|md|sh|cff))"
                  r"(?![\w(-])")
OTHERS = {"EVAL.md", "lit_gpt/config.py", "RECIPE.py"}     # the original's; a placeholder
OPTIONS = {*re.findall(r'"(--[\w-]+)"', "".join(CODE.values())), "--key",
           *(f"--{field.name}" for field in fields(TrainConfig))}
NAMES = {*re.findall(r"\w+", "".join(CODE.values())), *re.findall(r"def (test_\w+)", TESTS),
         "linear_cross_entropy", "flex_attention", "window_size"}           # of other programs


def check_paths(path, text):
    """A link to a page or section that moved, or a file that was renamed, sends readers nowhere."""
    for name in {name.rstrip(".") for name in OURS.findall(text)} - {*OTHERS, *ADDED}:
        assert any(any(folder.glob(name)) for folder in (HERE, path.parent, HERE / "tests")), name
    links = re.findall(r"\]\(([^)#:]*)(?:#([\w-]+))?\)(?:,\s([A-Z]\w+))?", text) + [
        (README, "", title) for title in re.findall(r"README,\s([A-Z]\w+)", text)]
    for target, *sections in links:
        page = path.parent / target if target else path
        assert page.exists(), target
        titles = re.findall(r"^#+ (.*)", page.read_text(), re.M) if page.suffix == ".md" else []
        titles = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert {title.lower() for title in sections if title} <= titles, (target, sections)


def check_names(path, text):
    """An exercise about a function, or an option of a program, that has another name now. Names are
    `x` in `file`, `--options`, and what has an underscore as ours have."""
    block = re.compile(r"^ *```.*?^ *```", re.M | re.S)
    blocks, prose = "".join(block.findall(text)), one_line(block.sub("", text))
    for name, file in re.findall(r"`(\w+)`(?:,? and `\w+`)? (?:in|of) `(\w+\.(?:py|c))`", prose):
        defined = rf"(def|class) {name}\b|^{name}\b.* =|^\w.* {name}\("
        assert re.search(defined, CODE[file], re.M), f"{name} in {file}"
    for name in re.findall(r"`(--[\w-]*\w|[a-z]\w*_\w+)[`=\[ ]", prose):
        assert name in OPTIONS | NAMES or name[0] == "-" and name in blocks, name


def check_lines(path, text):
    """A file grown to twice what the map says is not one to read in an evening. Lines, there and
    after a file's name, are rounded to ten, so they may be ten away."""
    rows = re.findall(r"^\| ([`*].*?) \| (\d+) \|", text, re.M)
    for files, printed in rows + re.findall(r"(`\w+\.(?:py|c)`)[^`.|]{,40}? (\d+) lines", text):
        lines = sum(CODE[name].count("\n") for name in re.findall(r"\w+\.\w+", files))
        assert abs(int(printed) - lines) <= 10, f"{files}: {lines} lines"
    listed = re.findall(r"\w+\.\w+", " ".join(files for files, _ in rows))
    ours = {name for name in CODE if not re.match("config_|test_|conftest", name)}
    assert path != README or sorted(listed) == sorted(ours | {"config_demo.py"})


# --------------------------------------------------------------------------------------------------
# Numbers that can be computed

with torch.device("meta"):
    TINYLLAMA, DEMO, BENCH = (Llama(cfg) for cfg in (
        ModelConfig(), read_recipe([str(HERE / "config_demo.py"), "--vocab_size=4096"])[0],
        load_config(bench.ON_CPU, TrainConfig)))
CFG = TINYLLAMA.config
LETTERS = {"C": CFG.d_model, "K": CFG.n_kv_head, "D": CFG.head_dim, "F": CFG.d_ff,
           "V": CFG.vocab_size}
UNITS = {"": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "million": 1e6, "billion": 1e9}


def check_sums(path, text):
    """A digit lost where a page multiplies and adds up: before a =, and in the model's drawing."""
    number = r"\d[\d,]*(?:\.\d+)?"
    term, result = rf"{number}(?: [a-zA-Z]{{3,}})*", rf"\**({number})(?: ([kMG]B|[mb]illion)\b|)"
    found = re.findall(rf"(?<![\d.,/−-])(?<![/−-] )({term}(?: [×+] {term})+) = {result}",
                       one_line(text))
    found += re.findall(rf"\*\*([\dCDFK+() ]+) = {result}", text)
    found += re.findall(rf"([2CDFKV·]+) {{9,}}({number})(?: +│)?()$", text, re.M)
    for formula, printed, unit in found:
        product = re.sub(r"[a-zA-Z]{3,}|,", "", formula).translate({ord("×"): "*", ord("·"): "*"})
        product = eval(re.sub(r"(?<=[\dA-Z)]) ?(?=[A-Z(])", "*", product), None, LETTERS)
        digits = len(printed.partition(".")[2])
        assert f"{product / UNITS[unit]:.{digits}f}" == printed.replace(",", ""), formula


def check_counts(path, text):
    """Another shape of TinyLlama, the demo or bench.py's model would keep its old parameters."""
    flops, cfg = TINYLLAMA.flops_per_token(), BENCH.config
    tinyllama, layer, demo, small = (
        sum(p.numel() for p in model.parameters())
        for model in (TINYLLAMA, TINYLLAMA.blocks[0], DEMO, BENCH))
    phrases = {README: [
        f"C = {CFG.d_model} wide, H = {CFG.n_head} query heads, K = {CFG.n_kv_head} key/value "
        f"heads of D = {CFG.head_dim}, F = {CFG.d_ff}, V = {CFG.vocab_size}, {CFG.n_layer} layers",
        f"One layer has {layer:,} parameters", f"= **{tinyllama:,}**",
        f"{CFG.n_layer * 2 * CFG.n_kv_head * CFG.head_dim * 2:,} bytes per token",
        f"= {flops / 1e9:.1f} GFLOP per token",
        f"{demo:,} parameters, {DEMO.flops_per_token():,} FLOPs per token"],
        FIDELITY: [f"C width, T context): {flops / 1e9:.2f} GFLOP."], PERFORMANCE: [
        f"{cfg.n_layer} layers, {cfg.d_model} wide, {cfg.n_head} query heads over {cfg.n_kv_head}, "
        f"feed-forward {cfg.d_ff:,}, a vocabulary of {cfg.vocab_size:,}, {small / 1e6:.1f} million "
        f"parameters, in batches of {cfg.micro_batch} × {cfg.context}"]}
    for phrase in phrases[path]:
        assert phrase in one_line(text), phrase
    rows = [int(row.replace(",", "")) for row in re.findall(r" ([\d,]+) │$", text, re.M)]
    assert sum(rows) == (layer if path == README else 0)


def plan(arguments):
    """What --plan prints where there are neither data nor checkpoints, as in docs/."""
    with chdir(HERE / "docs"), redirect_stdout(io.StringIO()) as printed:
        print_plan(*read_recipe([str(HERE / word) if word.endswith(".py") else word
                                 for word in arguments]), lr_at)
    return printed.getvalue()


def check_plans(path, text):
    """Recipes that were changed would keep their old price: in the table of recipes, in a plan that
    is shown, and on a page that says by which --plan --gpus=N it found its GPU-hours."""
    for command in find_commands(text):
        if "--plan" in command:
            printed = plan(shlex.split(command.partition("train.py")[2]))
            shown = re.search(rf"^\$ {re.escape(command)}\n(.*?)```", text, re.M | re.S)
            assert not shown or shown[1] == printed, command
            hours = re.findall(r"time: ([\d.,]+)", printed)[-1]
            assert hours in text or "--gpus" not in command, f"{command}: {hours} GPU-hours"
    for recipe, tokens, unit, hours in re.findall(
            r"^\| `(config_\w+\.py)` .*?\| ([\d.]+)([TB])[a-z ]* \| ([\d.,]+) \|", text, re.M):
        printed, digits = plan([recipe]), len(tokens.partition(".")[2])
        trained = int(re.search(r"compute: ([\d,]+)", printed)[1].replace(",", ""))
        assert f"{trained / {'T': 1e12, 'B': 1e9}[unit]:.{digits}f}" == tokens, recipe
        assert f"time: {hours} GPU-hours" in printed, recipe


# --------------------------------------------------------------------------------------------------
# Runs that are kept in docs/, and examples

LOG = (HERE / "docs/demo/log.txt").read_text().splitlines()
RECORDS = plot.read_metrics(HERE / "docs/demo")


def shows(picture, data):
    """Whether a PNG was drawn from data."""
    return hashlib.sha256(to_json(data).encode()).hexdigest().encode() in picture.read_bytes()


def check_demo(path, text):
    """Output put together from several runs promises what none of them did. It has lines of the
    log, in its order; " ..." is what is left out at the end of one."""
    block = re.search(r"^\$ python prepare\.py demo\n(.*?)```", text, re.M | re.S)
    assert block or path != README
    lines = block[1].splitlines() if block else re.findall(r"^step \d+/.*", text, re.M)
    rest = iter(LOG)
    for line in lines:
        if line and not line.startswith("$ "):
            start = line.removesuffix(" ...")
            assert any(logged == line or start != line and logged.startswith(start)
                       for logged in rest), line
    ends = [RECORDS[0], *(last for _, last in plot.find_stages(RECORDS).values())]
    for name in ("prose", "code") if path == README else ():
        bits = [f"{record['bits_per_byte'][f'demo-{name}']:.3f}" for record in ends]
        assert f"| {name} | {' | '.join(bits[:-1])} | **{bits[-1]}** |" in text, bits


def test_the_demo_that_is_kept_is_one_run():
    """The README's picture and the log below it were of different runs."""
    assert [line for line in LOG if re.match(r"step \d+/", line)] == [
        format_record(record, RECORDS[-1]["step"]) for record in RECORDS]
    assert shows(HERE / "demo.png", [RECORDS]) and not shows(HERE / "demo.png", [RECORDS[1:]])


@pytest.mark.parametrize("name", experiments.NAMES)
def test_tables_of_experiments_are_of_the_results_that_are_kept(name):
    """A table pasted before the last run; results of variants that are others by now."""
    variants = experiments.find_variants(name, experiments.parse_args([]).tokens)
    kept = read_json(HERE / "docs/experiments/results.json")
    results = {variant: kept[variant] for variant in variants}
    for variant, (stages, _) in variants.items():
        assert all(run["stages"] == stages for run in results[variant].values()), variant
    assert experiments.format_table(results) in (HERE / "docs/log.md").read_text()
    assert shows(HERE / f"docs/experiments/{name}.png", experiments.read_bits(results))


def check_examples(path, text):
    """An example that fails, or prints something else, is the first thing that a learner tries."""
    text, printed = re.sub(r"^ *```.*", "", text, flags=re.M), []      # a fence would be output
    examples = doctest.DocTestParser().get_doctest(text, {}, path.name, str(path), 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    with chdir(HERE):
        assert not runner.run(examples, out=printed.append).failed, "".join(printed)


def test_an_example_runs():
    """In the project's folder, and the fence is no output."""
    check_examples(README, "```python\n>>> import os, data\n>>> os.path.isfile('train.py')\n"
                           "True\n```\nThat is all.")


# --------------------------------------------------------------------------------------------------
# The checks, the pages that they are for, and mistakes: a page, what it says, and what it would say

TRAINING, PERFORMANCE, FIDELITY = (
    HERE / f"docs/{name}.md" for name in ("training", "performance", "fidelity"))
CHECKS = {
    check_paths: (TEXTS, [
        (README, "`model.py`", "`modle.py`"), (README, "docs/data.md", "docs/date.md"),
        (README, "(demo.png)", "(demos.png)"), (README, "runs/base.sh", "runs/bases.sh"),
        (README, "(docs/data.md)", "(docs/data.md#formats)"),
        (TRAINING, "(performance.md), Memory", "(performance.md), Memories")]),
    check_names: (PAGES, [
        (TRAINING, "`TrainConfig` in", "`Config` in"), (README, "`pytest`", "`test_nothing`"),
        (TRAINING, "`--micro_batch`", "`--micro_batches`"),
        (TRAINING, "`fork_from`", "`forks_from`")]),
    check_lines: (PAGES, [
        (README, "| 20 |", "| 40 |"), (README, "`decoder.py`, ", ""),
        (README, "`pytest`", "`train.py` has 500 lines")]),
    check_sums: (PAGES, [
        (README, "11,534,336", "11,534,337"), (README, "+ 2,048 =", "+ 2,049 ="),
        (README, "= 22,528", "= 22,529"), (PERFORMANCE, "= 79 kB", "= 78 kB")]),
    check_counts: ([README, PERFORMANCE, FIDELITY], [
        (README, "44,044,288", "44,044,287"), (README, "V = 32000", "V = 32001"),
        (README, "11,534,336 │", "11,534,336"), (README, "1,602,432", "1,602,433"),
        (README, "10,794,240", "10,794,241"), (README, "7.7 GFLOP", "7.6 GFLOP"),
        (PERFORMANCE, "26.7 million", "26.8 million"), (FIDELITY, "7.71", "7.70")]),
    check_plans: (PAGES, [
        (README, "34,722", "34,721"), (README, "| 2.4B |", "| 2.5B |"),
        (TRAINING, "817,436", "817,437"), (PERFORMANCE, "7,493", "7,494")]),
    check_demo: (PAGES, [
        (README, "tok/s", "tokens/s"), (README, "nats/token, ...", "nats/token"),
        (README, "documents  ", "document  "), (README, "| prose |", "| text |"),
        (TRAINING, "tok/s", "tokens/s")]),
    check_examples: (PAGES, [
        (README, "```\n", "```\n>>> 1 + 1\n3\n```\n"),
        (README, "```\n", "```\n>>> import nothing\n```\n")])}


def find_name(value):
    return getattr(value, "__name__", getattr(value, "name", None))


@pytest.mark.parametrize("check, path", [(check, path) for check, (pages, _) in CHECKS.items()
                                         for path in pages], ids=find_name)
def test_what_is_written_is_true(check, path):
    """What each check is for, of each page."""
    check(path, TEXTS[path])


@pytest.mark.parametrize("check, path, said, wrong", [
    (check, *mistake) for check, (_, mistakes) in CHECKS.items() for mistake in mistakes],
    ids=find_name)
def test_mistakes_are_found(check, path, said, wrong):
    """A check that lets a mistake pass proves nothing."""
    assert said in TEXTS[path]
    with pytest.raises(AssertionError):
        check(path, TEXTS[path].replace(said, wrong, 1))


def test_the_readme_is_short():
    """A README that grows is read by nobody."""
    lines = TEXTS[README].splitlines()
    assert len(lines) <= 260 and max(map(len, lines)) <= 100
