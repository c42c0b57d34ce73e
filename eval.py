"""The tables by which TinyLlama is judged: python eval.py [CHECKPOINT ...] [--tasks=SUITE] ...

There are two kinds of numbers.

Benchmarks (--tasks): a checkpoint is a Hugging Face folder, so lm-evaluation-harness opens it with
its own transformers model, asks the questions and scores the answers. Most of them ask how likely
each of a few continuations is after a context; the likeliest is the model's answer. This file
chooses the tasks and prints the published numbers above ours. It needs pip install "lm-eval[hf]".

Bits per byte of a text (--text): the cross-entropy of its tokens, in bits, over its length in
bytes. It does not depend on the tokenizer, as nats per token do, and needs no harness.
"""
import argparse
import difflib
import gc
import logging
import math
import os
import sys
import time
from collections import ChainMap, defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import plot
from data import Source, bits_per_byte
from device import find_device, find_dtype
from documents import RowFilter, all_texts, list_files
from files import InputError, as_path, read_json, run_program, sha256_file, write_json
from hf import find_model
from quantize import LINEAR_TYPES, stored_kind
from sample import load_model

# --------------------------------------------------------------------------------------------------
# Suites: the tables of arXiv 2401.02385 (v1 and v2), and the tasks that they consist of

class Suite(NamedTuple):
    columns: dict        # task of lm-evaluation-harness: (title, metric, examples in the prompt)
    published: dict      # row: score of each column and the average, in percent, as printed
    note: str            # how the published numbers were measured


SUITES = {
    "commonsense": Suite(
        {"hellaswag": ("HellaSwag", "acc_norm", 0), "openbookqa": ("OBQA", "acc_norm", 0),
         "winogrande": ("WinoGrande", "acc", 0), "arc_challenge": ("ARC-c", "acc_norm", 0),
         "arc_easy": ("ARC-e", "acc_norm", 0), "boolq": ("BoolQ", "acc", 0),
         "piqa": ("PIQA", "acc_norm", 0)},
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
        {"mmlu": ("MMLU", "acc", 5), "bbh_fewshot": ("BBH", "exact_match", 3),
         "humaneval": ("HumanEval", "pass@1", 0), "drop": ("DROP", "em", 3)},
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
        {"xwinograd_zh": ("XWinograd", "acc", 0), "xstorycloze_zh": ("XStoryCloze", "acc", 0),
         "xnli_zh": ("XNLI", "acc", 0), "xcopa_zh": ("XCOPA", "acc", 0)},
        {"OPT-1.3B": (54.96, 48.38, 33.45, 53.00, 47.45),
         "Pythia-1.0B": (60.31, 48.97, 33.77, 55.20, 49.56),
         "Pythia-1.4B": (60.51, 50.56, 35.38, 53.00, 49.86),
         "TinyLlama v1.0": (68.45, 54.53, 33.69, 56.80, 53.37),
         "TinyLlama v1.1": (55.75, 47.98, 34.70, 51.40, 47.46),
         "v1.1 Math & Code": (63.69, 56.32, 33.57, 57.00, 52.64),
         "v1.1 Chinese": (74.20, 60.29, 33.77, 65.20, 58.37)},
        "published 0-shot, acc; the paper names no harness"),
}

COLUMNS = ChainMap(*(suite.columns for suite in SUITES.values()))            # of all suites

# the commonsense suite for checkpoints of v1.0, by tokens (EVAL.md of the original's repository)
V1_SCORES = {
    105e9: (43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30),
    503e9: (49.56, 31.40, 55.80, 26.54, 48.32, 56.91, 69.42),
    1007e9: (52.54, 33.40, 55.96, 27.82, 52.36, 59.54, 69.91),
    1.5e12: (53.68, 35.20, 58.33, 29.18, 51.89, 59.08, 71.65),
    2e12: (54.63, 33.40, 56.83, 28.07, 54.67, 63.21, 70.67),
    2.5e12: (58.96, 34.40, 58.72, 31.91, 56.78, 63.21, 73.07),
    3e12: (59.20, 36.00, 59.12, 30.12, 55.25, 57.83, 73.29)}


