"""How fast, against the machine's own limits and against peers.

    python bench.py train [RECIPE.py] [--key=value ...] [--batch=TOKENS] [--seconds=N]
    python bench.py train --ablate      what each optimization contributes
    python bench.py train --peers       transformers on the same model
    python bench.py prepare [FILES...] [--tokenizer=FILE]      text to tokens, and its peers
    python bench.py generate [CHECKPOINT] [--batch=ROWS]       tokens to text, in bf16, int8, int4
    python bench.py generate --peers    transformers and llama.cpp on the same weights
    python bench.py generate CHECKPOINT --quality              what int8 and int4 cost
    python bench.py eval [CHECKPOINT]   questions answered, and lm-evaluation-harness' own way

What is timed is train.py's own train_step, tokenizer.py's Encoder, sample.py's generate and
eval.py's Adapter. Each measurement has a process to itself, so that none profits from what another
one compiled, cached or allocated. Machines are shared and clocks wander: only ratios within one run
mean anything, and what is compared is measured twice or more, in turns.

MFU, model FLOPs utilization (PaLM, arXiv 2204.02311), is the FLOP/s that the model asks for over
those that the hardware promises. Two counts of a token's FLOPs are customary, and the same run
looks a seventh better by the first, so both are printed, N being all parameters, L layers, C width,
T context and V vocabulary:

    6N + 12LCT          6 a parameter, and attention as if it saw the whole context
    6(N - VC) + 6LCT    the embedding multiplies nothing, and half of attention is masked

A text is encoded cold, by an encoder that has remembered nothing yet; new, by one that has encoded
the other half of the corpus; and warm, by one that has encoded this text before. A corpus of
terabytes lies between new and warm.

A token of generation must read all weights once, and what the cache holds; so the limit is how fast
the device reads, which is measured by a sum over 1 GB.

The last line is JSON: tokens_per_second, mfu (by the first count; of what products reach here
where the maker's number is unknown), peak_memory in bytes, ratio_to_..., above 1 where we are
faster, and what else was measured.
"""
import argparse
import ctypes
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import sentencepiece
import torch
import torch._dynamo  # building an optimizer would import it, and count it as memory of a step
import torch.nn.functional as F
from tqdm import tqdm

import model
import prepare
import train
from config import load
from data import Header, Source, TokenWriter
from device import (
    compile_error,
    device_name,
    disable_malloc_trim,
    find_device,
    find_dtype,
    memory_used,
    peak_flops,
)
from files import InputError, read_json
from quantize import LINEAR_TYPES, FrozenLinear, freeze_for_inference, in_large_pages
from sample import Decoder, find_model, generate, load_model, stored_bytes
from tokenizer import Encoder, llama_style, tokenizer_json, write_tokenizer
from train import TrainConfig, World, format_bytes

# what is measured where no recipe is given: TinyLlama on a GPU, and what two CPU cores can train
ON_GPU = ["--vocab_size=32000", "--micro_batch=16"]
ON_CPU = ["--n_layer=8", "--d_model=512", "--n_head=8", "--n_kv_head=2", "--d_ff=1408",
          "--vocab_size=4096", "--context=512", "--micro_batch=8"]


# --------------------------------------------------------------------------------------------------
# The machine

def wait(device):
    """Until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds_of(work, device, repeats=10):
    """Median seconds that work() takes."""
    taken = []
    for _ in range(repeats + 2):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return median(taken[2:])                                        # the first ones warm up


def repeated(work, seconds, least):
    """The seconds of each work() for so many seconds, and of so many at least."""
    taken, start = [], time.perf_counter()
    while len(taken) < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        work()
        taken.append(time.perf_counter() - before)
    return taken


def machine_limits(device, dtype):
    """(FLOP/s of a large product of random numbers in dtype, bytes/s of a copy, read and
    written)."""
    n, size = (8192, 2 ** 30) if device.type == "cuda" else (2048, 2 ** 28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return (2 * n ** 3 / seconds_of(lambda: a @ b, device),
            2 * size / seconds_of(lambda: target.copy_(source), device))


def in_own_process(function, *args):
    """What function(*args) returns in a new process, which ends with it."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise torch.OutOfMemoryError("the process was killed") from None


# --------------------------------------------------------------------------------------------------
# Training: each optimization, and how to do without it

def attention_by_definition(q, k, v, mask=None):
    """All scores at once, and keys and values repeated for their query heads."""
    G, T = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
    return scores.softmax(-1).type_as(q) @ v


