"""Text to tokens: train a tokenizer, write token files, look at them; or all of it from the text
that every Python brings along.

    python prepare.py demo    data/demo-prose, demo-code and demo-chat, no download
    python prepare.py tokenizer FILES... --vocab_size=4096 --out=FILE       a tokenizer of your own
    python prepare.py tokenize FILES... --tokenizer=FILE --out=data/NAME    a source to train on
    python prepare.py chat FILES... --tokenizer=FILE --out=data/NAME        one of conversations
    python prepare.py inspect data/NAME                                     what is in it

Text files hold documents, documents become ids, ids are written to token files, and source.json
counts them. A document is framed, <s> ids </s>, and the next one follows without padding: a model
that meets the frame in training begins at <s> when it generates and knows where a text ends.
Whether a document is for validation follows from a hash of its text, so the same text is never in
both splits, whatever is added or reordered.

A corpus may be a terabyte in ten thousand files. A shard of it, a run of whole files, becomes one
train_%05d.bin and one val_%05d.bin, whose bytes follow from these files alone. So any number of
workers on any number of machines, stopped and started as often as one likes, write the same bytes,
and a shard that is written twice does no harm.
"""
import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, groupby
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from conversations import TEMPLATE, Conversation, ConversationFilter, encode_conversation
from data import Header, Source, token_writer
from documents import (
    RowFilter,
    TextReader,
    Unreadable,
    all_texts,
    documentation,
    hash_to_unit,
    library_modules,
    list_files,
    questions_and_answers,
    split_code,
    split_docstrings,
)
from files import InputError, as_path, atomic_write, read_json, remove, run_program, write_json
from tokenizer import Encoder, load_tokenizer, train_tokenizer, write_tokenizer

# --------------------------------------------------------------------------------------------------
# Token files and source.json

SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "bytes")


def encode_texts(texts, encoder):
    """Yields of each text what decides its split, its tokens as bytes, its mask, its counts."""
    size = encoder.dtype.itemsize
    bos, eos = (token.to_bytes(size, "little") for token in (
        encoder.sp.bos_id(), encoder.sp.eos_id()))
    for text, ids in encoder.encode(texts):
        ids = bos + ids + eos
        yield text, ids, b"", {"documents": 1, "tokens": len(ids) // size,
                               "bytes": len(text.encode())}


def encode_conversations(conversations, encoder):
    """The same of each Conversation."""
    for messages, key in conversations:
        ids, mask = encode_conversation(messages, encoder)
        yield key, np.array(ids, encoder.dtype).tobytes(), bytes(mask), {
            "documents": 1, "tokens": len(ids), "learned_tokens": sum(mask),
            "bytes": sum(len(text.encode()) for _, text in messages),
            "learned_bytes": sum(len(text.encode()) for role, text in messages
                                 if role == "assistant")}


def write_documents(folder, i, documents, encoder, val_fraction, chat):
    """Writes train_%05d.bin and val_%05d.bin, and where the documents are conversations (`chat`)
    a .mask beside each, all or none; what is in them, {split: counts}."""
    sp = encoder.sp
    header = Header(len(sp), sp.bos_id(), sp.eos_id(), encoder.tokenizer_sha256)
    keys = (*COUNTS, "learned_tokens", "learned_bytes") if chat else COUNTS
    info = {split: Counter(dict.fromkeys(keys, 0)) for split in SPLITS}
    encode = encode_conversations if chat else encode_texts
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        files = {split: enter(token_writer(folder / f"{split}_{i:05}.bin", header))
                 for split in SPLITS}
        masks = {split: enter(open(enter(atomic_write(folder / f"{split}_{i:05}.mask")), "wb"))
                 for split in SPLITS if chat}
        for key, ids, mask, counts in encode(documents, encoder):
            split = "val" if hash_to_unit(key.encode()) < val_fraction else "train"
            files[split].write(ids)
            if chat:
                masks[split].write(mask)
            info[split].update(counts)
    return info


