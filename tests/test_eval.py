"""Proofs of eval.py: the same answers as lm-evaluation-harness' own model gives, request by request,
and tables that say what was measured and what was not."""
import copy
import importlib
import importlib.util
import json
import math
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml

import eval as evaluation
import prepare
import train
from config import load_config
from data import Source
from eval import SUITES, Adapter, Row, generation, likelihoods, rows_of, score_of, windows
from files import InputError
from model import Llama, ModelConfig
from parallel import World
from sample import Decoder, Tokenizer, load_model

lm_eval = pytest.importorskip("lm_eval")
DOCUMENTS = [text for text in prepare.documentation() if len(text) > 600]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where the harness keeps what it reads, instead of the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has seen enough text to have opinions."""
    folder = tmp_path_factory.mktemp("run") / "step_00000001"
    (folder / "training").mkdir(parents=True)
    prepare.write_tokenizer(folder, prepare.train_tokenizer(DOCUMENTS, 600))
    torch.manual_seed(0)
    model = Llama(ModelConfig(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_ff=112,
                              vocab_size=600, context=256)).init_weights()
    model.save_pretrained(folder)
    ids = torch.tensor(Tokenizer(folder).encode(" ".join(DOCUMENTS))[:40 * 513]).view(40, 513)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for row in ids.split(2):
        model(row[:, :-1], row[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    (folder / "training" / "state.json").write_text('{"tokens": 2000}')
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    model, tokenizer = load_model(folder, dtype=torch.float32)
    tokenizer.encode = evaluation.remembering(folder / "tokenizer.model")
    return model, tokenizer


def task(place, name, items, **more):
    """Writes a task of its own, YAML and data, as a user would."""
    (place / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (place / f"{name}.yaml").write_text(yaml.safe_dump({
        "task": name, "dataset_path": "json", "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(place / f"{name}.jsonl")}},
        "doc_to_text": "{{context}}", "doc_to_target": "{{answer}}"} | more))


def questions(n, seed=0):
    """Of n beginnings of documents, which of four continuations is the right one."""
    draw = random.Random(seed)
    words = [text.split() for text in DOCUMENTS]
    for k in range(n):
        some = words[k % len(words)]
        start, ends = draw.randrange(20), draw.randrange(30, 45)
        endings = [" ".join(other[ends:ends + draw.randrange(3, 15)]).strip() or "nothing"
                   for other in (some, *draw.sample(words, 3))]
        yield {"context": " ".join(some[start:ends]).strip(), "choices": endings,
               "answer": draw.randrange(4)}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks of each kind of request; two under the names of TinyLlama's."""
    place, odd = tmp_path_factory.mktemp("tasks"), [
        {"context": "", "choices": ["begins here", "begins there"], "answer": 0},   # no context
        {"context": "ends in a space ", "choices": ["so", "or not"], "answer": 1},
        {"context": " ".join(DOCUMENTS[:2]), "choices": ["x", "y z"], "answer": 0}]     # too long
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
              "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task(place, "hellaswag", [*questions(120), *odd], **choice)
    task(place, "piqa", questions(20, seed=1), **choice)
    task(place, "letters", [{"context": item["context"] + "\nAnswer:", "choices": [*"ABCD"],
                             "answer": item["answer"]} for item in questions(60, seed=2)], **choice)
    task(place, "documents", [{"text": text[:n]} for n in (1, 90, 300, 1200) for text in DOCUMENTS],
         doc_to_text="", doc_to_target="{{text}}", output_type="loglikelihood_rolling",
         metric_list=[{"metric": "bits_per_byte"}])
    task(place, "answers", [item | {"answer": item["choices"][0]}
                            for item in (*questions(100, seed=3), odd[2])],
         output_type="generate_until", metric_list=[{"metric": "exact_match"}],
         generation_kwargs={"until": ["\n", "."], "max_gen_toks": 24, "do_sample": False})
    return place


