"""Text from a model: python sample.py [CHECKPOINT] [--prompt=TEXT] [--temperature=0] ...

CHECKPOINT is a folder of ours, any Hugging Face Llama folder, or a hub name such as
TinyLlama/TinyLlama_v1.1; without one it is the newest under out/. Prefill: the prompt runs through
the model once, and its keys and values fill the cache. Decode: each further token costs one pass
over a single position. From the logits of each pass one id is sampled, which is the next input,
until the model ends the document itself (EOS) or the context is full.

For one text such a pass takes as long as reading the weights. Three things make a token cheaper.
Weights in 8 or 4 bits are less to read (--quantize). Several texts at the same time share the
reading (--num_samples, --prompts). And a small model can draft the next tokens, all of which the
large one verifies in a single pass, without changing the distribution of the text (--draft;
speculative decoding, arXiv 2211.17192).

Prompt and continuation go to standard output, samples separated by a line ---, or as JSON lines for
--prompts; everything else goes to standard error.
"""
import argparse
import codecs
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from timeit import repeat

import torch
import torch.nn.functional as F
from tqdm import tqdm

from decoder import Decoder, count_parameters, should_compile, step_error
from device import choose_compile, find_device, find_dtype
from files import InputError, as_path, run_program
from hf import find_model
from quantize import LINEAR_TYPES, load_frozen, precision
from tokenizer import Tokenizer, require_utf8

# --------------------------------------------------------------------------------------------------
# Loading

def load_model(folder, quantize=None, dtype=None):
    """The model of a folder, frozen for inference, and its tokenizer. It is on the accelerator if
    there is one, by default in bf16 where the hardware supports it, else in fp32."""
    device = find_device()
    return load_frozen(folder, device, dtype or find_dtype(device)[0], quantize), Tokenizer(folder)


# --------------------------------------------------------------------------------------------------
# Sampling

def top_k_top_p(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities and ids, both (..., k), of the tokens that may follow logits (..., V), the
    likeliest first: of softmax(logits / temperature) the top_k likeliest (0: all), and of these the
    fewest that together have probability top_p (arXiv 1904.09751); the rest is 0, and the sum not
    normalised. Temperature 0 keeps only the likeliest."""
    V = logits.shape[-1]
    values, ids = logits.float().topk(1 if temperature == 0 else min(top_k or V, V))
    p = ((values - values[..., :1]) / max(temperature, 1e-30)).softmax(-1)
    if top_p < 1:
        enough = p.cumsum(-1) - p >= top_p          # the likelier tokens have top_p already
        enough[..., 0] = False
        p = p.masked_fill(enough, 0)
    return p, ids


def sample_categorical(p, generator=None):
    """One index (..., 1) per row of p (..., V), with probability proportional to p. This is
    exponential-race sampling: among samples of Exp(1) / p the smallest is each index' with
    probability p. Unlike torch.multinomial it does not synchronize with the device."""
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1, keepdim=True)


def sample_token(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id per row of logits (R, V) -> (R,), from the distribution of top_k_top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    p, ids = top_k_top_p(logits, temperature, top_k, top_p)
    return ids.gather(-1, sample_categorical(p, generator)).squeeze(-1)


def copy_to_host(ids):
    """A function that returns ids as a list. On a GPU the copy is queued now, and the function
    waits for it alone, not for what is queued after it."""
    if ids.device.type != "cuda":
        return ids.tolist
    copied, done = torch.empty_like(ids, device="cpu", pin_memory=True), torch.cuda.Event()
    copied.copy_(ids, non_blocking=True)
    done.record()

    def wait():
        done.synchronize()
        return copied.tolist()

    return wait


def tokens_left(decoder, prompts, n, max_new_tokens):
    """How many ids each of n rows per prompt may still get, within the model's context."""
    context = decoder.model.config.context
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts for _ in range(n)]


def truncate_at_eos(new, left, eos_ids):
    """`new`, a list of ids per row, each cut after its EOS and at what `left` allows that row.
    Updates `left`: 0 once a row has ended."""
    for r, ids in enumerate(new):
        ids = ids[:left[r]]
        end = next((k + 1 for k, i in enumerate(ids) if i in eos_ids), None)
        new[r] = ids[:end]
        left[r] = 0 if end else left[r] - len(ids)
    return new


