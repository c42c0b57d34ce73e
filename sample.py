"""Text from a model: python sample.py [CHECKPOINT] [--prompt=TEXT] [--temperature=0] ...

CHECKPOINT is a folder of ours, any Hugging Face Llama folder, or a hub name such as
TinyLlama/TinyLlama_v1.1; without one it is the newest under out/. The prompt is run through the
model once, and fills the cache with its keys and values. From there each token costs one pass over
a single position: the model gives logits for the next one, `choose` draws from them, and what was
drawn goes in again, until the model ends the document itself (EOS), or the context is full.

Prompt and continuation go to standard output, samples separated by a line ---, and nothing else
does.
"""
import argparse
import glob
import os
import re
import sys
import time
from pathlib import Path

import torch

from model import KVCache, Llama, ModelError, read_json


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
            elif (folder / "tokenizer.json").exists():
                import tokenizers
                fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                self.size, self.decode = fast.get_vocab_size(), fast.decode
                self.encode = lambda text: fast.encode(text, add_special_tokens=False).ids
            else:
                sys.exit(f"{folder} has no tokenizer: "
                         "put its tokenizer.model (or tokenizer.json) there")
        except ImportError as error:
            sys.exit(f"{folder} has a tokenizer.json only: pip install {error.name}")
        except Exception as error:      # both libraries raise bare ones at a damaged file
            sys.exit(f"the tokenizer of {folder} cannot be read: {error}")


def load_model(folder):
    """(model, tokenizer) of a folder, on the accelerator if there is one: there in bf16 where it
    has that, else in fp32."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    model = Llama.from_pretrained(folder, device, torch.bfloat16 if bf16 else torch.float32).eval()
    tokenizer = Tokenizer(folder)
    if tokenizer.size > model.config.vocab_size:
        sys.exit(f"the tokenizer of {folder} has {tokenizer.size} tokens and its model "
                 f"{model.config.vocab_size}: they do not belong together")
    if not isinstance(tokenizer.bos_id, int) or not 0 <= tokenizer.bos_id < tokenizer.size:
        sys.exit(f"config.json of {folder} has bos_token_id {tokenizer.bos_id}: a text begins with "
                 f"it, so it must be one of the {tokenizer.size} tokens")
    return model, tokenizer


# --------------------------------------------------------------------------------------------------
# Generation

def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One id for each row of logits (n, V), as (n,): the likeliest at temperature 0; else drawn
    from softmax(logits / temperature), cut to the top_k likeliest (0: all) and of these to the
    fewest that hold top_p of the probability (arXiv 1904.09751)."""
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[-1]
    values, ids = logits.float().topk(min(top_k or V, V))                         # likeliest first
    p = ((values - values[..., :1]) / temperature).softmax(-1)
    p[..., 1:][(p.cumsum(-1) - p)[..., 1:] >= top_p] = 0    # those before it hold enough already
    return ids.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


@torch.inference_mode()
def generate(model, prompt, n, max_new_tokens, eos_ids, pick):
    """Yields what follows `prompt` (a list of ids) in n samples, a list of n ids at a time, None
    for a sample that has ended.

    `pick` takes logits (n, V) and returns ids (n,). At most max_new_tokens, and never more than the
    context holds.
    """
    config, weight = model.config, model.embed.weight
    room = min(max_new_tokens, config.context - len(prompt))
    cache = KVCache(config, 1, len(prompt) + room, weight.device, weight.dtype)
    logits = model(torch.tensor([prompt], device=weight.device),
                   cache=cache)[:, -1].expand(n, -1)                              # (n, V)
    cache = cache.repeat(n)
    ended = [False] * n
    for k in range(room):
        ids = pick(logits)                                                        # (n,)
        new = [None if done else i for done, i in zip(ended, ids.tolist())]
        ended = [done or i in eos_ids for done, i in zip(ended, new)]
        yield new
        if all(ended) or k + 1 == room:
            return
        logits = model(ids[:, None], cache=cache)[:, -1]                          # (n, V)


