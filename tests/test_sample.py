"""Proofs of sample.py: the same text by every way, the right distribution, and nothing but text on
standard output."""
import codecs
import json
import math
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prepare import AWKWARD, TEXT

import quantize
import sample
from decoder import compile_steps
from files import InputError
from hf import newest
from model import Llama, ModelConfig
from prepare import train_tokenizer, write_tokenizer
from quantize import freeze_for_inference, load_frozen
from sample import (
    Decoder,
    TextStreamer,
    Tokenizer,
    find_model,
    generate,
    load_model,
    sample_token,
    should_compile,
    speculate,
    top_k_top_p,
    truncate_at_eos,
)

HERE = Path(__file__).parents[1]
NO_COMPILER = not shutil.which("cc")
VERSE = "Two roads diverged — 中 🙂 — in a yellow wood."


def learn_by_heart(model, x, y, steps):
    """Trains on one batch alone; its last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = model(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has learned one sentence by heart, from <s> to </s>."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tokenizer(folder, train_tokenizer([TEXT, "Two roads diverged in a yellow wood."], 320))
    config = ModelConfig(n_layer=2, d_model=48, n_head=6, n_kv_head=2, d_ff=80, vocab_size=320,
                         context=64)
    torch.manual_seed(0)
    model = Llama(config).init_weights()
    model.save_pretrained(folder)
    ids = torch.tensor([[1, *Tokenizer(folder).encode(VERSE), 2]])
    assert 30 < ids.shape[1] < 60
    assert learn_by_heart(model, ids[:, :-1], ids[:, 1:], 80) < 0.05
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load_model(folder, dtype=torch.float32)
    return model.cpu(), tokenizer


def greedy(logits):
    return logits.argmax(-1)


def decoder(model, rows=1, **options):
    return Decoder(model, rows, model.config.context, model.config.vocab_size, **options)


def texts_of(steps):
    """The ids of each row, of what generate or speculate yields."""
    return [sum(row, []) for row in zip(*steps)]


def tiny(seed, **shape):
    torch.manual_seed(seed)
    config = ModelConfig(**dict(n_layer=2, d_model=48, n_head=6, n_kv_head=2, d_ff=80,
                                vocab_size=320, context=64) | shape)
    return freeze_for_inference(Llama(config).init_weights())


@pytest.fixture
def run(capsys):
    """run(arguments...) is what the program prints and how it ends, without starting a process."""
    def run(*arguments):
        code, message = 0, ""
        try:
            sample.main([str(a) for a in arguments])
        except (SystemExit, InputError, OSError) as error:
            code, message = 1, str(error)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, printed.out, printed.err + message)

    return run


def start(*arguments):
    return subprocess.run([sys.executable, str(HERE / "sample.py"), *map(str, arguments)],
                          capture_output=True, text=True, encoding="utf-8", timeout=120)


# --------------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize("prompt", ["", "Two roads", "Two roads diverged — 中 🙂 — in a yellow"])
def test_what_was_learned_is_recited(folder, prompt):
    """Two programs, one text: whatever train and sample understand differently (BOS, positions, the
    last byte) breaks it."""
    done = start(folder, f"--prompt={prompt}", "--temperature=0")
    assert done.returncode == 0 and done.stdout == VERSE + "\n"
    assert "tokens/s" in done.stderr


PROMPTS = ["dog and fox", "", "The quick brown fox jumps over the lazy dog", "lazy"]


@pytest.fixture(scope="module")
def right(loaded):
    """What follows each of PROMPTS, by the plainest loop: 20 times all over again, no cache."""
    model, tokenizer = loaded
    prompts = [[1, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(20):
                ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        texts.append(ids[len(prompt):])
    assert len({tuple(text) for text in texts}) == 4 and len(set(texts[0])) > 5
    return prompts, texts


def test_generation_equals_the_uncached_loop(loaded, right):
    """Token by token: a cache that is off by one position still talks, only worse."""
    for prompt, text in zip(*right):
        assert texts_of(generate(decoder(loaded[0]), [prompt], 1, 20, set(), greedy)) == [text]


def test_a_text_does_not_depend_on_the_other_rows(loaded, right):
    """Rows of other lengths, several samples, another batch before in the same cache: whatever
    shifts a row's positions or its mask changes its text."""
    prompts, texts = right
    many = decoder(loaded[0], 8)
    assert texts_of(generate(many, prompts, 2, 20, set(), greedy)) == [
        text for text in texts for _ in range(2)]
    back = texts_of(generate(many, prompts[::-1] * 2, 1, 20, set(), greedy))
    assert back == texts[::-1] * 2