def require_finite(number):
    if not math.isfinite(number):
        raise InputError(f"{number} is not finite: weights are NaN, infinite or too large")


# --------------------------------------------------------------------------------------------------
# Benchmarks, by lm-evaluation-harness

def parse_tasks(args):
    """{task: (metric, examples in a prompt)} of --tasks; None for what no suite says."""
    tasks = {}
    for name in filter(None, map(str.strip, (args.tasks or "").split(","))):
        for task in SUITES[name].columns if name in SUITES else [name]:
            _, metric, shots = COLUMNS.get(task, (None, None, None))
            tasks[task] = metric, shots if args.num_fewshot is None else args.num_fewshot
    return tasks


def find_tasks(tasks, include_path):
    """The harness' TaskManager. Exits, before hours of work, where it does not know a task."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        sys.exit(f'tasks need lm-evaluation-harness: pip install "lm-eval[hf]" ({error})')
    for noisy in "lm_eval", "huggingface_hub", "datasets", "transformers":
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # the harness needs seconds to list its 14,000 tasks: it does so only if a task is not local
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=include_path)
    for name in set(tasks) - set(manager.all_tasks):
        near = difflib.get_close_matches(name, [*SUITES, *manager.all_tasks], 5)
        sys.exit(f"lm-evaluation-harness has no task {name}; nearest: {', '.join(near) or 'none'}; "
                 "tasks of your own are found with --include_path=FOLDER")
    return manager


def load_harness_model(folder, dtype, args):
    """The harness' own Hugging Face model of a folder. It counts the requests that it cuts, and two
    of its answers are corrected: those about whole documents, and generated code."""
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):
        cut = 0                          # requests that did not fit and so lost their beginning

        def _loglikelihood_tokens(self, requests, *rest, **options):
            # the last token is only predicted, not read
            self.cut += sum(len(context) + len(continuation) - 1 > self.max_length
                            for _, context, continuation in requests)
            return super()._loglikelihood_tokens(requests, *rest, **options)

        def tok_batch_encode(self, prompts, left_truncate_len=None, **options):
            self.cut += sum(len(self.tok_encode(prompt)) > left_truncate_len for prompt in prompts)
            return super().tok_batch_encode(prompts, left_truncate_len=left_truncate_len, **options)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            # whole documents always begin with BOS: add_bos_token would give them a second one
            self.add_bos_token = False
            answers = super().loglikelihood_rolling(requests, disable_tqdm)
            self.add_bos_token = args.bos
            return answers

        def tok_decode(self, tokens, skip_special_tokens=True):
            # Llama's tokenizer drops the first space of a text. Between two words that is right,
            # but of four spaces of indentation it leaves three, and Python does not run. If more
            # spaces follow, the tokens are decoded after a newline, where nothing is dropped
            text = super().tok_decode(tokens, skip_special_tokens)
            if text.startswith(" "):
                newline = self.tokenizer.encode("\n", add_special_tokens=False)
                text = super().tok_decode([*newline, *tokens], skip_special_tokens)
                text = text.removeprefix(super().tok_decode(newline))
            return text

    torch.backends.cuda.enable_cudnn_sdp(False)          # see model.WITHOUT_CUDNN
    try:
        # logits_cache gives wrong answers where two requests are one text, divided differently
        lm = HarnessModel(str(folder), device=find_device().type, dtype=dtype,
                          batch_size=args.batch, softmax_dtype=torch.float32,
                          add_bos_token=args.bos, logits_cache=False)
    except Exception as error:
        raise InputError(f"transformers cannot open {folder}: {error}") from None
    with torch.inference_mode():
        logits = lm.model(torch.zeros(1, 1, dtype=torch.long, device=lm.device)).logits
        lm.magnitude = sum(x.abs().amax() for x in (*lm.model.parameters(), logits))
    return lm


USUAL_METRICS = "acc_norm", "acc", "exact_match", "pass@1", "em", "f1"       # all in percent


def find_score(results, metric=None):
    """(metric, value, standard error or None) of a task's results: of `metric` if it has that, else
    of the first usual one. None where there is no metric, as for some groups."""
    found = {}
    for key, value in results.items():           # "acc,none": 0.5, "acc_stderr,none": 0.1
        name, _, filtered = key.partition(",")
        if filtered and not name.endswith("_stderr") and not isinstance(value, str):
            found.setdefault(name, (value, results.get(f"{name}_stderr,{filtered}")))
    for name in (metric, *USUAL_METRICS, *found):
        if name in found:
            scale = 100 if name in USUAL_METRICS else 1
            value, error = found[name]
            return name, scale * value, scale * error if isinstance(error, float) else None


def run_task(lm, name, metric, shots, manager, args):
    """What the harness finds for a task, a dict, and the scores to show, {task: score}."""
    import lm_eval
    require_finite(lm.magnitude)                 # by NaN the harness would choose an answer
    lm.cut, start = 0, time.perf_counter()
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"       # tasks that run code cannot be loaded without
    os.environ["DISABLE_MULTIPROC"] = "1"        # standard errors are computed in this process
    with redirect_stdout(sys.stderr):            # only our tables go to standard output
        found = lm_eval.simple_evaluate(
            lm, tasks=[name], num_fewshot=shots, limit=args.limit, task_manager=manager,
            bootstrap_iters=1000, log_samples=False, confirm_run_unsafe_code=args.run_code)
    if lm.cut:
        print(f"{name}: {lm.cut} requests did not fit the context of {lm.max_length} and lost "
              "their beginning", file=sys.stderr)
    # a group may have a score of its own; else those of its tasks are shown
    scores = {task: find_score(found["results"].get(task, {}), metric)
              for task in (name, *found["n-shot"])}
    shown = [name] if scores[name] else [task for task in scores if scores[task]]
    return {"results": found["results"], "num_fewshot": found["n-shot"],
            "questions": found["n-samples"], "versions": found["versions"],
            "lm_eval": lm_eval.__version__, "cut": lm.cut, "seconds": time.perf_counter() - start
            }, {task: scores[task] for task in shown}


# --------------------------------------------------------------------------------------------------
# Bits per byte of a text

HEAD_ROWS = 512      # hidden states that become logits together: 65 MB of them for 32,000 tokens


def document_windows(ids, bos_id, context):
    """Yields (ids, targets), targets being what the last positions of ids are to predict: each
    token of a document once, the first from BOS. All windows but the first fill the context."""
    ids = [bos_id, *ids]
    for start in range(0, len(ids) - 1, context):
        end = min(start + context, len(ids) - 1)
        yield ids[max(0, end - context):end], ids[start + 1:end + 1]


def read_windows(name, folder, tokenizer, context, args):
    """(windows, the number of bytes they stand for, the number of rows that were lost) of a text:
    a folder data/NAME, whose validation split is read as in training, or files."""
    if (Path(name) / "source.json").exists():
        source, ours = Source(name, "val", context), folder / "tokenizer.model"
        if not source.windows:
            raise InputError(f"its validation split is shorter than the context of {context}")
        if source.header.vocab_size != tokenizer.size or (
                ours.exists() and sha256_file(ours) != source.header.tokenizer_sha256):
            raise InputError(f"it was written with another tokenizer than that of {folder}: "
                             "give the text itself")
        n = min(source.windows, args.limit or source.windows)
        tokens = sum(int(source.learned(i).sum()) for i in range(n))
        if not tokens:
            raise InputError(f"nothing is to be learned in its {n} windows: a larger --limit")
        size = tokens * source.learned_bytes / source.learned_tokens
        return ((x.tolist(), y.tolist()) for x, y in map(source.example, range(n))), size, 0
    texts, lost = all_texts(list_files([name]), RowFilter(args.text_key))
    texts = texts[:args.limit]
    windows = (window for text in texts
               for window in document_windows(tokenizer.encode(text), tokenizer.bos_id, context))
    return windows, sum(len(text.encode()) for text in texts), lost


@torch.inference_mode()
def total_cross_entropy(model, windows):
    """The cross-entropy of all targets of a batch of windows, in nats."""
    device = model.embed.weight.device
    # padded at the end: no token sees it
    inputs = pad_sequence([torch.tensor(ids) for ids, _ in windows], batch_first=True)
    states = model.hidden_states(inputs.to(device))                               # (B, T, C)
    x = torch.cat([row[len(ids) - len(wanted):len(ids)]
                   for row, (ids, wanted) in zip(states, windows)])               # (N, C)
    targets = torch.tensor([i for _, wanted in windows for i in wanted], device=device)    # (N,)
    # a few hundred rows of logits at a time: all of them would be the largest tensor by far
    losses = [F.cross_entropy(model.head(rows).float(), wanted, reduction="none").cpu()
              for rows, wanted in zip(x.split(HEAD_ROWS), targets.split(HEAD_ROWS))]
    return torch.cat(losses).double().sum().item()


def evaluate_text(model, tokenizer, name, folder, args):
    """The bits per byte of a text and how they were found, a dict, and the score to show."""
    start, nats, tokens = time.perf_counter(), 0.0, 0
    windows, size, lost = read_windows(name, folder, tokenizer, model.config.context, args)
    windows = tqdm(windows, unit=" windows", disable=None)
    while group := list(islice(windows, 64 * args.batch)):
        group.sort(key=lambda window: len(window[0]))    # similar lengths together: little padding
        for i in range(0, len(group), args.batch):
            nats += total_cross_entropy(model, group[i:i + args.batch])
        tokens += sum(i >= 0 for _, targets in group for i in targets)
    require_finite(nats)
    bits = bits_per_byte(nats, size)
    return {"bits_per_byte": bits, "nats_per_token": nats / tokens, "tokens": tokens, "bytes": size,
            "lost_rows": lost, "seconds": time.perf_counter() - start
            }, {f"text,{name}": ("bits per byte", bits, None)}


# --------------------------------------------------------------------------------------------------
# Tables and the picture

def markdown_table(rows):
    """Rows of strings as a Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def suite_table(suite, evaluations, tasks):
    """The columns of a suite that are among `tasks`, published rows first. An average is there only
    with all columns: one of half of them is no number of the paper."""
    columns = [i for i, task in enumerate(suite.columns) if task in tasks]
    if suite.published and len(columns) == len(suite.columns):
        columns.append(-1)
    titles = [*(title for title, *_ in suite.columns.values()), "average"]
    rows = [["", *(titles[i] for i in columns)]]
    for name, scores in suite.published.items():
        rows.append([name, *(f"{scores[i]:.2f}" for i in columns)])
    for name, evaluation in evaluations.items():
        scores = [evaluation.scores.get(task) for task in suite.columns]
        cells = [format_score(*score) if score else "" for score in scores]
        mean = sum(score[1] for score in scores) / len(scores) if all(scores) else None
        cells.append("" if mean is None else f"{mean:.2f}")
        rows.append([name, *(cells[i] for i in columns)])
    return markdown_table(rows)


