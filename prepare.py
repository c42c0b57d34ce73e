"""Text to tokens: train a tokenizer, write token files, look at them; or all of it at once from the
text that every Python brings along.

    python prepare.py demo    data/demo-prose and data/demo-code, no download
    python prepare.py tokenizer FILES... --vocab_size=4096 --out=FILE       a tokenizer of your own
    python prepare.py tokenize FILES... --tokenizer=FILE --out=data/NAME    a source to train on
    python prepare.py inspect data/NAME                                     what is in it

A document becomes <s> tokens </s>, and documents follow one another without padding: a model that
meets the frame in training begins at <s> when it generates and knows where a text ends. Which
documents are kept for validation follows from a hash of their text, so the same text never stands
on both sides, whatever is added or reordered.

A corpus may be a terabyte in ten thousand files. It is worked on in units, runs of whole files that
follow from the list of files alone, and a unit becomes one train_%05d.bin and one val_%05d.bin. So
any number of workers, on any number of machines, stopped and started as often as one likes, write
the same bytes.
"""
import argparse
import ast
import contextlib
import fcntl
import gzip
import importlib
import inspect
import io
import json
import multiprocessing
import os
import queue
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import fsspec
import sentencepiece
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from data import DataError, Header, Source, token_writer
from tokenizer import Encoder, load_tokenizer, train_tokenizer, write_tokenizer

# --------------------------------------------------------------------------------------------------
# Files

KINDS = ".txt (a document a file), .jsonl, .json (a document a line), .parquet (a document a row)"


class Unreadable(Exception):
    """A file that cannot be read to its end, so that what was read of it does not count."""


@dataclass(frozen=True)
class File:
    """A file of any filesystem that fsspec knows; `name` is what people call it."""
    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    size: int

    def kind(self):
        """(".txt", ".jsonl", ".json" or ".parquet", "" or ".gz" or ".zst"); None for others."""
        name, packed = os.path.splitext(self.name.lower())
        if packed not in (".gz", ".zst"):
            name, packed = self.name.lower(), ""
        kind = os.path.splitext(name)[1]
        known = (".txt", ".jsonl", ".json", *[".parquet"] * (not packed))
        return (kind, packed) if kind in known else None


def list_files(given, out=None):
    """The Files that a list of paths, folders and patterns names, in this order, those of a folder
    or a pattern sorted by path; none in the folder `out`. Exits where one names nothing that can be
    read."""
    files, ours = [], out and os.path.join(os.path.abspath(out), "")
    for path in given:
        try:
            fs, inner = fsspec.core.url_to_fs(path)
            local = isinstance(fs, LocalFileSystem)
            found = expand(fs, inner, local)
        except (ImportError, ValueError, OSError) as error:
            sys.exit(f"{path} cannot be opened: {error}")
        if not found:
            sys.exit(f"there is no file {path}, or none in it")
        name = (fs.unstrip_protocol if not local else str if os.path.isabs(path)
                else os.path.relpath)
        known = [file for file in (File(fs, p, name(p), size) for p, size in sorted(found.items()))
                 if file.kind() and not (local and ours and file.path.startswith(ours))]
        if not known:
            sys.exit(f"nothing in {path} can be read: only {KINDS}, each but .parquet also as .gz "
                     "or .zst")
        files += known
    (_, path), times = Counter((file.fs, os.path.realpath(file.path)) for file in files
                               ).most_common(1)[0]
    if times > 1:
        sys.exit(f"{path} is named {times} times: its documents would be there {times} times")
    for package, ending in ("zstandard", ".zst"), ("pyarrow", ".parquet"):
        needs = [file.name for file in files if ending in file.kind()]
        if needs and not find_spec(package):
            sys.exit(f"{needs[0]} needs {package}: pip install {package}")
    return files


def expand(fs, path, local):
    """{path: size} of a file, or of the files in a folder or of a pattern, at any depth; links are
    followed, and what begins with a dot below the path is passed over."""
    found, seen = {}, set()
    if fs.isfile(path):
        return {path: fs.info(path)["size"] or 0}
    todo = {path: fs.info(path)} if fs.isdir(path) else fs.glob(path, detail=True)
    fixed = len(path if fs.isdir(path) else re.match(r"[^*?[]*", path)[0].rpartition("/")[0])
    while todo:
        name, info = todo.popitem()
        if info["type"] == "directory" or local and os.path.isdir(name):
            if (real := os.path.realpath(name)) not in seen:              # links may go in circles
                seen.add(real)
                todo |= fs.find(name, detail=True)
        elif "/." not in name[fixed:] and (
                info["type"] == "file" or local and os.path.isfile(name)):
            found[name] = info["size"] or 0
    return found