def attention_by_sdpa(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def products_one_by_one(x, layers):
    return [layer(x) for layer in layers]


class WholeLoss:
    """Stands for HeadLoss: all logits, in fp32, and autograd."""

    @staticmethod
    def apply(x, weight, targets, *_):
        return F.cross_entropy(F.linear(x, weight).float(), targets)


OPTIMIZATIONS = ["bf16", "SDPA", "attention by rows", "joined products", "loss by parts",
                 "fused AdamW", "memory kept", "compilation"]


def cannot(cfg, device):
    """{optimization: why it is left out} of those that this machine or this configuration has no
    use for."""
    dtype, why_dtype = find_dtype(device, cfg.dtype)
    reasons = {}
    if dtype == torch.float32:
        reasons["bf16"] = why_dtype
    if device.type != "cpu" or dtype == torch.float32:
        reasons["attention by rows"] = "it is for CPUs in bf16"
    if device.type != "cpu":
        reasons["memory kept"] = "it is for CPUs"
    compiled, why_compiled = compiles(cfg, device)
    if not compiled:
        reasons["compilation"] = why_compiled
    return reasons


def compiles(cfg, device):
    """(whether training would compile in a run that is long enough, why)."""
    return train.choose_compile(cfg, device, flops=math.inf)


def do_without(left_out):
    """Puts the textbook's way in the place of each optimization that model.py or train.py would
    take; what their functions are told is measure_training's part."""
    if "SDPA" in left_out:
        model.attention = attention_by_definition
    elif "attention by rows" in left_out:
        model.attention = attention_by_sdpa
    if "joined products" in left_out:
        model.fused_linear = products_one_by_one
    if "loss by parts" in left_out:
        model.FusedLinearCrossEntropy = WholeLoss


def random_source(folder, cfg):
    """A source of random tokens, which are as good as any for timing, but for constant ones."""
    tokenizer = sha256(b"").hexdigest()
    (folder / "tokenizer.model").write_bytes(b"")
    n = 64 * cfg.context + 1
    with TokenWriter(folder / "train_00000.bin", Header(cfg.vocab_size, 1, 2, tokenizer)) as file:
        file.write(np.random.default_rng(0).integers(3, cfg.vocab_size, n))
    (folder / "source.json").write_text(json.dumps(
        {"train": {"tokens": n, "documents": 1, "bytes": n}}))
    return Source(folder, "train", cfg.context)


def timed_steps(step, seconds):
    """The seconds of each step() for so many seconds, and of five at least, after three to warm
    up."""
    for _ in range(3):
        step()
    return repeated(step, seconds, 5)


def split_of_a_step(step, called, optimizer, device):
    """{part: seconds} of one step(). The loss' own gradient is computed in the forward pass;
    clipping counts as backward."""
    marks = []

    def mark(before):
        def hook(*_):
            wait(device)
            marks.append((before, time.perf_counter()))
        return hook

    hooks = [called.register_forward_pre_hook(mark("backward")),     # of the micro-batch before
             called.register_forward_hook(mark("forward")),
             optimizer.register_step_pre_hook(mark("backward")),
             optimizer.register_step_post_hook(mark("optimizer"))]
    step()
    for hook in hooks:
        hook.remove()
    parts = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    for (_, start), (part, end) in zip(marks, marks[1:]):
        parts[part] += end - start
    return parts


def measure_training(cfg, batch, seconds, left_out=()):
    """What train_step does with `batch` rows, in a process of its own: seconds of steps, their
    parts, memory."""
    world = World(find_device())
    device = world.device
    do_without(left_out)
    if "memory kept" not in left_out:
        disable_malloc_trim()
    dtype = torch.float32 if "bf16" in left_out else find_dtype(device, cfg.dtype)[0]
    compiled = "compilation" not in left_out and compiles(cfg, device)[0]
    micro, _ = train.split_batch(batch, 1, cfg.micro_batch)
    with torch.device("meta"):
        llama = model.Llama(cfg)
    recompute = train.choose_recompute(llama, cfg, 1, micro, dtype, device, compiled)
    counted = sum(train.estimate_memory(llama, cfg, 1, micro, dtype, device, compiled, recompute))
    empty = memory_used(device)
    called = train.parallelize(llama, world, "none", dtype, compiled, cfg.activation_checkpointing,
                               recompute)
    train.init_weights(llama, cfg)
    optimizer = train.build_optimizer(llama, cfg, fused="fused AdamW" not in left_out)

    with tempfile.TemporaryDirectory() as folder:
        source = (Source(Path(cfg.data_dir) / cfg.data, "train", cfg.context) if cfg.data
                  else random_source(Path(folder), cfg))
        rows = [(source.name, i % source.windows) for i in range(batch)]

        def read():
            return train.read_batch({source.name: source}, rows, device)

        x, y = read()
        reading = seconds_of(read, device)

    def step():
        loss, norm, _ = train.train_step(called, optimizer, x, y, cfg.learning_rate, micro, dtype,
                                         cfg.grad_clip)
        assert math.isfinite(loss) and math.isfinite(norm), (loss, norm)

    taken = timed_steps(step, seconds)
    splits = [split_of_a_step(step, called, optimizer, device) for _ in range(3)]
    return {"seconds": taken, "data": reading, "micro": micro, "dtype": str(dtype)[6:],
            "parts": {part: median(split[part] for split in splits) for part in splits[0]},
            "counted": counted, "memory": memory_used(device), "empty": empty}


def measure_transformers(cfg, batch, seconds):
    """The same of transformers, as its users would train: bf16 by autocast, compiled, AdamW
    fused."""
    from transformers import LlamaConfig, LlamaForCausalLM
    device = find_device()
    dtype, _ = find_dtype(device, cfg.dtype)
    llama = LlamaForCausalLM(LlamaConfig(
        **{theirs: getattr(cfg, ours) for ours, theirs in model.HF_CONFIG.items()},
        use_cache=False)).to(device)
    if cfg.activation_checkpointing:
        llama.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=cfg.learning_rate, fused=True)
    called = torch.compile(llama) if compiles(cfg, device)[0] else llama
    micro, parts = train.split_batch(batch, 1, cfg.micro_batch)
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

    return timed_steps(step, seconds)


def flops_of(cfg):
    """FLOPs of a token by 6N + 12LCT, and by 6(N - VC) + 6LCT."""
    with torch.device("meta"):
        llama = model.Llama(cfg)
    flops = llama.flops_per_token()
    idle = 0 if cfg.tie_embeddings else 6 * cfg.vocab_size * cfg.d_model
    return flops, flops - idle - 6 * cfg.n_layer * cfg.d_model * cfg.context