def manager_of(place):
    from lm_eval.tasks import TaskManager
    return TaskManager(include_path=str(place), include_defaults=False)


@pytest.fixture
def run(tasks, capsys):
    """run(arguments...) is (exit status or message, standard output, standard error)."""
    def run(*arguments, include=tasks):
        code = 0
        try:
            evaluation.main([*map(str, arguments), f"--include_path={include}"])
        except (SystemExit, InputError) as error:
            code = error.code if isinstance(error, SystemExit) else str(error)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


# --------------------------------------------------------------------------------------------------
# The same answers

def answers_of(lm, place, name):
    """({metric: value}, the model's answer to each request) of a task."""
    loaded = manager_of(place).load([name])
    found = lm_eval.evaluate(lm, loaded, bootstrap_iters=0, log_samples=True)
    scores = {key: value for key, value in found["results"][name].items()
              if isinstance(value, float)}
    return scores, [answer for sample in found["samples"][name] for resps in sample["resps"]
                    for answer in resps]


@pytest.fixture(scope="module")
def harness(folder):
    """The harness' own adapter of the same folder, opened by transformers. Its cache of one-token
    answers is off: a text of two requests that split it differently gets wrong numbers from it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {bos: HFLM(model, tokenizer=tokenizer, batch_size=8, add_bos_token=bos,
                      logits_cache=False, softmax_dtype=torch.float64) for bos in (False, True)}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", ["hellaswag", "letters", "answers"])
def test_answers_are_the_harness_own(name, bos, loaded, harness, tasks):
    """A score is only comparable if each request is answered as everyone else's model would: by the
    same ids, cut at the same place, with the same tokens asked for."""
    scores, answers = answers_of(Adapter(*loaded, bos, 16), tasks, name)
    theirs, right = answers_of(harness[bos], tasks, name)
    assert scores == theirs and len(answers) == len(right) > 99
    if name == "answers":
        assert answers == right and len(set(map(len, answers))) > 9
        assert max(map(len, answers)) > 24                      # not all stop at once
    else:
        assert max(abs(a[0] - b[0]) for a, b in zip(answers, right)) < 1e-4
        assert [a[1] for a in answers] == [b[1] for b in right]
    if name == "letters":
        assert answers_of(Adapter(*loaded, not bos, 16), tasks, name)[1] != answers


def test_documents_are_the_harness_own(loaded, harness, tasks):
    """Each token once, each behind all that the context holds. The harness' own model, told to
    begin texts with BOS, begins them with two; so it is told not to."""
    scores, answers = answers_of(Adapter(*loaded, True, 16), tasks, "documents")
    theirs, right = answers_of(harness[False], tasks, "documents")
    assert max(abs(a - b) for a, b in zip(answers, right)) < 1e-4 and len(right) > 200
    assert scores == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("shots", [0, 3])
def test_examples_are_the_harness_own(shots, folder, loaded, tasks, run, tmp_path):
    """The examples in a prompt are drawn; an adapter of the same model, and a second checkpoint,
    must be given the same ones."""
    twin = tmp_path / "step_00000002"
    shutil.copytree(folder, twin)
    code, _, _ = run(folder, twin, "--tasks=piqa", f"--num_fewshot={shots}", "--dtype=float32",
                     f"--out={tmp_path / 'x.png'}")
    name = f"eval/piqa,num_fewshot={shots},dtype=float32.json"
    first, second = (json.loads((place / name).read_text()) for place in (folder, twin))
    assert code == 0 and first["results"] == second["results"]
    assert first["num_fewshot"] == {"piqa": shots}
    right = lm_eval.simple_evaluate(model=Adapter(*loaded, False, 16), tasks=["piqa"],
                                    task_manager=manager_of(tasks), num_fewshot=shots)
    assert (first["results"]["piqa"]["acc_norm,none"]
            == right["results"]["piqa"]["acc_norm,none"])


def test_a_task_that_says_no_examples_means_it(run, folder, tmp_path):
    """As the harness takes it: HumanEval with examples is another benchmark."""
    task(tmp_path, "bare", questions(9), output_type="multiple_choice", num_fewshot=0,
         doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    assert run(folder, "--tasks=bare", "--num_fewshot=2", include=tmp_path)[0] == 0
    found = json.loads((folder / "eval/bare,num_fewshot=2.json").read_text())
    assert found["num_fewshot"] == {"bare": 0}


def random_texts(n, context, vocab, seed):
    """Texts that begin alike, contain and repeat one another."""
    draw, texts = random.Random(seed), [[5]]
    while len(texts) < n:
        old = draw.choice(texts)
        ids = old[:draw.randrange(len(old) + 1)] + [
            draw.randrange(vocab) for _ in range(draw.choice([0, 1, 2, 7, 20]))]
        if 0 < len(ids) <= context:
            texts.append(ids)
    return [(ids, [draw.randrange(vocab) for _ in range(draw.randrange(len(ids) + 1))])
            for ids in texts]


@pytest.mark.parametrize("quantize, tolerance", [(None, 1e-5), ("int8", 1e-4)])
@pytest.mark.parametrize("batch", [1, 16])
def test_texts_that_share_rows_are_scored_as_if_alone(batch, quantize, tolerance, folder):
    """In a tree, in a batch, behind padding, without targets, or asked twice: a token that sees
    another branch, or stands elsewhere, has another likelihood."""
    model, _ = load_model(folder, quantize, torch.float32)
    texts = random_texts(150, model.config.context, model.config.vocab_size, seed=batch)
    rows = rows_of(texts, model.config.context)
    assert len(rows) < 80 and sum(len(row.ids) for row in rows) < 0.7 * sum(
        len(ids) for ids, _ in texts)
    steps = []
    given = likelihoods(model, texts, batch, steps.append)
    assert sum(steps) == len(texts)
    for (ids, targets), (nats, first) in zip(texts, given):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, len(ids) - len(targets):].float()
        alone = -F.cross_entropy(logits, torch.tensor(targets).long(), reduction="sum").item()
        assert nats == pytest.approx(alone, abs=tolerance * (1 + len(targets)))
        assert first == (logits.argmax(-1).tolist() == targets)


def test_a_row_is_no_longer_than_the_context():
    """Attention in a row costs its length squared; and one text of a row may be that long."""
    row = Row()
    row.add(0, [1, 2, 3], [3])
    row.add(1, [1, 2, 4, 5], [5])
    assert (row.ids, row.positions) == ([1, 2, 3, 4, 5], [0, 1, 2, 2, 3])
    assert row.ends[2] == 3 and set(row.ends[:2] + row.ends[3:]) == {evaluation.FOREVER}
    texts = random_texts(300, 40, 50, seed=3)
    rows = rows_of(texts, 40)
    assert max(len(row.ids) for row in rows) <= 40
    assert sorted(number for row in rows for number, _, _ in row.asked) == list(range(300))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 16, 17, 40])
def test_windows_are_the_harness_own(n):
    """A token more or less at an end is a token predicted twice, or never."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    ids = list(range(10, 10 + n))
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 1, 8, 1)]
    assert ([(context + rest[:-1], rest) for context, rest in theirs]
            == list(windows(ids, 1, 8)))