class Input(io.RawIOBase):
    """A File, opened. Whatever keeps it from being read, now or later, is raised as Unreadable."""

    def __init__(self, file):
        self.described, self.seen = file, 0
        with self.trouble():
            self.file = file.fs.open(file.path, "rb")

    @contextlib.contextmanager
    def trouble(self):
        try:
            yield
        except Exception as error:          # of whatever kind its filesystem raises
            raise Unreadable(f"{self.described.name} cannot be read: {error}") from error

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *where):
        with self.trouble():
            return self.file.seek(*where)

    def tell(self):
        return self.file.tell()

    def readinto(self, buffer):
        with self.trouble():
            read = self.file.read(len(buffer))
        if not read and len(buffer) and self.tell() < self.described.size:
            raise Unreadable(f"{self.described.name} ends after {self.tell():,} bytes, and it had "
                             f"{self.described.size:,} when it was listed")
        buffer[:len(read)] = read
        self.seen += len(read)
        return len(read)

    def close(self):
        if not self.closed:
            self.file.close()
        super().close()


class Zstd(io.RawIOBase):
    """What the frames of a .zst file, one after the other, decompress to. Raises EOFError where the
    last breaks off, over which zstandard's own reader goes in silence."""

    def __init__(self, file):
        from zstandard import ZstdDecompressor
        self.frames = ZstdDecompressor(max_window_size=2 ** 31)
        self.file, self.frame, self.packed, self.ready = file, None, b"", memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            self.packed = self.packed or self.file.read(2 ** 16)
            if not self.packed:
                if self.frame:
                    raise EOFError("the compressed data end in the middle")
                return 0
            self.frame = self.frame or self.frames.decompressobj()
            self.ready = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


# --------------------------------------------------------------------------------------------------
# Documents

REPORTS = 20        # lost rows of a unit that are named, beside being counted


class Skipped(NamedTuple):
    """Stands for a row that gives no document; `lost` if it should have."""
    reason: str
    message: str
    lost: bool = True


@dataclass(frozen=True)
class Choice:
    """Which rows are documents, and which of those are taken."""
    text_key: str = "text"
    exclude: tuple = ()           # of (key, value)
    fraction: float = 1.0

    def text(self, row, where):
        """The text of a row, a dict, or a Skipped."""
        if not isinstance(row, dict):
            return Skipped("no row", f"{where} is a {type(row).__name__}, and a row with keys is "
                           "wanted, one a line")
        rules = [f"{key}={value}" for key, value in self.exclude
                 if as_text(field(row, key)) == value]
        if rules:
            return Skipped(" and ".join(rules), where, lost=False)
        text = field(row, self.text_key)
        if text is MISSING:
            return Skipped(f"no {self.text_key!r}", f"{where} has no {self.text_key!r}, but the "
                           f"keys {list(row)}: name the key with --text_key=KEY")
        return self.taken(text, where)

    def taken(self, text, where):
        """The text, if it is one and is to be taken, else a Skipped."""
        if not isinstance(text, str):
            return Skipped("not text", f"{where} is no text but {text!r:.80}")
        if not text:
            return Skipped("empty", where, lost=False)
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            return Skipped("not text", f"{where} is no text that UTF-8 can write: {text!r:.80}")
        if self.fraction < 1 and chance_of(raw, b"fraction") >= self.fraction:
            return Skipped("not in the fraction", where, lost=False)
        return text


MISSING = object()


def field(row, key):
    """row["a"]["b"] for the key "a.b", if it has no key of that very name; MISSING if there is
    none."""
    if key in row:
        return row[key]
    for part in key.split("."):
        row = row.get(part, MISSING) if isinstance(row, dict) else MISSING
    return row


def as_text(value):
    return value if isinstance(value, str) else json.dumps(value, default=str)


def chance_of(raw, purpose=b""):
    """A number from 0 to below 1 that follows from the bytes of a text alone."""
    return int.from_bytes(blake2b(raw, digest_size=8, person=purpose).digest(), "big") / 2 ** 64


