"""The tables by which TinyLlama is judged: python eval.py [CHECKPOINT ...] [--tasks=SUITE] ...

The tasks are those of lm-evaluation-harness (pip install lm-eval): it makes requests to a model out
of questions, and scores out of answers. Here are the model behind it and the tables in front of it,
the published numbers beside ours; and bits per byte of any text, which need no harness (--text).

Most requests ask how likely a continuation is behind a context: each of four endings of a story,
say. Requests that begin alike become one row here, a tree, and what they share is computed once:

    row         The cat sat on the mat . her hat .
    position     0   1   2   3  4   5  6  4   5  6
    end          ∞   ∞   ∞   ∞  7   7  7  ∞   ∞  ∞

Each token stands as far from the root as in its own text, and sees what came before it in the row
but for branches that have ended: token i sees token j if j <= i < end of j. The likelihoods are the
same as of a row a text, for several times less work.
"""
import argparse
import difflib
import gc
import json
import logging
import math
import os
import random
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import plot
import prepare
from data import Source
from device import compile_error, find_device, find_dtype
from files import InputError, read_json, write_json
from quantize import LINEAR_TYPES
from sample import (
    Decoder,
    TextStreamer,
    count_parameters,
    find_model,
    generate,
    load_model,
    sample_token,
    should_compile,
)
from tokenizer import Encoder

try:
    from lm_eval.api.model import TemplateLM
except ImportError:              # --text does without it
    TemplateLM = object


# --------------------------------------------------------------------------------------------------
# Likelihoods

FOREVER = 2 ** 31 - 1
SHARED = 0.25       # of a text that a row has already, from which on the text joins that row
PART = 512          # states of which the head makes logits at once


class Row:
    """Texts that begin alike, as a tree."""

    def __init__(self):
        self.ids, self.positions, self.ends = [], [], []
        self.path = []               # where in the row the tokens of the newest text stand
        self.asked = []              # of each text: its number, where it predicts what targets

    @property
    def plain(self):
        """Whether there are no branches: a text, and beginnings of it."""
        return all(end == FOREVER for end in self.ends)

    def shared(self, ids):
        """How many tokens ids begins with like the newest text."""
        n = min(len(ids), len(self.path))
        return next((i for i in range(n) if self.ids[self.path[i]] != ids[i]), n)

    def add(self, number, ids, targets):
        """A text, of which the last states are to predict the targets."""
        old, new = self.shared(ids), range(len(self.ids), len(self.ids) + len(ids))
        for j in self.path[old:]:
            self.ends[j] = new[0]
        self.path[old:] = new[:len(ids) - old]
        self.ids += ids[old:]
        self.positions += range(old, len(ids))
        self.ends += [FOREVER] * (len(ids) - old)
        self.asked.append((number, self.path[len(ids) - len(targets):], targets))


def rows_of(texts, size):
    """Rows of at most `size` tokens, of texts that have no more, [(ids, targets), ...]."""
    rows = []
    for number in sorted(range(len(texts)), key=lambda number: texts[number][0]):
        ids, targets = texts[number]
        shared = rows[-1].shared(ids) if rows else 0
        if not rows or shared < SHARED * len(ids) or len(rows[-1].ids) + len(ids) - shared > size:
            rows.append(Row())
        rows[-1].add(number, ids, targets)
    return rows


def batches(rows, most):
    """Lists of rows with at most so many texts, or of one row; the longest first. Trees by
    themselves: one among them, and plain texts would need a mask, too."""
    for plain in False, True:
        batch, texts = [], 0
        for row in sorted((row for row in rows if row.plain is plain), key=lambda r: -len(r.ids)):
            if batch and texts + len(row.asked) > most:
                yield batch
                batch, texts = [], 0
            batch.append(row)
            texts += len(row.asked)
        if batch:
            yield batch


def lay_out(rows, device):
    """Rows as Llama.states takes them: ids (B, T), and their places, or None for plain ones."""
    T = 8 * math.ceil(max(1, len(rows[0].ids)) / 8)        # kernels want masks in multiples of 8
    filled = [[column + [filler] * (T - len(column)) for column, filler in (
        (row.ids, 0), (row.positions, 0), (row.ends, FOREVER))] for row in rows]
    filled = torch.tensor(filled, dtype=torch.long, device=device)
    ids, positions, ends = filled.unbind(1)                                             # (B, T)
    if rows[0].plain:
        return ids, None
    i = torch.arange(T, device=device)
    return ids, (positions, ((i <= i[:, None]) & (i[:, None] < ends[:, None]))[:, None])


