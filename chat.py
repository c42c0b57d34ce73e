"""A conversation with a model: python chat.py [CHECKPOINT] [--message=TEXT] [--system=TEXT] ...

CHECKPOINT is as for sample.py. A chat template, which comes with a model, makes one text of the
messages so far; its continuation is the answer. The KV cache keeps the conversation, so that a turn
costs its own tokens only. When the context is full, the oldest turns are forgotten.

    /new            begin a new conversation
    /system TEXT    begin one with this system message, or none
    /help           this list
    /quit, Ctrl-D   the end; Ctrl-C ends an answer

From a pipe each line is a message or one of these. Answers go to standard output, everything else
to standard error.
"""
import argparse
import re
import sys
from contextlib import suppress
from functools import partial

import torch

import sample
from conversations import Template
from decoder import ChatDecoder
from device import find_device, find_dtype
from files import InputError, run_program
from hf import find_model

ANSWER = "\ufdd1"        # stands in a rendered text where an answer belongs; no text has it


class Chat:
    """A conversation: `messages` are dicts of role, content and, of an answer, its ids."""

    def __init__(self, decoder, tokenizer, context, args):
        self.decoder, self.tokenizer, self.context, self.args = decoder, tokenizer, context, args
        self.template = Template(tokenizer)
        self.sample_token = partial(
            sample.sample_token, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            generator=torch.Generator(decoder.cache.lengths.device).manual_seed(args.seed))
        self.begin(args.system)

    def begin(self, system):
        messages = [{"role": "system", "content": system}] if system else []
        self.encode([*messages, {"role": "user", "content": ""}])      # refused now, if at all
        self.messages = messages

    def encode(self, messages):
        """The ids of a prompt. Answers keep the ids that were generated: those of their text could
        be others, which the cache does not hold. In what people write, special tokens are text."""
        text = self.template.render([
            {"role": message["role"], "content": f"{ANSWER}{k}{ANSWER}" if "ids" in message
             else self.tokenizer.guard(message["content"])} for k, message in enumerate(messages)])
        sample.require_utf8(text)
        first, *rest = re.split(f"{ANSWER}([0-9]+){ANSWER}", text)
        ids = self.tokenizer.encode_special(first)
        for k, chunk in zip(rest[::2], rest[1::2]):
            ids += messages[int(k)]["ids"] + self.tokenizer.encode_special(chunk)
        prefix = self.tokenizer.prefix                       # many templates begin with it
        return ids if ids[:len(prefix)] == prefix else [*prefix, *ids]

    def answer(self, text):
        """Prints the answer to a message as it comes. Returns whether it ended by itself."""
        messages = [*self.messages, {"role": "user", "content": text.replace(ANSWER, "")}]
        ids, oldest, forgotten = self.encode(messages), int(messages[0]["role"] == "system"), 0
        most = min(self.args.max_new_tokens, self.context // 4)      # there is to be room for it
        while len(ids) + most > self.context and len(messages) > oldest + 1:
            del messages[oldest:oldest + 2]
            ids, forgotten = self.encode(messages), forgotten + 1
        if len(ids) >= self.context:
            raise InputError(f"with this message the text has {len(ids)} tokens, and the context "
                             f"{self.context}: shorten it")
        if forgotten:
            print(f"(the context of {self.context} tokens is full: forgotten are the oldest "
                  f"{forgotten} turns)", file=sys.stderr)

        new, streamer = [], sample.TextStreamer(self.tokenizer, ids)
        room = min(self.args.max_new_tokens, self.context - len(ids))
        stop = f"after {room} tokens"
        try:
            for (step,) in sample.generate(self.decoder, [ids], 1, room, self.tokenizer.eos_ids,
                                           self.sample_token):
                new += step
                print(streamer.add(step), end="", flush=True)
        except KeyboardInterrupt:
            if not self.args.interactive:
                raise
            stop = "by Ctrl-C"
        print(streamer.add([], last=True))
        self.decoder.require_finite()
        self.decoder.ids = ids + new
        ended = bool(new) and new[-1] in self.tokenizer.eos_ids
        if new:
            self.messages = [*messages, {"role": "assistant", "ids": new[:-1] if ended else new}]
        if not ended:
            print(f"(stopped {stop})", file=sys.stderr)
        return ended


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="chat.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    sample.add_options(parser, max_new_tokens=512, top_p=0.95)
    add = parser.add_argument
    add("--message", metavar="TEXT", help="print the answer to this one, and end")
    add("--system", metavar="TEXT", default="", help="the first message, for the model to obey")
    add("--context", type=int, default=4096,
        help="most tokens of a conversation, as far as the model's context reaches (%(default)s)")
    args = parser.parse_args(argv)
    sample.check_options(args)
    args.interactive = args.message is None and sys.stdin.isatty()
    return args


def read_lines(interactive):
    """Yields the lines of a pipe, or those that are typed."""
    sys.stdin.reconfigure(errors="surrogateescape")
    if not interactive:
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 (from now on, input() edits lines and recalls old ones)
    print("/help lists what there is besides messages", file=sys.stderr)
    while True:
        prompt = "> " if sys.stdout.isatty() else ""
        print("" if prompt else "> ", end="", flush=True, file=sys.stderr)
        try:
            yield input(prompt)
        except EOFError:
            return print(file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends the program)", file=sys.stderr)


def main(argv):
    args = parse_args(argv)
    folder = find_model(args.checkpoint)
    dtype, _ = find_dtype(find_device(), args.dtype)
    model, tokenizer = sample.load_model(folder, args.quantize, dtype)
    context = min(args.context, model.config.context)
    steps = context if args.message is None else args.max_new_tokens
    chat = Chat(sample.build_decoder(args, model, tokenizer, 1, context + 1, steps, (1,),
                                     ChatDecoder), tokenizer, context, args)
    if args.message is not None:
        chat.answer(args.message)
        return
    answers, ended, refused = 0, 0, 0
    for line in read_lines(args.interactive):
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                break
            elif command in ("/new", "/system"):
                chat.begin(rest if command == "/system" else args.system)
            elif command == "/help" or re.fullmatch("/[a-z]+", command):
                print(re.search(r"    /new.*answer\n", __doc__, re.DOTALL)[0], file=sys.stderr)
            elif command:
                ended += chat.answer(line.rstrip("\n"))
                answers += 1
        except InputError as error:
            print(error, file=sys.stderr)
            refused += 1
        except KeyboardInterrupt:                # a second one, after the answer had ended
            if not args.interactive:
                raise
    if not args.interactive:
        print(f"{answers} answers, {ended} of them ended by themselves", file=sys.stderr)
        if refused:
            sys.exit(3)


if __name__ == "__main__":
    run_program(main)
