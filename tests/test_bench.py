"""Proofs of bench.py and of the optimizations it measures: each trains what the textbook's way
trains."""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench
import device
import model
import parallel
import prepare
import train
from bench import (
    OPTIMIZATIONS,
    ablation,
    count_flops,
    disable,
    main,
    measure_training,
    unavailable,
)
from files import InputError
from parallel import World
from train import TrainConfig

HERE = Path(__file__).parents[1]
SHAPE = ["--n_layer=2", "--d_model=64", "--n_head=4", "--n_kv_head=2", "--d_ff=176",
         "--vocab_size=256", "--context=96", "--micro_batch=4"]
CFG = TrainConfig(**{key: int(value) for key, value in (arg[2:].split("=") for arg in SHAPE)})


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """disable changes model.py for the process it is called in."""
    for name in "attention", "fused_linear", "FusedLinearCrossEntropy":
        monkeypatch.setattr(model, name, getattr(model, name))


def losses(left_out, steps=25):
    """Of steps on one text, without these optimizations."""
    disable(left_out)
    dtype = torch.float32 if "bf16" in left_out else torch.bfloat16
    with torch.device("meta"):
        llama = model.Llama(CFG)
    torch._dynamo.reset()
    called = parallel.parallelize(llama, World(torch.device("cpu")), "none", dtype,
                               "compilation" not in left_out)
    parallel.init_weights(llama, CFG.seed)
    optimizer = train.build_optimizer(llama, CFG, "fused AdamW" not in left_out)
    text = torch.tensor(list((HERE / "model.py").read_bytes() * 2)[:steps * 8 * 97])
    text = text.view(steps, 8, 97)
    return [train.train_step(called, optimizer, rows[:, :-1].contiguous(), rows[:, 1:].contiguous(),
                             2e-3, 4, dtype, 1.0)[0] for rows in text]


@pytest.fixture(scope="module")
def plain():
    """The textbook's losses: fp32, and nothing of ours."""
    with pytest.MonkeyPatch.context() as patch:
        for name in "attention", "fused_linear", "FusedLinearCrossEntropy":
            patch.setattr(model, name, getattr(model, name))
        return losses(OPTIMIZATIONS)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name == "compilation" else name
    for name in OPTIMIZATIONS if name != "no malloc trim"])
def test_every_optimization_trains_the_same(name, plain):
    """An optimization that rounds worse than bf16 must, or that is wrong, learns something else.
    In bf16, which rounds to a 256th, losses of a few nats stray by thousandths; alone in fp32 each
    must agree far better."""
    assert plain[-1] < 0.65 * plain[0]                # the text is model.py, which may change
    if name != "bf16":
        others = [other for other in OPTIMIZATIONS if other != name]
        if name == "chunked attention":
            others.remove("SDPA")
            model.attention = lambda q, k, v, mask: model.chunked_attention(q, k, v)   # in fp32 too
        assert losses(others) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("left_out", [["compilation"], pytest.param([], marks=pytest.mark.slow)])
def test_all_of_them_train_the_same_in_bf16(left_out, plain):
    assert losses(left_out) == pytest.approx(plain, rel=0.01)


# --------------------------------------------------------------------------------------------------
# The measurement

def test_flops_are_those_of_the_formulas():
    """TinyLlama's 7.71 GFLOP a token by the customary count, 6.76 by the strict one."""
    assert count_flops(TrainConfig(vocab_size=32_000)) == (7_707_586_560, 6_760_722_432)
    full, strict = count_flops(replace(CFG, tie_embeddings=True))
    assert full - strict == 6 * 2 * 64 * 96                      # tied, the embedding multiplies


def test_disable_changes_what_runs():
    """An ablation whose rows are all the same code would show the noise of the machine."""
    ours = model.attention, model.fused_linear, model.FusedLinearCrossEntropy
    disable([])
    assert (model.attention, model.fused_linear, model.FusedLinearCrossEntropy) == ours
    disable(["chunked attention", "fused projections", "chunked loss"])
    assert model.attention is bench.attention_by_sdpa
    assert model.fused_linear is bench.separate_linear
    assert model.FusedLinearCrossEntropy is bench.UnchunkedLoss
    disable(["chunked attention", "SDPA"])
    assert model.attention is bench.attention_by_definition