def format_score(metric, value, error):
    digits = 2 if metric in USUAL_METRICS else 4
    return f"{value:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def format_tables(evaluations, tasks, args):
    """All that was measured, in Markdown: a table for each suite, one for the other tasks and the
    texts; at the end, how it was measured."""
    parts = []
    for suite in SUITES.values():
        if suite.columns.keys() & tasks.keys():
            parts += [suite_table(suite, evaluations, tasks), suite.note]
    others = {task: (f"{task.removeprefix('text,')}, {metric}", metric)
              for evaluation in evaluations.values()
              for task, (metric, *_) in evaluation.scores.items() if task not in COLUMNS}
    if others:
        parts.append(suite_table(Suite(others, {}, ""), evaluations, others))
    how = [f"{key} {getattr(args, key)}" for key in ("num_fewshot", "limit", "quantize")
           if getattr(args, key) is not None]
    if tasks:
        how.insert(0, "ours with BOS" if args.bos else "ours without BOS")
    how.append(next(iter(evaluations.values())).dtype)
    return "\n\n".join([*parts, ", ".join(how)])


def plot_scores(evaluations, out):
    """Draws scores over the tokens seen to the PNG `out`, a panel for each task, a line for each
    run: figure 2 of the paper, with Pythia-1.4B and the checkpoints of TinyLlama v1.0."""
    panels = defaultdict(lambda: defaultdict(list))
    for evaluation in evaluations:
        for task, (metric, value, error) in evaluation.scores.items():
            point = evaluation.tokens, value, error or 0
            panels[task, metric][str(evaluation.folder.parent)].append(point)
    figure = plot.new_figure(figsize=(6, 2.6 * len(panels)))
    axes = figure.subplots(len(panels), squeeze=False)
    published = {task: (i, suite) for suite in SUITES.values()
                 for i, task in enumerate(suite.columns)}
    for ax, ((task, metric), lines) in zip(axes.flat, panels.items()):
        for run, points in lines.items():
            tokens, values, errors = zip(*sorted(points))
            ax.errorbar(tokens, values, errors, marker=".", linewidth=1.2, label=run)
        if task in published:
            i, suite = published[task]
            ax.axhline(suite.published["Pythia-1.4B"][i], color="grey", linestyle="--",
                       label="Pythia-1.4B")
            end = 1.1 * max(evaluation.tokens for evaluation in evaluations)
            seen = {n: scores[i] for n, scores in V1_SCORES.items() if n <= end}
            if suite is SUITES["commonsense"] and seen:
                ax.plot(seen.keys(), seen.values(), color="grey", linestyle=":", marker=".",
                        label="TinyLlama v1.0")
        ax.legend(fontsize="x-small")
        ax.set_title(f"{task.removeprefix('text,')}, {metric}", fontsize="small")
        ax.grid(alpha=0.2)
        ax.xaxis.set_major_formatter(plot.format_count)
    figure.supxlabel("tokens")
    plot.save_figure(figure, out)