@torch.inference_mode()
def likelihoods(model, texts, batch, done=lambda texts: None):
    """Of each of texts, (ids, targets) where the last states behind ids predict the targets: (their
    log-likelihood in nats, whether each is the likeliest token there). `batch` texts at a time."""
    answers, device = [None] * len(texts), model.embed.weight.device
    for rows in batches(rows_of(texts, model.config.context), batch):
        ids, places = lay_out(rows, device)
        x = model.hidden_states(ids, places=places).flatten(0, 1)                          # (B T, C)
        asked = [(number, [b * ids.shape[1] + j for j in at], targets)
                 for b, row in enumerate(rows) for number, at, targets in row.asked]
        at, targets = (torch.tensor([*chain(*lists)], dtype=torch.long, device=device)
                       for lists in list(zip(*asked))[1:])
        nats, first = [], []
        for at, targets in zip(at.split(PART), targets.split(PART)):
            logits = model.head(x[at]).float()                                      # (n, V)
            nats.append(-F.cross_entropy(logits, targets, reduction="none"))
            first.append(logits.argmax(1) == targets)       # of equals the first, as in generation
        each = [len(targets) for _, _, targets in asked]
        for (number, _, _), own, greedy in zip(asked, torch.cat(nats).cpu().split(each),
                                               torch.cat(first).cpu().split(each)):
            answers[number] = own.double().sum().item(), greedy.all().item()
        done(len(asked))
    return answers


def windows(ids, bos_id, context):
    """Texts in which each of ids is predicted once, the first behind BOS. All but the first are as
    long as the context; the last predicts what is left."""
    ids = [bos_id, *ids]
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        yield ids[max(0, end - context):end], ids[start + 1:end + 1]


# --------------------------------------------------------------------------------------------------
# The model as lm-evaluation-harness wants it

def generation(how, context):
    """(stop strings, most new tokens, settings of sample.choose) of a task's generation_kwargs. Who
    wants more tokens than the context holds gets half of it, and the prompt the other half."""
    from lm_eval.models.utils import normalize_gen_kwargs
    how = normalize_gen_kwargs(how)
    until, new = how.get("until") or [], how["max_gen_toks"]
    known = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}
    if set(how) - known:
        raise ValueError(f"generation_kwargs {sorted(set(how) - known)} are not implemented")
    return ([stop for stop in ([until] if isinstance(until, str) else until) if stop],
            new if new < context else context // 2,
            {"temperature": how.get("temperature", 1.0 if how["do_sample"] else 0.0),
             "top_k": how.get("top_k") or 0, "top_p": how.get("top_p") or 1.0})


def remembering(path):
    """The encode of a tokenizer.model, several times as fast where prompts share examples."""
    encoder = Encoder(path.read_bytes())

    def encode(text):
        [(_, ids)] = encoder.encode([text])
        return np.frombuffer(ids, encoder.dtype).tolist()

    return encode