def test_ablation_adds_one_at_a_time(capsys):
    """Row i has the first i optimizations; besides, ours without the i-th alone. One that does not
    fit into memory must not end the rest."""
    asked = []

    def measure(disabled):
        asked.append(disabled)
        if len(disabled) == 3:
            raise torch.OutOfMemoryError("full")
        return {"seconds": [1 / (1 + 10 * (3 - len(disabled)))], "memory": 2e9}

    steps = ablation(["a", "b", "c"], 1, measure)
    assert asked == 2 * [["a", "b", "c"], ["b", "c"], ["c"], [], ["a"], ["b"]]
    assert [step["name"] for step in steps] == ["the textbook's way", "a", "b", "c"]
    assert [step["speed"] for step in steps] == [None, *map(pytest.approx, (11, 21, 31))]
    assert [step["without"] for step in steps] == [None, *map(pytest.approx, (21, 21, 21))]
    printed = capsys.readouterr().out
    assert "out of memory" in printed and "+ c" in printed and "1.91" in printed
    rows = ablation(["SDPA", "chunked attention"], 1, lambda _: {"seconds": [1], "memory": 1})
    assert [step["without"] for step in rows] == [None, None, 1]


def test_what_a_machine_cannot_do_is_left_out_and_said(monkeypatch):
    """An optimization that is not used must not stand in the table as if it had brought nothing."""
    monkeypatch.setattr(device, "compile_error", lambda device: None)
    reasons = unavailable(replace(CFG, dtype="float32", compile=False), torch.device("cpu"))
    assert set(reasons) == {"bf16", "chunked attention", "compilation"} and all(reasons.values())
    assert set(unavailable(replace(CFG, dtype="bfloat16", compile=True), torch.device("cuda"))) == {
        "chunked attention", "no malloc trim"}


@pytest.mark.slow
def test_bench_train_measures_and_ends_with_json(capfd):
    """Scripts read the last line; its numbers must belong together."""
    main(["train", *SHAPE, "--compile=False", "--seconds=0.1", "--batch=768", "--dtype=float32"])
    out = capfd.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert {"tokens_per_second", "mfu", "peak_memory"} <= set(found)
    flops, strict = count_flops(CFG)
    assert found["mfu"] == pytest.approx(found["tokens_per_second"] * flops / found["products"])
    assert 0 < found["mfu_strict"] < found["mfu"] < 1 and found["peak_memory"] > 1e8
    assert "micro-batches of 4 x 96" in out and "left out: compilation: as asked" in out


def test_bench_prepare_measures_and_ends_with_json(tmp_path, capsys, monkeypatch):
    """Ratios come from one run in which both give the same ids, or they mean nothing."""
    monkeypatch.setattr(bench, "run_in_process", lambda function, *args: function(*args))
    texts = re.split("(?<=\n)\n\n(?=[a-z])", (HERE / "tokenizer.py").read_text())
    for name in "one", "two":
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"content": text}) + "\n" for text in texts))
    (tmp_path / "tokenizer.model").write_bytes(prepare.train_tokenizer(texts, 400))
    main(["prepare", str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl"),
          "--text_key=content", f"--tokenizer={tmp_path / 'tokenizer.model'}"])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    ratios = [one["ratio_to_sentencepiece"] for one in result["results"].values()]
    assert len(ratios) == 2 and result["ratio_to_sentencepiece"] == min(ratios) > 0
    assert result["peak_memory"] >= 0 and result["bytes_per_second"] > 0
    for one in result["results"].values():
        assert one["ratio_to_sentencepiece"] == pytest.approx(
            one["bytes_per_second"] / one["sentencepiece"])
        assert one["bytes"] == sum(len(text.encode()) for text in texts[1::2])


def test_ids_that_differ_are_no_result(tmp_path, capsys, monkeypatch):
    """A fast encoder that gives other ids is not faster."""
    monkeypatch.setattr(bench, "run_in_process", lambda _, model, texts, plain: (1.0, plain, 0))
    (tmp_path / "a.txt").write_text("some text " * 9)
    (tmp_path / "tokenizer.model").write_bytes(prepare.train_tokenizer(["some text abc"], 272))
    with pytest.raises(SystemExit, match="a.txt differ"):
        main(["prepare", str(tmp_path / "a.txt"), f"--tokenizer={tmp_path / 'tokenizer.model'}"])


@pytest.mark.slow
def test_memory_of_a_step_is_near_what_was_counted():
    """A copy of the logits, or gradients kept from one step to the next, would be found only on a
    full card. What libraries take is the same for a large and a small model; what is left is gaps
    between blocks of memory, a third in so small a model and a tenth in one three times as
    large."""
    shape = dict(d_model=256, n_head=4, n_kv_head=2, d_ff=704, vocab_size=4096, context=512)
    large, small = (bench.run_in_process(
        measure_training, TrainConfig(n_layer=layers, micro_batch=micro, **shape), micro, 0.1,
        ["compilation"]) for layers, micro in ((8, 8), (1, 1)))
    found, estimate = (large[key] - small[key] for key in ("memory", "estimate"))
    assert estimate > 5e8 and 0.8 < found / estimate < 1.5