# --------------------------------------------------------------------------------------------------
# The program

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="eval.py", allow_abbrev=False,
                                     description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", type=as_path,
        help="folders or hub names; default: the newest under out/")
    add("--tasks", help=f"suites ({', '.join(SUITES)}) or tasks of lm-evaluation-harness; default: "
        "commonsense, unless there is --text")
    add("--text", action="append", default=[], metavar="FILE", type=as_path,
        help="bits per byte of files or of a folder data/NAME; may be repeated")
    add("--text_key", default="text", help="of files with rows")
    add("--bos", action="store_true", help="begin prompts with BOS, as the harness does today; the "
        "published numbers of commonsense are without")
    add("--num_fewshot", type=int, help="examples in a prompt; default: the suite's or the task's")
    add("--limit", type=int, help="most questions of a task, documents or windows of a text")
    add("--batch", type=int, default=16, help="requests in a batch (%(default)s)")
    add("--include_path", metavar="FOLDER", type=as_path, help="with tasks of your own, in YAML")
    add("--run_code", action="store_true", help="run code that the model writes on this machine, "
        "unprotected; HumanEval is left out without")
    add("--quantize", choices=[*filter(None, LINEAR_TYPES)], help="with --text only")
    add("--dtype", choices=["float32", "bfloat16"],
        help="default: bfloat16 where the hardware has it; the published numbers: float32")
    add("--out", metavar="FILE.png", type=as_path,
        help="the picture; default: eval.png next to the last one")
    args = parser.parse_args(argv)
    if not args.tasks and not args.text:
        args.tasks = "commonsense"
    if args.tasks and args.quantize:
        sys.exit("--quantize goes with --text only: tasks are answered by transformers, which does "
                 "not know our int8 and int4")
    for name, least in ("limit", 1), ("batch", 1), ("num_fewshot", 0):
        value = getattr(args, name)
        if value is not None and value < least:
            sys.exit(f"--{name} must be at least {least}, got {value}")
    if args.out and not args.out.endswith(".png"):
        sys.exit(f"--out={args.out} must end in .png")
    return args