class Adapter(TemplateLM):
    """Our model to lm-evaluation-harness. Texts begin with BOS if `bos`; whole documents, and what
    has nothing before it, always do. What is too long for the context loses its beginning, and is
    counted: `cut`, of `requests`."""
    eot_token_id = prefix_token_id = None                # of the instance; abstract in the harness

    def __init__(self, model, tokenizer, bos, batch, quantize=None):
        super().__init__()
        self.model, self.tokens, self.bos, self.batch = model, tokenizer, bos, batch
        self.quantize, self.context = quantize, model.config.context
        self.eot_token_id, self.prefix_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        self.cut = self.requests = 0

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = self.bos if add_special_tokens is None else add_special_tokens
        return [self.tokens.bos_id] * bos + self.tokens.encode(string)

    def _loglikelihood_tokens(self, requests, **_):
        texts = []
        for _, context, continuation in requests:
            context = context or [self.prefix_token_id]          # it was nothing but spaces
            ids = (context + continuation)[-self.context - 1:-1]
            texts.append((ids, continuation[max(0, len(continuation) - len(ids)):]))
            self.cut += len(context) + len(continuation) - 1 > self.context
        self.requests += len(requests)
        return self.answer(texts)

    def answer(self, texts):
        with tqdm(total=len(texts), desc="likelihoods", disable=None) as bar:
            return likelihoods(self.model, texts, self.batch, bar.update)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        texts, of, nats = [], [], [0.0] * len(requests)
        self.requests += len(requests)
        for k, (string,) in enumerate(request.args for request in requests):
            for text in windows(self.tokens.encode(string), self.tokens.bos_id, self.context):
                texts.append(text)
                of.append(k)
        for k, (own, _) in zip(of, self.answer(texts)):
            nats[k] += own
        return nats

    def generate_until(self, requests, disable_tqdm=False):
        answers, groups = [None] * len(requests), defaultdict(list)
        self.requests += len(requests)
        for k, (context, how) in enumerate(request.args for request in requests):
            groups[json.dumps(how, sort_keys=True)].append((k, context))
        with tqdm(total=len(requests), desc="texts", disable=None) as bar:
            for how, members in groups.items():
                for k, text in self.follow(members, *generation(json.loads(how), self.context)):
                    answers[k] = text
                    bar.update()
        return answers

    def follow(self, members, until, new, settings):
        """Yields (k, the text behind a context up to the first stop string) for members (k,
        context), those of a batch at once."""
        prompts = []
        for k, context in members:
            ids = self.tok_encode(context) or [self.prefix_token_id]
            self.cut += len(ids) > self.context - new
            prompts.append((ids[-(self.context - new):], k, context))
        prompts.sort(key=lambda prompt: -len(prompt[0]))
        rows, most = min(self.batch, len(prompts)), len(prompts[0][0]) + new
        decoder = Decoder(self.model, rows, most, self.tokens.size, should_compile(
            self.model, self.quantize, math.ceil(len(prompts) / rows) * new)
            and not compile_error(self.model.embed.weight.device))
        for start in range(0, len(prompts), rows):
            part = prompts[start:start + rows]
            texts, going = [""] * len(part), [True] * len(part)
            # a few tokens of a prompt are enough to tell what those behind it add
            streams = [TextStreamer(self.tokens, ids[-8:]) for ids, _, _ in part]
            spare = [[self.prefix_token_id]] * (rows - len(part))
            for new_ids in generate(decoder, [ids for ids, _, _ in part] + spare, 1, new,
                                    self.tokens.eos_ids, partial(sample_token, **settings)):
                for r in range(len(part)):
                    if going[r]:
                        texts[r] += streams[r].add(new_ids[r])
                        going[r] = bool(new_ids[r]) and not any(stop in texts[r] for stop in until)
                if not any(going):
                    break
            for r, (_, k, context) in enumerate(part):
                text = texts[r] + streams[r].add([], last=True)
                for stop in until:
                    text = text.split(stop)[0]
                # the harness leaves out the space between two words, but indentation is kept
                yield k, text.removeprefix(" ") if context[-1:].strip() else text


# --------------------------------------------------------------------------------------------------
# Suites: the tables of arXiv 2401.02385 (v1 and v2), and what is asked for them

class Suite(NamedTuple):
    columns: dict        # title: (task of lm-evaluation-harness, metric, examples in the prompt)
    published: dict      # row: score of each column and the average, in percent, as printed
    note: str


