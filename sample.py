"""Text from a model: python sample.py [CHECKPOINT] [--prompt=TEXT] [--temperature=0] ...

CHECKPOINT is a folder of ours, any Hugging Face Llama folder, or a hub name such as
TinyLlama/TinyLlama_v1.1; without one it is the newest under out/. The prompt is run through the
model once, and fills the cache with its keys and values. From there each token costs one pass over
a single position: the model gives logits for the next one, `choose` draws from them, and what was
drawn goes in again, until the model ends the document itself (EOS), or the context is full.

For a single text such a pass multiplies each weight with one number, so it takes as long as reading
the weights: TinyLlama's 2.07 GB in bf16, at some 45 GB/s on two CPU cores and 4,300 on an H200.
Three things make a token cheaper than that, and all are here. Weights stored in 8 or 4 bits are
less to read (--quantize). Several texts at once share the reading (--num_samples, --prompts). And a
small model can guess the next tokens, all of which the large one then checks in a single pass,
without a change in what is likely to come out (--draft; speculative decoding, arXiv 2211.17192).

Prompt and continuation go to standard output, samples separated by a line ---, or as JSON lines for
--prompts, and nothing else does.
"""
import argparse
import copy
import glob
import json
import math
import mmap
import os
import re
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from device import compile_error, find_device, find_dtype
from files import InputError, read_json
from model import KVCache, Linear, Llama, ModelError

# --------------------------------------------------------------------------------------------------
# Loading

def find_model(name):
    """The folder of a checkpoint: a path, the newest in a run's folder, or a hub name; None is the
    newest under out/."""
    found = glob.glob(f"{glob.escape(name) if name else 'out/*'}/step_*[0-9]/training/state.json")
    if found:
        return Path(max(found, key=os.path.getmtime)).parent.parent
    if name is None:
        sys.exit("there is no checkpoint under out/: "
                 "train one with python train.py config_demo.py, or name a folder")
    if os.path.isdir(name) or name.count("/") != 1:
        return Path(name)           # a folder that is not there is named by whoever reads it
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        sys.exit(f"there is no folder {name}; to take it from the hub: pip install huggingface_hub")
    try:
        return Path(snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except Exception as error:      # of the network, the hub or the name: its own words say which
        sys.exit(f"there is no folder {name}, and the hub did not give it: {error}")


class Tokenizer:
    """The tokenizer of a model folder: text to ids and back, without special tokens; bos_id, and
    eos_ids, those that end a document. From tokenizer.model, by sentencepiece, or else from
    tokenizer.json, by tokenizers."""

    def __init__(self, folder):
        folder = Path(folder)
        hf = read_json(folder / "config.json")
        if (folder / "generation_config.json").exists():
            hf |= read_json(folder / "generation_config.json")
        eos = hf.get("eos_token_id", 2)
        self.bos_id, self.eos_ids = (hf.get("bos_token_id", 1),
                                     set(eos) if isinstance(eos, list) else {eos})
        try:
            if (folder / "tokenizer.model").exists():
                import sentencepiece
                sp = sentencepiece.SentencePieceProcessor(
                    model_file=str(folder / "tokenizer.model"))
                self.size, self.encode, self.decode = len(sp), sp.encode, sp.decode
                self.piece = sp.id_to_piece
            elif (folder / "tokenizer.json").exists():
                import tokenizers
                fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                self.size, self.decode = fast.get_vocab_size(), fast.decode
                self.piece = fast.id_to_token
                self.encode = lambda text: fast.encode(text, add_special_tokens=False).ids
            else:
                sys.exit(f"{folder} has no tokenizer: "
                         "put its tokenizer.model (or tokenizer.json) there")
        except ImportError as error:
            sys.exit(f"{folder} has a tokenizer.json only: pip install {error.name}")
        except Exception as error:      # both libraries raise bare ones at a damaged file
            sys.exit(f"the tokenizer of {folder} cannot be read: {error}")

    def pieces(self):
        return [self.piece(i) for i in range(self.size)]


def load_model(folder, quantize=None, dtype=None):
    """(model, tokenizer) of a folder, for reading only, on the accelerator if there is one; in
    bf16 where the hardware has it, else in fp32."""
    device = find_device()
    model = Llama.from_pretrained(folder, device, dtype or find_dtype(device)[0])
    tokenizer = Tokenizer(folder)
    if tokenizer.size > model.config.vocab_size:
        sys.exit(f"the tokenizer of {folder} has {tokenizer.size} tokens and its model "
                 f"{model.config.vocab_size}: they do not belong together")
    if not isinstance(tokenizer.bos_id, int) or not 0 <= tokenizer.bos_id < tokenizer.size:
        sys.exit(f"config.json of {folder} has bos_token_id {tokenizer.bos_id}: a text begins with "
                 f"it, so it must be one of the {tokenizer.size} tokens")
    return freeze_for_inference(model, quantize), tokenizer


def count_parameters(model):
    """Its parameters, however they are stored."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(model.config).parameters())


def stored_bytes(model):
    """Bytes of what it stores."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


# --------------------------------------------------------------------------------------------------
# Weights that are only read

STREAMS = 4         # places of a weight that are read at once
GROUP = 64          # weights of int4 that share a scale


def in_large_pages(tensor):
    """The tensor, on Linux in pages of 2 MB instead of 4 kB: a CPU then reads it a sixth faster, as
    it looks up 500 times fewer addresses."""
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes < 2 ** 21:
        return tensor
    memory = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):                                        # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def dot(x, w):
    """x (I,) times w (N, I), as the sums (N,) that the compiler turns into one loop. Of more than
    4,096 numbers it makes a slower one, so that many are then added in pairs first, or in fours."""
    I, n = len(x), 1
    while I > 4096 * n and I % (128 * n) == 0:
        n *= 2
    lanes = 64 if n > 1 else I
    x, w = x.view(-1, n, lanes), w.view(len(w), -1, n, lanes)
    return sum(x[:, k] * w[:, :, k] for k in range(n)).sum((-1, -2))