def test_running_ahead_changes_nothing(loaded, right):
    """On a GPU the next step is queued before this one's ids are read: the last ids must not come
    twice, nor earlier ones instead of them."""
    prompts, texts = right

    def asynchronous(rows):
        made = decoder(loaded[0], rows)
        made.is_async = True
        return made

    assert texts_of(generate(asynchronous(4), prompts, 1, 20, set(), greedy)) == texts
    ends = {texts[0][7]}
    cut, = texts_of(generate(asynchronous(1), prompts[:1], 1, 20, ends, greedy))
    assert cut == texts[0][:texts[0].index(texts[0][7]) + 1]


@pytest.mark.parametrize("tokens", [1, 24, 999])
def test_prompts_run_together_as_far_as_they_fit(loaded, right, tokens, monkeypatch):
    """Alone, in pairs or all in one pass: padding must not be seen, nor one row's keys be
    another's."""
    monkeypatch.setattr("decoder.PREFILL_TOKENS", tokens)
    prompts, texts = right
    for n in 1, 2:
        assert texts_of(generate(decoder(loaded[0], 4 * n), prompts, n, 20, set(), greedy)) == [
            text for text in texts for _ in range(n)]


def test_a_long_prompt_does_not_separate_the_short_ones(loaded, monkeypatch):
    """Prompts that run one by one, because another is long, take as many passes as there are."""
    model, passes = loaded[0], []
    monkeypatch.setattr("decoder.PREFILL_TOKENS", 24)
    forward = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda idx, *rest: passes.append(
        tuple(idx.shape)) or forward(idx, *rest))
    decoder(model, 9).prefill([[1] * 6] * 4 + [[1] * 30] + [[1] * 6] * 4)
    assert passes == [(4, 6), (1, 30), (4, 6)]


@pytest.mark.parametrize("guesses", [1, 4, 7])
@pytest.mark.parametrize("who", ["itself", "a stranger", "nearly"])
def test_a_draft_changes_no_text(loaded, right, who, guesses):
    """Whatever the draft says, greedy text is the model's own: a cache that keeps a rejected draft
    token, or one that misses the last token, would continue from there."""
    model, _ = loaded
    drafts = {"itself": model, "a stranger": tiny(5), "nearly": tiny(1)}
    if who == "nearly":
        weights = {k: v + 0.02 * torch.randn_like(v) if v.is_floating_point() else v
                   for k, v in model.state_dict().items()}
        drafts[who].load_state_dict(weights)
    prompts, texts = right
    counts = [0, 0]
    given = texts_of(speculate(decoder(model, 4), decoder(drafts[who], 4), guesses, prompts, 1, 20,
                               set(), {"temperature": 0}, None, counts))
    assert given == texts
    share = counts[1] / counts[0]
    assert share == 1 if who == "itself" else share < 0.2 if who == "a stranger" else 0 < share < 1


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.6},
                                 {"temperature": 1.3, "top_k": 4, "top_p": 0.8}])