def training_of(args, device):
    """(config, rows of a step) of a command line."""
    named = any(not arg.startswith("--") for arg in args.recipe)
    cfg = load([*([] if named else ON_GPU if device.type == "cuda" else ON_CPU), *args.recipe],
               TrainConfig)
    if cfg.data:
        cfg, _, _ = train.read_sources(cfg, [cfg.data])
    elif not cfg.vocab_size:
        cfg = replace(cfg, vocab_size=32_000)
        print("a vocabulary of 32,000, as the recipe leaves it to the data: --data=NAME, or "
              "--vocab_size=N")
    # on a GPU many micro-batches a step: as few as one, and its optimizer would weigh too much
    tokens = args.batch or (2 ** 19 if device.type == "cuda" else cfg.micro_batch * cfg.context)
    if tokens < cfg.context:
        sys.exit(f"--batch={tokens} is less than one sequence of {cfg.context} tokens")
    return cfg, tokens // cfg.context


def bench_train(args):
    device = find_device()
    cfg, batch = training_of(args, device)
    if args.peers and not find_spec("transformers"):
        sys.exit("--peers needs transformers: pip install -r requirements-dev.txt")
    dtype, _ = find_dtype(device, cfg.dtype)
    # not here: each process counts the peak of the one that started it as its own
    reasons = in_own_process(cannot, cfg, device)
    measured = [name for name in OPTIMIZATIONS if name not in reasons]
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}")
    products, copies = in_own_process(machine_limits, device, dtype)
    card = device_name(device)
    print(f"torch {torch.__version__}, {card}: products in {str(dtype)[6:]} "
          f"{products / 1e12:.2f} TFLOP/s, copies {copies / 1e9:.1f} GB/s")

    def run(left_out):
        return in_own_process(measure_training, cfg, batch, args.seconds, left_out)

    def rate(seconds):
        return batch * cfg.context / median(seconds)

    ours, theirs = [], []
    for _ in range(2 if args.peers else 1):                                         # in turns
        ours.append(run([]))
        if args.peers:
            theirs += in_own_process(measure_transformers, cfg, batch, args.seconds)
    speed = rate([s for one in ours for s in one["seconds"]])
    result = announce(cfg, batch, speed, ours[-1], card, products) | {"copies": copies}
    if args.ablate:
        result["ladder"] = ladder(measured, run, rate)
    if args.peers:
        result["ratio_to_transformers"] = speed / rate(theirs)
        print(f"transformers, {'compiled, ' * ('compilation' in measured)}{str(dtype)[6:]}, fused "
              f"AdamW: {rate(theirs):,.0f} tokens/s; ours is {speed / rate(theirs):.2f} times as "
              "fast")
    return result


def announce(cfg, batch, speed, ours, card, products):
    """Prints what was measured at so many tokens/s, and returns it for the last line."""
    promised = peak_flops(card, getattr(torch, ours["dtype"]))
    peak, whose = promised or products, "the maker promises" if promised else "products reach"
    tokens = batch * cfg.context
    print(f"{speed:,.0f} tokens/s: {tokens:,} tokens a step, in micro-batches of {ours['micro']} "
          f"x {cfg.context}, in {1e3 * tokens / speed:,.0f} ms")
    print("  " + ", ".join(f"{part} {1e3 * s:,.0f} ms" for part, s in ours["parts"].items())
          + f"; reading a batch {1e3 * ours['data']:,.1f} ms, while the step before computes")
    full, strict = flops_of(cfg)
    for name, flops in ("6N + 12LCT", full), ("6(N - VC) + 6LCT", strict):
        print(f"  {speed * flops / 1e12:.3f} TFLOP/s by {name}: MFU {speed * flops / peak:.1%} of "
              f"what {whose}")
    print(f"  memory: {format_bytes(ours['memory'])} at the peak, {format_bytes(ours['empty'])} before "
          "there was a model; weights, gradients, moments and activations as counted: "
          f"{format_bytes(ours['counted'])}")
    return {"tokens_per_second": speed, "mfu": speed * full / peak,
            "mfu_strict": speed * strict / peak, "peak_memory": ours["memory"],
            "counted_memory": ours["counted"], "products": products}


def ladder(measured, run, rate):
    """From the textbook's way to ours, one optimization at a time; and ours without each. What does
    not fit into memory is None."""
    climbing = [tuple(measured[i:]) for i in range(len(measured) + 1)]
    # ours has either rows or SDPA, so it cannot do without SDPA where it has rows
    lacking = {name: (name,) for name in measured
               if name != "SDPA" or "attention by rows" not in measured}
    found = {left_out: [] for left_out in (*climbing, *lacking.values())}
    for left_out in tqdm([*found] * 2, desc="measuring"):
        with suppress(torch.OutOfMemoryError):
            found[left_out].append(run(list(left_out)))
    speeds = {left_out: rate([s for one in runs for s in one["seconds"]]) if runs else None
              for left_out, runs in found.items()}

    print(f"\n{'':24}{'tokens/s':>13}{'times':>8}{'peak memory':>14}{'ours without it':>18}")
    steps, before = [], None
    for name, left_out in zip(["the textbook's way", *measured], climbing):
        speed, without = speeds[left_out], speeds.get(lacking.get(name))
        memory = max((one["memory"] for one in found[left_out]), default=None)
        steps.append({"name": name, "speed": speed, "memory": memory, "without": without})
        print(f"{'+ ' * (before is not None) + name:24}"
              f"{f'{speed:,.0f}' if speed else 'out of memory':>13}"
              f"{f'{speed / before:.2f}' if speed and before else '':>8}"
              f"{format_bytes(memory) if memory else '':>14}"
              f"{f'{without:,.0f}' if without else '':>18}")
        before = speed or 0
    return steps


# --------------------------------------------------------------------------------------------------
# Preparation: one core each, text in memory to ids

SCALING = 40 * 10 ** 6         # bytes of text in a unit, where workers are compared