class FrozenLinear(nn.Module):
    """A linear layer, x @ weightᵀ, whose weight (O, I) is only read from now on; here, as it is.

    For many rows, a prompt, that is a product of matrices. For few, a token each, its time is that
    of reading the weight, and there is nothing to gain but by reading faster, or less. On a CPU
    F.linear does so at half the speed of memory or less; sums over x * weight, compiled, at nearly
    all of it, and they turn int8 and int4 into floats on the way.
    """

    few = 2          # rows, up to which the sums are faster

    def __init__(self, weight):
        super().__init__()
        self.dtype = weight.dtype
        self.store(weight)

    def store(self, weight):
        self.register_buffer("weight", in_large_pages(weight.data))

    def product(self, x):
        """x (..., I) -> (..., O)."""
        return F.linear(x, self.weight)

    def times(self, x):
        """The same of one row x (I,) in fp32, for the compiler."""
        return torch.cat([dot(x, part) for part in self.weight.chunk(STREAMS)])

    def forward(self, x):
        shape = x.shape[:-1]
        if shape.numel() > self.few or not torch.compiler.is_compiling():
            return self.product(x.to(self.dtype))
        x = x.float().reshape(shape.numel(), -1)
        # the compiler does not see through as_strided: it computes x once, and not, say, the norm
        # that x comes from for each row of the weight
        x = x.as_strided(x.shape, x.stride())
        return torch.stack([self.times(row) for row in x]).view(*shape, -1)