@dataclass
class Evaluation:
    """What was measured of one checkpoint."""
    folder: Path
    dtype: str
    tokens: int | None                           # seen in training; None where nothing says so
    scores: dict = field(default_factory=dict)   # {task or "text,FILE": (metric, value, error)}
    complete: bool = True                        # False: something is left out, or a part of it


def run_or_skip(evaluation, name, args, work, *inputs):
    """Adds the scores that work(*inputs) finds to an Evaluation, and writes all that it finds to
    CHECKPOINT/eval/. Each option that changes numbers is in the file's name, so that --limit=10
    does not replace the whole. Where it fails, as for a task whose data, template or metric is
    broken, it says why, and the others go on."""
    print(name, file=sys.stderr)
    try:
        result, scores = work(*inputs)
    except (Exception, SystemExit) as error:
        words = str(error).replace("confirm_run_unsafe_code=True", "--run_code")
        if not isinstance(error, (SystemExit, InputError)):
            words = f"{type(error).__name__}: {words}"
        print(f"{name} is left out: {words}", file=sys.stderr)
        evaluation.complete = False
        return
    evaluation.scores |= scores
    evaluation.complete &= not result.get("lost_rows")
    options = {key: getattr(args, key) for key in ("bos", "num_fewshot", "limit", "quantize",
                                                   "dtype", "text_key")}
    changed = [key if value is True else f"{key}={value}" for key, value in options.items()
               if value is not False and value not in (None, "text")]
    path = evaluation.folder / "eval" / f"{','.join([name.replace('/', '_'), *changed])}.json"
    try:
        path.parent.mkdir(exist_ok=True)
        write_json(path, {
            "checkpoint": str(evaluation.folder), "task": name, "tokens_seen": evaluation.tokens,
            "batch": args.batch, "computed_in": evaluation.dtype} | options | result)
    except OSError as error:                     # the hub's cache may be somebody else's
        print(f"{path} cannot be written: {error.strerror}", file=sys.stderr)


