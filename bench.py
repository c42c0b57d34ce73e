"""How fast, against what the machine could do.

    python bench.py train [RECIPE.py] [--key=value ...] [--batch=TOKENS] [--seconds=N]
    python bench.py train --ablate      what each optimization contributes
    python bench.py train --peers       transformers on the same model
    python bench.py generate [CHECKPOINT] [--batch=ROWS]       tokens to text, in bf16, int8, int4
    python bench.py prepare [FILES...] [--tokenizer=FILE]      text to tokens

What is timed is train.py's own train_step, sample.py's generate and tokenizer.py's Encoder. Each
measurement runs in a process of its own, so that none profits from what another one compiled,
cached or allocated. Machines are shared and clocks change: only ratios within one run mean
anything, and what is compared is measured twice or more, in turns.

Training is limited by matmuls. MFU, model FLOPs utilization (PaLM, arXiv 2204.02311), is the FLOP/s
that the model needs over those that the hardware promises. There are two customary counts of the
FLOPs per token, and the same run looks a seventh better by the first, so both are printed. N is the
number of parameters, L of layers, C the width, T the context and V the vocabulary:

    6N + 12LCT          6 per parameter, and attention as if it saw the whole context
    6(N - VC) + 6LCT    the embedding is no matmul, and causal attention needs half

Generation is limited by memory: each token needs all weights and the cache, once. The limit is how
fast the device reads, measured by a sum over 1 GB.

The last line is JSON: tokens_per_second, mfu (by the first count; of what matmuls reach here where
the maker's number is unknown), peak_memory in bytes, ratio_to_..., above 1 where we are faster, and
what else was measured.
"""
import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from timeit import timeit

import numpy as np
import torch
import torch._dynamo  # building an optimizer would import it, and count it as memory of a step
import torch.nn.functional as F
from tqdm import tqdm

import model
import parallel
import train
from config import load_config
from data import Source
from decoder import Decoder, step_error
from device import (
    device_name,
    disable_malloc_trim,
    find_device,
    find_dtype,
    format_bytes,
    memory_used,
    peak_flops,
)
from documents import RowFilter, all_texts, documentation, library_modules, list_files
from files import as_path, print_once, run_program
from hf import HF_CONFIG, find_model
from plan import choose_training_compile, fill_vocab_size
from quantize import (
    LINEAR_TYPES,
    FrozenLinear,
    frozen_config,
    in_large_pages,
    load_frozen,
    stored_kind,
)
from sample import generate
from tokenizer import Encoder, load_tokenizer, train_tokenizer

# what is measured where no recipe is given: TinyLlama on a GPU, and what two CPU cores can train
ON_GPU = ["--vocab_size=32000", "--micro_batch=16"]
ON_CPU = ["--n_layer=8", "--d_model=512", "--n_head=8", "--n_kv_head=2", "--d_ff=1408",
          "--vocab_size=4096", "--context=512", "--micro_batch=8"]


# --------------------------------------------------------------------------------------------------
# The machine

def synchronize(device):
    """Waits until the device has finished all work that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def time_steps(step, seconds=0.0, least=5):
    """The seconds of each step() for that long, of `least` steps at least, after three to warm up.
    step() itself waits for the device."""
    taken = []
    while len(taken) < 3 + least or sum(taken[3:]) < seconds:
        taken.append(timeit(step, number=1))
    return taken[3:]


def median_time(work, device, repeats=10):
    """The median seconds of work()."""
    def step():
        work()
        synchronize(device)
    return median(time_steps(step, least=repeats))


def machine_limits(device, dtype):
    """(FLOP/s of a large matmul in dtype, bytes/s of a copy, what is read and written together)."""
    n, size = (8192, 2 ** 30) if device.type == "cuda" else (2048, 2 ** 28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (2 * n ** 3 / median_time(lambda: a @ b, device),
            2 * size / median_time(lambda: target.copy_(source), device))


def read_limit(device):
    """The bytes/s at which the device reads."""
    source = in_large_pages(torch.ones(2 ** 27, dtype=torch.int64, device=device))
    return source.nbytes / median_time(source.sum, device)


def run_in_process(function, *args):
    """What function(*args) returns in a new process, which ends with it."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise torch.OutOfMemoryError("the process was killed") from None


# --------------------------------------------------------------------------------------------------
# Training: each optimization, and the textbook's way without it

OPTIMIZATIONS = ["bf16", "SDPA", "chunked attention", "fused projections", "chunked loss",
                 "fused AdamW", "no malloc trim", "compilation"]