def test_a_draft_changes_no_probability(how, monkeypatch):
    """Triples of tokens come as often as the model says, with a draft of another distribution: to
    accept too readily, or to sample again from the wrong rest, would tilt it."""
    monkeypatch.setattr("decoder.CACHE_MULTIPLE", 8)                  # 20,000 rows of cache
    n, V = 20_000, 6
    model, draft = (tiny(seed, n_layer=1, vocab_size=V, d_model=32, n_head=2, n_kv_head=1, d_ff=32,
                         context=8) for seed in (1, 2))
    for m in (model, draft):
        m.head.weight *= 2

    def exact(logits):
        p, ids = top_k_top_p(logits, **how)
        return torch.zeros(V).scatter(0, ids, p / p.sum())

    with torch.no_grad():
        first = exact(model(torch.tensor([[1]]))[0, -1])
        pairs = torch.stack([first[i] * exact(model(torch.tensor([[1, i]]))[0, -1])
                             for i in range(V)])
        triples = torch.stack([torch.stack([pairs[i, j] * exact(model(
            torch.tensor([[1, i, j]]))[0, -1]) for j in range(V)]) for i in range(V)])
    generator, counts = torch.Generator().manual_seed(3), [0, 0]
    drawn = torch.tensor(texts_of(speculate(decoder(model, n), decoder(draft, n), 2, [[1]], n, 3,
                                            set(), how, generator, counts)))
    assert drawn.shape == (n, 3) and 0.1 < counts[1] / counts[0] < 0.9
    places = (drawn * torch.tensor([V * V, V, 1])).sum(1)
    found = torch.bincount(places, minlength=V ** 3).view(V, V, V) / n
    assert (found[triples == 0] == 0).all()
    sigma = (triples * (1 - triples) / n).sqrt()
    assert ((found - triples).abs() <= 5 * sigma + 1e-9).all()
    # the comparison sees what it is for: were it the draft's distribution, it would fail
    with torch.no_grad():
        other = exact(draft(torch.tensor([[1]]))[0, -1])
    assert (other - first).abs().max() > 0.05


def test_the_prompt_is_run_once_for_many_samples(loaded):
    """n samples cost one prompt; greedy, all are the one."""
    model, tokenizer = loaded
    prompt, calls = [1, *tokenizer.encode("lazy")], []
    hook = model.embed.register_forward_pre_hook(
        lambda module, args: calls.append(tuple(args[0].shape)))
    many = texts_of(generate(decoder(model, 3), [prompt], 3, 9, set(), greedy))
    hook.remove()
    one = texts_of(generate(decoder(model), [prompt], 1, 9, set(), greedy))
    assert calls == [(1, len(prompt))] + [(3, 1)] * 8
    assert many == one * 3


def test_each_sample_ends_for_itself(loaded):
    """A sample that has met its EOS gets no more ids while the others go on, and when all have,
    nothing more is computed."""
    model, _ = loaded
    script = iter([[5, 6, 7], [2, 6, 7], [9, 2, 7], [9, 9, 2], [9, 9, 9]])
    given = list(generate(decoder(model, 3), [[1]], 3, 10, {2},
                          lambda logits: torch.tensor(next(script))))
    assert given == [[[5], [6], [7]], [[2], [6], [7]], [[], [2], [7]], [[], [], [2]]]


def test_generation_stops_at_the_context(loaded):
    """Beyond it the model has never seen a position."""
    model, _ = loaded
    for room, most in ((4, 100), (3, 3)):
        one, = texts_of(generate(decoder(model), [[1] * 60], 1, most, set(), greedy))
        with_draft, = texts_of(speculate(
            Decoder(model, 1, 64 + 6, 320), Decoder(model, 1, 64 + 6, 320), 5, [[1] * 60], 1, most,
            set(), {"temperature": 0}, None))
        assert len(one) == room and with_draft == one


def test_what_comes_after_eos_is_dropped():
    """Draft tokens go on after EOS, and beyond the tokens that a row may still get."""
    left = [9, 9, 2, 0]
    new = [[5, 2, 7], [5, 6], [5, 6, 7], [5]]
    assert truncate_at_eos(new, left, {2}) == [[5, 2], [5, 6], [5, 6], []]
    assert left == [0, 7, 0, 0]


# --------------------------------------------------------------------------------------------------
# Compiled steps