def write_metadata(folder, model, info, val_fraction, more):
    """Writes the tokenizer and source.json beside the token files, which makes them a source. Exits
    if there is nothing to train on."""
    if not info["train"]["documents"]:
        n = info["val"]["documents"]
        skipped = "".join(f"; rows skipped: {count:,}, {reason}"
                          for reason, count in more.get("skipped", {}).items())
        sys.exit(f"all {n} documents fell to validation: give more documents, or a --val_fraction "
                 f"below {val_fraction}" if n else f"there is no text in these files{skipped}")
    chat = "learned_tokens" in info["train"]
    write_tokenizer(folder, model, **{"chat_template": TEMPLATE} if chat else {})
    vocab_size = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    write_json(folder / "source.json", info | {
        "vocab_size": vocab_size, "tokenizer": sha256(model).hexdigest()} | more)


def write_source(out, documents, model, val_fraction, origin, chat=False):
    """Tokenizes texts or, with `chat`, Conversations with a SentencePiece model (bytes) into the
    source folder `out`, which replaces what was there once it is whole."""
    out = Path(out)
    for leftover in out.parent.glob(f"{out.name}.*.tmp"):       # of a process that was killed
        remove(leftover)
    with atomic_write(out) as folder:
        folder.mkdir(parents=True)
        info = write_documents(folder, 0, documents, Encoder(model), val_fraction, chat)
        write_metadata(folder, model, info, val_fraction, {"from": origin, "command": sys.argv})
        remove(out)                                             # the new one takes its place
    print_counts(out, info)


def print_counts(out, info):
    print(f"{out}:")
    for split in SPLITS:
        documents, tokens, size = (info[split][key] for key in COUNTS)
        ratio = f"  {size / tokens:.2f} bytes per token" if tokens else ""
        if tokens and "learned_tokens" in info[split]:
            ratio = f"  {info[split]['learned_tokens'] / tokens:.0%} to be learned"
        print(f"  {split:5} {documents:>9,} documents {tokens:>13,} tokens {size:>14,} bytes"
              + ratio)


# --------------------------------------------------------------------------------------------------
# A corpus and its shards
#
# While a source is being written, its folder holds units/, with plan.json, which says what is being
# written, and a record %05d.json of each shard that is done. At the end source.json replaces it.

SHARD_BYTES = 10 ** 9      # of files, which become one train_%05d.bin and one val_%05d.bin


@dataclass(frozen=True)
class Corpus:
    """All that decides what `tokenize` writes: the same corpus gives the same bytes."""
    out: Path
    paths: tuple                # as they were given
    files: tuple
    tokenizer: str
    model: bytes
    row_filter: RowFilter
    val_fraction: float
    shard_bytes: int

    def shards(self):
        """Lists of consecutive files, of `shard_bytes` at most, or of one file."""
        shards, size = [], 0
        for file in self.files:
            if not shards or size + file.size > self.shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(file)
            size += file.size
        return shards

    def record(self, i):
        """The file that says that shard i is done, and what is in it."""
        return self.out / "units" / f"{i:05}.json"

    def done(self):
        return [i for i in range(len(self.shards())) if self.record(i).exists()]

    @property
    def chat(self):
        return isinstance(self.row_filter, ConversationFilter)

    def plan(self):
        """What must not change between the start of the work and its end, as JSON has it."""
        listing = "".join(f"{file.name}\t{file.size}\n" for file in self.files)
        return {"files": len(self.files), "bytes": sum(file.size for file in self.files),
                "listing": sha256(listing.encode()).hexdigest(), "unit": self.shard_bytes,
                "tokenizer": sha256(self.model).hexdigest(),
                "text_key": self.row_filter.text_key,
                "exclude": [f"{key}={value}" for key, value in self.row_filter.exclude],
                "fraction": self.row_filter.fraction, "val_fraction": self.val_fraction,
                "chat_template": TEMPLATE if self.chat else None}

    def command(self):
        """The command line, without what does not matter to the outcome."""
        return ["prepare.py", "chat" if self.chat else "tokenize", *self.paths,
                f"--tokenizer={self.tokenizer}", f"--out={self.out}",
                f"--text_key={self.row_filter.text_key}", f"--fraction={self.row_filter.fraction}",
                *[f"--exclude={key}={value}" for key, value in self.row_filter.exclude],
                f"--val_fraction={self.val_fraction}"]