def evaluate_checkpoint(folder, tasks, manager, args):
    """The Evaluation of a checkpoint."""
    device, state = find_device(), folder / "training" / "state.json"
    dtype, _ = find_dtype(device, args.dtype or "auto")
    kind, computed_in = stored_kind(folder), str(dtype).removeprefix("torch.")
    if tasks and kind:
        sys.exit(f"{folder} has {kind} weights, which go with --text only: tasks are answered by "
                 "transformers, which does not know them")
    evaluation = Evaluation(folder, f"{kind} weights, {computed_in}" if kind else computed_in,
                            read_json(state)["tokens"] if state.exists() else None)
    print(f"{folder}: {args.quantize or evaluation.dtype}, {device}", file=sys.stderr)
    if args.text:
        model, tokenizer = load_model(folder, args.quantize, dtype)
        for text in args.text:
            run_or_skip(evaluation, f"text,{text}", args,
                        evaluate_text, model, tokenizer, text, folder, args)
        del model                                # it need not fit beside transformers' model
    if tasks:
        lm = load_harness_model(folder, dtype, args)
        for name, (metric, shots) in tasks.items():
            run_or_skip(evaluation, name, args,
                        run_task, lm, name, metric, shots, manager, args)
    return evaluation


def main(argv):
    args = parse_args(argv)
    tasks, folders, evaluations = parse_tasks(args), {}, {}
    # what is missing is named now, not after hours of work
    for name in args.checkpoints or [None]:
        folder = find_model(name)
        read_json(folder / "config.json")
        is_hub_name = name and not Path(name).exists()
        folders.setdefault(folder.resolve(), (name if is_hub_name else str(folder), folder))
    for text in args.text:
        if not (Path(text) / "source.json").exists():
            list_files([text])
    if len(folders) > 1:
        plot.new_figure()
    manager = find_tasks(tasks, args.include_path) if tasks else None
    for name, folder in folders.values():
        evaluation = evaluate_checkpoint(folder, tasks, manager, args)
        if evaluation.tokens is not None:
            name += f", {plot.format_count(evaluation.tokens)} tokens"
        evaluations[name] = evaluation
        gc.collect()                             # or this model would stay beside the next
    print(format_tables(evaluations, tasks, args))
    drawn = [e for e in evaluations.values() if e.tokens is not None and e.scores]
    if len(drawn) > 1:
        out = args.out or str(folder.parent / "eval.png")
        plot_scores(drawn, out)
        print(out, file=sys.stderr)
    if not all(evaluation.complete for evaluation in evaluations.values()):
        sys.exit(3)


if __name__ == "__main__":
    run_program(main, "stopped; what was measured is in CHECKPOINT/eval/")