def test_compilation_where_it_pays_off():
    """A compiler that runs longer than the text it is for. On a CPU it never does."""
    with torch.device("meta"):
        small, large, int8 = tiny(0), *(
            freeze_for_inference(Llama(ModelConfig()), kind) for kind in (None, "int8"))
    for where in "cpu", "cuda":
        with torch._subclasses.FakeTensorMode():             # no GPU is needed
            weight = torch.nn.Parameter(torch.empty(1, device=where))
        small.embed.weight = large.embed.weight = int8.embed.weight = weight
        for model, steps, wanted in ((small, 2000, False), (large, 200, False),
                                     (large, 3000, False), (large, 10_000, True),
                                     (int8, 200, False), (int8, 3000, True)):
            assert should_compile(model, steps) == (wanted or where == "cpu")


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
@pytest.mark.parametrize("kind", [None, pytest.param("int8", marks=pytest.mark.slow),
                                  pytest.param("int4", marks=pytest.mark.slow)])
def test_compiled_text_is_the_same(folder, kind):
    """A GPU's compiled step is another program, with sums in place of matmuls. (PyTorch compiles it
    for a CPU, too, so that no GPU is needed.)"""
    model, tokenizer = load_model(folder, kind, torch.float32)
    prompts = [[1, *tokenizer.encode(prompt)] for prompt in PROMPTS[:2]]
    plain = texts_of(generate(decoder(model, 2), prompts, 1, 20, set(), greedy))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = decoder(model, 2)
    fast.step_model = compile_steps(model)
    assert texts_of(generate(fast, prompts, 1, 20, set(), greedy)) == plain
    # one graph before the blocks, one for all of them and one after, whatever the rows' lengths
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    with torch.inference_mode():
        ids = torch.tensor([[5], [6]], device=model.embed.weight.device)
        plain = decoder(model, 2)
        plain.prefill(prompts), fast.prefill(prompts)
        assert torch.allclose(fast.decode(ids), plain.decode(ids), atol=1e-3)


