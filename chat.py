"""A conversation with a model: python chat.py [CHECKPOINT] [--message=TEXT] [--system=TEXT] ...

CHECKPOINT is as for sample.py. A chat template, which comes with a model, makes one text of the
messages so far; its continuation is the answer. The KV cache keeps the conversation, so that a turn
costs its own tokens only. When the context is full, the oldest turns are forgotten.

    /new            begin a new conversation
    /system TEXT    begin one with this system message, or none
    /help           this list
    /quit, Ctrl-D   the end; Ctrl-C ends an answer

From a pipe each line is one of these or a message. Standard output gets answers and nothing else.
"""
import argparse
import re
import sys
from contextlib import suppress
from functools import partial

import sample
from conversations import Template
from decoder import ChatDecoder
from device import find_device, find_dtype
from files import InputError, run_program
from hf import find_model

ANSWER = "\ufdd1"     # frames the ids of an answer, in decimal, in a rendered text; no text has it


class Chat:
    """A conversation: `messages` are dicts of role and content. An answer's content are the ids
    that were generated, as those of its text could be others, which the cache does not hold."""

    def __init__(self, decoder, tokenizer, context, args):
        self.decoder, self.tokenizer, self.context, self.args = decoder, tokenizer, context, args
        self.template = Template(tokenizer)
        end_of_turn = tokenizer.vocab.get(tokenizer.named_tokens.get("eos_token"))
        self.ends = tokenizer.eos_ids | {end_of_turn}
        self.sample_token = partial(
            sample.sample_token, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
            generator=decoder.generator.manual_seed(args.seed))
        self.begin(args.system)

    def begin(self, system):
        """Begins a conversation, unless the template refuses its system message."""
        messages = [self.message("system", system)] if system else []
        prompt = [*messages, self.message("user", "?")]
        text = self.template.render([*prompt, {"role": "assistant", "content": ANSWER}, prompt[-1]])
        # a space that the template puts in front of answers the model has generated: it goes
        self.space = re.match(r"\s*", text.partition(self.template.render(prompt))[2])[0]
        self.messages = messages

    def message(self, role, text):
        """What people write: in it, special tokens are text."""
        sample.require_utf8(text)
        return {"role": role, "content": self.tokenizer.guard(text.replace(ANSWER, ""))}

    def encode(self, messages):
        """The ids of a prompt."""
        first, *rest = re.split(f"(?:{self.space})?{ANSWER}([0-9 ]*){ANSWER}",
                                self.template.render(messages))
        encode, token = self.tokenizer.encode_special, next(iter(self.tokenizer.special), "")
        ids = encode(first)
        for answer, chunk in zip(rest[::2], rest[1::2]):
            # after a special token, as SentencePiece puts a space in front of a text
            ids += [*map(int, answer.split()), *encode(token + chunk)[len(encode(token)):]]
        prefix = self.tokenizer.prefix                       # many templates begin with it
        return ids if ids[:len(prefix)] == prefix else [*prefix, *ids]

    def answer(self, text):
        """Prints the answer to a message as it comes. Returns whether it ended by itself."""
        messages = [*self.messages, self.message("user", text)]
        ids, oldest, forgotten = self.encode(messages), int(messages[0]["role"] == "system"), 0
        most = min(self.args.max_new_tokens, self.context // 4)      # there is to be room for it
        while len(ids) + most > self.context and len(messages) > oldest + 1:
            del messages[oldest:oldest + 2]
            ids, forgotten = self.encode(messages), forgotten + 1
        if len(ids) >= self.context:
            raise InputError(f"with this message the text has {len(ids)} tokens, and the context "
                             f"{self.context}: shorten it")
        if forgotten:
            print(f"(the context is full: oldest turns forgotten: {forgotten})", file=sys.stderr)
        new, streamer = [], sample.TextStreamer(self.tokenizer, ids[-64:])   # decoded at each step
        room = min(self.args.max_new_tokens, self.context - len(ids))
        stop = f"after {room} tokens"
        try:
            for (step,) in sample.generate(
                    self.decoder, [ids], 1, room, self.ends, self.sample_token):
                new += step
                print(streamer.add(step), end="", flush=True)
        except KeyboardInterrupt:
            if not self.args.interactive:
                raise
            stop = "by Ctrl-C"
        self.decoder.require_finite()
        self.decoder.ids = ids + new
        ended = bool(new) and new[-1] in self.ends
        if new:
            content = f"{ANSWER}{' '.join(map(str, new[:-1] if ended else new))}{ANSWER}"
            self.messages = [*messages, {"role": "assistant", "content": content}]
        print(streamer.add([], last=True))
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
    add("--context", type=int, default=4096, help="most tokens of a conversation (%(default)s)")
    args = parser.parse_args(argv)
    sample.check_options(args)
    args.interactive = args.message is None and sys.stdin.isatty()
    return args


def read_line(prompt):
    """The next line of standard input. Raises EOFError at its end."""
    if not sys.stdout.isatty():                  # it is to have answers only
        print(prompt, end="", flush=True, file=sys.stderr)
        prompt = ""
    return input(prompt)


def main(argv):
    args = parse_args(argv)
    folder, (dtype, _) = find_model(args.checkpoint), find_dtype(find_device(), args.dtype)
    if args.checkpoint is None:
        print(folder, file=sys.stderr)
    model, tokenizer = sample.load_model(folder, args.quantize, dtype)
    context = min(args.context, model.config.context)
    chat = Chat(sample.build_decoder(
        args, model, tokenizer, rows=1, size=context + 1, step_tokens=(1,), kind=ChatDecoder,
        steps=context if args.message is None else args.max_new_tokens), tokenizer, context, args)
    if args.message is not None:
        return chat.answer(args.message)
    if args.interactive:
        with suppress(ImportError):
            import readline  # noqa: F401 (from now on, input() edits lines and recalls old ones)
        print("/help lists what there is besides messages", file=sys.stderr)
    sys.stdin.reconfigure(errors="surrogateescape")
    ended, refused = [], 0
    while True:
        try:
            line = read_line("> " if args.interactive else "")
            command, _, rest = line.rstrip().partition(" ")
            if command == "/quit":
                break
            elif command in ("/new", "/system"):
                chat.begin(rest if command == "/system" else args.system)
            elif re.fullmatch("/[a-z]+", command):
                refused += command != "/help"
                print("" if command == "/help" else f"there is no command {command}:\n",
                      __doc__.split("\n\n")[2], sep="", file=sys.stderr)
            elif line.strip():
                ended.append(chat.answer(line))
        except EOFError:
            print(end="\n" if args.interactive else "", file=sys.stderr)
            break
        except InputError as error:
            print(error, file=sys.stderr)
            refused += 1
        except KeyboardInterrupt:                # at the prompt, or one more after an answer
            if not args.interactive:
                raise
            print("\n(/quit or Ctrl-D ends the program)", file=sys.stderr)
    if not args.interactive:
        print(f"{len(ended)} answers, {sum(ended)} ended by themselves", file=sys.stderr)
        sys.exit(3 if refused else 0)


if __name__ == "__main__":
    run_program(main)