def passes(encode, texts, seconds):
    """The seconds that each pass over the texts takes, of three at least; the first is cold."""
    return repeated(lambda: encode(texts), seconds, 3)


def bytes_of(texts):
    return sum(len(text.encode()) for text in texts)


def others(texts):
    """Every second text."""
    return texts[1::2] or texts


def measure_encoder(model, texts, seconds):
    """(seconds of passes, seconds of one half after the other, bytes of memory, a hash of that
    half's ids)."""
    encoder, empty = Encoder(model), memory_used(torch.device("cpu"))

    def encode(texts):
        for _ in encoder.encode(texts):
            pass

    taken = passes(encode, texts, seconds)
    memory = memory_used(torch.device("cpu")) - empty
    encoder = Encoder(model)
    encode(texts[::2])
    before = time.perf_counter()
    ids = [ids for _, ids in encoder.encode(others(texts))]
    return taken, time.perf_counter() - before, memory, sha256(b"".join(ids)).hexdigest()


def measure_sentencepiece(model, texts, seconds):
    """The usual loop. (Seconds of passes, ids of the other half, as above.)"""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    dtype = Encoder(model).dtype
    return (passes(lambda texts: [sp.encode(text) for text in texts], texts, seconds),
            sha256(b"".join(np.array(sp.encode(text), dtype).tobytes()
                            for text in others(texts))).hexdigest())