@pytest.mark.skipif(NO_COMPILER, reason="there is no C compiler")
@pytest.mark.parametrize("kind", [None, pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_text_of_decode_c_is_the_same(loaded, folder, kind):
    """Rows of different lengths, of which one ends before the others."""
    model = load_frozen(folder, torch.device("cpu"), torch.float32, kind)
    prompts = [[1, *loaded[1].encode(prompt)] for prompt in PROMPTS[:3]]
    plain = texts_of(generate(decoder(model, 3), prompts, 1, 20, set(), greedy))
    ends = {plain[0][7]}
    fast, right = (texts_of(generate(decoder(model, 3, compile=compile), prompts, 1, 20, ends,
                                     greedy)) for compile in (True, False))
    assert fast == right != plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_graph_is_the_same_as_its_kernels(folder, right):
    """A CUDA graph repeats what it has seen: ids or lengths that were copied into it say the same
    token for ever."""
    prompts, texts = right
    model, _ = load_model(folder, dtype=torch.float32)
    assert model.embed.weight.is_cuda
    assert texts_of(generate(decoder(model, 4), prompts, 1, 20, set(), greedy)) == texts


# --------------------------------------------------------------------------------------------------
# Sampling

def test_a_seed_gives_the_text_it_gave(run, folder, loaded):
    """One set of numbers per token, from a generator of its own, on whatever path: a text that
    somebody has noted with its seed is not lost."""
    (model, tokenizer), ids, text = loaded, [1, *loaded[1].encode("Two")], []
    steps, generator = decoder(model), torch.Generator().manual_seed(3)
    logits = steps.prefill([ids])
    for _ in range(12):
        p, likeliest = (logits / 1.5).topk(50)
        race = p.softmax(-1) / torch.empty_like(p).exponential_(generator=generator)
        text += likeliest[0, race.argmax(-1)].tolist()
        logits = steps.decode(torch.tensor([text[-1:]]))[:, -1]
    assert len({*text}) > 6 and 2 not in text
    printed = TextStreamer(tokenizer, ids).add(text, last=True)
    options = "--temperature=1.5", "--seed=3", "--max_new_tokens=12", "--dtype=float32"
    assert run(folder, "--prompt=Two", *options).stdout == f"Two{printed}\n"


def test_sample_token_follows_its_distribution():
    """A top-p that drops the token that crosses the line, or a temperature after the cut, is a
    different distribution."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.empty(4)
    logits[order] = p.log()
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        drawn = sample_token(logits.expand(40_000, 4), generator=generator, **options)
        return torch.bincount(drawn, minlength=4)[order] / 40_000

    hot = (p ** 0.5) / (p ** 0.5).sum()
    for options, expected in [
            (dict(), p), (dict(temperature=2.0), hot),
            (dict(top_k=2), torch.tensor([4 / 7, 3 / 7, 0, 0])), (dict(top_k=9), p),
            (dict(top_p=0.6), torch.tensor([4 / 7, 3 / 7, 0, 0])),
            (dict(top_p=0.75), torch.tensor([4, 3, 2, 0]) / 9),
            (dict(top_p=1e-300), torch.tensor([1.0, 0, 0, 0])),
            (dict(top_p=0.3), torch.tensor([1.0, 0, 0, 0])),
            (dict(top_k=3, top_p=0.7), torch.tensor([4 / 7, 3 / 7, 0, 0])),
            (dict(temperature=0), torch.tensor([1.0, 0, 0, 0])),
            (dict(temperature=1e-40), torch.tensor([1.0, 0, 0, 0]))]:
        got = frequencies(**options)
        assert (got - expected).abs().max() < 0.012, (options, got)  # five sigmas of 40,000 draws
        assert (got[expected == 0] == 0).all()


def test_a_padded_vocabulary_is_never_spoken(run, folder, tmp_path):
    """Vocabularies are padded to round sizes; ids after the last token decode to an error."""
    shutil.copytree(folder, tmp_path / "m")
    config = ModelConfig(n_layer=1, d_model=8, n_head=1, n_kv_head=1, d_ff=8, vocab_size=4000,
                         context=32)
    Llama(config).init_weights().save_pretrained(tmp_path / "m")
    done = run(tmp_path / "m", "--prompt=a", "--top_k=0", "--temperature=9")
    assert done.returncode == 0 and done.stdout


def test_streamed_text_is_the_whole_text(folder):
    """Characters of several bytes come in several tokens: printed immediately, each part would be a
    replacement character."""
    tokenizer = Tokenizer(folder)
    for text in [*AWKWARD, TEXT, VERSE, "🙂🙂é中\n"]:
        ids = tokenizer.encode(text)
        for cut in {0, 1, len(ids) // 2} & set(range(len(ids) + 1)):
            stream = TextStreamer(tokenizer, [1, *ids[:cut]])
            parts = [stream.add([i]) for i in ids[cut:]] + [stream.add([2], last=True)]
            assert (tokenizer.decode([1, *ids[:cut]]).rstrip("\ufffd") + "".join(parts) == text
                    or "\ufffd" in tokenizer.decode(ids[:cut]))
            assert all("\ufffd" not in part for part in parts)


# --------------------------------------------------------------------------------------------------
# The command

def test_only_text_goes_to_standard_output(run, folder):
    """Whatever else is printed there ends up in the file of who redirects it."""
    def drawn(seed):
        return run(folder, "--prompt=The", f"--seed={seed}", "--max_new_tokens=12",
                   "--num_samples=3", "--temperature=2").stdout

    one = drawn(5)
    samples = one.rstrip("\n").split("\n---\n")
    assert one == drawn(5) != drawn(6) and len(samples) == 3 and len(set(samples)) > 1
    assert all(text.startswith("The") for text in samples)


def test_a_full_context_is_said(run, folder):
    """A text that breaks off for want of room must not look like one that has ended."""
    prompt = "fox " * 14
    done = run(folder, f"--prompt={prompt}", "--max_new_tokens=200", "--temperature=0")
    count = int(done.stderr.splitlines()[-1].split()[0])
    assert ("the context of 64 is full" in done.stderr) == (
        1 + len(Tokenizer(folder).encode(prompt)) + count == 64)
    assert "is full" not in run(folder, f"--prompt={prompt}", "--max_new_tokens=2",
                                "--temperature=0").stderr


def test_tokenizer_json_alone_is_enough(folder, tmp_path):
    """Llama folders of today often bring no tokenizer.model."""
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/tokenizer.model").unlink()
    fast, sp = Tokenizer(tmp_path / "m"), Tokenizer(folder)
    for text in [*AWKWARD, TEXT]:
        assert fast.encode(text) == sp.encode(text) and fast.decode([1, *sp.encode(text)]) == text
    assert (fast.bos_id, fast.eos_ids, fast.size) == (1, {2}, 320) == (
        sp.bos_id, sp.eos_ids, sp.size)


def test_several_ends_are_honoured(folder, tmp_path):
    """Chat models name more than one EOS in generation_config.json; missing one, they talk on as
    the user."""
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Tokenizer(tmp_path / "m").eos_ids == {2, 7}


def test_the_newest_checkpoint_is_taken(tmp_path, monkeypatch):
    """Sampling from last week's run, or from half a save, shows the wrong model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no checkpoint under out/"):
        find_model(None)
    for age, name in enumerate([
            "a/step_00000009", "b/step_00000003", "a/step_00000002",
            "c/step_00000099.tmp", "c/step_00000010-old.2", "b/step_00000003 (copy 4)"]):
        state = tmp_path / "out" / name / "training/state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"time": 1000 - age}))
        os.utime(state, (1000 + age, 1000 + age))                   # as a copy leaves them
    assert find_model(None) == Path("out/a/step_00000009")
    assert find_model("out/b") == Path("out/b/step_00000003")       # the folder of a run is enough
    for run in "ab":                                # before "time" was recorded, clocks must do
        (tmp_path / f"out/{run}/{newest(f'out/{run}').name}/training/state.json").write_text("{}")
    os.utime("out/b/step_00000003/training/state.json", (5000, 5000))
    os.utime("out/a/step_00000009/training/state.json", (4000, 4000))
    assert find_model(None) == Path("out/b/step_00000003")


def test_a_name_on_the_hub_brings_all_that_is_read(tmp_path, monkeypatch):
    """A chat template may be a file of its own, without which a model is talked to by another."""
    taken = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(
        snapshot_download=lambda name, allow_patterns: taken.extend(allow_patterns) or tmp_path))
    assert find_model("owner/model") == tmp_path
    for file in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model",
                 "chat_template.jinja"):
        assert any(fnmatch(file, pattern) for pattern in taken), file
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in taken)