class Int8(FrozenLinear):
    """Each row of the weight in whole numbers from -127 to 127, times a scale."""

    few = 8          # as a product of matrices must first turn all of them into floats

    def store(self, weight):
        weight = weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("weight", in_large_pages(
            (weight / scale[:, None]).round_().to(torch.int8)))
        self.register_buffer("scale", scale)

    def product(self, x):
        return (F.linear(x, self.weight.to(self.dtype)) * self.scale).to(self.dtype)

    def times(self, x):
        return super().times(x) * self.scale


class Int4(FrozenLinear):
    """GROUP neighbours of a row in whole numbers from -8 to 7, times a scale that makes the largest
    of them -8. A byte holds one of the first half of a group, plus 8, and 16 times one of the
    second half."""

    few = 8

    def store(self, weight):
        O, I = weight.shape
        group = math.gcd(I, GROUP)
        if group % 2:
            raise ModelError(f"int4 stores two numbers a byte: a width of {I} is odd")
        groups = weight.float().view(O, -1, group)
        scale = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
        scale[scale == 0] = 1
        first, second = (groups / scale).round_().clamp_(-8, 7).to(torch.int8).chunk(2, dim=2)
        self.register_buffer("weight", in_large_pages(16 * second + (first + 8)))
        self.register_buffer("scale", in_large_pages(scale[..., 0].contiguous()))

    def product(self, x):
        first, second = (self.weight & 15) - 8, self.weight >> 4
        groups = torch.cat((first, second), dim=2).to(self.dtype)
        return F.linear(x, (groups * self.scale[..., None].to(self.dtype)).flatten(1))

    def times(self, x):
        # with b = 16 second + first + 8, first x₁ + second x₂ = b x₁ + second (x₂ - 16 x₁) - 8 x₁
        x1, x2 = x.view(self.weight.shape[1], 2, -1).unbind(1)
        x2 = x2 - 16 * x1

        def part(b, scale):
            b = b.to(torch.int32)
            return ((b * x1 + ((b >> 4) * x2 - 8 * x1)) * scale[..., None]).sum((-1, -2))

        return torch.cat([part(b, scale) for b, scale in zip(self.weight.chunk(STREAMS),
                                                             self.scale.chunk(STREAMS))])