def is_validation(raw, fraction):
    return chance_of(raw) < fraction


def documents(file, opened, choice):
    """The texts of a File that is opened as an Input, and a Skipped for each row that has none, or
    where the file breaks off. Raises Unreadable."""
    kind, packed = file.kind()
    stream = io.BufferedReader(opened, 2 ** 20)
    if packed == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    elif packed == ".zst":
        stream = io.BufferedReader(Zstd(stream), 2 ** 20)
    rows = {".txt": text_file, ".parquet": parquet_rows}.get(kind, json_lines)
    try:
        yield from rows(stream, file.name, choice)
    except Unreadable:
        raise
    except Exception as error:        # what a decoder raises is up to the decoder
        yield Skipped("breaks off", f"{file.name} breaks off, and what comes is lost: {error}")


BOM = b"\xef\xbb\xbf"        # some editors mark UTF-8 by it, at the beginning of a file


def decode(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Skipped("not UTF-8", f"{where} is not UTF-8: byte {error.start} is "
                       f"0x{raw[error.start]:02x}; convert it, e.g. with iconv -t utf-8")


def text_file(stream, name, choice):
    text = decode(stream.read().removeprefix(BOM), name)
    yield text if isinstance(text, Skipped) else choice.taken(text, name)


def json_lines(stream, name, choice):
    for number, line in enumerate(stream, 1):
        if line.strip():
            where = f"{name}:{number}"
            line = decode(line.removeprefix(BOM) if number == 1 else line, where)
            if not isinstance(line, Skipped):
                try:
                    line = choice.text(json.loads(line), where)
                except (ValueError, RecursionError) as error:
                    line = Skipped("not JSON", f"{where} is not JSON: {error}")
            yield line


def parquet_rows(stream, name, choice):
    from pyarrow.parquet import ParquetFile
    table = ParquetFile(stream, buffer_size=2 ** 20)
    have = table.schema_arrow.names
    keys = [choice.text_key, *(key for key, _ in choice.exclude)]
    columns = {key if key in have else key.split(".")[0] for key in keys} & set(have)
    number = 0
    for batch in table.iter_batches(16, columns=sorted(columns), use_threads=False):
        for row in batch.to_pylist() if columns else [dict.fromkeys(have)] * len(batch):
            number += 1
            yield choice.text(row, f"{name}: row {number}")


class Strict(Exception):
    """A row that gives no document, where --strict forbids that."""


class Tally:
    """Counts rows that give no document; tells of the first that should have, and of every file
    that breaks off."""

    def __init__(self, strict, tell):
        self.strict, self.tell = strict, tell
        self.reasons, self.lost, self.broken = Counter(), 0, []

    def skip(self, row):
        self.reasons[row.reason] += 1
        if not row.lost:
            return
        if self.strict:
            raise Strict(f"{row.message} (--strict)")
        self.lost += 1
        if row.reason == "breaks off":
            self.broken.append(row.message)
        if self.lost <= REPORTS or row.reason == "breaks off":
            self.tell(row.message)
        elif self.lost == REPORTS + 1:
            self.tell("more rows like these are counted, and not named")


def all_texts(files, choice, strict=False):
    """The documents of several Files as a list, and how many rows were lost. Exits where there is
    none."""
    texts = []
    with tqdm(total=sum(file.size for file in files), unit="B", unit_scale=True, desc="reading",
              disable=None) as bar:
        tally = Tally(strict, lambda message: bar.write(message, sys.stderr))
        for file in files:
            with Input(file) as opened:
                for text in documents(file, opened, choice):
                    if isinstance(text, str):
                        texts.append(text)
                    else:
                        tally.skip(text)
            bar.update(file.size)
    if not texts:
        sys.exit("there is no text in these files")
    return texts, tally.lost


# --------------------------------------------------------------------------------------------------
# Sources

SPLITS = ("train", "val")


@contextlib.contextmanager
def new_folder(out):
    """A temporary folder that becomes `out`, in place of what was there, when `with` ends without
    an error."""
    temporary, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_texts(folder, i, texts, encoder, val_fraction):
    """Writes train_%05d.bin and val_%05d.bin, both or none; what is in them, {split: counts}."""
    sp, size = encoder.sp, encoder.dtype.itemsize
    header = Header(len(sp), sp.bos_id(), sp.eos_id(), encoder.tokenizer)
    bos, eos = encoder.pack([sp.bos_id()]), encoder.pack([sp.eos_id()])
    info = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(token_writer(folder / f"{split}_{i:05}.bin", header))
                   for split in SPLITS}
        for text, ids in encoder.encode(texts):
            raw = text.encode()
            split = "val" if is_validation(raw, val_fraction) else "train"
            writers[split].write_bytes(bos + ids + eos)
            counts = info[split]
            counts["documents"] += 1
            counts["tokens"] += len(ids) // size + 2
            counts["bytes"] += len(raw)
    return info