@pytest.mark.parametrize("name", ["out/dmeo", "./demo", "a/b/c", "runs/dmeo/", "/x/y", "dmeo"])
def test_a_mistyped_path_is_no_name_of_the_hub(name, tmp_path, monkeypatch):
    """What begins as a path here ended with advice about the internet."""
    monkeypatch.chdir(tmp_path)
    for run in "out/demo", "runs/demo":
        Path(run).mkdir(parents=True)
    with pytest.raises(SystemExit) as found:
        find_model(name)
    assert f"there is no folder {name}" in str(found.value)
    assert "hub did" not in str(found.value)
    assert ("nearest: " in str(found.value)) == (Path(name).name == "dmeo" and "/" in name)


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=" + "x " * 300], "context of this model 64"),
    (["--temperature=-1"], "temperature must be 0 or above, got -1"), (["--top_p=0"], "top_p"),
    (["--top_k=-1"], "top_k"), (["--max_new_tokens=0"], "max_new_tokens"),
    (["--num_samples=0"], "num_samples"), (["--guesses=0"], "guesses"), (["--batch=0"], "batch"),
    (["--prompt=a", "--prompts=b"], "exclude one another"),
    (["--prompts=absent"], "No such file or directory: 'absent'"),
    (["--draft=absent"], "no folder absent")])