# --------------------------------------------------------------------------------------------------
# Generation

def instances(*arguments):
    from lm_eval.api.instance import Instance
    return [Instance("generate_until", {}, one, k) for k, one in enumerate(arguments)]


def test_settings_of_a_task():
    """A task without a limit has the harness' 256 tokens, and one that asks for more than the
    context holds still has a prompt."""
    assert generation({"until": "\n"}, 2048) == (
        ["\n"], 256, {"temperature": 0.0, "top_k": 0, "top_p": 1.0})
    assert generation({"until": ["", "."], "max_new_tokens": 7, "temperature": 0.5}, 2048) == (
        ["."], 7, {"temperature": 0.5, "top_k": 0, "top_p": 1.0})
    assert generation({"max_completion_tokens": 9, "max_gen_toks": None}, 2048)[1] == 9
    assert generation({"do_sample": True, "top_p": 0.9, "max_gen_toks": 4096}, 100) == (
        [], 50, {"temperature": 1.0, "top_k": 0, "top_p": 0.9})
    assert generation({"do_sample": False, "temperature": 0.7}, 2048)[2]["temperature"] == 0.0


def test_text_ends_where_it_should(loaded, monkeypatch):
    """At the first stop string, though others come; at EOS; or where it may be no longer. Behind a
    word the space before the next is left out, as the harness does it; behind a newline it is
    indentation, and Python would not run without."""
    model, tokenizer = loaded
    said = {prompt: tokenizer.encode(prompt + text)[len(tokenizer.encode(prompt)):] for prompt, text
            in (("Q:", " four words. And more"), ("Q:\n", "    return 1\n    never"), ("", "hm"))}
    asked, picks, said[""] = [], [], [*said[""], 2]
    for prompt in "Q:", "Q:\n":
        said[prompt] += [9] * 60                       # what nobody waits for, behind a stop string

    def generate(decoder, prompts, n, most, eos_ids, pick):
        asked.append((prompts, most, 0))
        picks.append(pick)
        texts = [said[next(context for context in sorted(said, key=len, reverse=True)
                           if tokenizer.decode(prompt).endswith(context))] for prompt in prompts]
        for step in range(most):
            asked[-1] = *asked[-1][:2], step + 1
            yield [text[step:step + 1] for text in texts]

    monkeypatch.setattr(evaluation, "generate", generate)
    lm = Adapter(model, tokenizer, True, 2)
    given = lm.generate_until(instances(
        ("Q:", {"until": [".", " wo"]}), ("Q:\n", {"until": ["\n"]}), ("Q:", {"max_gen_toks": 3}),
        ("", {"until": ["\n"]})))
    assert given == ["four", "    return 1", tokenizer.decode(said["Q:"][:3]), "hm"]
    assert lm.requests == 4
    steps = {(len(prompts), most): steps for prompts, most, steps in asked}
    assert steps.keys() == {(1, 3), (1, 128), (2, 128)} and max(steps.values()) < 30
    context = "long " * 300 + "Q:"
    lm.generate_until(instances((context, {"max_gen_toks": 24, "temperature": 0.5})))
    assert picks[0].keywords["temperature"] == 0.0 and picks[-1].keywords["temperature"] == 0.5
    assert asked[-1][0] == [tokenizer.encode(context)[-(256 - 24):]] and lm.cut == 1