class Embedding(nn.Module):
    """Rows of a weight, in fp32, in which the residual stream stays, as it did in training."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, idx):
        return F.embedding(idx, self.weight).float()


LINEAR_TYPES = {None: FrozenLinear, "int8": Int8, "int4": Int4}


def freeze_for_inference(model, quantize=None):
    """The model, from now on for reading only, its linear layers stored as STORED says."""
    torch.backends.cuda.enable_cudnn_sdp(False)              # see model.WITHOUT_CUDNN
    model.requires_grad_(False)
    if model.config.tie_embeddings:
        model.head = LINEAR_TYPES[quantize](model.embed.weight)
    model.embed = Embedding(model.embed.weight)
    for module in [m for m in model.modules() if not isinstance(m, Linear)]:
        for name, child in module.named_children():
            if isinstance(child, Linear):       # nothing holds it when the next one is stored
                setattr(module, name, LINEAR_TYPES[quantize](child.weight))
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Steps

PREFILL_TOKENS = 512         # tokens of a prompt that are run at once
CACHE_MULTIPLE = 128         # a cache is a multiple of this, so that compiled code is found again


def compiled(model):
    """The same model, its weights shared, its blocks and its head compiled for steps of fixed
    shapes: one graph for all blocks, so that compiling takes seconds."""
    torch._dynamo.config.recompile_limit = 64         # a graph for each number of rows and tokens
    fast = copy.copy(model)
    fast._modules = dict(model._modules)
    fast.blocks = nn.ModuleList(copy.copy(block) for block in model.blocks)
    fast.head = copy.copy(model.head)
    for module in (*fast.blocks, fast.head):
        module.compile(fullgraph=True, dynamic=False,         # a product and its sum are one FMA
                       options={"cpp.enable_floating_point_contract_flag": "fast"})
    return fast


def should_compile(model, quantize, steps):
    """Whether compiling repays itself in so many steps. It takes some ten seconds, and then a token
    of TinyLlama half the time on a CPU; or far less of it, where weights are stored in fewer bits,
    as without a compiler they are turned into floats as a whole, for each token."""
    on_cpu, read = model.embed.weight.device.type == "cpu", steps * count_parameters(model)
    return read > (1e10 if quantize else 1.5e11 if on_cpu else 1e13)


class Decoder:
    """A model and the cache of a number of rows: `read` their prompts, then take steps, each of so
    many tokens a row. Logits are those of the first `vocabulary` tokens: what pads a vocabulary is
    no text."""

    def __init__(self, model, rows, size, vocabulary, compile=False):
        self.model, self.vocabulary = model, vocabulary
        self.fast = compiled(model) if compile else model
        weight = model.embed.weight
        size = -(-size // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.cache = KVCache(model.config, rows, size, weight.device, weight.dtype)
        self.cache.length = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self.graphs = {}

    def tokens_left(self, prompts, n, most):
        """How many ids may follow prompts, n rows for each: at most `most`, within the context."""
        return [min(most, self.model.config.context - len(prompt)) for prompt in prompts
                for _ in range(n)]

    def prefill(self, prompts, n=1):
        """Logits (R, V) behind prompts, lists of ids, n rows for each. A prompt is run once, in
        chunks if it is long; short ones together, as far as that is no more than a chunk."""
        device, last, done = self.cache.length.device, [], 0
        while done < len(prompts):
            some, T = [], 0
            for prompt in prompts[done:]:
                if some and max(T, len(prompt)) * (len(some) + 1) > PREFILL_TOKENS:
                    break
                some.append(prompt)
                T = max(T, len(prompt))
            rows = self.cache.rows(slice(done * n, (done + len(some)) * n, n))
            for part in torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in some],
                                     device=device).split(PREFILL_TOKENS, dim=1):
                x = self.model.hidden_states(part, cache=rows)                           # (B, T, C)
            last += [x[b, (len(prompt) - 1) % PREFILL_TOKENS] for b, prompt in enumerate(some)]
            done += len(some)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.cache.length[:len(prompts) * n] = lengths.repeat_interleave(n)
        for kept in (tensor for pair in self.cache.layers for tensor in pair if n > 1):
            for i in range(0, len(prompts) * n, n):
                kept[i + 1:i + n] = kept[i]
        logits = self.model.head(torch.stack(last)).repeat_interleave(n, 0)
        return logits[:, :self.vocabulary].float()

    def decode(self, ids):
        """Logits (R, T, V) behind each of ids (R, T), which continue the rows; to be used before
        the next step, as a graph leaves those in the same place."""
        if ids.device.type != "cuda":
            logits = self.fast(ids, cache=self.cache)
        else:
            if ids.shape not in self.graphs:
                self.graphs[ids.shape] = self.capture(ids.clone())
            graph, given, logits = self.graphs[ids.shape]
            given.copy_(ids)
            graph.replay()
        return logits[..., :self.vocabulary].float()

    @torch.inference_mode()
    def warmup(self, T):
        """Takes a step of T tokens for nothing, so that the next ones find it compiled. The rows
        are to be read after this."""
        self.decode(torch.zeros(len(self.cache.length), T, dtype=torch.long,
                              device=self.cache.length.device)).sum().item()

    def capture(self, given):
        """A CUDA graph of one step: hundreds of kernels that are started by a single call. (It,
        where it takes its ids, where it leaves its logits.)"""
        length = self.cache.length.clone()
        side = torch.cuda.TextStreamer()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):               # compiles, and lets libraries make their plans
            for _ in range(3):
                self.fast(given, cache=self.cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.fast(given, cache=self.cache)
        self.cache.length.copy_(length)
        return graph, given, logits


# --------------------------------------------------------------------------------------------------
# Generation

def top_k_top_p(logits, temperature=1.0, top_k=0, top_p=1.0):
    """(probabilities, ids), both (..., k), of what may be drawn behind logits (..., V), likeliest
    first: of softmax(logits / temperature) the top_k likeliest (0: all), and of these the fewest
    that hold top_p of the probability (arXiv 1904.09751), not yet normalised; at temperature 0 the
    likeliest alone."""
    V = logits.shape[-1]
    values, ids = logits.float().topk(1 if temperature == 0 else min(top_k or V, V))
    p = ((values - values[..., :1]) / max(temperature, 1e-30)).softmax(-1)
    if top_p < 1:                                            # those before it hold enough already
        p[..., 1:][(p.cumsum(-1) - p)[..., 1:] >= top_p] = 0
    return p, ids


def sample_from(p, generator=None):
    """Of each row of p (..., V) one place, (..., 1), with a chance in proportion to p: the first to
    ring of alarms at rates p. Nothing waits for the device, as torch.multinomial would."""
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id for each row of logits (n, V), as (n,); see likeliest."""
    p, ids = top_k_top_p(logits, temperature, top_k, top_p)
    return ids.gather(-1, sample_from(p, generator)).squeeze(-1)