def test_bad_arguments_are_refused(arguments, words, run, folder):
    """A negative temperature would prefer the least likely token, without a word."""
    done = run(folder, *arguments)
    assert done.returncode == 1 and words in done.stderr and not done.stdout


def test_samples_by_default(folder):
    """A prompt, or no chance, asks for one text; without either, several show what was learned."""
    count = [sample.parse_args(arguments).num_samples for arguments in (
        [], ["--prompt=x"], ["--temperature=0"], ["--num_samples=2", "--prompt=x"])]
    assert count == [4, 1, 1, 2]


def test_many_prompts(run, folder, tmp_path):
    """One line each, in order, several samples, of the model's text alone; what cannot be used is
    named, and costs the others nothing."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(codecs.BOM_UTF8 + b"Two roads\n\nThe \xff dog\n"
                     b"Two roads diverged \xe2\x80\x94\r\n" + b"fox " * 99 + b"\n")
    for batch, n in ((1, 1), (2, 1), (16, 1), (3, 2), (16, 3)):
        done = run(folder, f"--prompts={file}", "--temperature=0", f"--batch={batch}",
                   f"--num_samples={n}")
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["prompt"] for line in lines] == [
            prompt for prompt in ("Two roads", "", "Two roads diverged —") for _ in range(n)]
        assert all(line["prompt"] + line["completion"] == VERSE for line in lines)
        assert "line 3 is left out: this is not UTF-8" in done.stderr
        assert "line 5 is left out" in done.stderr and "context of this model 64" in done.stderr
        assert done.returncode == 1                      # 3 where it is a program of its own
    for nothing in b"\xff\n", b"":
        file.write_bytes(nothing)
        assert "has no prompt that can be used" in run(folder, f"--prompts={file}").stderr


def test_a_draft_is_used(run, folder, tmp_path):
    """What the draft gains is printed; the text is the model's own, and so is the tokenizer."""
    done = run(folder, "--prompt=Two", "--temperature=0", f"--draft={folder}")
    assert done.stdout == VERSE + "\n" and "100%" in done.stderr and "times as fast" in done.stderr
    shutil.copytree(folder, tmp_path / "other")
    write_tokenizer(tmp_path / "other", train_tokenizer([TEXT * 2, "other words altogether"], 320))
    refused = run(folder, "--prompt=Two", f"--draft={tmp_path / 'other'}")
    assert refused.returncode == 1 and "has another tokenizer (320 tokens)" in refused.stderr


def test_compilation_needs_a_compiler(run, folder, monkeypatch):
    """Asked for where it does not work, it would end in a page of the compiler's own errors; where
    it is chosen, it is left out."""
    monkeypatch.setenv("CC", "nowhere/cc")
    why = ("nowhere/cc does not compile decode.c: [Errno 2] No such file or directory: "
           "'nowhere/cc'")
    done = run(folder, "--compile=True")
    assert done.returncode == 1 and not done.stdout
    assert f"--compile=True does not work here: {why}. Install" in done.stderr
    done = run(folder, "--prompt=Two", "--temperature=0")
    assert done.returncode == 0 and done.stdout == VERSE + "\n"
    assert done.stderr.count(f"not compiled: {why}\n") == 1
    assert "not compiled" not in run(folder, "--compile=False", "--max_new_tokens=1").stderr


def test_quantized_logits_are_near(folder, loaded):
    """Within a hundredth for int8 on a text that the model knows; int4 has 16 steps, not 255."""
    model, tokenizer = loaded
    ids = torch.tensor([[1, *tokenizer.encode(VERSE)]])
    right = model(ids)

    def away(kind):
        given = load_model(folder, kind, torch.float32)[0].cpu()(ids)
        return ((given - right).norm() / right.norm()).item()

    assert 1e-4 < away("int8") < 0.01 < away("int4") < 0.2