def write_source(out, texts, model, val_fraction, origin):
    """Tokenizes `texts` with a SentencePiece model (bytes) into the source folder `out`, whole or
    not at all."""
    with new_folder(Path(out)) as folder:
        info = write_texts(folder, 0, texts, Encoder(model), val_fraction)
        complete(folder, model, info, val_fraction, {"from": origin, "command": sys.argv})
    describe(out, info)


def complete(folder, model, info, val_fraction, more):
    """Puts the tokenizer and source.json beside the tokens, which makes them a source."""
    if not info["train"]["documents"]:
        n = info["val"]["documents"]
        sys.exit(f"all {n} documents fell to validation: give more documents, or a --val_fraction "
                 f"below {val_fraction}" if n else "there is no text in these files")
    write_tokenizer(folder, model)
    vocab_size = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    write_json(folder / "source.json", info | {
        "vocab_size": vocab_size, "tokenizer": sha256(model).hexdigest()} | more)


def write_json(path, value):
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def describe(out, info):
    print(f"{out}:")
    for split in SPLITS:
        part = info[split]
        print(f"  {split:5} {part['documents']:>9,} documents {part['tokens']:>13,} tokens "
              f"{part['bytes']:>14,} bytes"
              + (f"  {part['bytes'] / part['tokens']:.2f} bytes per token" if part["tokens"]
                 else ""))


# --------------------------------------------------------------------------------------------------
# Corpora: units of work, and who does them

UNIT = 10 ** 9      # bytes of files that become one train_%05d.bin and one val_%05d.bin


class Busy(Exception):
    """A unit that another process is writing."""


@dataclass(frozen=True)
class Corpus:
    """All that decides what `tokenize` writes: the same corpus gives the same bytes, whoever writes
    which unit when."""
    out: Path
    given: tuple
    files: tuple
    tokenizer: str
    model: bytes
    choice: Choice
    val_fraction: float
    unit: int

    def units(self):
        """Runs of whole files, of `unit` bytes at most, or of one file."""
        units, size = [], 0
        for file in self.files:
            if not units or size + file.size > self.unit:
                units.append([])
                size = 0
            units[-1].append(file)
            size += file.size
        return units

    def plan(self):
        """What must not change between the start of the work and its end, as JSON has it."""
        listing = "".join(f"{file.name}\t{file.size}\n" for file in self.files)
        return {"files": len(self.files), "bytes": sum(file.size for file in self.files),
                "listing": sha256(listing.encode()).hexdigest(), "unit": self.unit,
                "tokenizer": sha256(self.model).hexdigest(),
                "text_key": self.choice.text_key,
                "exclude": [f"{key}={value}" for key, value in self.choice.exclude],
                "fraction": self.choice.fraction, "val_fraction": self.val_fraction}

    def command(self):
        """The command line, without what does not matter to the outcome."""
        return ["prepare.py", "tokenize", *self.given,
                f"--tokenizer={self.tokenizer}", f"--out={self.out}",
                f"--text_key={self.choice.text_key}", f"--fraction={self.choice.fraction}",
                *[f"--exclude={key}={value}" for key, value in self.choice.exclude],
                f"--val_fraction={self.val_fraction}"]

    def record(self, i):
        """The file that says that unit i is done, and what is in it."""
        return self.out / "units" / f"{i:05}.json"