def attention_by_definition(q, k, v, mask=None):
    """All scores exist together, and keys and values are repeated for their query heads."""
    groups, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
    return scores.softmax(-1).type_as(q) @ v


def attention_by_sdpa(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def separate_linear(x, layers):
    return [layer(x) for layer in layers]


class UnchunkedLoss:
    """All logits exist together, in fp32, and autograd finds their gradient."""

    @staticmethod
    def apply(x, weight, targets, *_):
        return F.cross_entropy(F.linear(x, weight).float(), targets)


def disable(optimizations):
    """Replaces these parts of model.py by the textbook's. The other optimizations are arguments of
    train.py's functions, see measure_training."""
    if "SDPA" in optimizations:
        model.attention = attention_by_definition
    elif "chunked attention" in optimizations:
        model.attention = attention_by_sdpa
    if "fused projections" in optimizations:
        model.fused_linear = separate_linear
    if "chunked loss" in optimizations:
        model.FusedLinearCrossEntropy = UnchunkedLoss


def unavailable(cfg, device):
    """{optimization: why this machine or this configuration has no use for it}."""
    dtype, why_dtype = find_dtype(device, cfg.dtype)
    compiled, why_compiled = choose_training_compile(cfg, device, math.inf)       # of a long run
    in_fp32, on_cpu = dtype == torch.float32, device.type == "cpu"
    cases = [("bf16", in_fp32, why_dtype),
             ("chunked attention", in_fp32 or not on_cpu, "it is for CPUs in bf16"),
             ("no malloc trim", not on_cpu, "it is for CPUs"),
             ("compilation", not compiled, why_compiled)]
    return {name: why for name, is_unavailable, why in cases if is_unavailable}


def time_parts(step, wrapped_model, optimizer, device):
    """{"forward", "backward", "optimizer": seconds} of one step(). The gradient of the loss itself
    is computed in the forward pass; clipping counts as backward."""
    marks = []

    def mark(part, *_):
        """A hook that notes: up to here it was this part."""
        synchronize(device)
        marks.append((part, time.perf_counter()))

    backward = partial(mark, "backward")         # before a forward pass: of the micro-batch before
    hooks = [wrapped_model.register_forward_pre_hook(backward),
             wrapped_model.register_forward_hook(partial(mark, "forward")),
             optimizer.register_step_pre_hook(backward),
             optimizer.register_step_post_hook(partial(mark, "optimizer"))]
    step()
    for hook in hooks:
        hook.remove()
    parts = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    for (_, start), (part, end) in zip(marks, marks[1:]):
        parts[part] += end - start
    return parts


def measure_training(cfg, batch, seconds, disabled=()):
    """What train_step does with a batch of so many sequences, without the disabled optimizations:
    seconds of steps, their parts, memory. To be called in a process of its own."""
    device, world = find_device(), parallel.World(find_device())
    disable(disabled)
    if "no malloc trim" not in disabled:
        disable_malloc_trim()
    dtype = torch.float32 if "bf16" in disabled else find_dtype(device, cfg.dtype)[0]
    compiled = "compilation" not in disabled and choose_training_compile(cfg, device, math.inf)[0]
    micro, _ = parallel.split_batch(batch, 1, cfg.micro_batch)
    with torch.device("meta"):
        llama = model.Llama(cfg)
    recompute = parallel.choose_recompute(llama, cfg, 1, micro, dtype, device, compiled)
    estimate = sum(parallel.estimate_memory(llama, cfg, 1, micro, dtype, device, compiled,
                                            recompute))
    memory_before = memory_used(device)
    wrapped_model = parallel.parallelize(llama, world, "none", dtype, compiled,
                                         cfg.activation_checkpointing, recompute)
    parallel.init_weights(llama, cfg.seed)
    optimizer = train.build_optimizer(llama, cfg, fused="fused AdamW" not in disabled)

    x, y = (torch.randint(3, cfg.vocab_size, (batch, cfg.context), device=device)
            for _ in range(2))                   # any tokens take as long

    def step():
        loss, norm, _ = train.train_step(wrapped_model, optimizer, x, y, cfg.learning_rate, micro,
                                         dtype, cfg.grad_clip)
        assert math.isfinite(loss) and math.isfinite(norm), (loss, norm)

    taken = time_steps(step, seconds)
    parts = [time_parts(step, wrapped_model, optimizer, device) for _ in range(3)]
    return {"seconds": taken, "micro": micro, "dtype": str(dtype).removeprefix("torch."),
            "parts": {part: median(one[part] for one in parts) for part in parts[0]},
            "estimate": estimate, "memory": memory_used(device), "memory_before": memory_before}


def measure_transformers(cfg, batch, seconds):
    """The seconds of steps of transformers, as its users would train: bf16 by autocast, compiled,
    fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM
    device = find_device()
    dtype, _ = find_dtype(device, cfg.dtype)
    llama = LlamaForCausalLM(LlamaConfig(
        **{theirs: getattr(cfg, ours) for ours, theirs in HF_CONFIG.items()},
        use_cache=False)).to(device)
    if cfg.activation_checkpointing:
        llama.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=cfg.learning_rate, fused=True)
    compiled, _ = choose_training_compile(cfg, device, math.inf)
    called = torch.compile(llama) if compiled else llama
    micro, parts = parallel.split_batch(batch, 1, cfg.micro_batch)
    x = torch.randint(3, cfg.vocab_size, (batch, cfg.context), device=device)

    def step():
        for rows in x.split(micro):
            with train.autocast(device, dtype):
                loss = called(input_ids=rows, labels=rows).loss / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return time_steps(step, seconds)


def count_flops(cfg):
    """The FLOPs per token by 6N + 12LCT, and by 6(N - VC) + 6LCT."""
    with torch.device("meta"):
        flops = model.Llama(cfg).flops_per_token()
    embedding = 0 if cfg.tie_embeddings else 6 * cfg.vocab_size * cfg.d_model
    return flops, flops - embedding - 6 * cfg.n_layer * cfg.d_model * cfg.context


def resolve_training(args, device):
    """(config, sequences per step) of a command line."""
    has_recipe = any(not arg.startswith("--") for arg in args.recipe)
    defaults = [] if has_recipe else ON_GPU if device.type == "cuda" else ON_CPU
    cfg = load_config([*defaults, *args.recipe], train.TrainConfig)
    if cfg.data:
        source = Source(Path(cfg.data_dir) / cfg.data, "train", cfg.context)
        cfg = fill_vocab_size(cfg, {cfg.data: source})
    elif not cfg.vocab_size:
        cfg = replace(cfg, vocab_size=32_000)
        print("a vocabulary of 32,000, as the recipe leaves it to the data: --data=NAME, or "
              "--vocab_size=N")
    # on a GPU many micro-batches a step: with few of them its optimizer would weigh too much
    tokens = args.batch or (2 ** 19 if device.type == "cuda" else cfg.micro_batch * cfg.context)
    if tokens < cfg.context:
        sys.exit(f"--batch={tokens} is less than one sequence of {cfg.context} tokens")
    return cfg, tokens // cfg.context


def bench_train(args):
    device = find_device()
    cfg, batch = resolve_training(args, device)
    if args.peers and not find_spec("transformers"):
        sys.exit("--peers needs transformers: pip install -r requirements-dev.txt")
    dtype, _ = find_dtype(device, cfg.dtype)
    # not in this process: a new one counts the peak memory of its parent as its own
    reasons = run_in_process(unavailable, cfg, device)
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}")
    matmul, copy = run_in_process(machine_limits, device, dtype)
    print(f"torch {torch.__version__}, {device_name(device)}: matmuls in {dtype} "
          f"{matmul / 1e12:.2f} TFLOP/s, copies {copy / 1e9:.1f} GB/s")

    ours, theirs = [], []
    for _ in range(2 if args.peers else 1):                                         # in turns
        ours.append(run_in_process(measure_training, cfg, batch, args.seconds))
        if args.peers:
            theirs += run_in_process(measure_transformers, cfg, batch, args.seconds)
    tokens = batch * cfg.context
    speed = tokens / median(s for run in ours for s in run["seconds"])
    result = print_training(cfg, tokens, speed, ours[-1], device_name(device), matmul)
    result["copies"] = copy
    if args.ablate:
        result["ladder"] = ablation(
            [name for name in OPTIMIZATIONS if name not in reasons], tokens,
            lambda disabled: run_in_process(measure_training, cfg, batch, args.seconds, disabled))
    if args.peers:
        their_speed = tokens / median(theirs)
        result["ratio_to_transformers"] = speed / their_speed
        print(f"transformers, {dtype}, fused AdamW, "
              f"{'not compiled' if 'compilation' in reasons else 'compiled'}: "
              f"{their_speed:,.0f} tokens/s; ours is {speed / their_speed:.2f} times as fast")
    return result


def print_training(cfg, tokens, speed, run, card, matmul):
    """Prints what was measured, and returns it for the last line."""
    promised = peak_flops(card, getattr(torch, run["dtype"]))
    peak, whose = (promised, "the maker promises") if promised else (matmul, "matmuls reach")
    print(f"{speed:,.0f} tokens/s: {tokens:,} tokens per step, in micro-batches of {run['micro']} "
          f"x {cfg.context}, in {1e3 * tokens / speed:,.0f} ms")
    print("  " + ", ".join(f"{part} {1e3 * s:,.0f} ms" for part, s in run["parts"].items()))
    full, strict = count_flops(cfg)
    for name, flops in ("6N + 12LCT", full), ("6(N - VC) + 6LCT", strict):
        print(f"  {speed * flops / 1e12:.3f} TFLOP/s by {name}: MFU {speed * flops / peak:.1%} of "
              f"what {whose}")
    print(f"  memory: {format_bytes(run['memory'])} at the peak, "
          f"{format_bytes(run['memory_before'])} before there was a model; estimated for "
          f"weights, gradients, moments and activations: {format_bytes(run['estimate'])}")
    return {"tokens_per_second": speed, "mfu": speed * full / peak,
            "mfu_strict": speed * strict / peak, "peak_memory": run["memory"],
            "counted_memory": run["estimate"], "products": matmul}


def ablation(optimizations, tokens, measure):
    """From the textbook's way to ours, one optimization after the other, and ours without each
    single one: prints the table and returns its rows. What does not fit into memory is None."""
    cumulative = [tuple(optimizations[i:]) for i in range(len(optimizations) + 1)]
    # chunked attention stands where SDPA would: where it is used, SDPA alone cannot be disabled
    single = {name: (name,) for name in optimizations
              if name != "SDPA" or "chunked attention" not in optimizations}
    runs = {disabled: [] for disabled in (*cumulative, *single.values())}
    for disabled in tqdm([*runs] * 2, desc="measuring"):                            # in turns
        with suppress(torch.OutOfMemoryError):
            runs[disabled].append(measure(list(disabled)))
    speeds = {disabled: tokens / median(s for run in found for s in run["seconds"])
              if found else None for disabled, found in runs.items()}

    print(f"\n{'':24}{'tokens/s':>13}{'times':>8}{'peak memory':>14}{'ours without it':>18}")
    rows, before = [], None
    for name, disabled in zip(["the textbook's way", *optimizations], cumulative):
        speed, without = speeds[disabled], speeds.get(single.get(name))
        memory = max((run["memory"] for run in runs[disabled]), default=None)
        rows.append({"name": name, "speed": speed, "memory": memory, "without": without})
        print(f"{name if disabled == cumulative[0] else '+ ' + name:24}"
              f"{f'{speed:,.0f}' if speed else 'out of memory':>13}"
              f"{f'{speed / before:.2f}' if speed and before else '':>8}"
              f"{format_bytes(memory) if memory else '':>14}"
              f"{f'{without:,.0f}' if without else '':>18}")
        before = speed
    return rows


# --------------------------------------------------------------------------------------------------
# Generation

def measure_generation(folder, quantize, batch, prompt, steps, compile):
    """What generate does with `batch` continuations of a random prompt of so many tokens: seconds
    to load, to compile, of the prompt, of each step; bytes. To be called in its own process."""
    device, start = find_device(), time.perf_counter()
    llama = load_frozen(folder, device, find_dtype(device)[0], quantize)
    loading, vocab_size = time.perf_counter() - start, llama.config.vocab_size
    error = step_error(llama, device) if compile else None
    decoder = Decoder(llama, batch, prompt + steps, vocab_size, compile and not error)
    ids = np.random.default_rng(0).integers(3, vocab_size, prompt).tolist()
    compiling = timeit(lambda: decoder.warmup(1), number=1)
    decoder.choose_threads()
    with torch.inference_mode():
        prefill = median_time(lambda: decoder.prefill([ids]), device, 3)
    marks = [time.perf_counter() for _ in generate(
        decoder, [ids], batch, steps, set(), lambda logits: logits.argmax(-1))]
    weights = sum(tensor.nbytes for module in decoder.model.modules()
                  if isinstance(module, FrozenLinear) for tensor in module.buffers())
    cache = sum(tensor.nbytes for pair in decoder.cache.layers for tensor in pair)
    return {"loading": loading, "compiling": compiling, "prefill": prefill,
            "steps": np.diff(marks).tolist()[1:], "bytes": weights + cache,
            "memory": memory_used(device), "threads": torch.get_num_threads(), "error": error}


def random_model(folder):
    """A folder with the weights of an untrained TinyLlama, which are read as fast as any others."""
    torch.manual_seed(0)
    with torch.device("meta"):
        llama = model.Llama(model.ModelConfig())
    llama.to(torch.bfloat16).to_empty(device="cpu").init_weights().save_pretrained(folder)
    return folder


def bench_generate(args):
    for name, least in ("batch", 1), ("prompt", 1), ("tokens", 3):
        if getattr(args, name) < least:
            sys.exit(f"--{name} must be at least {least}, got {getattr(args, name)}")
    checkpoint = find_model(args.checkpoint) if args.checkpoint else None
    config = frozen_config(checkpoint) if checkpoint else model.ModelConfig()
    if checkpoint and (kind := stored_kind(checkpoint)):
        args.precisions = [kind]
    if args.prompt + args.tokens > config.context:
        sys.exit(f"--prompt={args.prompt} and --tokens={args.tokens} are more than the context of "
                 f"{config.context}")
    device, compile = find_device(), args.compile == "True"
    dtype, why = find_dtype(device)
    limit = run_in_process(read_limit, device)
    print(f"torch {torch.__version__}, {device_name(device)}, {dtype} ({why}), reads "
          f"{limit / 1e9:.1f} GB/s; {args.batch} continuations of {args.prompt} tokens")
    runs = {precision: [] for precision in args.precisions}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint or random_model(Path(folder))
        for precision in tqdm([*runs] * 2, desc="measuring"):                       # in turns
            runs[precision].append(run_in_process(
                measure_generation, checkpoint, PRECISIONS[precision], args.batch, args.prompt,
                args.tokens, compile))
    limit = max(limit, run_in_process(read_limit, device))
    for run in sum(runs.values(), []):
        if run["error"]:
            print_once(f"not compiled: {run['error']}")
    return print_generation(runs, args, dtype, limit)


def print_generation(runs, args, dtype, limit):
    """Prints what was measured, and returns it for the last line; `share` is that of the device's
    reading speed."""
    print(f"\n{'':12}{'tokens/s':>10}{'GB per step':>13}{'of limit':>10}{'prompt/s':>10}"
          f"{'first, s':>10}{'memory':>11}{'load, s':>9}{'compile, s':>12}{'threads':>9}")
    results = {}
    for precision, found in runs.items():
        name = str(dtype).removeprefix("torch.") if precision == "full" else precision
        seconds, size = median(s for run in found for s in run["steps"]), found[0]["bytes"]
        prefill, loading, compiling = (min(run[key] for run in found)
                                       for key in ("prefill", "loading", "compiling"))
        memory, share = max(run["memory"] for run in found), size / seconds / limit
        results[name] = {
            "tokens_per_second": args.batch / seconds,
            "prompt_tokens_per_second": args.prompt / prefill, "time_to_first_token": prefill,
            "bytes_per_step": size, "share": share, "loading": loading, "compiling": compiling,
            "peak_memory": memory}
        print(f"{name:12}{args.batch / seconds:10,.1f}{size / 1e9:13.3f}{share:10.0%}"
              f"{args.prompt / prefill:10,.0f}{prefill:10.2f}{format_bytes(memory):>11}"
              f"{loading:9.1f}{compiling:12.1f}{found[0]['threads']:9}")
    first, *_ = results.values()
    return {"tokens_per_second": first["tokens_per_second"],
            "peak_memory": max(row["peak_memory"] for row in results.values()),
            "read_bytes_per_second": limit, "results": results}


# --------------------------------------------------------------------------------------------------
# Preparation: text in memory to ids, on one core

def measure_encoder(tokenizer, texts, plain):
    """(seconds, a hash of the ids, bytes of memory) of every second text, after the others have
    filled the caches: so most words are known and each text is new, as in a large corpus. `plain`
    is SentencePiece alone."""
    cpu, encoder = torch.device("cpu"), Encoder(tokenizer)
    memory_before = memory_used(cpu)

    def encode(texts):
        if plain:
            return [np.array(encoder.sp.encode(text), encoder.dtype).tobytes() for text in texts]
        return [ids for _, ids in encoder.encode(texts)]

    encode(texts[::2])
    start = time.perf_counter()
    ids = encode(texts[1::2])
    seconds = time.perf_counter() - start
    return seconds, sha256(b"".join(ids)).hexdigest(), memory_used(cpu) - memory_before


def bench_prepare(args):
    if args.files and not args.tokenizer:
        sys.exit("files need a --tokenizer=FILE, a SentencePiece model")
    row_filter = RowFilter(args.text_key)
    corpora = {path: all_texts(list_files([path]), row_filter)[0]
               for path in args.files} or {"documentation": documentation(),
                                           "modules": list(library_modules().values())}
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer).serialized_model_proto()
    else:
        print("training the demo's tokenizer")
        tokenizer = train_tokenizer(sum(corpora.values(), []), 4096)
    results, memory = {}, 0
    print(f"{'MB/s of new text, one core':30}{'MB':>8}{'ours':>8}{'SentencePiece':>15}{'times':>9}")
    for name, texts in corpora.items():
        texts = texts if len(texts) > 1 else texts * 2       # a single one is then known already
        size, seconds, ids = sum(len(text.encode()) for text in texts[1::2]), {}, set()
        for plain in (False, True) * 3:                                             # in turns
            found, digest, used = run_in_process(measure_encoder, tokenizer, texts, plain)
            seconds[plain] = min(found, seconds.get(plain, math.inf))
            memory = memory if plain else max(memory, used)
            ids.add(digest)
        if len(ids) > 1:
            sys.exit(f"the ids of {name} differ: one of the two encoders has an error")
        results[name] = {"bytes": size, "bytes_per_second": size / seconds[False],
                         "sentencepiece": size / seconds[True],
                         "ratio_to_sentencepiece": seconds[True] / seconds[False]}
        print(f"{name[-29:]:30}{size / 1e6:8.1f}{size / seconds[False] / 1e6:8.1f}"
              f"{size / seconds[True] / 1e6:15.1f}{seconds[True] / seconds[False]:9.2f}")
    return {key: min(row[key] for row in results.values())
            for key in ("bytes_per_second", "ratio_to_sentencepiece")
            } | {"peak_memory": memory, "results": results}


# --------------------------------------------------------------------------------------------------

PRECISIONS = {quantize or "full": quantize for quantize in LINEAR_TYPES}


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="tokens/s of a training step", allow_abbrev=False)
    p.add_argument("recipe", nargs="*", help="recipe files; their keys go as --key=value")
    p.add_argument("--batch", type=int, default=0, help="tokens per step")
    p.add_argument("--seconds", type=float, default=60 if torch.cuda.is_available() else 15,
                   help="of each measurement (%(default)s)")
    p.add_argument("--ablate", action="store_true", help="measure each optimization")
    p.add_argument("--peers", action="store_true", help="measure transformers, too")
    p = commands.add_parser("generate", help="tokens/s of generation", allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", type=as_path, help="a folder or a hub name; default: "
                   "an untrained TinyLlama")
    p.add_argument("--batch", type=int, default=1, help="texts generated together (%(default)s)")
    p.add_argument("--prompt", type=int, default=512, help="tokens before (%(default)s)")
    p.add_argument("--tokens", type=int, default=100, help="to generate (%(default)s)")
    p.add_argument("--precisions", default=",".join(PRECISIONS), help="(%(default)s)")
    p.add_argument("--compile", choices=["True", "False"], default="True")
    p = commands.add_parser("prepare", help="MB/s of encoding", allow_abbrev=False)
    p.add_argument("files", nargs="*", type=as_path, help="corpora, each measured by itself; "
                   "default: the documentation and the modules of this Python")
    p.add_argument("--tokenizer", type=as_path, help="a SentencePiece model; default: the demo's")
    p.add_argument("--text_key", default="text", help="of files with rows")
    for p in commands.choices.values():
        p.add_argument("--json", type=as_path, help="a file for what the last line says")
    args, keys = parser.parse_known_args(argv)
    if args.command == "train":
        args.recipe += keys                                   # config.py refuses unknown keys
    elif keys:
        parser.error(f"there is no option {keys[0]}")
    if args.command == "generate":
        args.precisions = args.precisions.split(",")
        for name in set(args.precisions) - set(PRECISIONS):
            parser.error(f"--precisions: {name!r} is none of {', '.join(PRECISIONS)}")
    return args


def main(argv):
    args = parse_args(argv)
    try:
        result = {"train": bench_train, "generate": bench_generate,
                  "prepare": bench_prepare}[args.command](args)
    except torch.OutOfMemoryError as error:
        sys.exit(f"out of memory; what helps is a smaller --micro_batch. ({error})")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    run_program(main)