SUITES = {
    "commonsense": Suite(
        {"HellaSwag": ("hellaswag", "acc_norm", 0), "OBQA": ("openbookqa", "acc_norm", 0),
         "WinoGrande": ("winogrande", "acc", 0), "ARC-c": ("arc_challenge", "acc_norm", 0),
         "ARC-e": ("arc_easy", "acc_norm", 0), "BoolQ": ("boolq", "acc", 0),
         "PIQA": ("piqa", "acc_norm", 0)},
        {"OPT-1.3B": (53.65, 33.40, 59.59, 29.44, 50.80, 60.83, 72.36, 51.44),
         # BoolQ: 60.83 in the repository's EVAL.md, 57.83 in the paper, whose average says 60.83
         "Pythia-1.0B": (47.16, 31.40, 53.43, 27.05, 48.99, 60.83, 69.21, 48.30),
         "Pythia-1.4B": (52.01, 33.20, 57.38, 28.50, 54.00, 63.27, 70.95, 51.33),
         "TinyLlama v1.0": (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29, 52.99),
         "TinyLlama v1.1": (61.47, 36.80, 59.43, 32.68, 55.47, 55.99, 73.56, 53.63),
         "v1.1 Math & Code": (60.80, 36.40, 60.22, 33.87, 55.20, 57.09, 72.69, 53.75),
         "v1.1 Chinese": (58.23, 35.20, 59.27, 31.40, 55.35, 61.41, 73.01, 53.41)},
        "published 0-shot, without BOS, in fp32; acc_norm, by length in characters, but acc for "
        "WinoGrande and BoolQ"),
    "problem_solving": Suite(
        {"MMLU": ("mmlu", "acc", 5), "BBH": ("bbh_fewshot", "exact_match", 3),
         "HumanEval": ("humaneval", "pass@1", 0), "DROP": ("drop", "em", 3)},
        {"OPT-1.3B": (24.90, 28.57, 0.00, 14.32, 16.95),
         "Pythia-1.0B": (25.70, 28.19, 1.83, 4.25, 14.99),
         "Pythia-1.4B": (25.41, 29.01, 4.27, 12.27, 17.72),
         "TinyLlama v1.0": (25.34, 29.65, 9.15, 15.34, 19.87),
         "TinyLlama v1.1": (26.58, 29.27, 6.71, 15.21, 19.44),
         "v1.1 Math & Code": (24.60, 26.35, 15.24, 18.54, 21.18),
         "v1.1 Chinese": (26.35, 30.04, 4.88, 15.75, 19.26)},
        "published numbers are InstructEval's, with BOS, other prompts, examples and matching of "
        "answers: near, not the same"),
    "chinese": Suite(
        {"XWinograd": ("xwinograd_zh", "acc", 0), "XStoryCloze": ("xstorycloze_zh", "acc", 0),
         "XNLI": ("xnli_zh", "acc", 0), "XCOPA": ("xcopa_zh", "acc", 0)},
        {"OPT-1.3B": (54.96, 48.38, 33.45, 53.00, 47.45),
         "Pythia-1.0B": (60.31, 48.97, 33.77, 55.20, 49.56),
         "Pythia-1.4B": (60.51, 50.56, 35.38, 53.00, 49.86),
         "TinyLlama v1.0": (68.45, 54.53, 33.69, 56.80, 53.37),
         "TinyLlama v1.1": (55.75, 47.98, 34.70, 51.40, 47.46),
         "v1.1 Math & Code": (63.69, 56.32, 33.57, 57.00, 52.64),
         "v1.1 Chinese": (74.20, 60.29, 33.77, 65.20, 58.37)},
        "published 0-shot, acc; the paper names no harness"),
}

# the commonsense suite for checkpoints of v1.0, by tokens (EVAL.md of the original's repository)
V1 = {105e9: (43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30),
      503e9: (49.56, 31.40, 55.80, 26.54, 48.32, 56.91, 69.42),
      1007e9: (52.54, 33.40, 55.96, 27.82, 52.36, 59.54, 69.91),
      1.5e12: (53.68, 35.20, 58.33, 29.18, 51.89, 59.08, 71.65),
      2e12: (54.63, 33.40, 56.83, 28.07, 54.67, 63.21, 70.67),
      2.5e12: (58.96, 34.40, 58.72, 31.91, 56.78, 63.21, 73.07),
      3e12: (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29)}


# --------------------------------------------------------------------------------------------------
# Tasks

PERCENT = "acc_norm", "acc", "exact_match", "pass@1", "em", "f1"      # the first of them is shown


def asked_for(args):
    """{task: (metric, examples in a prompt)} of --tasks; None for what no suite says."""
    known = {task: (metric, shots) for suite in SUITES.values()
             for task, metric, shots in suite.columns.values()}
    found = {}
    for name in filter(None, map(str.strip, (args.tasks or "").split(","))):
        for task in [c[0] for c in SUITES[name].columns.values()] if name in SUITES else [name]:
            metric, shots = known.get(task, (None, None))
            found[task] = metric, shots if args.num_fewshot is None else args.num_fewshot
    return found