def is_async(device):
    """Whether a device works on its own, so that it should be told its next step before the ids of
    this one are waited for."""
    return device.type == "cuda"


def on_host(ids):
    """A function that gives the list of ids. It waits for them alone, not for what the device is
    told after this."""
    if ids.device.type != "cuda":
        return ids.tolist
    copied, done = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True), torch.cuda.Event()
    copied.copy_(ids, non_blocking=True)
    done.record()

    def read():
        done.synchronize()
        return copied.tolist()

    return read


def truncate_at_eos(new, left, eos_ids):
    """Of new, a list of ids for each row, what comes up to its end; left is how many each row may
    still take, 0 once it has ended."""
    for r, ids in enumerate(new):
        ids = ids[:left[r]]
        end = next((k for k, i in enumerate(ids) if i in eos_ids), None)
        new[r], left[r] = (ids, left[r] - len(ids)) if end is None else (ids[:end + 1], 0)
    return new


@torch.inference_mode()
def generate(decoder, prompts, n, max_new_tokens, eos_ids, pick):
    """Yields what follows prompts (lists of ids), n samples of each, a step at a time: for each row
    a list of the one id that it got, or of none once it has ended.

    `pick` takes logits (R, V) and returns ids (R,). A row gets at most max_new_tokens, and never
    more than the context holds.
    """
    left = decoder.tokens_left(prompts, n, max_new_tokens)
    ids, most = pick(decoder.prefill(prompts, n)), max(left)
    ahead = is_async(ids.device)
    for k in range(most):
        read = on_host(ids)
        if ahead and k + 1 < most:
            ids = pick(decoder.decode(ids[:, None])[:, -1])
        yield truncate_at_eos([[i] for i in read()], left, eos_ids)
        if not any(left):
            return
        if not ahead:
            ids = pick(decoder.decode(ids[:, None])[:, -1])


def verify_draft(p, q, guessed, generator=None):
    """(how many of guessed (R, k) stay, the id that follows those), both (R, 1), where q (R, k, V)
    are the chances that they were drawn with, and p (R, k + 1, V) those of the model.

    A guess stays with chance min(1, p / q); instead of the first that does not, one is drawn from
    what p has more than q. Together that is p: nothing about the text tells that there was a draft.
    """
    p_of, q_of = (t[:, :guessed.shape[1]].gather(2, guessed[..., None])[..., 0] for t in (p, q))
    luck = torch.rand(guessed.shape, device=p.device, generator=generator)
    stayed = (luck * q_of < p_of).cumprod(1).sum(1, keepdim=True)                 # (R, 1)
    here = stayed[..., None].expand(-1, 1, p.shape[2])
    q = F.pad(q, (0, 0, 0, 1))                               # nothing is guessed behind the last
    p, q = p.gather(1, here)[:, 0], q.gather(1, here)[:, 0]                       # (R, V)
    rest = (p - q).clamp_(min=0)
    rest = torch.where(rest.any(-1, keepdim=True), rest, p)          # where p is q but for rounding
    return stayed, sample_from(rest, generator)