def begin(corpus):
    """Makes the folder, or finds in it the beginning of the same work; True if that is complete.
    Exits where it holds anything else."""
    out, plan, units = corpus.out, corpus.plan(), corpus.out / "units"
    if out.exists() and not out.is_dir():
        sys.exit(f"{out} is a file: choose another --out")
    if not (out / "source.json").exists():
        others = any(path != units for path in out.rglob("*"))
        if others and not (units / "plan.json").exists():     # asked last: another may just begin
            sys.exit(f"{out} exists already, and is no source that was begun: remove it first, or "
                     "choose another --out")
        units.mkdir(parents=True, exist_ok=True)
        with open(units / "plan.json", "a+") as file:           # others may begin at the same time
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text, old = file.read(), {}
            with contextlib.suppress(ValueError):               # nothing, or torn: as good as new
                old = json.loads(text)
            if any(units.glob("[0-9]*.json")):
                compare(out, old, plan)
            if old != plan:
                remove_tokens(out)
                file.truncate(0)
                file.write(json.dumps(plan))
            return False
    compare(out, read_json(out / "source.json").get("plan"), plan)
    shutil.rmtree(units, ignore_errors=True)
    return True


def remove_tokens(out):
    """What units wrote, or left half-written, when it is not to be used."""
    for path in out.glob("*.bin*"):
        if re.fullmatch(r"(train|val)_\d{5,}\.bin(\.tmp)?", path.name):
            path.unlink()


def compare(out, old, new):
    if old is None:
        sys.exit(f"{out} exists already: remove it first, or choose another --out")
    differs = [f"{key} was {old.get(key)} and is {new[key]}" for key in new
               if old.get(key) != new[key] and key not in ("listing", "tokenizer")]
    if old.get("tokenizer") != new["tokenizer"]:
        differs.append("it is another tokenizer")
    if old.get("listing") != new["listing"]:
        differs.append("the files have other names or sizes")
    if differs:
        sys.exit(f"{out} was made, or begun, from other input: {'; '.join(differs)}. Give the "
                 "command that began it, remove the folder, or choose another --out")


def read_json(path):
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        sys.exit(f"{path} is damaged ({error}): remove the folder, and begin again")


@contextlib.contextmanager
def owned(record):
    """Keeps others away from a unit, by a lock that ends with this process however it ends; gives
    whether there is something to do. Raises Busy."""
    with open(record.with_suffix(".lock"), "a") as file:
        for attempt in range(25):                       # a predecessor may be dying: five seconds
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.2)
        else:
            raise Busy(f"another process is writing unit {int(record.stem)}")
        yield not record.exists()


def write_unit(corpus, i, files, encoder, strict, tell):
    """Tokenizes unit i, unless it is done. Calls tell(n) for n bytes of files that were read, and
    tell(message) for what is wrong with them. Raises Unreadable, Busy and Strict, and OSError for
    what cannot be written: then the unit is not done."""
    told, tally = 0, Tally(strict, tell)

    def progress(read):
        nonlocal told
        tell(read - told)
        told = read

    def texts():
        before = 0
        for file in files:
            with Input(file) as opened:
                for text in documents(file, opened, corpus.choice):
                    if isinstance(text, str):
                        yield text
                    else:
                        tally.skip(text)
                    read = before + min(opened.seen, file.size)
                    if read > told + 10 ** 6:
                        progress(read)
            before += file.size
            progress(before)

    with owned(corpus.record(i)) as needed:
        if needed:
            try:
                info = write_texts(corpus.out, i, texts(), encoder, corpus.val_fraction)
            except BaseException:
                progress(0)
                raise
            write_json(corpus.record(i), info | {
                "skipped": dict(tally.reasons), "lost": tally.lost, "broken": tally.broken})


def work(corpus, indices, strict, tell):
    """Does units one after the other; tells what kept one from being done, too."""
    encoder, units = Encoder(corpus.model), corpus.units()
    for i in indices:
        try:
            write_unit(corpus, i, units[i], encoder, strict, tell)
        except (Unreadable, Busy, Strict, OSError, MemoryError) as error:
            tell(error)