def attempt(name, left_out, work, *args):
    """What work(*args) returns; or None where it fails, and then `name` is left out."""
    try:
        return work(*args)
    except (Exception, SystemExit) as error:     # of its data, its template, its metric, memory
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        print(f"{name} is left out: {kind}{error}", file=sys.stderr)
        left_out.append(name)


def load_task(manager, name, shots, run_code):
    """What the harness loads for a name: a task, or several."""
    random.seed(0)                               # some tasks shuffle as they are read
    try:
        loaded = manager.load([name])
    except Exception as error:         # of the network, the hub, the reader of a file or the task
        sys.exit(f"it cannot be loaded: {type(error).__name__}: {error}")
    tasks = loaded["tasks"].values()
    if not run_code and any(getattr(task, "UNSAFE_CODE", False) for task in tasks):
        sys.exit("it runs code that the model writes, on this machine: allow it by --run_code")
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=own or 0 if shots is None else shots)
        elif shots:                              # the harness takes that for a part of the task
            print(f"{task.task_name} is without examples: it says so itself", file=sys.stderr)
    return loaded


def load_tasks(asked, args):
    """({task: what the harness loads for it}, the tasks that were left out)."""
    if TemplateLM is object:
        sys.exit("tasks need lm-evaluation-harness: pip install lm-eval")
    from lm_eval.tasks import TaskManager
    for noisy in "lm_eval", "huggingface_hub", "datasets":
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # the harness takes some seconds to list its 14,000 tasks; local ones need not wait for that
    manager = TaskManager(include_path=args.include_path, include_defaults=False)
    if not set(asked) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=args.include_path)
    for name in asked:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], 5)
            sys.exit(f"lm-evaluation-harness has no task {name}"
                     + f"; near it are {', '.join(near)}" * bool(near)
                     + "; tasks of your own are found with --include_path=FOLDER")
    os.environ |= {"HF_ALLOW_CODE_EVAL": "1",    # such tasks cannot even be loaded without
                   "DISABLE_MULTIPROC": "1"}     # errors are estimated in this process
    found, left_out = {}, []
    for name, (_, shots) in asked.items():
        if loaded := attempt(name, left_out, load_task, manager, name, shots, args.run_code):
            found[name] = loaded
    return found, left_out


def measure(lm, loaded, args):
    """What the harness finds of a task: its results, and how it came to them."""
    import lm_eval
    random.seed(0)                               # the seeds are the harness' own
    np.random.seed(1234)
    torch.manual_seed(1234)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    lm.cut, lm.requests, start = 0, 0, time.perf_counter()
    with redirect_stdout(sys.stderr):            # it prints, too
        found = lm_eval.evaluate(lm, loaded, limit=args.limit, bootstrap_iters=1000,
                                 log_samples=False, confirm_run_unsafe_code=args.run_code)
    return {"results": found["results"], "num_fewshot": found["n-shot"],
            "questions": found["n-samples"], "versions": found["versions"],
            "lm_eval": lm_eval.__version__, "requests": lm.requests, "cut": lm.cut,
            "seconds": time.perf_counter() - start}


def score_of(results, wanted=None):
    """(metric, value, standard error or None) of a task's results, of the wanted metric if it has
    that; in percent where that is usual. None where there is no metric, as for some groups."""
    found = {}
    for key, value in results.items():           # "acc,none": 0.5, "acc_stderr,none": 0.1
        metric, _, rest = key.partition(",")
        if rest and not metric.endswith("_stderr") and not isinstance(value, str):
            found.setdefault(metric, (value, results.get(f"{metric}_stderr,{rest}")))
    metric = next((metric for metric in (wanted, *PERCENT, *found) if metric in found), None)
    if metric is None:
        return None
    scale = 100 if metric in PERCENT else 1
    return metric, *(x * scale if isinstance(x, (int, float)) else None for x in found[metric])


# --------------------------------------------------------------------------------------------------
# Texts