@pytest.mark.parametrize("argv, words", [
    (["--contxt=5"], "there is no key 'contxt'; nearest: context"),
    (["--batch=5"], "--batch=5 is less than one sequence of 96 tokens"),
    (["--data=absent"], "there is no folder data/absent"),
    (["absent.py"], "there is no recipe 'absent.py'"),
])
def test_bad_input_is_named(argv, words):
    """Ten minutes of measuring must not end in a stack trace."""
    with pytest.raises((SystemExit, InputError), match=words):
        main(["train", *SHAPE, "--compile=False", "--seconds=0.1", *argv])


@pytest.mark.parametrize("argv, words", [
    (["a.txt"], "need a --tokenizer"), (["a.txt", "--tokenizer=x"], "there is no file a.txt"),
    (["--tokenizer=absent.model"], "no tokenizer absent.model")])
def test_bad_input_of_prepare_is_named(argv, words):
    """Ten minutes of measuring must not end in a stack trace."""
    with pytest.raises(SystemExit, match=words):
        main(["prepare", *argv])


def test_transformers_takes_the_same_shape():
    """A name that moved to another file would be missed by the slow test below alone."""
    assert len(bench.measure_transformers(replace(CFG, compile=False), 4, 0.0)) >= 5


@pytest.mark.slow
def test_transformers_is_measured_too(capfd):
    """Both in processes of their own, twice in turns, and the ratio of what was printed."""
    main(["train", *SHAPE, "--compile=False", "--seconds=0.1", "--peers"])
    out = capfd.readouterr().out
    found = json.loads(out.splitlines()[-1])
    theirs, = re.findall(r"^transformers, .*: ([\d,]+) tokens/s", out, re.M)
    assert found["ratio_to_transformers"] == pytest.approx(
        found["tokens_per_second"] / int(theirs.replace(",", "")), rel=0.01)


# --------------------------------------------------------------------------------------------------
# Generation

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small model."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    llama = model.Llama(model.ModelConfig(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_ff=192,
                                          vocab_size=256, context=96))
    llama.init_weights().bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Without processes of their own, which take seconds each to start."""
    monkeypatch.setattr(bench, "run_in_process", lambda function, *args: function(*args))
    monkeypatch.setattr(bench, "read_limit", lambda device: 1e10)


def test_generation_is_measured(small, here, capfd):
    """Bytes that a step reads, by hand; a share of the limit that follows from them; and the first
    rate is that of the weights as they are."""
    main(["generate", str(small), "--prompt=20", "--tokens=9", "--compile=False", "--batch=3"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    size = torch.finfo(bench.find_dtype(bench.find_device())[0]).bits // 8
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192) + 256 * 64
    cache = 2 * 2 * 3 * 2 * 128 * 16 * size
    full, int8, int4 = found["results"].values()
    assert full["bytes_per_step"] == size * weights + cache
    scales, head = 2 * weights // 64, 256 * 64               # in int4 the head stays int8
    assert int8["bytes_per_step"] == weights + scales + cache
    assert int4["bytes_per_step"] == (weights + head) // 2 + scales + cache
    assert found["tokens_per_second"] == full["tokens_per_second"] > 0
    for row in full, int8, int4:
        seconds = 3 / row["tokens_per_second"]
        assert row["share"] == pytest.approx(row["bytes_per_step"] / seconds / 1e10)


def test_generation_is_measured_without_a_compiler(small, here, monkeypatch, capfd):
    """It is compiled by default, and where nothing compiles there is still something to measure."""
    monkeypatch.setenv("CC", "nowhere/cc")
    main(["generate", str(small), "--prompt=20", "--tokens=5", "--precisions=full"])
    printed = capfd.readouterr().out
    assert "not compiled: nowhere/cc does not compile decode.c" in printed
    assert '"tokens_per_second"' in printed


@pytest.mark.parametrize("argv, words", [
    (["absent"], "there is no folder absent"), (["--batch=0"], "must be at least 1"),
    (["--precisions=int3"], "none of full, int8, int4"),
    (["--prompt=2000"], "are more than the context of 2048")])
def test_bad_input_of_generate_is_named(argv, words, capsys):
    """Ten minutes of measuring must not end in a stack trace."""
    with pytest.raises((SystemExit, InputError)) as error:
        main(["generate", *argv])
    assert words in str(error.value) + capsys.readouterr().err