def worker(corpus, todo, place, strict, events):
    """The life of a process that takes units of `todo` as long as there are any."""
    stop = threading.Event()            # heeded where `with` cleans up, not in the midst of that
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)                # the first process will tell
    threading.Thread(target=end_with_parent, daemon=True).start()

    def tell(event):
        events.put(event)
        if stop.is_set():
            sys.exit(1)

    def indices():
        while True:
            with place.get_lock():
                k, place.value = place.value, place.value + 1
            if k >= len(todo):
                return
            yield todo[k]

    work(corpus, indices(), strict, tell)
    events.put(None)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def run_units(corpus, todo, workers, strict):
    """Does the units `todo` with so many processes; the messages of those that could not be
    done."""
    units, failed = corpus.units(), []
    with tqdm(total=sum(file.size for i in todo for file in units[i]), unit="B", unit_scale=True,
              desc=corpus.out.name, disable=None) as bar:
        def tell(event):
            if isinstance(event, int):
                bar.update(event)
            elif isinstance(event, (Unreadable, Busy)):
                failed.append(str(event))
            elif isinstance(event, str):
                bar.write(event, sys.stderr)
            else:
                raise event

        if min(workers, len(todo)) <= 1:
            work(corpus, todo, strict, tell)
            return failed
        context = multiprocessing.get_context("spawn")
        place, events = context.Value("q", 0), context.Queue()
        processes = [context.Process(target=worker, args=(corpus, todo, place, strict, events))
                     for _ in range(min(workers, len(todo)))]
        try:
            for process in processes:
                process.start()
            running = len(processes)
            while running:
                if any(process.exitcode for process in processes):   # it may have held a lock
                    raise ChildProcessError(
                        0, "a worker was killed (for its memory, perhaps), or has told above why")
                with contextlib.suppress(queue.Empty):
                    event = events.get(timeout=0.5)
                    if event is None:
                        running -= 1
                    else:
                        tell(event)
        finally:
            for process in processes:
                if process.pid:
                    process.terminate()
            for process in processes:
                if process.pid:
                    process.join(10)
                    process.kill()
    return failed