def read_text(name, folder, tokenizer, context, args):
    """(texts (ids, targets), one after the other, in which each token of `name` is predicted once;
    how many bytes that is; how many rows were lost): the documents of files, each behind BOS, or a
    source's validation windows, as training evaluates them."""
    if (Path(name) / "source.json").exists():
        source, own = Source(name, "val", context), folder / "tokenizer.model"
        if not source.windows:
            sys.exit(f"its validation part is shorter than the context of {context}")
        if source.header.vocab_size != tokenizer.size or own.exists() and (
                sha256(own.read_bytes()).hexdigest() != source.header.tokenizer_sha256):
            sys.exit(f"it was written with another tokenizer than that of {folder}: "
                     "give the text itself")
        some = range(source.windows)[:args.limit]
        return (((window[:-1], window[1:]) for window in (source.window(i).tolist() for i in some)),
                len(some) * context * source.info["bytes"] / source.info["tokens"], 0)
    strings, lost = prepare.all_texts(prepare.list_files([name]), prepare.RowFilter(args.text_key))
    strings = strings[:args.limit]
    return ((text for string in strings
             for text in windows(tokenizer.encode(string), tokenizer.bos_id, context)),
            sum(len(string.encode()) for string in strings), lost)


def measure_text(lm, name, folder, args):
    """Bits per byte of a text, and how it came to them."""
    start, nats, tokens = time.perf_counter(), 0.0, 0
    texts, size, lost = read_text(name, folder, lm.tokens, lm.context, args)
    with tqdm(desc="tokens", unit_scale=True, disable=None) as bar:
        while some := list(islice(texts, 64 * lm.batch)):
            nats -= sum(own for own, _ in likelihoods(lm.model, some, lm.batch))
            bar.update(sum(len(targets) for _, targets in some))
            tokens += sum(len(targets) for _, targets in some)
    return {"bits_per_byte": nats / math.log(2) / size, "nats_per_token": nats / tokens,
            "tokens": tokens, "bytes": size, "lost_rows": lost,
            "seconds": time.perf_counter() - start}


# --------------------------------------------------------------------------------------------------
# Tables and pictures