def begin(corpus):
    """Whether the source is complete already. If not, its folder is there afterwards, with a plan.
    Exits if the folder holds anything else than the beginning of the same work."""
    out, plan, units = corpus.out, corpus.plan(), corpus.out / "units"
    if out.exists() and not out.is_dir():
        sys.exit(f"{out} is a file: choose another --out")
    # others may begin or finish right now: temporary files do not count, source.json comes last
    others = any(path != units and path.suffix != ".tmp" for path in out.rglob("*"))
    begun, complete = (units / "plan.json").exists(), (out / "source.json").exists()
    if complete and (old := read_json(out / "source.json").get("plan")):    # not if demo wrote it
        compare_plans(out, old, plan)
        return True
    if others and not begun:
        sys.exit(f"{out} exists already, and is no source that was begun: remove it first, or "
                 "choose another --out")
    units.mkdir(parents=True, exist_ok=True)
    if any(units.glob("[0-9]*.json")):
        compare_plans(out, read_json(units / "plan.json"), plan)
    else:                                       # nothing is done yet: the plan may be another
        with contextlib.suppress(InputError):
            if read_json(units / "plan.json") != plan:
                remove_tokens(out)
        write_json(units / "plan.json", plan)
    return False


def compare_plans(out, old, new):
    """Exits unless the two plans are the same, and says what differs."""
    words = {"tokenizer": "it is another tokenizer",
             "listing": "the files have other names or sizes",
             "chat_template": "it is of conversations with another template, or of none"}
    differs = [words.get(key, f"{key} was {old.get(key)} and is {new[key]}")
               for key in new if old.get(key) != new[key]]
    if differs:
        sys.exit(f"{out} was made, or begun, from other input: {'; '.join(differs)}. Give the "
                 "command that began it, remove the folder, or choose another --out")


def remove_tokens(out):
    """Removes the token files of shards, when they are not to be used."""
    for path in out.iterdir():
        if re.fullmatch(r"(train|val)_\d{5,}\.(bin|mask)", path.name):
            path.unlink(missing_ok=True)


def remove_leftovers(out):
    """Removes what is only there while the work goes on, and what killed processes left."""
    for path in (*out.glob("*.tmp"), out / "units"):
        remove(path)


def write_shard(i, corpus, encoder, scratch, strict, report):
    """Writes the token files of shard i, in the folder `scratch` until they are whole, and then its
    record; returns messages about lost rows. Raises InputError or OSError, and then the shard
    is not done."""
    reader = TextReader(corpus.shards()[i], corpus.row_filter, strict, report)
    info = write_documents(Path(scratch), i, reader.texts(), encoder, corpus.val_fraction,
                           corpus.chat)
    for path in Path(scratch).glob(f"*_{i:05}.*"):
        os.replace(path, corpus.out / path.name)
    write_json(corpus.record(i), info | {
        "skipped": dict(reader.reasons), "lost": reader.lost, "broken": reader.broken})
    return reader.messages


def start_worker(corpus, scratch, strict, bytes_read, stop):
    """Makes this process ready for write_shard_in_worker. `bytes_read` and `stop` are numbers in
    shared memory, without a lock, which a killed worker could leave locked."""
    def report(n):
        bytes_read.value += n           # an addition may get lost: it is only a progress bar
        if stop.value:
            sys.exit()

    def exit_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    global worker_arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C: the first process sets `stop`
    threading.Thread(target=exit_with_parent, daemon=True).start()
    worker_arguments = corpus, Encoder(corpus.model), scratch, strict, report


def write_shard_in_worker(i):
    return write_shard(i, *worker_arguments)


