"""Proofs of sample.py: the same text by every way, the right distribution, and nothing but text on
standard output."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample
from model import Llama, ModelConfig, ModelError
from prepare import train_tokenizer, write_tokenizer
from sample import Stream, Tokenizer, choose, find_model, generate, load_model
from test_prepare import AWKWARD, TEXT

HERE = Path(__file__).parent
VERSE = "Two roads diverged — 中 🙂 — in a yellow wood."


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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def greedy(logits):
    return logits.argmax(-1)


@pytest.fixture
def run(capsys):
    """run(arguments...) is what the program prints and how it ends, without starting a process."""
    def run(*arguments):
        code, message = 0, ""
        try:
            sample.main([str(a) for a in arguments])
        except (SystemExit, ModelError) as error:
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


def test_generation_equals_the_uncached_loop(loaded):
    """Token by token: a cache that is off by one position still talks, only worse."""
    model, tokenizer = loaded
    prompt = [1, *tokenizer.encode("dog and fox")]
    new = [ids[0] for ids in generate(model, prompt, 1, 40, set(), greedy)]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(40):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    assert new == ids[len(prompt):] and len(set(new)) > 5


def test_the_prompt_is_run_once_for_many_samples(loaded, monkeypatch):
    """n samples cost one prompt; greedy, all are the one."""
    model, tokenizer = loaded
    prompt, calls = [1, *tokenizer.encode("lazy")], []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(tuple(args[0].shape)))
    many = list(generate(model, prompt, 3, 9, set(), greedy))
    hook.remove()
    one = list(generate(model, prompt, 1, 9, set(), greedy))
    assert calls == [(1, len(prompt))] + [(3, 1)] * 8
    assert many == [ids * 3 for ids in one]


def test_each_sample_ends_for_itself(loaded):
    """A sample that has met its EOS is silent while the others go on, and when all have, nothing
    more is computed."""
    model, _ = loaded
    script = iter([[5, 6, 7], [2, 6, 7], [9, 2, 7], [9, 9, 2], [9, 9, 9]])
    given = list(generate(model, [1], 3, 10, {2}, lambda logits: torch.tensor(next(script))))
    assert given == [[5, 6, 7], [2, 6, 7], [None, 2, 7], [None, None, 2]]


def test_generation_stops_at_the_context(loaded):
    """Beyond it the model has never seen a position."""
    model, _ = loaded
    assert len(list(generate(model, [1] * 60, 1, 100, set(), greedy))) == 4
    assert len(list(generate(model, [1] * 60, 1, 3, set(), greedy))) == 3


def test_choose_is_the_distribution_it_says():
    """A top-p that drops the token that crosses the line, or a temperature after the cut, is a
    different distribution."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    order = torch.tensor([2, 0, 3, 1])
    logits = torch.empty(4)
    logits[order] = p.log()
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options):
        drawn = choose(logits.expand(40_000, 4), generator=generator, **options)
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
    """Vocabularies are padded to round sizes; the rows behind the last piece decode to an error."""
    shutil.copytree(folder, tmp_path / "m")
    config = ModelConfig(n_layer=1, d_model=8, n_head=1, n_kv_head=1, d_ff=8, vocab_size=4000,
                         context=32)
    Llama(config).init_weights().save_pretrained(tmp_path / "m")
    done = run(tmp_path / "m", "--prompt=a", "--top_k=0", "--temperature=9")
    assert done.returncode == 0 and done.stdout


def test_streamed_text_is_the_whole_text(folder):
    """Characters of several bytes come in pieces: printed at once, each would be a replacement
    sign."""
    tokenizer = Tokenizer(folder)
    for text in [*AWKWARD, TEXT, VERSE, "🙂🙂é中\n"]:
        ids = tokenizer.encode(text)
        for cut in {0, 1, len(ids) // 2} & set(range(len(ids) + 1)):
            stream = Stream(tokenizer, [1, *ids[:cut]])
            parts = [stream.add(i) for i in ids[cut:]] + [stream.add(None, last=True)]
            assert (tokenizer.decode([1, *ids[:cut]]).rstrip("\ufffd") + "".join(parts) == text
                    or "\ufffd" in tokenizer.decode(ids[:cut]))
            assert all("\ufffd" not in part for part in parts)


# --------------------------------------------------------------------------------------------------
# The program

def test_only_text_goes_to_standard_output(run, folder):
    """Whatever else is printed there ends up in the file of who redirects it."""
    one = run(folder, "--prompt=The", "--seed=5", "--max_new_tokens=12", "--num_samples=3")
    two = run(folder, "--prompt=The", "--seed=5", "--max_new_tokens=12", "--num_samples=3")
    samples = one.stdout.rstrip("\n").split("\n---\n")
    assert one.stdout == two.stdout and len(samples) == 3 and len(set(samples)) > 1
    assert all(text.startswith("The") for text in samples)
    assert run(folder, "--prompt=The", "--seed=6", "--max_new_tokens=12",
               "--num_samples=3").stdout != one.stdout


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
    for age, name in enumerate(["a/step_00000009", "b/step_00000003", "a/step_00000002"]):
        state = tmp_path / "out" / name / "training/state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        os.utime(state, (1000 - age, 1000 - age))
    assert find_model(None) == Path("out/a/step_00000009")
    (tmp_path / "out/c/step_00000099.tmp/training").mkdir(parents=True)     # a save cut short
    (tmp_path / "out/c/step_00000099.tmp/training/state.json").write_text("{}")
    assert find_model(None) == Path("out/a/step_00000009")
    assert find_model("out/b") == Path("out/b/step_00000003")       # the folder of a run is enough


@pytest.mark.parametrize("arguments, words", [
    (["--prompt=" + "x " * 300], "context of this model 64"),
    (["--temperature=-1"], "temperature must be 0 or above, got -1"), (["--top_p=0"], "top_p"),
    (["--top_k=-1"], "top_k"), (["--max_new_tokens=0"], "max_new_tokens"),
    (["--num_samples=0"], "num_samples")])
def test_bad_arguments_are_refused(arguments, words, run, folder):
    """A negative temperature would prefer the least likely token, without a word."""
    done = run(folder, *arguments)
    assert done.returncode == 1 and words in done.stderr and not done.stdout


def test_samples_by_default(folder):
    """A prompt, or no chance, asks for one text; without either, several show what was learned."""
    count = [sample.parse_args(arguments).num_samples for arguments in (
        [], ["--prompt=x"], ["--temperature=0"], ["--num_samples=2", "--prompt=x"])]
    assert count == [4, 1, 1, 2]


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
    refused("tokenizer of", lambda m: (m / "tokenizer.model").write_bytes(b"x"))
    refused("bos_token_id None", lambda m: (m / "generation_config.json").write_text(
        '{"bos_token_id": null}'))
    refused("generation_config.json", lambda m: (m / "generation_config.json").write_text("3"))
    refused("model.safetensors", lambda m: (m / "model.safetensors").write_bytes(
        (m / "model.safetensors").read_bytes()[:-9]))
    refused("do not belong together", lambda m: Llama(ModelConfig(
        n_layer=1, d_model=8, n_head=1, n_kv_head=1, d_ff=8, vocab_size=9,
        context=8)).init_weights().save_pretrained(m))
    done = start(tmp_path / "nowhere")
    assert done.returncode == 1 and "no folder" in done.stderr and "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_error(folder):
    """python sample.py | head must not end in a stack trace."""
    command = (f'"{sys.executable}" "{HERE / "sample.py"}" "{folder}" '
               '--max_new_tokens=50 --top_k=0 --num_samples=9 | head -c 1')
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