@torch.inference_mode()
def speculate(decoder, draft, guesses, prompts, n, max_new_tokens, eos_ids, how, generator,
              counts=None):
    """Yields as generate does, but several ids a row and step: the decoder `draft` makes a number
    of `guesses`, and `decoder` checks them all in one pass (arXiv 2211.17192).

    `how` are the settings of likeliest; counts[0] are the guesses made, counts[1] those that
    stayed.
    """
    left = decoder.tokens_left(prompts, n, max_new_tokens)

    def chances(logits):                                     # (..., V), of the whole vocabulary
        p, ids = top_k_top_p(logits, **how)
        return torch.zeros_like(logits).scatter_(-1, ids, p / p.sum(-1, keepdim=True))

    draft.prefill(prompts, n)
    ids = sample_from(chances(decoder.prefill(prompts, n)), generator)                      # (R, 1)
    yield truncate_at_eos(ids.tolist(), left, eos_ids)
    while any(left):
        before, rows, q = decoder.cache.length.clone(), [ids], []
        for _ in range(guesses):
            q.append(chances(draft.decode(rows[-1])[:, -1]))
            rows.append(sample_from(q[-1], generator))
        draft.decode(rows[-1])                                 # the draft reads its last guess, too
        p, guessed = chances(decoder.decode(torch.cat(rows, 1))), torch.cat(rows[1:], 1)
        stayed, ids = verify_draft(p, torch.stack(q, 1), guessed, generator)
        for cache in (decoder.cache, draft.cache):           # the rest was never said
            cache.length.copy_(before + stayed[:, 0] + 1)
        new = [g[:k] + i for g, (k,), i in zip(guessed.tolist(), stayed.tolist(), ids.tolist())]
        if counts:
            going = sum(l > 0 for l in left)
            counts[0] += going * guesses
            counts[1] += sum(k for (k,), l in zip(stayed.tolist(), left) if l)
        yield truncate_at_eos(new, left, eos_ids)


