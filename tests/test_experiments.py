"""Proofs of experiments.py: a variant differs from the recipe in what it says and in nothing else,
and a table calls no difference one that seeds may make."""
import random
import shutil
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_prepare import TEXT

import config_demo
import experiments
import train
from data import Source, parse_stages, sequences_per_source
from experiments import CODE, PROSE, SEEDS, find_variants, format_table
from files import InputError, read_json, to_json, write_json
from model import Llama, ModelConfig
from prepare import train_tokenizer, write_source

HERE = train.Path(train.__file__).parent
TINY = ModelConfig(n_layer=2, d_model=32, n_head=4, n_kv_head=2, d_ff=48, vocab_size=64, context=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the demo's recipe, and two small sources of the names that the demo's have."""
    world = tmp_path_factory.mktemp("world")
    shutil.copy(HERE / "config_demo.py", world)
    texts = [" ".join(random.Random(i).choices(TEXT.split(), k=300)) for i in range(100)]
    tokenizer = train_tokenizer(texts, 320)
    for name, part in (CODE, texts[:50]), (PROSE, texts[50:]):
        write_source(world / "data" / name, part, tokenizer, 0.2, "a test")
    return world


def given(stages):
    """{source: sequences} of a recipe's stages, in all."""
    total = Counter()
    for stage in parse_stages(stages, config_demo.context):
        total.update(sequences_per_source(stage, stage.steps * stage.batch))
    return total


def test_variants_have_equal_tokens_and_say_what_differs():
    """A variant that reads more than another, or "one stage" of another mixture than the three
    have, would compare two things at once."""
    recipe = {name: stages for name, (stages, _) in find_variants("recipe", 3_200_000).items()}
    assert recipe["three stages"] == config_demo.stages
    for stages in recipe.values():
        assert given(stages).total() == pytest.approx(given(config_demo.stages).total(), rel=0.003)
        # without the ramp it is 8 % more
        assert given(stages)[CODE] == pytest.approx(given(config_demo.stages)[CODE], rel=0.1)
    # until the cooldown the learning rates are the same, as they follow from the total
    assert given(recipe["no cooldown"]) == given(config_demo.stages)
    assert not any(stage.get("ramp") for stage in recipe["no ramp"])
    one, = recipe["one stage"]
    assert given([one])[CODE] == pytest.approx(given(config_demo.stages)[CODE], rel=0.005)
    assert {stage["batch"] for stage in recipe["no cooldown"]} == {one["batch"]} == {2048}
    for experiment in "mixture", "epochs":
        found = find_variants(experiment, 3e6)
        assert len({given(stages).total() for stages, _ in found.values()}) == 1
        for name, (stages, change) in found.items():
            code = given(stages)[CODE] / given(stages).total()
            assert f"{code:.0%} code" == name or code == 1 and name.startswith(
                f"{change[2].keywords['n']} x ")
    for name in experiments.NAMES:
        for _, change in find_variants(name, 3e6).values():
            assert not change or callable(getattr(*change[:2]))      # of a name that is still there


def test_learning_rates_end_where_the_cosine_does():
    """A schedule that ends elsewhere, or differs before it should, would be judged for that."""
    cfg = train.TrainConfig(stages=[{"tokens": 800}, {"tokens": 200}], warmup_steps=0,
                            learning_rate=8e-3, min_lr=8e-4)
    cosine, linear, lowered = ([rate(tokens, 1000, 100, cfg) for tokens in range(1, 1001)]
                               for rate in (train.lr_at, experiments.decay_linearly,
                                            experiments.lower_last_rate))
    assert linear[:99] == pytest.approx(cosine[:99]) and linear[99:800] == [8e-3] * 701
    assert linear[899] == pytest.approx(4.4e-3) and linear[-1] == pytest.approx(cosine[-1])
    assert lowered[:800] == cosine[:800]
    assert lowered[800:] == pytest.approx([rate / 4 for rate in cosine[800:]])


@pytest.fixture
def step():
    """step(build) moves a tiny model once, with an optimizer so built and gradients that are drawn,
    or zero. Returns {name: (weight before, weight after)}."""
    def step(build, gradients=1.0):
        torch.manual_seed(0)
        model = Llama(TINY).init_weights()
        optimizer = build(model, train.TrainConfig())
        optimizer.param_groups[0]["lr"] = 0.01
        for p in model.parameters():
            p.grad = gradients * torch.randn_like(p)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        return {name: (before[name], p.detach()) for name, p in model.named_parameters()}
    return step


def test_only_norms_are_exempt_from_decay(step):
    """A parameter in no group would not be trained at all."""
    for name, (before, after) in step(experiments.exempt_norms, gradients=0).items():
        assert torch.equal(before, after) == name.endswith("norm.weight"), name
    plain = step(train.build_optimizer)
    for name, (_, after) in step(experiments.exempt_norms).items():
        assert name.endswith("norm.weight") or torch.equal(after, plain[name][1]), name
        assert not torch.equal(*plain[name]), name


def test_muon_moves_matrices_of_blocks_by_orthogonal_steps(step):
    """Singular values of an update that are not about 1, at the size that AdamW's steps have, are
    another optimizer; and what is no matrix of a block has to move as AdamW moves it."""
    plain = step(train.build_optimizer)
    for name, (before, after) in step(experiments.build_muon).items():
        if name.startswith("blocks.") and before.ndim == 2:
            update = (before * (1 - 0.01 * 0.1) - after) / (0.01 * 0.2 * max(before.shape) ** 0.5)
            values = torch.linalg.svdvals(update)
            assert values.min() > 0.5 and values.max() < 1.5, name
        else:
            assert torch.equal(after, plain[name][1]), name


def test_initial_values_are_those_of_pytorch():
    """Two ways, one answer: layers as PyTorch makes them, and what is drawn here."""
    torch.manual_seed(1)
    linear, drawn = torch.nn.Linear(32, 64, bias=False).weight.detach(), torch.empty(64, 32)
    torch.manual_seed(1)
    experiments.pytorch_init(None, "head.weight", drawn)
    assert torch.equal(drawn, linear)
    experiments.pytorch_init(None, "embed.weight", drawn)
    assert drawn.std().item() == pytest.approx(1, rel=0.1)            # as nn.Embedding's
    norm = torch.empty(32)
    experiments.pytorch_init(None, "norm.weight", norm)
    assert (norm == 1).all()


def test_repeated_windows_are_few_and_from_everywhere(world):
    """Windows of one corner of a source would be another text, and fewer of the validation split
    another measure."""
    plain = Source(world / "data" / CODE, "train", 8)
    source = experiments.every_nth(world / "data" / CODE, "train", 8, n=3, most=100)
    assert source.windows == 33
    for i in range(source.windows):
        assert (source.example(i) == plain.example(3 * i)).all()
    for name, split in (CODE, "val"), (PROSE, "train"):
        whole = experiments.every_nth(world / "data" / name, split, 8, n=3, most=100)
        assert whole.windows == Source(world / "data" / name, split, 8).windows > 33
    with pytest.raises(InputError, match="has less than 100000 windows: fewer --tokens"):
        experiments.every_nth(world / "data" / CODE, "train", 8, n=3, most=100_000)


def result(code, prose):
    return {"bits_per_byte": {CODE: code, PROSE: prose}, "minutes": 2.0, "commit": "abc"}


def test_a_table_tells_apart_what_chance_cannot_explain():
    """Seeds may differ by more than variants. What counts is whether a variant differs from the
    first by more than its differences, seed by seed, do among each other; 4.303 is Student's t for
    three of them at 5 %."""
    runs = {"a": [1.00, 1.10, 1.05], "b": [1.02, 1.12, 1.08], "c": [1.02, 1.12, 1.06]}
    table = format_table({name: {seed: result(bits, 2.0) for seed, bits in zip(SEEDS, values)}
                          for name, values in runs.items()})
    same = "2.000 ± 0.000 | +0.000 ± 0.000, not told apart | 6 | abc |"
    assert table.splitlines()[2:] == [
        "| a | 1.050 ± 0.050 |  | 2.000 ± 0.000 |  | 6 | abc |",
        f"| b | 1.073 ± 0.050 | +0.023 ± 0.006 | {same}",
        f"| c | 1.067 ± 0.050 | +0.017 ± 0.006 | {same}"]
    for third, words in (1.088, ""), (1.089, ", not told apart"):     # t is 4.33, 4.16
        runs["c"][2] = third
        table = format_table({name: {seed: result(bits, 2.0) for seed, bits in zip(SEEDS, values)}
                              for name, values in runs.items()})
        assert f"± {0.010 if third == 1.088 else 0.011:.3f}{words} | 2.000" in table


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    """An hour of runs that starts anew after Ctrl-C; or one that goes on with results of stages
    that the recipe no longer has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/experiments/100000").mkdir(parents=True)
    done = []

    def pool(jobs, max_tasks_per_child):       # all in this process, but each wants one of its own
        assert max_tasks_per_child == 1
        return nullcontext(SimpleNamespace(map=map))

    def run_variant(experiment, variant, tokens, seed):
        done.append((variant, seed))
        if len(done) == 5:
            raise KeyboardInterrupt
        return {"stages": find_variants(experiment, tokens)[variant][0]} | result(1.0, len(done))

    monkeypatch.setattr(experiments, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(experiments, "run_variant", run_variant)
    args = SimpleNamespace(tokens=100_000, jobs=1)
    with pytest.raises(KeyboardInterrupt):
        experiments.run_experiment("mixture", args)
    assert experiments.run_experiment("mixture", args).keys() == find_variants("mixture", 1).keys()
    assert Counter(done).most_common(1) == [(done[4], 2)] and len(done) == 5 * 3 + 1
    path = tmp_path / "out/experiments/100000/results.json"
    write_json(path, read_json(path) | {"10% code": {"1": {"stages": []}}})
    experiments.run_experiment("mixture", args)
    assert done[16:] == [("10% code", seed) for seed in SEEDS]


def test_finished_results_are_only_shown(tmp_path, monkeypatch, capsys):
    """A picture or a table that fails after an hour of runs; or runs that begin again for it."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "run_variant", None)
    variants = find_variants("mixture", 3_200_000)
    results = {name: {seed: {"stages": stages} | result(k + int(seed) / 10, 2.0) for seed in SEEDS}
               for k, (name, (stages, _)) in enumerate(variants.items())}
    folder = tmp_path / "out/experiments/3200000"
    folder.mkdir(parents=True)
    write_json(folder / "results.json", results)
    experiments.main(["mixture", "--jobs=1"])
    assert format_table(results) in capsys.readouterr().out
    assert (folder / "mixture.png").read_bytes().startswith(b"\x89PNG")
    for wrong in ["recipes"], ["--jobs=0"], ["--tokens=1000"]:
        with pytest.raises(SystemExit):
            experiments.parse_args(wrong)


def test_a_run_is_train_py_with_one_change(tmp_path, monkeypatch):
    """A seed or a change that does not reach train.py gives rows that are equal; and a run that was
    stopped has no result."""
    monkeypatch.chdir(tmp_path)
    for name in "lr_at", "main":
        monkeypatch.setattr(train, name, getattr(train, name))        # to be put back afterwards
    argv, steps = [], [1345, 700]

    def main(arguments):
        argv[:] = arguments
        cfg, _ = train.read_recipe([str(HERE / arguments[0]), *arguments[1:]])
        folder, step = tmp_path / cfg.out_dir, steps.pop(0)
        (folder / f"step_{step:08d}").mkdir()
        record = {"step": step, "tokens": 9, "loss": 2.0, "bits_per_byte": {CODE: 1, PROSE: 2}}
        (folder / "metrics.jsonl").write_text(f"{to_json(record)}\n")

    def leave(code):
        raise KeyboardInterrupt(code)

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(experiments.os, "_exit", leave)
    found = experiments.run_variant("recipe", "linear decay", 3_200_000, "2")
    assert found["bits_per_byte"] == {CODE: 1, PROSE: 2} and found["stages"] == config_demo.stages
    assert train.lr_at is experiments.decay_linearly and "--seed=2" in argv
    with pytest.raises(KeyboardInterrupt, match="130"):
        experiments.run_variant("recipe", "linear decay", 3_200_000, "2")


@pytest.mark.slow
def test_a_change_reaches_train_py(world, monkeypatch):
    """The recipe's own result in each row would say that nothing is told apart."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(train, "build_optimizer", train.build_optimizer)
    plain, muon = (experiments.run_variant("recipe", name, 65_536, "1")["bits_per_byte"]
                   for name in ("three stages", "Muon"))
    assert plain.keys() == muon.keys() == {CODE, PROSE}
    assert all(abs(plain[name] - muon[name]) > 1e-3 for name in plain)
    log = (world / "out/experiments/65536/Muon-1/log.txt").read_text()
    assert "is the end of the run" in log and "stage 3: " in log