def test_text_does_without_cudnn(folder, monkeypatch):
    """On Blackwell it has chosen other tokens, in silence, for models with fewer than 8 key heads;
    and it plans anew for each length of a prompt."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(folder)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_recites(run, folder, kind, tmp_path, capsys):
    """From any checkpoint at load, or from a folder of such weights; by decode.c, which is taken
    by itself, or in PyTorch; and of several texts at the same time."""
    quantize.main([str(folder), f"--bits={kind[3]}", f"--out={tmp_path / 'm'}"])
    assert f"python sample.py {tmp_path / 'm'} generates with them" in capsys.readouterr().out
    for where in (folder, f"--quantize={kind}"), (tmp_path / "m",):
        for how in "--num_samples=3", "--compile=False":
            done = run(*where, "--prompt=Two roads", "--temperature=0", how)
            assert {*done.stdout.splitlines()} - {"---"} == {VERSE}
            assert f"MB, {kind}, " in done.stderr


def test_bad_folders_are_refused(run, folder, tmp_path):
    """One sentence each, no stack trace."""
    def refused(words, change):
        shutil.copytree(folder, tmp_path / "m")
        change(tmp_path / "m")
        done = run(tmp_path / "m")
        assert done.returncode == 1 and words in done.stderr and not done.stdout
        shutil.rmtree(tmp_path / "m")

    refused("no tokenizer", lambda m: [(m / "tokenizer.model").unlink(),
                                       (m / "tokenizer.json").unlink()])
    refused("no tokenizer", lambda m: [(m / "tokenizer.model").write_bytes(b"x"),
                                       (m / "tokenizer.json").write_bytes(b"x")])
    refused("ends with [320], but only ids below 320", lambda m: (
        m / "generation_config.json").write_text('{"eos_token_id": 320}'))
    refused("cannot be put on cpu", lambda m: (m / "config.json").write_text(
        (m / "config.json").read_text().replace(": 320", f": {10 ** 13}")))
    refused("files in", lambda m: (m / "added_tokens.json").write_text('{"<x>": "y"}'))
    refused("generation_config.json", lambda m: (m / "generation_config.json").write_text("3"))
    refused("model.safetensors", lambda m: (m / "model.safetensors").write_bytes(
        (m / "model.safetensors").read_bytes()[:-9]))
    shutil.copytree(folder, tmp_path / "m")                # fewer rows than the tokenizer has ids
    Llama(ModelConfig(n_layer=1, d_model=8, n_head=1, n_kv_head=1, d_ff=8, vocab_size=9,
                      context=8)).init_weights().save_pretrained(tmp_path / "m")
    assert run(tmp_path / "m", "--temperature=9").returncode == 0
    done = run(tmp_path / "m", "--prompt=Two")
    assert done.returncode == 1 and "knows only 9" in done.stderr and not done.stdout
    done = run(folder / "config.json")
    assert done.returncode == 1 and "is a file: give the folder" in done.stderr
    done = start(tmp_path / "nowhere")
    assert done.returncode == 1 and "no folder" in done.stderr and "Traceback" not in done.stderr


def test_weights_that_are_not_finite_are_said(run, folder, tmp_path):
    """From NaN the first token was chosen again and again, and the exit status was 0."""
    shutil.copytree(folder, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = math.nan
    save_file(tensors, tmp_path / "m/model.safetensors")
    done = run(tmp_path / "m", "--prompt=Two")
    assert done.returncode == 1 and "logits are not finite" in done.stderr
    at_a_later_step = decoder(load_model(folder, dtype=torch.float32)[0])
    at_a_later_step.prefill([[1]])
    at_a_later_step.cache.layers[0][0][:, :, 0] = math.inf
    at_a_later_step.decode(torch.tensor([[5]]))
    with pytest.raises(InputError, match="not finite"):
        at_a_later_step.require_finite()


def test_a_closed_pipe_is_no_error(folder, tmp_path):
    """python sample.py | head must not end in a stack trace."""
    (tmp_path / "prompts").write_text("Two\n" * 99)
    command = (f'"{sys.executable}" "{HERE / "sample.py"}" "{folder}" --max_new_tokens=50 '
               f'--prompts="{tmp_path / "prompts"}" --batch=2 | head -c 1')
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