def measure_tokenizers(model, texts, seconds):
    """Hugging Face tokenizers, by its fastest call."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer
    described = tokenizer_json(sentencepiece.SentencePieceProcessor(model_proto=model))
    described["added_tokens"] = []                   # else it takes a literal <s> in a text for one
    theirs = Tokenizer.from_str(json.dumps(described))

    def encode(texts):
        return [found.ids for found in
                theirs.encode_batch_fast(texts, add_special_tokens=False)]

    dtype = Encoder(model).dtype
    return (passes(encode, texts, seconds),
            sha256(b"".join(np.array(ids, dtype).tobytes()
                            for ids in encode(others(texts)))).hexdigest())


def measure_workers(model, texts):
    """Bytes of text a second of all of `prepare.py tokenize`, by one worker and by two, once they
    run: of 12 units more than 4, so without the start and what is read by cold encoders."""
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    copies = max(1, SCALING // bytes_of(texts))
    seconds = {(workers, units): [] for workers in (1, 2) for units in (4, 16)}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        files = [Path(folder) / f"{k}.jsonl" for k in range(16)]
        for file in files:
            file.write_text(rows * copies, "utf-8")
        for workers, units in [*seconds] * 2:                                       # in turns
            before = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "import prepare, sys; prepare.UNIT = 1; "
                 "prepare.main(sys.argv[1:])", "tokenize", *files[:units], f"--out={folder}/out",
                 f"--tokenizer={folder}/tokenizer.model", f"--workers={workers}"],
                check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parent)
            seconds[workers, units].append(time.perf_counter() - before)
            shutil.rmtree(Path(folder) / "out")
    return [12 * copies * bytes_of(texts) / (min(seconds[workers, 16]) - min(seconds[workers, 4]))
            for workers in (1, 2)]


def corpora_of(args):
    """({name: texts}, tokenizer model): of files, or of what Python brings."""
    if args.files:
        if not args.tokenizer:
            sys.exit("files need a --tokenizer=FILE, a SentencePiece model")
        choice = prepare.Choice(args.text_key)
        corpora = {path: prepare.all_texts(prepare.list_files([path]), choice)[0]
                   for path in args.files}
    else:
        corpora = {"documentation": prepare.documentation(),
                   "modules": list(prepare.library_modules().values())}
    if args.tokenizer:
        prepare.load_tokenizer(args.tokenizer)
        return corpora, Path(args.tokenizer).read_bytes()
    print("training the demo's tokenizer")
    return corpora, prepare.train_tokenizer(sum(corpora.values(), []), 4096)


def compare_encoders(name, model, texts, peers, seconds):
    """Prints and returns what was measured of one corpus: bytes a second, ours over theirs."""
    ours, theirs, size = [], {peer: [] for peer in peers}, bytes_of(texts)
    for _ in range(2):                                                              # in turns
        ours.append(in_own_process(measure_encoder, model, texts, seconds))
        for peer, measure in peers.items():
            theirs[peer].append(in_own_process(measure, model, texts, seconds))
    if len({ids for *_, ids in [ours[0], *(runs[0] for runs in theirs.values())]}) > 1:
        sys.exit(f"the ids of {name} differ: one of these has an error")
    rates = {"cold": size / min(taken[0] for taken, *_ in ours),
             "new": bytes_of(others(texts)) / min(new for _, new, *_ in ours),
             "warm": size / median(s for taken, *_ in ours for s in taken[1:])}
    print(f"{name[-27:]:28}{size / 1e6:7.1f}"
          + "".join(f"{rate / 1e6:9.1f}" for rate in rates.values()))
    result = {"bytes": size, "memory": max(memory for _, _, memory, _ in ours)} | rates
    for peer, runs in theirs.items():
        cold = size / min(taken[0] for taken, _ in runs)
        warm = size / median(s for taken, _ in runs for s in taken[1:])
        ratio = rates["warm"] / warm
        result |= {peer: {"cold": cold, "warm": warm}, f"ratio_to_{peer}": ratio}
        print(f"  {peer:26}{'':7}{cold / 1e6:9.1f}{'':9}{warm / 1e6:9.1f}   ours, warm, is "
              f"{ratio:.1f} times as fast")
    return result


def bench_prepare(args):
    corpora, model = corpora_of(args)
    peers = {"sentencepiece": measure_sentencepiece}
    if not find_spec("tokenizers"):
        print("left out: tokenizers is not installed")
    elif not llama_style(model):
        print("left out: tokenizers, as this model is not Llama's kind")
    else:
        peers["tokenizers"] = measure_tokenizers
    print(f"{'MB/s on one core':28}{'MB':>7}{'cold':>9}{'new':>9}{'warm':>9}")
    results = {name: compare_encoders(name, model, texts, peers, args.seconds)
               for name, texts in corpora.items()}
    one, two = measure_workers(model, sum(corpora.values(), []))
    print(f"all of prepare.py tokenize, files to token files: {one / 1e6:.1f} MB/s by one worker, "
          f"{two / 1e6:.1f} by two, {two / one:.2f} times as fast")
    smallest = {key: min(result[key] for result in results.values())
                for key in ("warm", *(f"ratio_to_{peer}" for peer in peers))}
    return {"bytes_per_second": smallest.pop("warm"),
            "peak_memory": max(result["memory"] for result in results.values()),
            **smallest, "workers": {"1": one, "2": two}, "results": results}


# --------------------------------------------------------------------------------------------------
# Generation

def read_limit(device):
    """Bytes/s at which the device reads."""
    source = in_large_pages(torch.ones(2 ** 27, dtype=torch.int64, device=device))
    return source.nbytes / seconds_of(source.sum, device)


def greedy(logits):
    return logits.argmax(-1)


def random_prompt(vocab_size, n):
    return np.random.default_rng(0).integers(3, vocab_size, n).tolist()


def measure_generation(folder, quantize, batch, prompt, steps, compile):
    """What generate does with `batch` rows behind a prompt of so many tokens, in a process of its
    own: seconds to load, of the prompt, of each step; bytes; the logits behind the prompt."""
    device = find_device()
    start = time.perf_counter()
    llama = freeze_for_inference(model.Llama.from_pretrained(folder, device, find_dtype(device)[0]), quantize)
    loading, V = time.perf_counter() - start, llama.config.vocab_size
    decoder = Decoder(llama, batch, prompt + steps, V, compile)
    ids = random_prompt(V, prompt)
    with torch.inference_mode():
        reading = seconds_of(lambda: decoder.prefill([ids]), device, 3)
        decoder.prefill([ids], batch)
        start = time.perf_counter()
        decoder.decode(torch.zeros(batch, 1, dtype=torch.long, device=device))
        compiling = time.perf_counter() - start
        logits = decoder.prefill([ids])[0].cpu().numpy()
    marks = []
    for _ in generate(decoder, [ids], batch, steps, set(), greedy):
        marks.append(time.perf_counter())
    weights = sum(tensor.nbytes for m in decoder.model.modules() if isinstance(m, FrozenLinear)
                  for tensor in m.buffers())
    cache = sum(tensor.nbytes for pair in decoder.cache.layers for tensor in pair)
    return {"loading": loading, "compiling": compiling, "reading": reading,
            "steps": np.diff(marks).tolist()[1:], "bytes": weights + cache,
            "stored": stored_bytes(llama), "memory": memory_used(device), "logits": logits}


def measure_transformers_generation(folder, quantize, batch, prompt, steps, compile):
    """The same of transformers, in the same dtype, by the calls that its generate makes."""
    from transformers import AutoModelForCausalLM
    device = find_device()
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=find_dtype(device)[0]).to(device)
    ids = torch.tensor([random_prompt(llama.config.vocab_size, prompt)], device=device)

    @torch.inference_mode()
    def read():
        return llama(ids.repeat(rows, 1), use_cache=True, logits_to_keep=1)

    rows = 1
    reading, logits = seconds_of(read, device, 3), read().logits[0, -1].float().cpu().numpy()
    rows, taken = batch, []
    out = read()
    with torch.inference_mode():
        for _ in range(steps):
            start = time.perf_counter()
            out = llama(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            wait(device)
            taken.append(time.perf_counter() - start)
    return {"reading": reading, "steps": taken[1:], "logits": logits,
            "memory": memory_used(device)}


def measure_llama_cpp(folder, quantize, batch, prompt, steps, compile):
    """The same of llama.cpp with one row, by its calls for single tokens."""
    import llama_cpp
    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(f"{folder}/{GGUF[quantize]}.gguf", n_ctx=prompt + steps, n_batch=512,
                            n_threads=threads, n_threads_batch=threads, verbose=False,
                            n_gpu_layers=-1 if torch.cuda.is_available() else 0)
    ids = random_prompt(llama.n_vocab(), prompt)

    def read():
        llama.reset()
        llama.eval(ids)

    reading = seconds_of(read, torch.device("cpu"), 3)
    at = ctypes.cast(llama_cpp.llama_get_logits(llama.ctx), ctypes.POINTER(ctypes.c_float))
    logits, taken = np.ctypeslib.as_array(at, (llama.n_vocab(),)).copy(), []
    for i in range(steps):
        start = time.perf_counter()
        llama.eval([ids[i % prompt]])
        taken.append(time.perf_counter() - start)
    return {"reading": reading, "steps": taken[1:], "logits": logits,
            "memory": memory_used(torch.device("cpu"))}


GGUF = {None: "BF16", "int8": "Q8_0", "int4": "Q4_0"}        # what llama.cpp calls the nearest

GGUF_NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output", "blocks": "blk",
              "attn_norm": "attn_norm", "mlp_norm": "ffn_norm", "q": "attn_q", "k": "attn_k",
              "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
              "down": "ffn_down"}


def write_gguf(folder, out):
    """The weights of a folder for llama.cpp, in bf16 and as it quantizes them. It rotates
    neighbouring numbers where we rotate halves, so rows of q and k change places."""
    import gguf
    import llama_cpp
    llama = model.Llama.from_pretrained(folder, dtype=torch.bfloat16)
    cfg, writer = llama.config, gguf.GGUFWriter(out / "BF16.gguf", "llama")
    for add, value in ((writer.add_context_length, cfg.context),
                       (writer.add_embedding_length, cfg.d_model),
                       (writer.add_block_count, cfg.n_layer),
                       (writer.add_feed_forward_length, cfg.d_ff),
                       (writer.add_head_count, cfg.n_head),
                       (writer.add_head_count_kv, cfg.n_kv_head),
                       (writer.add_layer_norm_rms_eps, cfg.norm_eps),
                       (writer.add_rope_freq_base, cfg.rope_theta),
                       (writer.add_vocab_size, cfg.vocab_size),
                       (writer.add_file_type, gguf.LlamaFileType.MOSTLY_BF16),
                       (writer.add_tokenizer_model, "no_vocab")):
        add(value)
    for name, p in llama.named_parameters():
        *path, _ = name.split(".")
        p, label = p.data, ".".join(GGUF_NAMES.get(part, part) for part in path
                                    if part not in ("attn", "mlp"))
        if path[-1] in ("q", "k"):
            p = p.view(-1, 2, cfg.head_dim // 2, cfg.d_model).transpose(1, 2).reshape(p.shape)
        if p.ndim == 1:
            writer.add_tensor(f"{label}.weight", p.float().numpy())
        else:
            writer.add_tensor(f"{label}.weight", p.view(torch.uint8).numpy(),
                              raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for quantize in "int8", "int4":
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{GGUF[quantize]}")
        if llama_cpp.llama_model_quantize(bytes(out / "BF16.gguf"),
                                          bytes(out / f"{GGUF[quantize]}.gguf"),
                                          ctypes.byref(how)):
            sys.exit(f"llama.cpp could not write {GGUF[quantize]}")


def random_model(out):
    """A folder with the weights of an untrained TinyLlama, which are read as fast as any."""
    torch.manual_seed(0)
    with torch.device("meta"):
        llama = model.Llama(model.ModelConfig())
    llama.to(torch.bfloat16).to_empty(device="cpu").init_weights().save_pretrained(out)
    return out


def generation_peers(batch):
    """{name: how it is measured} of those that are installed."""
    peers = {}
    for name, packages, measure in (
            ("transformers", ["transformers"], measure_transformers_generation),
            ("llama_cpp", ["llama_cpp", "gguf"], measure_llama_cpp)):
        lacking = [package for package in packages if not find_spec(package)]
        if lacking:
            print(f"left out: {name}: {lacking[0]} is not installed")
        elif name == "llama_cpp" and batch > 1:
            print(f"left out: {name} is measured with one text")
        else:
            peers[name] = measure
    return peers


def bench_generate(args):
    if args.quality:
        return bench_quality(args)
    for name in "batch", "prompt", "tokens":
        if getattr(args, name) < 1 + 2 * (name == "tokens"):
            sys.exit(f"--{name} must be above {2 * (name == 'tokens')}, got {getattr(args, name)}")
    source = find_model(args.checkpoint) if args.checkpoint else None
    config = (model.config_from_hf(read_json(source / "config.json")) if source
              else model.ModelConfig())
    if args.prompt + args.tokens > config.context:
        sys.exit(f"--prompt={args.prompt} and --tokens={args.tokens} are more than the context of "
                 f"{config.context}")
    device, peers = find_device(), generation_peers(args.batch) if args.peers else {}
    dtype, why = find_dtype(device)
    compile = args.compile == "True"
    if compile and (error := in_own_process(compile_error, device)):
        print(f"not compiled: {error}")
        compile = False
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = source or random_model(folder)
        if "llama_cpp" in peers:
            in_own_process(write_gguf, source, folder)
        limit = in_own_process(read_limit, device)
        print(f"torch {torch.__version__}, {device_name(device)}, {str(dtype)[6:]} ({why}), "
              f"reads {limit / 1e9:.1f} GB/s; {args.batch} of {args.prompt} tokens to continue")
        jobs = [(quantize, name, measure) for quantize in args.precisions
                for name, measure in {"ours": measure_generation, **peers}.items()
                if name != "transformers" or not quantize]
        runs = {job[:2]: [] for job in jobs}
        for quantize, name, measure in tqdm(jobs * 2, desc="measuring"):            # in turns
            runs[quantize, name].append(in_own_process(
                measure, folder if name == "llama_cpp" else source, quantize, args.batch,
                args.prompt, args.tokens, compile))
    return tell(runs, args, str(dtype)[6:], limit, in_own_process(read_limit, device))


def tell(runs, args, dtype, *limits):
    """Prints and returns what was measured; `limits` are bytes/s read, before and after."""
    print(f"\n{'':26}{'tokens/s':>9}{'ms':>8}{'GB read':>9}{'GB/s':>7}{'of limit':>9}"
          f"{'prompt/s':>10}{'first, s':>9}{'memory':>9}{'ours is':>9}")
    results, limit = {}, max(limits)
    for (quantize, name), found in runs.items():
        step = median(s for one in found for s in one["steps"])
        reading = min(one["reading"] for one in found)
        row = {"tokens_per_second": args.batch / step, "prompt_tokens_per_second":
               args.prompt / reading, "time_to_first_token": reading,
               "peak_memory": max(one["memory"] for one in found)}
        text = f"{args.batch / step:9,.1f}{1e3 * step:8.2f}"
        if name == "ours":
            ours, read = row, found[0]["bytes"]
            row |= {"bytes_per_step": read, "share": read / step / limit,
                    "loading": min(one["loading"] for one in found),
                    "compiling": min(one["compiling"] for one in found)}
            results[quantize or dtype] = row
            text += f"{read / 1e9:9.3f}{read / step / 1e9:7.1f}{row['share']:9.0%}"
        else:
            ours[name] = row
            ours[f"ratio_to_{name}"] = ours["tokens_per_second"] / row["tokens_per_second"]
            text += f"{'':25}"
            mine, theirs = runs[quantize, "ours"][0]["logits"], found[0]["logits"]
            row["distance"] = float(np.linalg.norm(mine - theirs) / np.linalg.norm(mine))
        label = {"ours": quantize or dtype, "llama_cpp": f"llama.cpp {GGUF[quantize]}"}
        print(f"{'  ' * (name != 'ours') + label.get(name, name):26}{text}"
              f"{row['prompt_tokens_per_second']:10,.0f}{reading:9.2f}"
              f"{format_bytes(row['peak_memory']):>9}"
              + (f"{ours[f'ratio_to_{name}']:9.2f}" if name != "ours" else ""))
    for key, row in results.items():
        print(f"{key}: loaded in {row['loading']:.1f} s, compiled in {row['compiling']:.1f} s"
              + "".join(f"; logits {row[name]['distance']:.1%} from those of {name}"
                        for name in ("transformers", "llama_cpp") if name in row))
    return {"tokens_per_second": next(iter(results.values()))["tokens_per_second"],
            "peak_memory": max(row["peak_memory"] for row in results.values()),
            "read_bytes_per_second": limit, **{
                ratio: min(row[ratio] for row in results.values() if ratio in row)
                for ratio in ("ratio_to_transformers", "ratio_to_llama_cpp")
                if any(ratio in row for row in results.values())}, "results": results}


def sources_of(args, folder):
    """The sources whose validation texts are read: those named, or those of the run that wrote the
    checkpoint."""
    names, state = args.data, folder / "training/state.json"
    if not names and state.exists():
        state = read_json(state)
        names = [str(Path(state["recipe"]["data_dir"]) / name) for name in state["sources"]]
    if not names:
        sys.exit("--quality needs texts: --data=data/NAME")
    return names


def bench_quality(args):
    """Bits per byte, and the distance of logits from those of the weights as they are."""
    if not args.checkpoint:
        sys.exit("--quality needs a trained CHECKPOINT")
    folder, device = find_model(args.checkpoint), find_device()
    dtype = find_dtype(device)[0]
    names, results, exact = sources_of(args, folder), {}, {}
    print(f"{'':12}{'MB':>8}{'logits off':>12}{'same choice':>13}  bits per byte of "
          + ", ".join(names))
    for quantize in args.precisions:
        llama = freeze_for_inference(model.Llama.from_pretrained(folder, device, dtype), quantize)
        source_bits, away, agreed = [], [], []
        for name in names:
            source = Source(name, "val", llama.config.context)
            n = min(source.windows, max(1, args.eval_tokens // source.context))
            nats = 0
            for i in range(n):
                x, y = train.read_batch({name: source}, [(name, i * source.windows // n)], device)
                with torch.inference_mode():
                    logits = llama(x)[0].float()                                  # (T, V)
                nats += F.cross_entropy(logits, y[0]).item() / n
                first = exact.setdefault((name, i), logits)
                away.append(((logits - first).norm() / first.norm()).item())
                agreed.append((logits.argmax(-1) == first.argmax(-1)).float().mean().item())
            source_bits.append(nats / math.log(2) * source.info["tokens"] / source.info["bytes"])
        results[quantize or str(dtype)[6:]] = row = {
            "stored": stored_bytes(llama), "distance": sum(away) / len(away),
            "agreement": sum(agreed) / len(agreed), "bits_per_byte": dict(zip(names, source_bits))}
        print(f"{quantize or str(dtype)[6:]:12}{row['stored'] / 1e6:8,.1f}{row['distance']:12.2%}"
              f"{row['agreement']:13.1%}  " + "  ".join(f"{bits:.4f}" for bits in source_bits))
    return {"results": results}


# --------------------------------------------------------------------------------------------------
# Evaluation

def demo_model(out):
    """A folder with an untrained model of the demo's shape, and a tokenizer as large as its."""
    tokenizer = prepare.train_tokenizer(prepare.documentation(), 4096)
    cfg = load(["config_demo.py"], TrainConfig)
    shape = {field.name: getattr(cfg, field.name) for field in fields(model.ModelConfig)}
    model.Llama(model.ModelConfig(**shape | {"vocab_size": 4096})).init_weights().save_pretrained(
        out)
    write_tokenizer(out, tokenizer)
    return out