@torch.inference_mode()
def generate(decoder, prompts, n, max_new_tokens, eos_ids, pick):
    """Yields the continuations of prompts (lists of ids), n samples of each, one step at a time: a
    list per row with the one id that it got, or empty once the row has ended. `pick` takes logits
    (R, V) and returns ids (R,). A row gets at most max_new_tokens ids, within the context."""
    left = tokens_left(decoder, prompts, n, max_new_tokens)
    max_steps = max(left)

    # the pass over the prompts already gives the logits of the first new token
    ids = pick(decoder.prefill(prompts, n))                                  # (R,)
    for step in range(1, max_steps + 1):
        read_ids = copy_to_host(ids)
        # a GPU gets its next step before the host waits for the ids of this one, so that it is
        # never idle. If the ids turn out to end every row, that step was for nothing
        if decoder.is_async and step < max_steps:
            ids = decoder.decode(ids[:, None], pick)
        yield truncate_at_eos([[i] for i in read_ids()], left, eos_ids)
        if not any(left):
            return
        # a CPU computes a step only once it is known to be needed
        if not decoder.is_async:
            ids = decoder.decode(ids[:, None], pick)


class TextStreamer:
    """Turns ids, as they come, into the text they add to a prompt. A character whose bytes are not
    complete yet is held back; EOS is no text."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.printed = len(tokenizer.decode(self.ids))

    def add(self, ids, last=False):
        """The text that ids add; `last` releases what is still held back."""
        self.ids += [i for i in ids if i not in self.tokenizer.eos_ids]
        text = self.tokenizer.decode(self.ids)
        if not last:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        new, self.printed = text[self.printed:], max(self.printed, len(text))
        return new


# --------------------------------------------------------------------------------------------------
# Speculative decoding

def verify_draft(p, q, draft_ids, generator=None):
    """How many of draft_ids (R, k) are accepted, and the id that follows those, both (R, 1).
    q (R, k, V) are the probabilities they were sampled with, p (R, k + 1, V) those of the model.

    A draft token is accepted with probability min(1, p / q). Instead of the first one that is not,
    a token is sampled from max(0, p - q). Together that is exactly p: nothing about the text tells
    that there was a draft.
    """
    p_draft, q_draft = (t[:, :draft_ids.shape[1]].gather(2, draft_ids[..., None])[..., 0]
                        for t in (p, q))                                     # (R, k)
    u = torch.rand(draft_ids.shape, device=p.device, generator=generator)
    # cumprod leaves 1 for the leading accepted tokens, and 0 from the first rejected one on
    accepted = (u * q_draft < p_draft).cumprod(1).sum(1, keepdim=True)       # (R, 1)
    # p and q at the first position that was not accepted. If all were, it is the one after the
    # draft, where q is 0 and p itself is sampled from
    position = accepted[..., None].expand(-1, 1, p.shape[2])
    q = F.pad(q, (0, 0, 0, 1))
    p, q = p.gather(1, position)[:, 0], q.gather(1, position)[:, 0]          # (R, V)
    rest = (p - q).clamp_(min=0)
    rest = torch.where(rest.any(-1, keepdim=True), rest, p)          # where p is q but for rounding
    return accepted, sample_categorical(rest, generator)


@torch.inference_mode()
def speculate(decoder, draft, k, prompts, n, max_new_tokens, eos_ids, settings, generator,
              counts=None):
    """Yields as generate does, but several ids per row and step: the decoder `draft` proposes k
    tokens one by one, and `decoder` verifies them in one pass (arXiv 2211.17192). `settings` are
    those of top_k_top_p. counts, [proposed, accepted] draft tokens, is added to."""
    left = tokens_left(decoder, prompts, n, max_new_tokens)

    def probabilities(logits):                               # (..., V), over the whole vocabulary
        p, ids = top_k_top_p(logits, **settings)
        return torch.zeros_like(logits).scatter_(-1, ids, p / p.sum(-1, keepdim=True))

    draft.prefill(prompts, n)
    ids = sample_categorical(probabilities(decoder.prefill(prompts, n)), generator)       # (R, 1)
    yield truncate_at_eos(ids.tolist(), left, eos_ids)
    while any(left):
        lengths, tokens, q = decoder.cache.lengths.clone(), [ids], []
        for _ in range(k):
            q.append(probabilities(draft.decode(tokens[-1])[:, -1]))
            tokens.append(sample_categorical(q[-1], generator))
        draft.decode(tokens[-1])                   # its cache needs the last draft token, too
        # one pass gives the model's distribution after the last id and after each draft token
        p = probabilities(decoder.decode(torch.cat(tokens, 1)))              # (R, k + 1, V)
        draft_ids = torch.cat(tokens[1:], 1)                                 # (R, k)
        accepted, ids = verify_draft(p, torch.stack(q, 1), draft_ids, generator)
        # both caches forget what was not accepted: later tokens overwrite it
        for cache in (decoder.cache, draft.cache):
            cache.lengths.copy_(lengths + accepted[:, 0] + 1)
        new = [row[:a] + i for row, (a,), i in
               zip(draft_ids.tolist(), accepted.tolist(), ids.tolist())]
        if counts:
            counts[0] += k * sum(rest > 0 for rest in left)
            counts[1] += sum(a for (a,), rest in zip(accepted.tolist(), left) if rest)
        yield truncate_at_eos(new, left, eos_ids)


# --------------------------------------------------------------------------------------------------
# The command

def add_options(parser, max_new_tokens, top_p):
    """Adds the options that chat.py has, too."""
    add = parser.add_argument
    add("checkpoint", nargs="?", type=as_path, help="folder or hub name; default: newest in out/")
    add("--max_new_tokens", type=int, default=max_new_tokens, help="at most (%(default)s)")
    add("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    add("--top_k", type=int, default=50, help="sample from the k likeliest tokens only; 0: all")
    add("--top_p", type=float, default=top_p,
        help="sample from the likeliest tokens that have this probability together (%(default)s)")
    add("--seed", type=int, default=1337)
    add("--quantize", choices=[*filter(None, LINEAR_TYPES)], help="store weights in fewer bits")
    add("--dtype", choices=["float32", "bfloat16"], default="auto",
        help="to compute in; default: bfloat16 where the hardware has it")
    add("--compile", choices=["True", "False"], help="default: where it pays off")


def check_options(args):
    for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("temperature", 0), ("top_k", 0),
                        ("guesses", 1), ("batch", 1), ("seed", 0), ("context", 1)):
        if not getattr(args, name, least) >= least:
            sys.exit(f"--{name} must be {least} or above, got {getattr(args, name)}")
    if args.seed >= 2 ** 63:
        sys.exit(f"--seed must be below 2^63, got {args.seed}")
    if not 0 < args.top_p <= 1:
        sys.exit(f"--top_p must be in (0, 1], got {args.top_p}")


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="sample.py",
                                     description="Generate text with a trained model.")
    add_options(parser, max_new_tokens=200, top_p=1.0)
    add = parser.add_argument
    add("--prompt", help="the text to continue; default: none, a document from its beginning")
    add("--prompts", metavar="FILE", type=as_path, help="many prompts, one per line; prints "
        '{"prompt": ..., "completion": ...} lines in their order')
    add("--num_samples", type=int, help="of each prompt; default: 1, or 4 where there is neither a "
        "prompt nor --temperature=0")
    add("--draft", metavar="CHECKPOINT", type=as_path, help="a smaller model that drafts tokens")
    add("--guesses", type=int, default=4, help="tokens of the draft per step")
    add("--batch", type=int, default=16, help="texts of --prompts to generate at the same time")
    args = parser.parse_args(argv)
    if args.prompt is not None and args.prompts is not None:
        sys.exit("--prompt and --prompts exclude one another")
    if args.num_samples is None:
        args.num_samples = 1 if args.prompt or args.prompts or args.temperature == 0 else 4
    check_options(args)
    return args


def encode_prompt(text, tokenizer, context):
    """The ids of a prompt. Raises InputError if it is not UTF-8 or too long."""
    require_utf8(text)
    ids = tokenizer.encode_prompt(text)
    if len(ids) >= context:
        raise InputError(f"the prompt has {len(ids)} tokens, and the context of this model "
                         f"{context}: shorten it")
    return ids


def read_prompts(path, tokenizer, context):
    """[(text, ids), ...] of the prompts in a file, one per line; how many lines are unusable."""
    lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    prompts = []
    for number, line in enumerate(lines, 1):
        text = line.decode("utf-8", "surrogateescape")
        try:
            prompts.append((text, encode_prompt(text, tokenizer, context)))
        except InputError as error:
            print(f"{path}, line {number} is left out: {error}", file=sys.stderr)
    if not prompts:
        sys.exit(f"{path} has no prompt that can be used")
    return prompts, len(lines) - len(prompts)


def print_stream(generate_fn, prompt, ids, n, tokenizer):
    """Prints a prompt with its n continuations, the first as it comes. Returns the ids of each."""
    streamer, rows = TextStreamer(tokenizer, ids), [[] for _ in range(n)]
    print(prompt, end="", flush=True)
    for new in generate_fn([ids]):
        print(streamer.add(new[0]), end="", flush=True)
        rows = [row + new_ids for row, new_ids in zip(rows, new)]
    print(streamer.add([], last=True))
    for row in rows[1:]:
        print("---", prompt + TextStreamer(tokenizer, ids).add(row, last=True), sep="\n")
    return rows


def print_lines(generate_fn, prompts, at_once, n, tokenizer):
    """Prints {"prompt", "completion"} lines, n per prompt. Returns the ids of each."""
    rows = []
    for start in tqdm(range(0, len(prompts), at_once), disable=len(prompts) <= at_once):
        batch = prompts[start:start + at_once]
        # the last batch is filled up to the shape of the others, which is compiled already
        padded = batch + batch[-1:] * (at_once - len(batch))
        new = [sum(row, []) for row in zip(*generate_fn([ids for _, ids in padded]))]
        new = new[:n * len(batch)]
        for r, new_ids in enumerate(new):
            prompt, ids = batch[r // n]
            text = TextStreamer(tokenizer, ids).add(new_ids, last=True)
            print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False),
                  flush=True)
        rows += new
    return rows


def build_decoder(args, model, tokenizer, rows, size, steps, step_tokens, kind=Decoder):
    """A decoder, compiled where --compile says so or so many steps make it pay off. step_tokens
    are the numbers of tokens per row that its steps will have."""
    start, wanted = time.perf_counter(), {"True": True, "False": False}.get(args.compile)
    device, pays = model.embed.weight.device, should_compile(model, steps)
    compile, why = choose_compile(device, wanted, pays, "", partial(step_error, model))
    if wanted is None and pays and not compile:
        print(f"not compiled: {why}", file=sys.stderr)
    decoder = kind(model, rows, size, tokenizer.size, compile)
    if compile:
        for T in step_tokens:
            decoder.warmup(T)
        if (seconds := time.perf_counter() - start) > 2:     # on a CPU it takes none
            print(f"compiled in {seconds:.1f} s", file=sys.stderr)
    decoder.choose_threads()
    return decoder


def load_draft(name, quantize, dtype, tokenizer):
    folder = find_model(name)
    draft, other = load_model(folder, quantize, dtype)
    if (other.vocab, other.size) != (tokenizer.vocab, tokenizer.size):
        sys.exit(f"the draft {folder} has another tokenizer ({other.size} tokens) than this model "
                 f"({tokenizer.size}): it cannot draft its tokens")
    return draft


def main(argv):
    args = parse_args(argv)
    folder = find_model(args.checkpoint)
    dtype, _ = find_dtype(find_device(), args.dtype)
    model, tokenizer = load_model(folder, args.quantize, dtype)
    context, n = model.config.context, args.num_samples
    if args.prompts is None:
        prompt = args.prompt or ""
        prompts, skipped = [(prompt, encode_prompt(prompt, tokenizer, context))], 0
    else:
        prompts, skipped = read_prompts(args.prompts, tokenizer, context)
    stored = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    print(f"{folder}: {count_parameters(model):,} parameters in "
          f"{stored / 1e6:,.1f} MB, {precision(model)}, {find_device()}", file=sys.stderr)

    # the caches have room for the longest text, and for a step of draft tokens beyond its end
    at_once = min(len(prompts), max(1, args.batch // n))
    size = min(context, max(len(ids) for _, ids in prompts) + args.max_new_tokens)
    build = partial(build_decoder, args, tokenizer=tokenizer, rows=at_once * n,
                    size=size + args.guesses + 1,
                    steps=math.ceil(len(prompts) / at_once) * args.max_new_tokens)
    draft = args.draft and build(load_draft(args.draft, args.quantize, dtype, tokenizer),
                                 step_tokens=(1,))
    decoder = build(model, step_tokens=(args.guesses + 1, 1) if draft else (1,))
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    pick = partial(sample_token, **settings, generator=decoder.generator.manual_seed(args.seed))
    counts, steps = [0, 0], []      # draft tokens (proposed, accepted); (when, tokens per row)

    def generate_fn(prompts):
        what = prompts, n, args.max_new_tokens, tokenizer.eos_ids
        if draft:
            news = speculate(decoder, draft, args.guesses, *what, settings, decoder.generator,
                             counts)
        else:
            news = generate(decoder, *what, pick)
        for new in news:
            steps.append((time.perf_counter(), sum(map(len, new)) / len(new)))
            yield new
        decoder.require_finite()

    start = time.perf_counter()
    rows = (print_stream(generate_fn, *prompts[0], n, tokenizer) if args.prompts is None
            else print_lines(generate_fn, prompts, at_once, n, tokenizer))
    seconds, tokens = time.perf_counter() - start, sum(map(len, rows))
    report = (f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s; "
              f"the first after {steps[0][0] - start:.2f} s")
    full = sum(len(ids) < args.max_new_tokens and ids[-1] not in tokenizer.eos_ids for ids in rows)
    if full:
        report += f"; {full} stopped where the context of {context} is full"
    print(report, file=sys.stderr)
    if args.draft and len(steps) > 2:           # the first two steps warm up
        rate = sum(gained for _, gained in steps[2:]) / (steps[-1][0] - steps[1][0])
        # what a step without a draft takes, in seconds: a discarded one of one token, timed
        plain_step = min(repeat(lambda: decoder.warmup(1), number=1, repeat=5))
        print(f"the draft: {counts[1]} of {counts[0]} tokens accepted, "
              f"{counts[1] / counts[0]:.0%}; {rate * plain_step:.2f} times as fast as without",
              file=sys.stderr)
    if skipped:
        sys.exit(3)


if __name__ == "__main__":
    run_program(main)