def run_shards(corpus, todo, workers, strict):
    """Writes the shards `todo` by so many processes; returns a message for each unreadable one."""
    shards, unread, workers = corpus.shards(), [], min(workers, len(todo))
    total = sum(file.size for i in todo for file in shards[i])

    def collect(write, *arguments):
        try:
            for message in write(*arguments):
                bar.write(message, sys.stderr)
        except Unreadable as error:
            unread.append(str(error))

    # half-written files go with this folder, also those of workers that were killed
    with (tempfile.TemporaryDirectory(".tmp", dir=corpus.out / "units",
                                      ignore_cleanup_errors=True) as scratch,
          tqdm(total=total, unit="B", unit_scale=True, desc=corpus.out.name, disable=None) as bar):
        if workers <= 1:
            encoder = Encoder(corpus.model)
            for i in todo:
                collect(write_shard, i, corpus, encoder, scratch, strict, bar.update)
            return unread
        context = multiprocessing.get_context("spawn")
        bytes_read, stop = context.RawValue("q", 0), context.RawValue("b", 0)
        with ProcessPoolExecutor(workers, context, start_worker,
                                 (corpus, scratch, strict, bytes_read, stop)) as pool:
            try:
                pending = {pool.submit(write_shard_in_worker, i) for i in todo}
                while pending:
                    finished, pending = wait(pending, 0.5, FIRST_COMPLETED)
                    bar.update(bytes_read.value - bar.n)
                    for future in finished:
                        collect(future.result)
            except BaseException:
                stop.value = 1
                pool.shutdown(cancel_futures=True)
                raise
    return unread


def merge_shards(corpus):
    """Writes source.json, once all shards are done. Several processes may do so at the same time,
    as they write the same bytes."""
    records = [read_json(corpus.record(i)) for i in range(len(corpus.shards()))]
    info = {split: {key: sum(record[split][key] for record in records)
                    for key in records[0][split]} for split in SPLITS}
    skipped = sum((Counter(record["skipped"]) for record in records), Counter())
    try:
        write_metadata(corpus.out, corpus.model, info, corpus.val_fraction, {
            "from": corpus.paths, "command": corpus.command(),
            "skipped": dict(sorted(skipped.items())),
            "lost": sum(record["lost"] for record in records),
            "broken": [name for record in records for name in record["broken"]],
            "plan": corpus.plan()})
    except SystemExit:                               # there is nothing to train on
        remove_tokens(corpus.out)
        remove_leftovers(corpus.out)
        with contextlib.suppress(OSError):
            corpus.out.rmdir()                       # unless somebody has put something in it
        raise


def tokenize(corpus, part, parts, workers, strict):
    """Does one of the parts of a corpus, and makes a source of it once all are done. Exits with
    3 if rows were lost, with 1 if files could not be read or the work was stopped."""
    out, n, unread = corpus.out, len(corpus.shards()), []
    path, mine = out / "source.json", range(part - 1, n, parts)
    try:
        if not begin(corpus):
            unread = run_shards(corpus, sorted({*mine} - {*corpus.done()}), workers, strict)
            if len(corpus.done()) == n:
                merge_shards(corpus)
    except (InputError, OSError, MemoryError, BrokenProcessPool, KeyboardInterrupt) as error:
        reasons = {KeyboardInterrupt: "stopped",
                   MemoryError: "out of memory, give fewer --workers",
                   BrokenProcessPool: "a worker was killed (for its memory, perhaps), or failed"}
        reason = reasons.get(type(error), getattr(error, "strerror", None) or error)
        if not path.exists():           # else others have finished, even this part
            sys.exit(f"{out}: {reason}; {len(corpus.done())} of {n} shards are done, and the same "
                     "command goes on from there")
    if not path.exists():
        done = corpus.done()
        print(f"{out}: {len(done)} of {n} shards are done")
        if unread:
            sys.exit("\n".join([*unread, "the same command tries them again"]))
        sys.exit(3 if any(read_json(corpus.record(i))["lost"] for i in done if i in mine) else 0)
    remove_leftovers(out)
    source = read_json(path)
    print_counts(out, source)
    for reason, count in source["skipped"].items():
        print(f"  rows skipped: {count:,}, {reason}")
    for message in source["broken"]:
        print(f"  {message}")
    for key, value in corpus.row_filter.exclude:
        if not any(f"{key}={value}" in reason.split(" and ") for reason in source["skipped"]):
            print(f"  no row was excluded by {key}={value}")
    if source["lost"]:
        sys.exit(3)