def markdown(rows):
    """Rows of strings as a table; the first is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
             for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|",
                      *lines[1:]])


def cell(score):
    if score is None:
        return ""
    _, value, error = score
    return f"{value:.2f}" + (f" ± {error:.2f}" if error else "")


def suite_table(suite, runs, asked):
    """The columns of a suite that were asked for, published rows first; the average of all."""
    columns = {title: (c, task) for c, (title, (task, *_)) in enumerate(suite.columns.items())
               if task in asked}
    whole = len(columns) == len(suite.columns)
    rows = [["", *columns, *["average"] * whole]]
    for name, scores in suite.published.items():
        rows.append([name, *(f"{scores[c]:.2f}" for c, _ in columns.values()),
                     *[f"{scores[-1]:.2f}"] * whole])
    for name, run in runs.items():
        scores = [run["scores"].get(task) for _, task in columns.values()]
        mean = f"{sum(score[1] for score in scores) / len(scores):.2f}" if all(scores) else ""
        rows.append([name, *map(cell, scores), *[mean] * whole])
    return markdown(rows)


def tables(runs, asked, args):
    """What was measured of runs {name: {"scores": {task: score}, "bits": {text: bits a byte}}},
    in Markdown."""
    parts, listed = [], set()
    for suite in SUITES.values():
        tasks = {task for task, *_ in suite.columns.values()}
        listed |= tasks
        if tasks & asked.keys():
            parts += [suite_table(suite, runs, asked), suite.note]
    others = {task: metric for run in runs.values() for task, (metric, *_) in run["scores"].items()
              if task not in listed}
    if others:
        parts.append(markdown(
            [["", *(f"{task}, {metric}" for task, metric in others.items())],
             *([name, *(cell(run["scores"].get(task)) for task in others)]
               for name, run in runs.items())]))
    if args.text:
        parts.append(markdown([["bits a byte", *args.text], *(
            [name, *(f"{run['bits'][text]:.4f}" if text in run["bits"] else ""
                     for text in args.text)] for name, run in runs.items())]))
    how = ["ours with BOS" if args.bos else "ours without BOS"] * bool(asked) + [
        f"{key} {getattr(args, key)}" for key in ("num_fewshot", "limit", "quantize")
        if getattr(args, key) is not None]
    parts.append(", ".join([*how, *{run["dtype"]: 0 for run in runs.values()}]))
    return "\n\n".join(parts)


def draw(runs, out):
    """The scores and bits a byte of runs over their tokens, a panel each, to the PNG `out`: figure
    2 of the paper, with Pythia-1.4B and the checkpoints of TinyLlama v1.0."""
    plt, panels = plot.pyplot(), defaultdict(lambda: defaultdict(list))
    for run in runs.values():
        for task, (metric, value, error) in run["scores"].items():
            panels[task, metric][run["of"]].append((run["tokens"], value, error or 0))
        for text, bits in run["bits"].items():
            panels[text, "bits a byte"][run["of"]].append((run["tokens"], bits, 0))
    across = min(4, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // across), across, squeeze=False,
                                figsize=(3 * across + 1, 2.6 * -(-len(panels) // across)),
                                layout="constrained")
    for ax in axes.flat[len(panels):]:
        ax.remove()
    published = {task: (c, suite) for suite in SUITES.values()
                 for c, (task, *_) in enumerate(suite.columns.values())}
    for ax, ((name, what), lines) in zip(axes.flat, panels.items()):
        for k, (of, points) in enumerate(lines.items()):
            tokens, values, errors = zip(*sorted(points))
            ax.errorbar(tokens, values, errors, marker=".", linewidth=1.2, label=of,
                        color="black" if k == 0 else f"C{k + 1}")
        if name in published:
            c, suite = published[name]
            ax.axhline(suite.published["Pythia-1.4B"][c], color="C0", linestyle="--", linewidth=0.8,
                       label="Pythia-1.4B")
            most = 1.1 * max(tokens for points in lines.values() for tokens, _, _ in points)
            seen = {n: scores[c] for n, scores in V1.items() if n <= most}
            if suite is SUITES["commonsense"] and seen:
                ax.plot(seen.keys(), seen.values(), color="C1", linestyle=":", marker=".",
                        label="TinyLlama v1.0")
        ax.legend(fontsize="x-small")
        ax.set_title(f"{name}, {what}", fontsize="small")
        ax.grid(alpha=0.2)
        ax.xaxis.set_major_formatter(plot.short)
    figure.supxlabel("tokens")
    plot.write(figure, out)


# --------------------------------------------------------------------------------------------------
# The program

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="eval.py", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT",
                        help="folders or hub names; default: the newest under out/")
    parser.add_argument("--tasks", help=f"suites ({', '.join(SUITES)}) or tasks of "
                        "lm-evaluation-harness; default: commonsense, unless there is --text")
    parser.add_argument("--text", action="append", default=[], metavar="FILE",
                        help="bits per byte of files or a folder data/NAME; may be repeated")
    parser.add_argument("--text_key", default="text", help="of files with rows")
    parser.add_argument("--bos", action="store_true", help="begin texts with BOS, as the harness "
                        "does today; the published ones of commonsense are without")
    parser.add_argument("--num_fewshot", type=int, help="examples in a prompt; default: the "
                        "suite's, or the task's")
    parser.add_argument("--limit", type=int, help="only so many questions of a task, documents "
                        "of a file, or windows of a source")
    parser.add_argument("--batch", type=int, default=16, help="requests at once")
    parser.add_argument("--include_path", metavar="FOLDER", help="with tasks of your own, in YAML")
    parser.add_argument("--run_code", action="store_true", help="run code that the model writes "
                        "on this machine, unprotected; HumanEval is left out without")
    parser.add_argument("--quantize", choices=[*filter(None, LINEAR_TYPES)])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="default: bfloat16 where the hardware has it; published: float32")
    parser.add_argument("--out", metavar="FILE.png", help="the picture of several checkpoints; "
                        "default: eval.png beside the first")
    args = parser.parse_args(argv)
    if not args.tasks and not args.text:
        args.tasks = "commonsense"
    if "" in args.text:
        sys.exit("--text= names nothing")
    for name, least in ("limit", 1), ("batch", 1), ("num_fewshot", 0):
        value = getattr(args, name)
        if value is not None and value < least:
            sys.exit(f"--{name} must be at least {least}, got {value}")
    if args.out and not args.out.endswith(".png"):
        sys.exit(f"--out={args.out} must end in .png")
    return args


def record(folder, name, found, args):
    """Writes what was found of a task or text to `folder`/eval/, in a file of its own for each
    choice that changes numbers."""
    how = {key: getattr(args, key) for key in ("bos", "num_fewshot", "limit", "quantize", "dtype",
                                               "text_key")}
    words = [key if value is True else f"{key}={value}" for key, value in how.items()
             if value not in (None, "text") and value is not False]
    path = folder / "eval" / (",".join([name.replace("/", "_"), *words]) + ".json")
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"checkpoint": str(folder), "task": name} | how | found)
    except OSError as error:
        print(f"{path} cannot be written: {error.strerror}", file=sys.stderr)


def evaluate(folder, tasks, asked, args, left_out):
    """{"tokens", "of", "dtype", "scores", "bits"} of a checkpoint; tokens is None where nothing
    says how many it has seen. Adds to left_out what could not be measured, or not whole."""
    dtype, _ = find_dtype(find_device(), args.dtype or "auto")
    model, tokenizer = load_model(folder, args.quantize, dtype)
    if (folder / "tokenizer.model").exists():
        tokenizer.encode = remembering(folder / "tokenizer.model")
    state, weight = folder / "training" / "state.json", model.embed.weight
    run = {"tokens": read_json(state)["tokens"] if state.exists() else None,
           "of": str(folder.parent), "dtype": str(weight.dtype)[6:], "scores": {}, "bits": {}}
    print(f"{folder}: {count_parameters(model):,} parameters, {args.quantize or run['dtype']}, "
          f"{weight.device}", file=sys.stderr)
    lm = Adapter(model, tokenizer, args.bos, args.batch, args.quantize)
    how = {"tokens_seen": run["tokens"], "batch": args.batch, "computed_in": run["dtype"]}
    for name in args.text:
        print(name, file=sys.stderr)
        if found := attempt(name, left_out, measure_text, lm, name, folder, args):
            record(folder, f"text,{name}", how | found, args)
            run["bits"][name] = found["bits_per_byte"]
            left_out += [name] * (found["lost_rows"] > 0)
    for name, loaded in tasks.items():
        print(name, "with BOS" if args.bos else "without BOS", file=sys.stderr)
        if found := attempt(name, left_out, measure, lm, loaded, args):
            record(folder, name, how | found, args)
            if lm.cut:
                print(f"{name}: {lm.cut} of {lm.requests} requests did not fit the context of "
                      f"{lm.context} and lost their beginning", file=sys.stderr)
            scores = {task: score for task in (name, *found["num_fewshot"])
                      if (score := score_of(found["results"].get(task, {}), asked[name][0]))}
            run["scores"] |= {name: scores[name]} if name in scores else scores
    return run


def main(argv):
    args = parse_args(argv)
    folders, runs = {}, {}
    for name in args.checkpoints or [None]:
        folder = find_model(name)
        read_json(folder / "config.json")        # what is not there is named before hours of work
        name = str(folder) if name is None or folder.resolve().is_relative_to(
            Path(name).resolve()) else name
        folders.setdefault(folder.resolve(), (name, folder))
    for name in args.text:
        if not (Path(name) / "source.json").exists():
            prepare.list_files([name])
    if len(folders) > 1:
        plot.pyplot()
    asked = asked_for(args)
    tasks, left_out = load_tasks(asked, args) if asked else ({}, [])
    for name, folder in folders.values():
        gc.collect()                             # what compiled the one before holds its weights
        run = evaluate(folder, tasks, asked, args, left_out)
        words = "" if run["tokens"] is None else f", {plot.short(run['tokens'])} tokens"
        runs[name + words] = run
    print(tables(runs, asked, args))
    seen = {name: run for name, run in runs.items()
            if run["tokens"] is not None and (run["scores"] or run["bits"])}
    if len(seen) > 1:
        out = args.out or str(folder.parent / "eval.png")
        draw(seen, out)
        print(out, file=sys.stderr)
    if left_out:
        sys.exit(3)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, prepare.Unreadable) as error:
        sys.exit(str(error))
    except BrokenPipeError:                      # whoever read the tables has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit("\nstopped; what was measured is in CHECKPOINT/eval/")