def requests_of(n):
    """{kind: (method of the harness, what it is asked, requests of a question)}: n questions as
    long as HellaSwag's and n texts to continue, from this Python's library; and documents of it."""
    texts = [text.split(" ") for text in prepare.embedded_corpus()[0] if len(text) > 600][:n]
    contexts = [" ".join(words[:40]).rstrip() for words in texts]
    endings = [" " + " ".join(words[40:55]).strip() for words in texts]
    return {"multiple choice": ("loglikelihood", [
                (context, endings[(k + 7 * j) % len(texts)]) for k, context in enumerate(contexts)
                for j in range(4)], 4),
            "documents": ("loglikelihood_rolling", [(" ".join(words),) for words in texts[::4]], 1),
            "generation": ("generate_until", [(context, {"until": ["\n\n"], "max_gen_toks": 32})
                                              for context in contexts], 1)}


def measure_answers(ours, folder, dtype, batch, asked):
    """{kind: (questions a second, the answers)}, by our adapter or the harness' own."""
    from lm_eval.api.instance import Instance
    if ours:
        from eval import Adapter
        lm = Adapter(*load_model(folder, None, dtype), False, batch)
    else:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer
        lm = HFLM(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(find_device()),
                  tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch,
                  add_bos_token=False)
    found = {}
    for kind, (method, arguments, of) in asked.items():
        requests = [Instance(method, {}, one, k) for k, one in enumerate(arguments)]
        call = partial(getattr(lm, method), disable_tqdm=True)
        call(requests[:batch])
        before = time.perf_counter()
        answers = call(requests)
        found[kind] = len(requests) / of / (time.perf_counter() - before), answers
    return found