@pytest.mark.parametrize("error", [None, "no compiler"])
def test_answers_are_compiled_where_that_works(loaded, error, monkeypatch):
    """What the program chose by itself ended an evaluation where nothing compiles."""
    compiled = []

    def decoder(*arguments):
        compiled.append(arguments[-1])
        return Decoder(*arguments[:-1])

    monkeypatch.setattr(evaluation, "Decoder", decoder)
    monkeypatch.setattr(evaluation, "should_compile", lambda *_: True)
    monkeypatch.setattr(evaluation, "compile_error", lambda device: error)
    Adapter(*loaded, True, 2).generate_until(instances(("Q:", {"max_gen_toks": 2})))
    assert compiled == [error is None]


# --------------------------------------------------------------------------------------------------
# Suites and tables

@pytest.fixture(scope="module")
def manager():
    """Of the folders that hold the suites; all of them are 14,000 files to read."""
    from lm_eval.tasks import TaskManager
    place = Path(importlib.import_module("lm_eval.tasks").__file__).parent
    return TaskManager(include_defaults=False, include_path=[place / name for name in (
        "arc", "bbh", "drop", "hellaswag", "humaneval", "mmlu", "openbookqa", "piqa", "super_glue",
        "winogrande", "xcopa", "xnli", "xstorycloze", "xwinograd")])