class TextStreamer:
    """Turns ids, as they come, into the text they add to a prompt. A character whose bytes have not
    all come waits; what ends a document is no text."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.seen = len(tokenizer.decode(self.ids))

    def add(self, ids, last=False):
        """The text that ids add; `last` gives out what still waits."""
        self.ids += [i for i in ids if i not in self.tokenizer.eos_ids]
        text = self.tokenizer.decode(self.ids)
        if not last:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        new, self.seen = text[self.seen:], max(self.seen, len(text))
        return new


# --------------------------------------------------------------------------------------------------
# The program

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="sample.py",
                                     description="Generate text with a trained model.")
    parser.add_argument("checkpoint", nargs="?",
                        help="a folder or a hub name; default: the newest under out/")
    parser.add_argument("--prompt", help="the text to continue; default: none, a document from "
                        "its beginning")
    parser.add_argument("--prompts", metavar="FILE", help="many prompts, one a line; "
                        'prints {"prompt": ..., "completion": ...} lines in their order')
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--num_samples", type=int, help="of each prompt; default: 1, or 4 where "
                        "there is neither a prompt nor --temperature=0")
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50,
                        help="draw from the k likeliest tokens only; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--quantize", choices=[*filter(None, LINEAR_TYPES)],
                        help="store weights in fewer bits")
    parser.add_argument("--draft", metavar="CHECKPOINT",
                        help="a smaller model, which guesses tokens for this one to check")
    parser.add_argument("--guesses", type=int, default=4, help="of the draft at a time")
    parser.add_argument("--batch", type=int, default=16,
                        help="texts of --prompts to generate at once")
    parser.add_argument("--compile", choices=["True", "False"],
                        help="default: where it repays itself")
    args = parser.parse_args(argv)
    if args.prompt is not None and args.prompts is not None:
        sys.exit("--prompt and --prompts exclude one another")
    if args.num_samples is None:
        args.num_samples = 1 if args.prompt or args.prompts or args.temperature == 0 else 4
    for name, fine, wanted in (("max_new_tokens", args.max_new_tokens > 0, "above 0"),
                               ("num_samples", args.num_samples > 0, "above 0"),
                               ("temperature", args.temperature >= 0, "0 or above"),
                               ("top_k", args.top_k >= 0, "0 or above"),
                               ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
                               ("guesses", args.guesses > 0, "above 0"),
                               ("batch", args.batch > 0, "above 0"),
                               ("seed", 0 <= args.seed < 2 ** 63, "0 or above, below 2^63")):
        if not fine:
            sys.exit(f"--{name} must be {wanted}, got {getattr(args, name)}")
    return args


def ids_of(text, tokenizer, context):
    """The ids of a prompt, from BOS. Raises ValueError for one that is no text, or too long."""
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"the prompt is not UTF-8: {text!r:.80}")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    if len(ids) >= context:
        raise ValueError(f"the prompt has {len(ids)} tokens, and the context of this model "
                         f"{context}: shorten it")
    return ids


def read_prompts(args, tokenizer, context):
    """([(prompt, ids), ...], how many lines were left out): of a file, one a line, or --prompt."""
    path = args.prompts
    if path is None:
        try:
            return [(args.prompt or "", ids_of(args.prompt or "", tokenizer, context))], 0
        except ValueError as error:
            sys.exit(str(error))
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")
    found = []
    for number, line in enumerate(lines, 1):
        text = line.decode("utf-8", "surrogateescape")
        try:
            found.append((text, ids_of(text, tokenizer, context)))
        except ValueError as error:
            print(f"{path}, line {number} is left out: {error}", file=sys.stderr)
    if not found:
        sys.exit(f"{path} has no prompt that can be used")
    return found, len(lines) - len(found)


def print_stream(follow, prompt, ids, n, tokenizer):
    """Prints one prompt with its n continuations, the first as it comes, and returns their ids."""
    streams, texts, taken = [TextStreamer(tokenizer, ids) for _ in range(n)], [prompt] * n, [[]] * n
    print(prompt, end="", flush=True)
    for new in follow([ids]):
        taken = [before + more for before, more in zip(taken, new)]
        added = [stream.add(more) for stream, more in zip(streams, new)]
        texts = [text + more for text, more in zip(texts, added)]
        print(added[0], end="", flush=True)      # beside the first, the others wait for their turn
    print(streams[0].add([], last=True))
    for stream, text in zip(streams[1:], texts[1:]):
        print("---", text + stream.add([], last=True), sep="\n")
    return taken


def print_lines(follow, prompts, at_once, n, tokenizer):
    """Prints {"prompt", "completion"} lines, n for each of prompts, and returns the ids."""
    taken = []
    for start in tqdm(range(0, len(prompts), at_once), disable=len(prompts) <= at_once):
        part = prompts[start:start + at_once]
        rows = part + part[-1:] * (at_once - len(part))          # of one shape, the last ones too
        new = [sum(row, []) for row in zip(*follow([ids for _, ids in rows]))][:n * len(part)]
        for r, ids in enumerate(new):
            prompt, before = part[r // n]
            text = TextStreamer(tokenizer, before).add(ids, last=True)
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False),
                  flush=True)
        taken += new
    return taken


def load_draft(name, quantize, tokenizer):
    folder = find_model(name)
    draft, its = load_model(folder, quantize)
    if its.pieces() != tokenizer.pieces() or its.bos_id != tokenizer.bos_id:
        sys.exit(f"the draft {folder} has another tokenizer ({its.size} tokens) than this model "
                 f"({tokenizer.size}): it cannot guess its tokens")
    return draft


def draft_report(rate, counts, decoder):
    """In words, what a draft was worth, if each text got `rate` tokens a second with it."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        decoder.warmup(1)
        taken.append(time.perf_counter() - start)
    return (f"the draft: {counts[1]} of {counts[0]} guesses stayed, {counts[1] / counts[0]:.0%}; "
            f"{rate * min(taken):.2f} times as fast as without")


