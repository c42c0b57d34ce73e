"""Proofs of eval.py: the harness' transformers model answers as ours would, with the same ids; bits
per byte are training's; and tables say what was measured and what was not."""
import argparse
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
from safetensors.torch import load_file, save_file

import eval as evaluation
import parallel
import prepare
import train
from config import load_config
from conversations import Conversation
from data import Source
from eval import SUITES, document_windows, find_score, load_harness_model
from files import InputError
from model import Llama, ModelConfig
from sample import Tokenizer, load_model

lm_eval = pytest.importorskip("lm_eval")
DOCUMENTS = [text for text in prepare.documentation() if len(text) > 600]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where the harness keeps what it reads, instead of the home folder; and half a second less for
    each task, in which it describes the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that has seen enough text to have opinions."""
    folder = tmp_path_factory.mktemp("run") / "step_00000001"
    (folder / "training").mkdir(parents=True)
    prepare.write_tokenizer(folder, prepare.train_tokenizer(DOCUMENTS[:80], 600))
    torch.manual_seed(0)
    model = Llama(ModelConfig(n_layer=2, d_model=64, n_head=4, n_kv_head=2, d_ff=112,
                              vocab_size=600, context=256)).init_weights()
    model.save_pretrained(folder)
    ids = torch.tensor(Tokenizer(folder).encode(" ".join(DOCUMENTS[:80]))[:40 * 513]).view(40, 513)
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
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def harness(folder):
    """The harness' model with and without BOS."""
    return {bos: load_harness_model(folder, torch.float32, argparse.Namespace(bos=bos, batch=8))
            for bos in (False, True)}


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
        {"context": "one text", "choices": ["divided here", "or there"], "answer": 0},
        {"context": "one text divided", "choices": ["here", "there"], "answer": 0},
        {"context": " ".join(DOCUMENTS[:2]), "choices": ["x", "y z"], "answer": 0}]     # too long
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
              "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    task(place, "hellaswag", [*questions(40), *odd], **choice)
    task(place, "piqa", questions(20, seed=1), **choice)
    task(place, "documents", [{"text": text[:n]} for n in (1, 90, 1200) for text in DOCUMENTS[:9]],
         doc_to_text="", doc_to_target="{{text}}", output_type="loglikelihood_rolling",
         metric_list=[{"metric": "bits_per_byte"}])
    task(place, "answers", [item | {"answer": item["choices"][0]}
                            for item in (*questions(20, seed=3), odd[-1])],
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
    """[(what was asked, the answer)] of all requests of a task."""
    found = lm_eval.evaluate(lm, manager_of(place).load([name]), bootstrap_iters=0,
                             log_samples=True)
    return [(asked, answer) for sample in found["samples"][name]
            for asked, answers in zip(sample["arguments"], sample["resps"]) for answer in answers]


def nats_of(model, ids, targets):
    """The log-likelihood of targets after ids, which end with all targets but the last."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, len(ids) - len(targets):]
    return -F.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()


@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_are_those_of_our_model(bos, loaded, harness, tasks):
    """A score of a checkpoint means nothing if transformers opens another model, cuts the text into
    other ids, or begins it with one BOS more; nor if one of two requests that are the same text,
    divided at different places, gets the numbers of the other."""
    (model, tokenizer), start = loaded, [1] if bos else []
    answers = answers_of(harness[bos], tasks, "hellaswag")
    assert len(answers) == 40 * 4 + 10
    for (context, continuation), (nats, _) in answers:
        spaces = len(context) - len(context.rstrip())                # they go to the continuation
        context = context[:len(context) - spaces]
        before = start + tokenizer.encode(context) or [1]            # BOS if there is nothing
        whole = start + tokenizer.encode(context + " " * spaces + continuation)
        if len(whole) > 256:
            continue                                                 # see the test of what is cut
        whole = whole if context or bos else [1, *whole]
        targets = whole[len(before):]
        assert nats == pytest.approx(nats_of(model, whole[:-1], targets), abs=1e-3), context


@pytest.mark.parametrize("bos", [False, True])
def test_generated_text_is_that_of_our_model(bos, loaded, harness, tasks):
    """Padding in a batch, a stop string of another row, or sampling as generation_config.json asks
    would change what a model is marked for."""
    (model, tokenizer), lengths = loaded, set()
    for (context, _), text in answers_of(harness[bos], tasks, "answers")[:-1]:
        ids = new = [1] * bos + tokenizer.encode(context)
        for _ in range(24):
            with torch.no_grad():
                new = [*new, model(torch.tensor([new]))[0, -1].argmax().item()]
        ours = tokenizer.decode(new)[len(tokenizer.decode(ids)):].removeprefix(" ")
        ours = ours.partition("</s>")[0].partition("\n")[0].partition(".")[0]
        assert text == ours
        lengths.add(len(text))
    assert len(lengths) > 3


@pytest.mark.parametrize("bos", [False, True])
def test_documents_begin_with_one_bos(bos, loaded, harness, tasks):
    """With add_bos_token the harness puts a second BOS before them, and a BOS after a BOS
    makes a short document many times as unlikely."""
    model, tokenizer = loaded
    for (text,), (nats,) in ((asked, (answer,)) for asked, answer in answers_of(
            harness[bos], tasks, "documents")):
        windows = document_windows(tokenizer.encode(text), 1, 256)
        assert nats == pytest.approx(sum(nats_of(model, *window) for window in windows), rel=1e-5)
    assert harness[bos].add_bos_token is bos


def test_indentation_is_kept(loaded, harness):
    """Llama's tokenizer drops one space at the beginning of a text: Python code that a model
    indents by four would be marked as wrong."""
    lm, tokenizer = harness[False], loaded[1]
    for before, text, kept in (("def f():\n", "    return 1\n    never", "    return 1\n    never"),
                               ("Q: two", " words", "words"), ("x\n", "y", "y")):
        ids = tokenizer.encode(before + text)[len(tokenizer.encode(before)):]
        assert lm.tok_decode(ids) == kept
    assert lm.tok_decode(2, skip_special_tokens=False) == "</s>"


@pytest.mark.parametrize("shots", [0, 3])
def test_checkpoints_get_the_same_examples(shots, folder, run, tmp_path):
    """The examples in a prompt are drawn: if a second checkpoint had others, the two could not be
    compared."""
    twin = tmp_path / "step_00000002"
    shutil.copytree(folder, twin)
    code, _, _ = run(folder, twin, "--tasks=piqa", f"--num_fewshot={shots}", "--dtype=float32",
                     f"--out={tmp_path / 'x.png'}")
    name = f"eval/piqa,num_fewshot={shots},dtype=float32.json"
    first, second = (json.loads((place / name).read_text()) for place in (folder, twin))
    assert code == 0 and first["results"] == second["results"]
    assert first["num_fewshot"] == {"piqa": shots}


def test_a_task_that_says_no_examples_means_it(run, folder, tmp_path):
    """As the harness takes it: HumanEval with examples is another benchmark."""
    task(tmp_path, "bare", questions(9), output_type="multiple_choice", num_fewshot=0,
         doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    assert run(folder, "--tasks=bare", "--num_fewshot=2", include=tmp_path)[0] == 0
    found = json.loads((folder / "eval/bare,num_fewshot=2.json").read_text())
    assert found["num_fewshot"] == {"bare": 0}


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 16, 17, 40])
def test_windows_are_the_harness_own(n):
    """A token more or less at an end is a token predicted twice, or never."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    ids = list(range(10, 10 + n))
    theirs = [make_disjoint_window(pair) for pair in get_rolling_token_windows(ids, 1, 8, 1)]
    assert ([(context + rest[:-1], rest) for context, rest in theirs]
            == list(document_windows(ids, 1, 8)))


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
        for name, (_, metric, _) in suite.columns.items():
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
    assert evaluation.V1_SCORES[3e12] == SUITES["commonsense"].published["TinyLlama v1.0"][:-1]


def test_an_unknown_task_is_named_with_its_neighbours(run, folder, manager, monkeypatch):
    """Before anything is loaded."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    code, out, _ = run(folder, "--tasks=piqa,helaswag")
    assert "no task helaswag" in code and "hellaswag" in code and not out
    assert "nearest: commonsense" in run(folder, "--tasks=comonsense")[0]


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
    assert "documents, bits_per_byte" in out and f"{bits:.4f}" in out
    assert "ours without BOS, limit 30, bfloat16" in out.replace("float32", "bfloat16")
    assert found["hellaswag"]["tokens_seen"] == 2000 and found["hellaswag"]["lm_eval"]
    assert "ours with BOS" in run(folder, "--tasks=piqa", "--bos")[1]
    assert (folder / "eval/piqa,bos.json").exists()


def test_a_task_that_breaks_is_left_out(run, folder, tmp_path):
    """The twentieth document of the third task must not cost the two before it."""
    items = [*questions(4), {"context": "no choices", "answer": 0}]
    task(tmp_path, "late", items, output_type="multiple_choice", doc_to_choice="{{choices}}",
         metric_list=[{"metric": "acc"}])
    task(tmp_path, "long", [{"context": "a", "answer": "b"}], output_type="generate_until",
         generation_kwargs={"until": ["."], "max_gen_toks": 256},
         metric_list=[{"metric": "exact_match"}])
    task(tmp_path, "fine", questions(4), output_type="multiple_choice",
         doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    code, out, err = run(folder, "--tasks=late,long,fine", include=tmp_path)
    assert code == 3 and "fine, acc" in out and "late" not in out and "late is left out: " in err
    assert "must be less than model's maximum sequence length (256)" in err


def test_a_model_of_nan_has_no_scores(run, folder, tmp_path):
    """The harness chose an answer by NaN and called it accuracy; a text's loss became NaN, which is
    no JSON."""
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("eval"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "x.txt").write_text("a text")
    code, out, err = run(tmp_path / "m", "--tasks=piqa", f"--text={tmp_path / 'x.txt'}")
    assert code == 3 and err.count("is not finite") == 2 and "nan |" not in out
    assert not (tmp_path / "m/eval").exists()


def test_a_whole_suite_has_an_average(tasks, run, folder, tmp_path):
    """Of all columns, or none: one of half of them is no number of the paper."""
    columns = SUITES["chinese"].columns
    for name in columns:
        task(tmp_path, name, questions(8), output_type="multiple_choice",
             doc_to_choice="{{choices}}", metric_list=[{"metric": "acc"}])
    code, out, _ = run(folder, "--tasks=chinese", include=tmp_path)
    *scores, average = [float(cell.split("±")[0]) for cell in
                        out.split("\n\n")[0].splitlines()[-1].split("|")[2:-1]]
    assert code == 0 and "58.37" in out and average == pytest.approx(sum(scores) / 4, abs=0.01)
    (tmp_path / "xnli_zh.jsonl").unlink()
    code, out, err = run(folder, "--tasks=chinese", include=tmp_path)
    assert code == 3 and "xnli_zh is left out: FileNotFoundError" in err
    assert out.split("\n\n")[0].splitlines()[-1].split("|")[-2].strip() == ""
    assert f"{scores[0]:.2f}" in out                              # it went on with the others


def test_what_does_not_fit_is_counted(run, folder):
    """A score of questions whose beginning was lost is another score."""
    _, _, err = run(folder, "--tasks=hellaswag,piqa,answers")
    assert [line for line in err.splitlines() if "lost their beginning" in line] == [
        f"{name} requests did not fit the context of 256 and lost their beginning"
        for name in ("hellaswag: 2", "answers: 1")]


def test_what_just_fits_is_whole(harness):
    """The last token is predicted, not read: a text may be one longer than the context."""
    lm, ids = harness[False], [7] * 200
    lm.cut = 0
    lm._loglikelihood_tokens([(("", ""), ids, [8] * 57), (("", ""), ids, [8] * 58)])
    assert lm.cut == 1


def test_code_is_only_run_if_allowed(run, folder, tmp_path):
    """What a model writes may delete files."""
    task(tmp_path, "code", [{"context": "def f():\n", "answer": "x"}], unsafe_code=True,
         output_type="generate_until", metric_list=[{"metric": "exact_match"}],
         generation_kwargs={"until": ["\n"], "max_gen_toks": 9})
    code, out, err = run(folder, "--tasks=code", include=tmp_path)
    assert code == 3 and "Set --run_code to run this task" in err
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
    assert find_score(found) == ("acc_norm", 50.0, None)
    assert find_score(found, "acc") == ("acc", 25.0, 10.0)
    assert find_score({"word_perplexity,none": 31.5, "word_perplexity_stderr,none": "N/A"}) == (
        "word_perplexity", 31.5, None)


def test_many_checkpoints_are_a_table_and_a_picture(run, folder, tmp_path, monkeypatch):
    """Over tokens, as in the paper's figure 2."""
    pytest.importorskip("matplotlib")
    save = evaluation.plot.save_figure
    for step in 3, 2:
        shutil.copytree(folder, tmp_path / f"step_0000000{step}")
        (tmp_path / f"step_0000000{step}/training/state.json").write_text(
            json.dumps({"tokens": 1000 * step}))
    (tmp_path / "a.txt").write_text("some text")
    steps, lines = sorted(tmp_path.glob("step_*"), reverse=True), []
    monkeypatch.setattr(evaluation.plot, "save_figure", lambda figure, out: (
        lines.extend([[line.get_xydata().tolist() for line in ax.lines] for ax in figure.axes]),
        save(figure, out)))
    code, out, err = run(*steps, steps[0] / "..", f"{steps[0]}/", "--tasks=piqa,documents",
                         "--limit=5", f"--text={tmp_path / 'a.txt'}")
    assert code == 0 and out.count("2k tokens") == 2 and out.count("3k tokens") == 2
    (bits,), (_, level), (rolling,) = lines = [[line for line in ax if line] for ax in lines]
    assert [x for x, _ in lines[1][0]] == [x for x, _ in bits] == [2000, 3000]       # in order
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

def test_bits_per_byte_of_a_text(run, folder, loaded, harness, tmp_path):
    """By its definition; and as the harness finds it."""
    model, tokenizer = loaded
    (tmp_path / "a.txt").write_text(DOCUMENTS[0], "utf-8")
    windows = document_windows(tokenizer.encode(DOCUMENTS[0]), 1, model.config.context)
    nats = sum(nats_of(model, *window) for window in windows)
    bits = -nats / math.log(2) / len(DOCUMENTS[0].encode())
    (tmp_path / "b.txt").write_text("another")
    code, out, _ = run(folder, f"--text={tmp_path}", "--dtype=float32", "--limit=1")
    assert code == 0 and f"{bits:.4f}" in out and "acc" not in out
    task(tmp_path, "one", [{"text": DOCUMENTS[0]}], doc_to_text="", doc_to_target="{{text}}",
         output_type="loglikelihood_rolling", metric_list=[{"metric": "bits_per_byte"}])
    [(_, theirs)] = answers_of(harness[False], tmp_path, "one")
    assert theirs == pytest.approx(nats, rel=1e-5)


def test_bits_per_byte_of_quantized_weights(run, folder, tmp_path):
    """What a precision costs: nearly nothing in int8, more in int4."""
    (tmp_path / "a.txt").write_text(DOCUMENTS[0], "utf-8")
    bits = {}
    for quantize in None, "int8", "int4":
        more = [f"--quantize={quantize}"] if quantize else []
        code, out, err = run(folder, f"--text={tmp_path / 'a.txt'}", "--dtype=float32", *more)
        assert code == 0 and (not quantize or f"quantize {quantize}" in out)
        name = ",".join([str(tmp_path / "a.txt").replace("/", "_"),
                         *(arg[2:] for arg in more), "dtype=float32"])
        found = json.loads((folder / f"eval/text,{name}.json").read_text())
        bits[quantize] = found["bits_per_byte"]
    assert 0 < abs(bits["int8"] - bits[None]) < 0.0002 < abs(bits["int4"] - bits[None])


def test_bits_per_byte_of_a_source_are_trainings(run, folder, loaded, tmp_path):
    """Evaluation and training disagreeing about the same checkpoint would leave one to wonder which
    is right. Of conversations both are of the answers; where the first windows have none, there is
    no number, and no division by 0."""
    ours = (folder / "tokenizer.model").read_bytes()
    cfg = load_config(["--context=256", "--vocab_size=600", "--eval_tokens=1_000_000",
                       "--micro_batch=4"], train.TrainConfig)
    model, where = Llama.from_pretrained(folder), parallel.World(torch.device("cpu"))
    conversations = [Conversation((("user", text), ("assistant", text[:90])), text)
                     for text in DOCUMENTS[:20]]
    for chat, documents in (False, DOCUMENTS[:20]), (True, conversations):
        own = tmp_path / f"own{chat}"
        prepare.write_source(own, documents, ours, 0.5, "here", chat)
        _, out, _ = run(folder, f"--text={own}", "--dtype=float32")
        _, bits = train.evaluate(model, SimpleNamespace(
            val={"own": Source(own, "val", 256)}, cfg=cfg, world=where, dtype=torch.float32))
        assert f"{bits['own']:.4f}" in out
        code, _, err = run(folder, f"--text={own}", "--limit=1")
        assert (code, "nothing is to be learned in its 1 windows" in err) == (3 * chat, chat)
    other = tmp_path / "other"
    theirs = prepare.train_tokenizer(DOCUMENTS[5:30], 600)
    prepare.write_source(other, DOCUMENTS[:20], theirs, 0.5, "")
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
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    spec = importlib.util.spec_from_file_location("alone", evaluation.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    (tmp_path / "a.txt").write_text("some text")
    alone.main([str(folder), f"--text={tmp_path / 'a.txt'}"])
    assert "bits per byte" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pip install .lm-eval"):
        alone.main([str(folder)])


@pytest.mark.parametrize("argument, message", {
    "--limit=0": "--limit must be at least 1, got 0",
    "--batch=0": "--batch must be at least 1, got 0",
    "--num_fewshot=-1": "--num_fewshot must be at least 0, got -1",
    "--quantize=int8": "--quantize goes with --text only",
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
    assert code == 3 and "bits per byte" in out and "has no 'text'" in err


def test_a_folder_that_cannot_be_written_costs_no_result(run, folder, monkeypatch):
    """The hub's cache may be somebody else's."""
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(evaluation, "write_json", refuse)
    code, out, err = run(folder, "--tasks=piqa", "--limit=2")
    assert code == 0 and "PIQA" in out and "cannot be written: Permission denied" in err
    assert not (folder / "eval/piqa,limit=2.json").exists()