class Stream:
    """Turns ids, as they come, into the text they add to a prompt. A character whose bytes have not
    all come waits."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.seen = len(tokenizer.decode(self.ids))

    def add(self, i, last=False):
        """The text that id i adds; `last` gives out what still waits."""
        if i is not None:
            self.ids.append(i)
        text = self.tokenizer.decode(self.ids)
        if not last:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        new, self.seen = text[self.seen:], max(self.seen, len(text))
        return new


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="sample.py",
                                     description="Generate text with a trained model.")
    parser.add_argument("checkpoint", nargs="?",
                        help="a folder or a hub name; default: the newest under out/")
    parser.add_argument("--prompt", default="",
                        help="the text to continue; default: none, a document from its beginning")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--num_samples", type=int,
                        help="default: 1, or 4 where there is neither a prompt nor --temperature=0")
    parser.add_argument("--temperature", type=float, default=0.7,
                        help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=50,
                        help="draw from the k likeliest tokens only; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="draw from the likeliest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    if args.num_samples is None:
        args.num_samples = 1 if args.prompt or args.temperature == 0 else 4
    for name, fine, wanted in (("max_new_tokens", args.max_new_tokens > 0, "above 0"),
                               ("num_samples", args.num_samples > 0, "above 0"),
                               ("temperature", args.temperature >= 0, "0 or above"),
                               ("top_k", args.top_k >= 0, "0 or above"),
                               ("top_p", 0 < args.top_p <= 1, "in (0, 1]"),
                               ("seed", 0 <= args.seed < 2 ** 63, "0 or above, below 2^63")):
        if not fine:
            sys.exit(f"--{name} must be {wanted}, got {getattr(args, name)}")
    return args


def main(argv):
    args = parse_args(argv)
    folder = find_model(args.checkpoint)
    model, tokenizer = load_model(folder)
    if re.search("[\ud800-\udfff]", args.prompt):
        sys.exit(f"the prompt is not UTF-8: {args.prompt!r:.80}")
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    if len(prompt) >= model.config.context:
        sys.exit(f"the prompt has {len(prompt)} tokens, "
                 f"and the context of this model {model.config.context}: shorten it")
    device = model.embed.weight.device
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{model.embed.weight.dtype}, {device}", file=sys.stderr)
    generator = torch.Generator(device).manual_seed(args.seed)

    def pick(logits):               # a vocabulary may be padded; what follows the pieces is no text
        logits = logits[:, :tokenizer.size]
        return choose(logits, args.temperature, args.top_k, args.top_p, generator)

    # the first sample appears as it is generated, beside which the others wait for their turn
    streams = [Stream(tokenizer, prompt) for _ in range(args.num_samples)]
    texts = [args.prompt] * args.num_samples
    print(args.prompt, end="", flush=True)
    start, count, new = time.perf_counter(), 0, []
    for new in generate(model, prompt, args.num_samples, args.max_new_tokens, tokenizer.eos_ids,
                        pick):
        for s, i in enumerate(new):
            if i is not None and i not in tokenizer.eos_ids:
                text = streams[s].add(i)
                texts[s] += text
                if s == 0:
                    print(text, end="", flush=True)
        count += sum(i is not None for i in new)
    seconds = time.perf_counter() - start
    print(streams[0].add(None, last=True))
    for stream, text in zip(streams[1:], texts[1:]):
        print("---", text + stream.add(None, last=True), sep="\n")
    cut = (args.max_new_tokens > model.config.context - len(prompt)
           and any(i is not None and i not in tokenizer.eos_ids for i in new))
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s, the prompt included"
          + (f"; stopped where the context of {model.config.context} is full" if cut else ""),
          file=sys.stderr)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ModelError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except BrokenPipeError:                      # whoever read the text has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