def finish(corpus):
    """source.json of a corpus, once all its units are done; None before that."""
    path, plan = corpus.out / "source.json", corpus.out / "units" / "plan.json"
    records = [corpus.record(i) for i in range(len(corpus.units()))]
    # where there is no plan any more another process has finished it
    with contextlib.suppress(FileNotFoundError), open(plan, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not path.exists() and all(record.exists() for record in records):
            gather(corpus, list(map(read_json, records)))
    return read_json(path) if path.exists() else None


def gather(corpus, records):
    """Makes one source of all units. Exits where there is nothing to train on, and removes them."""
    info = {split: {key: sum(record[split][key] for record in records)
                    for key in ("documents", "tokens", "bytes")} for split in SPLITS}
    skipped = sum((Counter(record["skipped"]) for record in records), Counter())
    try:
        complete(corpus.out, corpus.model, info, corpus.val_fraction, {
            "from": corpus.given, "command": corpus.command(),
            "skipped": dict(sorted(skipped.items())),
            "lost": sum(record["lost"] for record in records),
            "broken": [name for record in records for name in record["broken"]],
            "plan": corpus.plan()})
    except SystemExit:
        remove_tokens(corpus.out)
        shutil.rmtree(corpus.out / "units")
        with contextlib.suppress(OSError):
            corpus.out.rmdir()                       # unless somebody has put something in it
        raise
    for half in corpus.out.glob("*.bin.tmp"):
        half.unlink()
    shutil.rmtree(corpus.out / "units")


def tokenize(corpus, part, parts, workers, strict):
    """Does a part of the parts of a corpus, and makes a source of it once all is done. Exits where
    anything was lost, by 3, or is left to do, by 1."""
    units, failed = corpus.units(), []
    if not begin(corpus):
        todo = [i for i in range(part - 1, len(units), parts) if not corpus.record(i).exists()]
        try:
            failed = run_units(corpus, todo, workers, strict)
        except (Strict, OSError, MemoryError, KeyboardInterrupt) as error:
            why = {KeyboardInterrupt: "stopped", MemoryError: "out of memory, give fewer --workers"}
            why = why.get(type(error), getattr(error, "strerror", None) or error)
            done = sum(corpus.record(i).exists() for i in range(len(units)))
            sys.exit(f"{corpus.out}: {why}; {done} of {len(units)} units are done, and the same "
                     "command goes on from there")
    source = finish(corpus)
    if source is None:
        done = [i for i in range(len(units)) if corpus.record(i).exists()]
        print(f"{corpus.out}: {len(done)} of {len(units)} units are done")
        if failed:
            sys.exit("\n".join([*failed, "the same command tries them again"]))
        mine = set(done) & set(range(part - 1, len(units), parts))
        sys.exit(3 if any(read_json(corpus.record(i))["lost"] for i in mine) else 0)
    describe(corpus.out, source)
    for reason, n in source["skipped"].items():
        print(f"  rows skipped: {n:,}, {reason}")
    for message in source["broken"]:
        print(f"  {message}")
    for key, value in corpus.choice.exclude:
        if not any(f"{key}={value}" in reason.split(" and ") for reason in source["skipped"]):
            print(f"  no row was excluded by {key}={value}")
    if source["lost"]:
        sys.exit(3)


def inspect_source(folder):
    """Prints what is in a source: its counts, and its first and last tokens decoded."""
    train, val = (Source(folder, split, context=1) for split in ("train", "val"))
    sp = load_tokenizer(Path(folder) / "tokenizer.model")
    describe(folder, {"train": train.info, "val": val.info})
    print(f"  vocabulary of {train.header.vocab_size:,}, BOS {train.header.bos_id}, "
          f"EOS {train.header.eos_id}, tokenizer {train.header.tokenizer_sha256[:12]}")
    for source, split in (train, "train"), (val, "val"):
        total = source.info["tokens"]
        if total:
            print(f"{split} begins {show(sp, source.read(0, min(total, 48)))}")
            print(f"{split} ends   {show(sp, source.read(max(0, total - 48), total))}")


def show(sp, ids):
    """Ids as text on one line, control tokens by name."""
    runs, text = [], ""
    for i in map(int, ids):
        if sp.is_control(i):
            text += sp.decode(runs) + sp.id_to_piece(i)
            runs = []
        else:
            runs.append(i)
    return repr(text + sp.decode(runs))


# --------------------------------------------------------------------------------------------------
# The embedded corpus: every Python has its documentation and its source

def library_modules():
    """The source text of the standard library's modules, {name: text}, without tests, bundled
    copies and tables."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "_vendor",
            "pydoc_data", "__pycache__", "encodings"}
    modules = {}
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if not skip & set(parts) and not parts[0].startswith("config-"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                modules["/".join(parts)] = path.read_text("utf-8")
    return modules


def documentation():
    """The texts that help() shows of Python's keywords and topics."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [inspect.cleandoc(topics[name]) for name in sorted(topics)]


def split_docstrings(source):
    """(docstrings, the source without them): no text of the one is in the other. Raises
    SyntaxError."""
    tree, raw = ast.parse(source), source.encode()
    starts = [0]
    for line in raw.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    docs = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef,
                             ast.AsyncFunctionDef)) and ast.get_docstring(node):
            expr, only = node.body[0], len(node.body) == 1
            cut = (starts[expr.lineno - 1] + expr.col_offset,
                   starts[expr.end_lineno - 1] + expr.end_col_offset)
            docs.append((*cut, only, ast.get_docstring(node)))
    docs.sort()
    for start, stop, only, _ in reversed(docs):
        begin, end = raw.rfind(b"\n", 0, start) + 1, raw.find(b"\n", stop) + 1 or len(raw)
        if only or raw[begin:start].strip() or raw[stop:end].strip():
            raw = raw[:start] + b"pass" + raw[stop:]
        else:
            raw = raw[:begin] + raw[end:]
    code = raw.decode()
    ast.parse(code)
    return [doc for *_, doc in docs], code


def embedded_corpus():
    """(prose, code), lists of documents. Prose: each documentation topic and each docstring. Code:
    each top-level part of a module, two blank lines from the next, its docstrings cut out."""
    prose, code = documentation(), []
    for text in library_modules().values():
        with contextlib.suppress(SyntaxError):
            docs, rest = split_docstrings(text)
            prose += docs
            code += re.split(r"\n{3,}(?=\S)", rest.strip())
    # a few words teach nothing, and many docstrings stand several times
    return tuple(list(dict.fromkeys(text + "\n" for text in texts if len(text) > 30))
                 for texts in (prose, code))


def demo(data_dir, vocab_size, val_fraction=0.05):
    prose, code = embedded_corpus()
    if not code:
        sys.exit(f"this Python has no library source in {sysconfig.get_path('stdlib')}: "
                 "use one that has, or tokenize own text")
    print(f"this Python's library: {len(prose)} documents of prose, {len(code)} of code")
    model = train_tokenizer([text for text in prose + code
                             if not is_validation(text.encode(), val_fraction)], vocab_size)
    origin = f"the library of Python {sys.version.split()[0]}"
    for name, texts in ("demo-prose", prose), ("demo-code", code):
        bar = tqdm(texts, desc=name, disable=None)
        write_source(Path(data_dir) / name, bar, model, val_fraction, origin)