def inspect_source(folder):
    """Prints what is in a source: its counts, and its first and last tokens decoded."""
    sources = {split: Source(folder, split, context=1) for split in SPLITS}
    sp, header = load_tokenizer(Path(folder) / "tokenizer.model"), sources["train"].header
    print_counts(folder, {split: source.info for split, source in sources.items()})
    print(f"  vocabulary of {header.vocab_size:,}, BOS {header.bos_id}, EOS {header.eos_id}, "
          f"tokenizer {header.tokenizer_sha256[:12]}")
    for split, source in sources.items():
        if total := source.info["tokens"]:
            n = min(total, 256 if source.masks else 48)
            print(f"{split} begins {show(sp, source, 0, n)}")
            print(f"{split} ends   {show(sp, source, total - n, total)}")
    if sources["train"].masks:
        print("to be learned is what stands in [[ ]]")


def show(sp, source, start, stop):
    """Tokens as text on one line, control tokens by name, and by masks what is learned in [[ ]]."""
    ids, text = source.read(start, stop).tolist(), ""
    marks = source.read_mask(start, stop) & bool(source.masks)
    for (control, learned), run in groupby(zip([sp.is_control(i) for i in ids], marks)):
        run = [ids.pop(0) for _ in run]
        part = "".join(sp.id_to_piece(run)) if control else sp.decode(run)
        text += f"[[{part}]]" if learned else part
    return repr(text.replace("]][[", ""))


# --------------------------------------------------------------------------------------------------
# The demo

def stdlib_corpus():
    """(prose, code), lists of documents. Prose: each documentation topic and each docstring. Code:
    each top-level part of a module, two blank lines from the next, its docstrings cut out."""
    prose, code = documentation(), []
    for text in library_modules().values():
        with contextlib.suppress(SyntaxError):
            docs, rest = split_docstrings(text)
            prose += docs
            code += split_code(rest)
    # a few words teach nothing, and many docstrings stand several times
    return tuple(list(dict.fromkeys(text + "\n" for text in texts if len(text) > 30))
                 for texts in (prose, code))