def bench_eval(args):
    lacking = [name for name in ("lm_eval", "transformers", "accelerate") if not find_spec(name)]
    if lacking:
        sys.exit('this needs the peer: pip install "lm-eval[hf]"')
    for name in "batch", "questions":
        if getattr(args, name) < 1:
            sys.exit(f"--{name} must be above 0, got {getattr(args, name)}")
    device = find_device()
    dtype, _ = find_dtype(device, args.dtype or "auto")
    print(f"torch {torch.__version__}, {device_name(device)}, {str(dtype)[6:]}; "
          f"{args.batch} requests at once")
    asked = requests_of(args.questions)
    with tempfile.TemporaryDirectory() as folder:
        source = find_model(args.checkpoint) if args.checkpoint else demo_model(Path(folder))
        runs = {name: [] for name in ("ours", "transformers")}
        for name in tqdm([*runs] * 3, desc="measuring"):                             # in turns
            runs[name].append(in_own_process(measure_answers, name == "ours", source, dtype,
                                             args.batch, asked))
    results = {}
    print(f"\n{'questions/s':20}{'ours':>10}{'harness':>10}{'ours is':>9}")
    for kind in asked:
        ours, theirs = (max(one[kind][0] for one in found) for found in runs.values())
        results[kind] = {"ours": ours, "transformers": theirs,
                         "ratio_to_transformers": ours / theirs}
        print(f"{kind:20}{ours:10.1f}{theirs:10.1f}{ours / theirs:9.2f}")
    return {"ratio_to_transformers": min(row["ratio_to_transformers"] for row in results.values()),
            "results": results}