# --------------------------------------------------------------------------------------------------
# Commands

def parse_args(argv):
    parser = argparse.ArgumentParser(prog="prepare.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("demo",
                            help="tokenize the documentation and the modules of this Python")
    p.add_argument("--data_dir", default="data")
    p.add_argument("--vocab_size", type=int, default=4096)

    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument("files", nargs="+", help=f"files, folders or patterns: {KINDS}; .gz and "
                         ".zst of them; of any filesystem that fsspec opens")
    reading.add_argument("--text_key", default="text",
                         help="the key or column of the text; a.b for b in a (%(default)s)")
    reading.add_argument("--exclude", action="append", default=[], metavar="KEY=VALUE",
                         help="leave out rows that have this; may be repeated")
    reading.add_argument("--fraction", type=float, default=1.0,
                         help="share of the documents to take, chosen by a hash of each")
    reading.add_argument("--strict", action="store_true",
                         help="stop at the first row that should be a document and is none")

    p = commands.add_parser("tokenizer", parents=[reading],
                            help="train a SentencePiece tokenizer as Llama's was")
    p.add_argument("--vocab_size", type=int, default=4096)
    p.add_argument("--out", required=True, help="the file to write")

    p = commands.add_parser("tokenize", parents=[reading], help="write the token files of a source")
    p.add_argument("--tokenizer", required=True, help="a SentencePiece model")
    p.add_argument("--out", required=True, help="the folder to write, data/NAME")
    p.add_argument("--val_fraction", type=float, default=0.001,
                   help="share of the documents kept for validation")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    p.add_argument("--part", default="1/1", metavar="I/N",
                   help="do only the I-th of N parts; others do theirs into the same folder")

    p = commands.add_parser("inspect", help="print what is in a source")
    p.add_argument("source", help="data/NAME")

    return parser.parse_args(argv)


def choice_of(args):
    exclude = []
    for pair in args.exclude:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            sys.exit(f"--exclude={pair} must be KEY=VALUE")
        exclude.append((key, value))
    if not 0 < args.fraction <= 1:
        sys.exit(f"--fraction={args.fraction} must be above 0 and at most 1")
    return Choice(args.text_key, tuple(exclude), args.fraction)


def part_of(text):
    """(I, N) of "I/N"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        sys.exit(f"--part={text} must be I/N with I from 1 to N: 1/4, 2/4, 3/4 and 4/4 are all of "
                 "it")
    return int(found[1]), int(found[2])


def main(argv):
    args = parse_args(argv)
    if args.command == "demo":
        demo(args.data_dir, args.vocab_size)
    elif args.command == "inspect":
        inspect_source(args.source)
    elif not Path(args.out).name:
        sys.exit(f"--out={args.out} names nothing: give a file for a tokenizer, "
                 "a folder for a source")
    elif args.command == "tokenizer":
        out, choice = Path(args.out), choice_of(args)
        if out.exists():
            sys.exit(f"{out} exists already: remove it first, or choose another --out")
        try:
            texts, lost = all_texts(list_files(args.files, args.out), choice, args.strict)
        except (Strict, Unreadable) as error:
            sys.exit(str(error))
        model = train_tokenizer(texts, args.vocab_size)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".tmp").write_bytes(model)
        os.replace(out.with_name(out.name + ".tmp"), out)
        print(f"{out}: {args.vocab_size} pieces, from {len(texts):,} documents")
        if lost:
            print(f"  {lost:,} rows were skipped")
            sys.exit(3)
    else:
        if not 0 <= args.val_fraction < 1:
            sys.exit(f"--val_fraction={args.val_fraction} must be at least 0 and below 1")
        if args.workers < 1:
            sys.exit(f"--workers={args.workers} must be at least 1")
        part, choice = part_of(args.part), choice_of(args)
        load_tokenizer(args.tokenizer)
        corpus = Corpus(Path(args.out), tuple(args.files), tuple(list_files(args.files, args.out)),
                        args.tokenizer, Path(args.tokenizer).read_bytes(), choice,
                        args.val_fraction, UNIT)
        tokenize(corpus, *part, args.workers, args.strict)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped")