def test_suites_are_tasks_of_the_harness(manager):
    """A task that was renamed, or that has lost the metric, would be noticed hours later."""
    from lm_eval.tasks._yaml_loader import load_yaml
    for suite in SUITES.values():
        for name, metric, _ in suite.columns.values():
            entry = manager.task_index[name]
            found = load_yaml(entry.yaml_path, resolve_func=False, recursive=True)
            metrics = found.get("aggregate_metric_list") or found["metric_list"]
            assert metric.partition("@")[0] in str(metrics) or name == "humaneval", name


def test_published_averages_are_those_of_their_rows():
    """A digit copied wrongly is a wrong claim about somebody's work. The paper's own sums are up to
    0.02 off."""
    for suite in SUITES.values():
        for name, (*scores, average) in suite.published.items():
            assert len(scores) == len(suite.columns)
            assert sum(scores) / len(scores) == pytest.approx(average, abs=0.026), name
    assert evaluation.V1[3e12] == SUITES["commonsense"].published["TinyLlama v1.0"][:-1]


def test_an_unknown_task_is_named_with_its_neighbours(run, folder, manager, monkeypatch):
    """Before anything is loaded."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    code, out, _ = run(folder, "--tasks=piqa,helaswag")
    assert "no task helaswag" in code and "hellaswag" in code and not out
    assert "near it are commonsense" in run(folder, "--tasks=comonsense")[0]


def test_a_table_shows_what_was_measured(run, folder):
    """Ours beside the published ones, in the metric of the paper, in percent; the same numbers in
    JSON."""
    code, out, err = run(folder, "--tasks=hellaswag, piqa,documents", "--limit=30")
    assert code == 0
    found = {name: json.loads((folder / f"eval/{name},limit=30.json").read_text())
             for name in ("hellaswag", "piqa", "documents")}
    acc = [100 * found[name]["results"][name]["acc_norm,none"] for name in ("hellaswag", "piqa")]
    head, line, *rows = [[cell.strip() for cell in row.split("|")[1:-1]]
                         for row in out.split("\n\n")[0].splitlines()]
    assert head == ["", "HellaSwag", "PIQA"]
    assert rows[0] == ["OPT-1.3B", "53.65", "72.36"] and len(rows) == 8
    assert rows[-1][0] == f"{folder}, 2k tokens"
    error = 100 * found["piqa"]["results"]["piqa"]["acc_norm_stderr,none"]
    assert [cell.split(" ± ")[0] for cell in rows[-1][1:]] == [f"{x:.2f}" for x in acc]
    assert rows[-1][2].endswith(f" ± {error:.2f}")
    bits = found["documents"]["results"]["documents"]["bits_per_byte,none"]
    assert "documents, bits_per_byte" in out and f"{bits:.2f}" in out
    assert "ours without BOS, limit 30, bfloat16" in out.replace("float32", "bfloat16")
    assert found["hellaswag"]["tokens_seen"] == 2000 and found["hellaswag"]["lm_eval"]
    assert "ours with BOS" in run(folder, "--tasks=piqa", "--bos")[1]
    assert (folder / "eval/piqa,bos.json").exists()
    _, out, err = run(folder, "--tasks=piqa", "--quantize=int8")
    assert "quantize int8" in out and ", int8, " in err
    assert json.loads((folder / "eval/piqa,quantize=int8.json").read_text())["quantize"] == "int8"


def test_a_task_that_breaks_is_left_out(run, folder, tmp_path):
    """The twentieth document of the third task must not cost the two before it."""
    items = [*questions(4), {"context": "no choices", "answer": 0}]
    task(tmp_path, "late", items, output_type="multiple_choice", doc_to_choice="{{choices}}",
         metric_list=[{"metric": "acc"}])
    task(tmp_path, "beams", [{"context": "a", "answer": "b"}], output_type="generate_until",
         generation_kwargs={"until": ["."], "num_beams": 2},
         metric_list=[{"metric": "exact_match"}])
    task(tmp_path, "fine", questions(4), output_type="multiple_choice",
         doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    code, out, err = run(folder, "--tasks=late,beams,fine", include=tmp_path)
    assert code == 3 and "fine, acc" in out and "late" not in out and "late is left out: " in err
    assert "generation_kwargs ['num_beams'] are not implemented" in err


def test_a_whole_suite_has_an_average(tasks, run, folder, tmp_path):
    """Of all columns, or none: one of half of them is no number of the paper."""
    columns = SUITES["chinese"].columns
    for name, _, _ in columns.values():
        task(tmp_path, name, questions(8), output_type="multiple_choice",
             doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    code, out, _ = run(folder, "--tasks=chinese", include=tmp_path)
    *scores, average = [float(cell.split("±")[0]) for cell in
                        out.split("\n\n")[0].splitlines()[-1].split("|")[2:-1]]
    assert code == 0 and "58.37" in out and average == pytest.approx(sum(scores) / 4, abs=0.01)
    (tmp_path / "xnli_zh.jsonl").unlink()
    code, out, err = run(folder, "--tasks=chinese", include=tmp_path)
    assert code == 3 and "xnli_zh is left out: it cannot be loaded" in err
    assert out.split("\n\n")[0].splitlines()[-1].split("|")[-2].strip() == ""
    assert f"{scores[0]:.2f}" in out                              # it went on with the others


def test_what_does_not_fit_is_counted(run, folder):
    """A score of questions whose beginning was lost is another score."""
    _, _, err = run(folder, "--tasks=hellaswag,piqa,answers")
    assert [line for line in err.splitlines() if "lost their beginning" in line] == [
        f"{name} requests did not fit the context of 256 and lost their beginning"
        for name in ("hellaswag: 2 of 486", "answers: 1 of 101")]


def test_what_just_fits_is_whole(loaded):
    """The last token is asked for, not read: a text may be one longer than the context."""
    lm = Adapter(*loaded, False, 4)
    ids = [7] * 200
    lm._loglikelihood_tokens([(None, ids, [8] * 57), (None, ids, [8] * 58)])
    assert (lm.cut, lm.requests) == (1, 2)
    assert lm._loglikelihood_tokens([(None, [7], [])]) == [(0.0, True)]
    # a context of spaces only is nothing to the harness, and then BOS stands before the answer
    spaces, bos = lm._loglikelihood_tokens([(None, [], [8]), (None, [1], [8])])
    assert spaces == bos


def test_of_equals_the_first_is_the_likeliest(loaded):
    """As generation would take it: in bf16 one maximum in fifty is shared, and a benchmark of last
    words would count each of them."""
    model, same = copy.deepcopy(loaded[0]), torch.zeros(600)
    same[[3, 5]] = 1.0
    model.head.forward = lambda x: same.expand(len(x), -1)
    given = likelihoods(model, [([1], [3]), ([1], [5]), ([1], [4])], 1)
    assert [first for _, first in given] == [True, False, False]


def test_code_is_only_run_if_allowed(run, folder, tmp_path):
    """What a model writes may delete files."""
    task(tmp_path, "code", [{"context": "def f():\n", "answer": "x"}], unsafe_code=True,
         output_type="generate_until", metric_list=[{"metric": "exact_match"}])
    code, out, err = run(folder, "--tasks=code", include=tmp_path)
    assert code == 3 and "allow it by --run_code" in err
    code, out, _ = run(folder, "--tasks=code", "--run_code", include=tmp_path)
    assert code == 0 and "code, exact_match" in out


def test_a_group_and_a_tag(run, folder, tmp_path, monkeypatch):
    """A group may have a score of its own; what only gathers tasks has theirs."""
    for name in "one", "two":
        task(tmp_path, name, questions(9, seed=len(name)), output_type="multiple_choice",
             doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}], tag="both")
    both = {"group": "all", "task": ["one", "two"]}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(
        both | {"aggregate_metric_list": [{"metric": "acc"}]}))
    (tmp_path / "loose.yaml").write_text(yaml.safe_dump(both | {"group": "loose"}))
    known = manager_of(tmp_path)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)
    for name, columns in ("all", ["all"]), ("both", ["one", "two"]), ("loose", ["one", "two"]):
        code, out, _ = run(folder, f"--tasks={name}", include=tmp_path)
        assert code == 0
        assert [cell.strip() for cell in out.splitlines()[0].split("|")[2:-1]] == [
            f"{column}, acc" for column in columns]


def test_scores_are_found_among_what_the_harness_says():
    """It joins metrics with filters, and puts errors beside them."""
    found = {"alias": "x", "sample_len": 5, "acc,none": 0.25, "acc_stderr,none": 0.1,
             "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"}
    assert score_of(found) == ("acc_norm", 50.0, None)
    assert score_of(found, "acc") == ("acc", 25.0, 10.0)
    assert score_of({"word_perplexity,none": 31.5, "word_perplexity_stderr,none": "N/A"}) == (
        "word_perplexity", 31.5, None)


def test_many_checkpoints_are_a_table_and_a_picture(run, folder, tmp_path, monkeypatch):
    """Over tokens, as in the paper's figure 2."""
    pytest.importorskip("matplotlib")
    write = evaluation.plot.write
    for step in 3, 2:
        shutil.copytree(folder, tmp_path / f"step_0000000{step}")
        (tmp_path / f"step_0000000{step}/training/state.json").write_text(
            json.dumps({"tokens": 1000 * step}))
    (tmp_path / "a.txt").write_text("some text")
    steps, lines = sorted(tmp_path.glob("step_*"), reverse=True), []
    monkeypatch.setattr(evaluation.plot, "write", lambda figure, out: (
        lines.extend([[line.get_xydata().tolist() for line in ax.lines] for ax in figure.axes]),
        write(figure, out)))
    code, out, err = run(*steps, steps[0] / "..", f"{steps[0]}/", "--tasks=piqa,documents",
                         "--limit=5", f"--text={tmp_path / 'a.txt'}")
    assert code == 0 and out.count("2k tokens") == 3 and out.count("3k tokens") == 3
    (_, level), (rolling,), (bits,) = lines = [[line for line in ax if line] for ax in lines]
    assert [x for x, _ in lines[0][0]] == [x for x, _ in bits] == [2000, 3000]       # in order
    assert level[0][1] == SUITES["commonsense"].published["Pythia-1.4B"][6]
    assert (tmp_path / "eval.png").read_bytes()[:4] == b"\x89PNG" and "eval.png" in err
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "eval.png").unlink()
    task(tmp_path, "late", [{"context": "x"}], output_type="multiple_choice",
         doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    assert run(*steps, "--tasks=late", include=tmp_path)[0] == 3     # there is nothing to draw
    assert not (tmp_path / "eval.png").exists()


# --------------------------------------------------------------------------------------------------
# Texts

def test_bits_per_byte_of_a_text(run, folder, loaded, tmp_path):
    """By its definition; and as the harness finds it."""
    model, tokenizer = loaded
    (tmp_path / "a.txt").write_text(DOCUMENTS[0], "utf-8")
    ids, nats = [1, *tokenizer.encode(DOCUMENTS[0])], 0.0
    with torch.no_grad():
        for text, targets in windows(ids[1:], 1, model.config.context):
            logits = model(torch.tensor([text]))[0, -len(targets):]
            nats += F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
    bits = nats / math.log(2) / len(DOCUMENTS[0].encode())
    (tmp_path / "b.txt").write_text("another")
    code, out, _ = run(folder, f"--text={tmp_path}", "--dtype=float32", "--limit=1")
    assert code == 0 and f"{bits:.4f}" in out and "acc" not in out
    task(tmp_path, "one", [{"text": DOCUMENTS[0]}], doc_to_text="", doc_to_target="{{text}}",
         output_type="loglikelihood_rolling", metric_list=[{"metric": "bits_per_byte"}])
    scores, _ = answers_of(Adapter(*loaded, False, 4), tmp_path, "one")
    assert scores["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_bits_per_byte_of_a_source_are_trainings(run, folder, loaded, tmp_path):
    """Evaluation and training disagreeing about the same checkpoint would leave one to wonder which
    is right."""
    ours = (folder / "tokenizer.model").read_bytes()
    prepare.write_source(tmp_path / "own", DOCUMENTS[:60], ours, 0.5, "here")
    _, out, err = run(folder, f"--text={tmp_path / 'own'}", "--dtype=float32")
    source = Source(tmp_path / "own", "val", 256)
    cfg = load_config(["--context=256", "--vocab_size=600", "--eval_tokens=1_000_000", "--micro_batch=4"],
               train.TrainConfig)
    model, where = Llama.from_pretrained(folder), World(torch.device("cpu"))
    _, bits = train.evaluate(model, SimpleNamespace(val={"own": source}, cfg=cfg, world=where, dtype=torch.float32))
    assert f"{bits['own']:.4f}" in out
    code, *_ = run(folder, f"--text={tmp_path / 'own'}", "--limit=1")
    assert code == 0
    other = tmp_path / "other"
    theirs = prepare.train_tokenizer(DOCUMENTS[5:], 600)
    prepare.write_source(other, DOCUMENTS[:60], theirs, 0.5, "")
    code, _, err = run(folder, f"--text={other}")
    assert code == 3 and "another tokenizer" in err


def test_a_text_may_be_called_as_a_task_is(run, folder, tmp_path, monkeypatch):
    """Both are asked for by name, and the task would be measured twice."""
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "a.txt").write_text("some text")
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(folder, "--text=piqa", "--tasks=piqa", "--limit=3")
    bits = json.loads((folder / "eval/text,piqa,limit=3.json").read_text())["bits_per_byte"]
    assert code == 0 and f"{bits:.4f}" in out and "| PIQA" in out


def test_texts_need_no_harness(folder, tmp_path, monkeypatch, capsys):
    """650 MB of packages for a number that needs none."""
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    spec = importlib.util.spec_from_file_location("alone", evaluation.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    (tmp_path / "a.txt").write_text("some text")
    alone.main([str(folder), f"--text={tmp_path / 'a.txt'}"])
    assert "bits a byte" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pip install lm-eval"):
        alone.main([str(folder)])


@pytest.mark.parametrize("argument, message", {
    "--limit=0": "--limit must be at least 1, got 0",
    "--batch=0": "--batch must be at least 1, got 0",
    "--num_fewshot=-1": "--num_fewshot must be at least 0, got -1",
    "--out=a.pdf": "must end in .png", "--text=nowhere.txt": "there is no file nowhere.txt",
    "elsewhere": "there is no folder elsewhere"}.items())
def test_bad_arguments_are_refused(argument, message, run, folder):
    """A sentence, not a traceback; and before an hour of work."""
    code, out, err = run(folder, argument, "--tasks=piqa")
    assert message in str(code) and not out + err


def test_a_text_with_lost_rows_tells(run, folder, tmp_path):
    """Bits per byte of half a file are another number."""
    (tmp_path / "a.jsonl").write_text('{"text": "one row"}\n{"txt": "another"}\n')
    code, out, err = run(folder, f"--text={tmp_path / 'a.jsonl'}")
    assert code == 3 and "bits a byte" in out and "has no 'text'" in err


def test_a_folder_that_cannot_be_written_costs_no_result(run, folder, monkeypatch):
    """The hub's cache may be somebody else's."""
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(evaluation, "write_json", refuse)
    code, out, err = run(folder, "--tasks=piqa", "--limit=2")
    assert code == 0 and "PIQA" in out and "cannot be written: Permission denied" in err
    assert not (folder / "eval/piqa,limit=2.json").exists()