def build_decoders(args, model, tokenizer, rows, size, steps):
    """The decoder of the model and that of its draft, or None; compiled where that repays itself in
    so many steps."""
    def build(model, *sizes):
        compile = (should_compile(model, args.quantize, steps) if args.compile is None
                   else args.compile == "True")
        start = time.perf_counter()
        if compile and (error := compile_error(model.embed.weight.device)):
            if args.compile:
                sys.exit(f"--compile=True does not work here: {error}. Install what is missing "
                         "(g++ for a CPU; gcc and python3-dev for a GPU), or leave it out")
            print(f"not compiled: {error}", file=sys.stderr)
            compile = False
        decoder = Decoder(model, rows, size, tokenizer.size, compile)
        if compile:
            for T in sizes:
                decoder.warmup(T)
            print(f"compiled in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        return decoder

    if not args.draft:
        return build(model, 1), None
    draft = load_draft(args.draft, args.quantize, tokenizer)
    return build(model, args.guesses + 1, 1), build(draft, 1)


def main(argv):
    args = parse_args(argv)
    folder = find_model(args.checkpoint)
    model, tokenizer = load_model(folder, args.quantize)
    context, n, counts = model.config.context, args.num_samples, [0, 0]
    prompts, lost = read_prompts(args, tokenizer, context)
    generator = torch.Generator(model.embed.weight.device).manual_seed(args.seed)
    print(f"{folder}: {count_parameters(model):,} parameters in {stored_bytes(model) / 1e6:,.1f} MB, "
          f"{args.quantize or str(model.embed.weight.dtype)[6:]}, {generator.device}",
          file=sys.stderr)

    at_once = min(len(prompts), max(1, args.batch // n))
    longest = min(context, max(len(ids) for _, ids in prompts) + args.max_new_tokens)
    decoder, draft = build_decoders(args, model, tokenizer, at_once * n, longest + args.guesses + 1,
                                    math.ceil(len(prompts) / at_once) * args.max_new_tokens)
    how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    follow = (partial(speculate, decoder, draft, args.guesses, how=how, generator=generator,
                      counts=counts) if draft else
              partial(generate, decoder, pick=partial(sample_token, **how, generator=generator)))
    marks, steps = [], []

    def timed(prompts):
        for new in follow(prompts, n=n, max_new_tokens=args.max_new_tokens,
                          eos_ids=tokenizer.eos_ids):
            marks.append(time.perf_counter())
            steps.append(sum(map(len, new)) / len(new))
            yield new

    start = time.perf_counter()
    taken = (print_stream(timed, *prompts[0], n, tokenizer) if args.prompts is None
             else print_lines(timed, prompts, at_once, n, tokenizer))
    seconds, tokens = time.perf_counter() - start, sum(map(len, taken))
    full = sum(len(ids) < args.max_new_tokens and ids[-1] not in tokenizer.eos_ids for ids in taken)
    print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; the first after "
          f"{marks[0] - start:.2f} s" + f"; {full} stopped where the context of {context} is full"
          * (full > 0), file=sys.stderr)
    if draft and len(marks) > 2:
        print(draft_report(sum(steps[2:]) / (marks[-1] - marks[1]), counts, decoder), file=sys.stderr)
    if lost:
        sys.exit(3)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except BrokenPipeError:                      # whoever read the text has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