# --------------------------------------------------------------------------------------------------

def stored_as(word):
    """None for "full", else a way to quantize."""
    found = {str(key or "full"): key for key in LINEAR_TYPES}
    if word not in found:
        raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(found)}")
    return found[word]


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="tokens/s of a training step", allow_abbrev=False)
    p.add_argument("recipe", nargs="*", help="recipe files; their keys go as --key=value")
    p.add_argument("--batch", type=int, default=0, help="tokens of a step")
    p.add_argument("--seconds", type=float, default=60 if torch.cuda.is_available() else 15,
                   help="of each measurement (%(default)s)")
    p.add_argument("--ablate", action="store_true", help="measure each optimization")
    p.add_argument("--peers", action="store_true", help="measure transformers, too")
    p.add_argument("--json", help="a file for what the last line says")
    p = commands.add_parser("prepare", help="MB/s of encoding", allow_abbrev=False)
    p.add_argument("files", nargs="*", help="corpora, each measured by itself; without, the "
                   "documentation and the modules of this Python")
    p.add_argument("--tokenizer", help="a SentencePiece model; without, the demo's")
    p.add_argument("--text_key", default="text")
    p.add_argument("--seconds", type=float, default=5, help="of each measurement (%(default)s)")
    p.add_argument("--json", help="a file for what the last line says")
    p = commands.add_parser("generate", help="tokens/s of generation", allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", help="a folder or a hub name; without, the weights of "
                   "an untrained TinyLlama")
    p.add_argument("--batch", type=int, default=1, help="texts at once (%(default)s)")
    p.add_argument("--prompt", type=int, default=512, help="tokens before (%(default)s)")
    p.add_argument("--tokens", type=int, default=100, help="to generate (%(default)s)")
    p.add_argument("--precisions", type=lambda text: [stored_as(word) for word in text.split(",")],
                   default=[*LINEAR_TYPES], help="of full,int8,int4: those to measure")
    p.add_argument("--compile", choices=["True", "False"], default="True")
    p.add_argument("--peers", action="store_true", help="measure transformers and llama.cpp, too")
    p.add_argument("--quality", action="store_true", help="measure what a precision costs instead")
    p.add_argument("--data", nargs="+", help="folders of sources for --quality; default: those of "
                   "the checkpoint's run")
    p.add_argument("--eval_tokens", type=int, default=32_768, help="of each (%(default)s)")
    p.add_argument("--json", help="a file for what the last line says")
    p = commands.add_parser("eval", help="questions/s of an evaluation", allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", help="a folder or a hub name; without, an untrained "
                   "model of the demo's shape")
    p.add_argument("--batch", type=int, default=16, help="requests at once (%(default)s)")
    p.add_argument("--questions", type=int, default=200, help="(%(default)s)")
    p.add_argument("--dtype", choices=["float32", "bfloat16"])
    p.add_argument("--json", help="a file for what the last line says")
    args, keys = parser.parse_known_args(argv)
    if args.command == "train":
        args.recipe += keys                                   # config.py refuses what is no key
    elif keys:
        parser.error(f"no option {keys[0]}")
    return args


def main(argv):
    args = parse_args(argv)
    result = {"train": bench_train, "prepare": bench_prepare,
              "generate": bench_generate, "eval": bench_eval}[args.command](args)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except torch.OutOfMemoryError as error:
        sys.exit(f"out of memory; what helps is a smaller --micro_batch. ({error})")
    except (InputError, prepare.Unreadable, OSError) as error:
        sys.exit(str(error))