def stdlib_conversations(prose, val_fraction):
    """Conversations of one to three questions and answers, and twenty questions for validation. No
    text is in both splits, here or in the `prose` and code that stdlib_corpus returns."""
    pairs, used = {True: [], False: []}, set()
    seen = "\n".join(text for text in prose if hash_to_unit(text.encode()) >= val_fraction)
    for name, source in library_modules().items():
        with contextlib.suppress(SyntaxError):
            for question, answer, texts in questions_and_answers(name, source):
                splits = {hash_to_unit(f"{text}\n".encode()) < val_fraction for text in texts}
                if len(splits) == 1 and not used & {question, answer} and not (
                        True in splits and answer in seen):
                    used |= {question, answer}
                    pairs[splits.pop()].append((question, answer, texts[0]))
    conversations = []
    for group in pairs.values():
        start, sizes = 0, cycle((1, 2, 3))
        while turns := group[start:start + next(sizes)]:
            start += len(turns)
            messages = [(role, text) for question, answer, _ in turns
                        for role, text in (("user", question), ("assistant", answer))]
            conversations.append(Conversation(tuple(messages), f"{turns[0][2]}\n"))
    step = max(1, len(pairs[True]) // 20)
    return conversations, [question for question, *_ in pairs[True][::step][:20]]


def demo(data_dir, vocab_size, val_fraction=0.05):
    prose, code = stdlib_corpus()
    if not code:
        sys.exit(f"this Python has no library source in {sysconfig.get_path('stdlib')}: "
                 "use one that has, or tokenize own text")
    print(f"this Python's library: {len(prose)} documents of prose, {len(code)} of code")
    model = train_tokenizer([text for text in prose + code
                             if hash_to_unit(text.encode()) >= val_fraction], vocab_size)
    origin = f"the library of Python {sys.version.split()[0]}"
    for name, texts in ("demo-prose", prose), ("demo-code", code):
        bar = tqdm(texts, desc=name, disable=None)
        write_source(Path(data_dir) / name, bar, model, val_fraction, origin)
    conversations, questions = stdlib_conversations(prose, val_fraction)
    out = Path(data_dir) / "demo-chat"
    write_source(out, conversations, model, val_fraction, origin, chat=True)
    (out / "questions.txt").write_text("\n/new\n".join(questions) + "\n", "utf-8")


# --------------------------------------------------------------------------------------------------
# Commands

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("demo", help="tokenize this Python's documentation and modules")
    p.add_argument("--data_dir", type=as_path, default="data")
    p.add_argument("--vocab_size", type=int, default=4096)

    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("files", nargs="+", type=as_path, help="files, folders or patterns, of "
                         "any filesystem of fsspec: .txt, .jsonl, .json, also .gz, .zst; .parquet")
    reading.add_argument("--text_key", help="the key or column of the text, a.b for b in a; "
                         "default: text, or of conversations messages")
    reading.add_argument("--exclude", action="append", default=[], metavar="KEY=VALUE",
                         type=parse_exclude, help="leave out rows that have this; may be repeated")
    reading.add_argument("--fraction", type=float, default=1.0,
                         help="share of the documents to take, chosen by a hash of each")
    reading.add_argument("--strict", action="store_true",
                         help="stop at the first row that should be a document and is none")

    p = commands.add_parser("tokenizer", parents=[reading],
                            help="train a SentencePiece tokenizer as Llama's was")
    p.add_argument("--vocab_size", type=int, default=4096)
    p.add_argument("--out", required=True, type=as_path, help="the file to write")

    writing = argparse.ArgumentParser(add_help=False)
    add = writing.add_argument
    add("--tokenizer", required=True, type=as_path, help="a SentencePiece model")
    add("--out", required=True, type=as_path, help="the folder to write, data/NAME")
    add("--val_fraction", type=float, default=0.001,
        help="share of the documents kept for validation")
    add("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    add("--part", default="1/1", type=parse_part, metavar="I/N",
        help="do only the I-th of N parts; others do theirs into the same folder")
    commands.add_parser("tokenize", parents=[reading, writing],
                        help="write the token files of a source")
    commands.add_parser("chat", parents=[reading, writing], help="the same of conversations: rows "
                        "with `messages` or `conversations`; answers are to be learned")

    p = commands.add_parser("inspect", help="print what is in a source")
    p.add_argument("source", type=as_path, help="data/NAME")
    return parser.parse_args(argv)


def parse_exclude(pair):
    key, equals, value = pair.partition("=")
    if not key or not equals:
        sys.exit(f"--exclude={pair} must be KEY=VALUE")
    return key, value


def parse_part(text):
    """(I, N) of "I/N"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        sys.exit(f"--part={text} must be I/N: 1/4, 2/4, 3/4 and 4/4 are all of it")
    return int(found[1]), int(found[2])


def run_tokenizer(args, row_filter):
    out = Path(args.out)
    if out.exists():
        sys.exit(f"{out} exists already: remove it first, or choose another --out")
    texts, lost = all_texts(list_files(args.files, args.out), row_filter, args.strict)
    model = train_tokenizer(texts, args.vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as temporary:
        temporary.write_bytes(model)
    print(f"{out}: {args.vocab_size} tokens, from {len(texts):,} documents")
    if lost:
        print(f"  {lost:,} rows were skipped")
        sys.exit(3)


def run_tokenize(args, row_filter):
    if not 0 <= args.val_fraction < 1:
        sys.exit(f"--val_fraction={args.val_fraction} must be at least 0 and below 1")
    if args.workers < 1:
        sys.exit(f"--workers={args.workers} must be at least 1")
    load_tokenizer(args.tokenizer)
    corpus = Corpus(Path(args.out), tuple(args.files), tuple(list_files(args.files, args.out)),
                    args.tokenizer, Path(args.tokenizer).read_bytes(), row_filter,
                    args.val_fraction, SHARD_BYTES)
    tokenize(corpus, *args.part, args.workers, args.strict)


def main(argv):
    args = parse_args(argv)
    if args.command == "demo":
        demo(args.data_dir, args.vocab_size)
    elif args.command == "inspect":
        inspect_source(args.source)
    else:
        if not 0 < args.fraction <= 1:
            sys.exit(f"--fraction={args.fraction} must be above 0 and at most 1")
        kind = ConversationFilter if args.command == "chat" else RowFilter
        run = run_tokenizer if args.command == "tokenizer" else run_tokenize
        run(args, kind(args.text_key or kind.text_key, tuple(args.exclude), args.fraction))


if __name__ == "__main__":
    run_program(main)
