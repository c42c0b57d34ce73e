"""Where documents come from: text files, or the library of this Python.

A .txt file is one document, a .jsonl file has one per line, a .parquet file one per row. What goes
wrong is of two kinds. A row that should be a document and is none, or a file that breaks off in the
middle, is skipped, counted and named: a bad line in a terabyte neither stops the work nor passes
unnoticed. A file that cannot be read, as it vanished or a connection broke, raises Unreadable:
another time it may be read.
"""
import ast
import contextlib
import glob
import gzip
import importlib
import inspect
import io
import json
import os
import re
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

from files import LFS_POINTER, InputError, print_once

zstd = None                                                     # only .zst files need it
for module in "backports.zstd", "compression.zstd":             # the latter from Python 3.14 on
    with contextlib.suppress(ImportError):
        zstd = importlib.import_module(module)

# --------------------------------------------------------------------------------------------------
# Files

FORMAT = re.compile(r"\.(txt|jsonl?|parquet(?=$))(\.gz|\.zst)?$", re.IGNORECASE)
FORMATS = (".txt (a document per file), .jsonl, .json (a document per line), .parquet (a document "
           "per row), each but .parquet also as .gz or .zst")
# lies beside documents or a model, and holds no text
DESCRIPTION = re.compile(r"(dataset_(infos?|dict)|source|state|((generation|tokenizer)_)?config"
                         r"|tokenizer|special_tokens_map|.*\.index)\.json$")


class Unreadable(InputError):
    """A file that cannot be read to its end, so that what was read of it does not count."""


class File(NamedTuple):
    """A file of any filesystem that fsspec knows; `name` is what messages call it."""
    fs: fsspec.AbstractFileSystem
    path: str
    name: str
    size: int


def list_files(paths, out=None):
    """The Files that a list of paths, folders and patterns names, in this order, those of a folder
    or a pattern sorted by path; none in the folder `out`. Exits if a path names nothing that can be
    read, or if a file is named twice."""
    files, out = {}, os.path.realpath(out) if out else None
    for path in paths:
        try:
            fs, inner = fsspec.core.url_to_fs(path)
            sizes = find_files(fs, inner, out)
        except (ImportError, ValueError, OSError) as error:
            reason = error.__cause__ or error if str(error) in path else error
            sys.exit(f"{path} cannot be opened: {reason}")
        if not sizes:
            sys.exit(f"there is no file {path}, or none in it that can be read: "
                     f"only {FORMATS}; and not what is in --out")
        name = fs.unstrip_protocol
        if isinstance(fs, LocalFileSystem):
            name = str if os.path.isabs(path) else os.path.relpath
        for file in sizes:
            # bytes of a name that are not UTF-8 are written as \xNN
            text = name(file).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            new = File(fs, file, text, sizes[file])
            same = files.setdefault((fs, os.path.realpath(file)), new)
            if same is not new:
                sys.exit(f"{same.name} and {text} are the same file: its documents would be there "
                         "twice")
    for ending, package, installed in ((".zst", "backports.zstd", zstd),
                                       (".parquet", "pyarrow", find_spec("pyarrow"))):
        names = [file.name for file in files.values() if file.name.lower().endswith(ending)]
        if names and not installed:
            sys.exit(f"{names[0]} needs {package}: pip install {package}")
    return list(files.values())


def find_files(fs, path, out):
    """{path: size} of the files of a known format that a path, folder or pattern names, at any
    depth, sorted, but none in `out`. Links are followed, and what exists is no pattern. Below
    `path` names that begin with a dot are skipped, and others with a message. Raises OSError for a
    folder that may not be read, and for what stands for a file that is not there."""
    local, folder = isinstance(fs, LocalFileSystem), path
    while glob.has_magic(folder) and not fs.exists(folder):
        folder = os.path.dirname(folder)
    below = path[len(folder):].strip("/").split("/") if folder != path else []
    if local and not os.path.exists(folder):
        return {}
    # websites call a folder a file
    info = {"type": "directory"} if below and fs.isdir(folder) else fs.info(folder)
    todo, sizes, others, seen = [(folder, info, below)], {}, [], set()
    while todo:
        name, info, parts = todo.pop()
        if info["type"] == "directory" or local and os.path.isdir(name):
            if (here := (os.path.realpath(name), *parts)) in seen or here[0] == out:
                continue
            seen.add(here)                                          # links may go in circles
            part, *rest = parts or ["**"]
            entries = {Path(entry["name"]).name: entry for entry in fs.ls(name, detail=True)}
            if part == "**":
                todo.append((name, info, rest))
                rest = parts
            # sorted, as the first of two names of a folder is the one that counts
            todo += [(entry["name"], entry, rest) for base, entry in sorted(entries.items())[::-1]
                     if base == part or part not in entries and base[0] != "."
                     and fnmatchcase(base, part)]
        elif parts:
            continue
        elif not FORMAT.search(name) or DESCRIPTION.match(os.path.basename(name)) and name != path:
            others.append(name)
        elif local and not os.path.isfile(name):
            raise FileNotFoundError(f"{name} is a link to a file that is not there, or no file")
        elif local and info["size"] < 1024 and Path(name).read_bytes().startswith(LFS_POINTER):
            raise FileNotFoundError(f"{name} is a Git LFS pointer, not the file: git lfs pull")
        else:
            sizes[name] = info["size"] or 0
    if others:
        print_once(f"{path}: files that are not read, going by their names: {len(others):,} "
                   f"({min(others)}, ...)", file=sys.stderr)
    return dict(sorted(sizes.items()))


class Input(io.RawIOBase):
    """A File, opened. Whatever keeps it from being read, now or later, is raised as Unreadable."""

    def __init__(self, file, report):
        self.file, self.report, self.bytes_read = file, report, 0
        self.stream = self.wrap_read_errors(file.fs.open, file.path, "rb")

    def wrap_read_errors(self, read, *arguments):
        try:
            return read(*arguments)
        except Exception as error:          # of whatever kind its filesystem raises
            raise Unreadable(f"{self.file.name} cannot be read: {error}") from error

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, *where):
        return self.wrap_read_errors(self.stream.seek, *where)

    def tell(self):
        return self.stream.tell()

    def readinto(self, buffer):
        read = self.wrap_read_errors(self.stream.read, len(buffer))
        if not read and len(buffer) and self.tell() < self.file.size:
            raise Unreadable(f"{self.file.name} ends after {self.tell():,} bytes, and it had "
                             f"{self.file.size:,} when it was listed")
        buffer[:len(read)] = read
        self.bytes_read += len(read)
        self.report(len(read))
        return len(read)

    def close(self):
        if not self.closed:
            self.stream.close()
        super().close()


# --------------------------------------------------------------------------------------------------
# Rows

MISSING = object()
ROWS = "a row with keys is wanted, one a line: jq -c '.[]' of an array, or jq -c ., writes them"


class Skip(Exception):
    """A row gives no document. `reason` is what it is counted under; `message`, of a row that
    should have given one, says what is wrong with it."""

    def __init__(self, reason, message=None):
        self.reason, self.message = reason, message


@dataclass(frozen=True)
class RowFilter:
    """Which rows are documents, and which of those are taken. The methods return a document, or
    raise Skip."""
    text_key: str = "text"
    exclude: tuple = ()           # of (key, value)
    fraction: float = 1.0

    def columns(self):
        """The keys that it looks at."""
        return [self.text_key, *(key for key, _ in self.exclude)]

    def from_row(self, row):
        """The document of a row, a dict; a Skip in its place is raised."""
        if isinstance(row, Skip):
            raise row
        if not isinstance(row, dict):
            raise Skip("no row", f"is a {type(row).__name__}, and {ROWS}")
        rules = [f"{key}={value}" for key, value in self.exclude
                 if as_text(field(row, key)) == value]
        if rules:
            raise Skip(" and ".join(rules))
        text = field(row, self.text_key)
        if text is MISSING:
            raise Skip(f"no {self.text_key!r}", f"has no {self.text_key!r}, but the keys "
                       f"{list(row)}: name the key with --text_key=KEY")
        return self.accept(text)

    def from_json(self, line):
        """The document of a line of JSON."""
        try:
            row = json.loads(decode(line))
        except (ValueError, RecursionError) as error:
            raise Skip("not JSON", f"is not JSON: {error}") from None
        return self.from_row(row)

    def accept(self, text):
        """The text, a str or the bytes of one, if it is one and in the fraction."""
        text = check_text(text)
        if not text:
            raise Skip("empty")
        self.check_fraction(text)
        return text

    def check_fraction(self, text):
        if self.fraction < 1 and hash_to_unit(text.encode(), b"fraction") >= self.fraction:
            raise Skip("not in the fraction")


def check_text(text):
    """The text, a str or the bytes of one. Raises Skip if it is none."""
    text = decode(text) if isinstance(text, bytes) else text
    if not isinstance(text, str):
        raise Skip("not text", f"is no text but {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Skip("not text", f"is no text that UTF-8 can write: {text!r:.80}") from None
    return text


def field(row, key):
    """row["a"]["b"] for the key "a.b", unless the row has a key of that very name; MISSING if there
    is none."""
    if key in row:
        return row[key]
    for part in key.split("."):
        row = row.get(part, MISSING) if isinstance(row, dict) else MISSING
    return row


def as_text(value):
    """A value as --exclude gives it: 2024-01-01, but true, 3, null and lists as in JSON."""
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, default=as_text, ensure_ascii=False)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def hash_to_unit(raw, purpose=b""):
    """A number in [0, 1) that follows from the bytes of a text alone."""
    return int.from_bytes(blake2b(raw, digest_size=8, person=purpose).digest(), "big") / 2 ** 64


def decode(raw):
    """The text of bytes. Raises Skip unless they are UTF-8, and more than by chance."""
    if raw.startswith(LFS_POINTER):
        raise Skip("not text", "is a Git LFS pointer, not the file: git lfs pull")
    if bytes(8) in raw or raw.count(0) > 1 + len(raw) // 100:
        raise Skip("not UTF-8", f"is not UTF-8: {raw.count(0):,} of {len(raw):,} bytes are 0; "
                   "convert UTF-16 with iconv -f utf-16 -t utf-8, and unpack what is packed")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise Skip("not UTF-8", f"is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; "
                   "convert it, e.g. with iconv -f latin1 (or utf-16) -t utf-8") from None


# --------------------------------------------------------------------------------------------------
# Reading

BOM = b"\xef\xbb\xbf"       # some editors mark UTF-8 by it, at the beginning of a file
NAMED_ROWS = 20             # lost rows that are named; further ones are only counted


class TextReader:
    """Reads the documents of Files and counts the rows that give none: all of them in `reasons`, in
    `lost` those that should have. `messages` names the first of these and each file that breaks
    off. For n bytes of files read report(n) is called."""

    def __init__(self, files, row_filter, strict, report):
        self.files, self.row_filter, self.strict, self.report = files, row_filter, strict, report
        self.reasons, self.lost, self.broken, self.messages = Counter(), 0, [], []

    def texts(self):
        """Yields the documents. Raises Unreadable, and InputError for a lost row if `strict`."""
        for file in self.files:
            with Input(file, self.report) as opened:
                try:
                    for where, parse, row in read_rows(file.name, opened, self.row_filter):
                        try:
                            yield parse(row)
                        except Skip as skip:
                            self.count(skip.reason, skip.message and f"{where} {skip.message}")
                except (InputError, MemoryError):
                    raise
                except Exception as error:        # what a decoder raises is up to the decoder
                    self.count("breaks off", f"{file.name} breaks off, and what comes is lost: "
                               f"{error}")
            self.report(file.size - opened.bytes_read)      # parquet: not all, or some twice

    def count(self, reason, message):
        self.reasons[reason] += 1
        if message and self.strict:
            raise InputError(f"{message} (--strict)")
        if message:
            self.lost += 1
            if reason == "breaks off":
                self.broken.append(message)
            if self.lost <= NAMED_ROWS or reason == "breaks off":
                self.messages.append(message)
            elif self.lost == NAMED_ROWS + 1:
                self.messages.append("more rows like these are counted, and not named")


def read_rows(name, opened, row_filter):
    """Yields (where, parse, row) for each row of a file: parse(row) is its document."""
    kind, packed = FORMAT.search(name.lower()).groups()
    stream = io.BufferedReader(opened, 2 ** 20)
    if packed and not stream.peek(1):
        raise EOFError("it is empty, and no compressed file is")
    if packed == ".gz":
        stream = gzip.GzipFile(fileobj=stream)
    elif packed == ".zst":
        stream = zstd.ZstdFile(stream, options={zstd.DecompressionParameter.window_log_max: 31})
    if kind == "txt":
        yield name, row_filter.accept, stream.read().removeprefix(BOM)
    elif kind == "parquet":
        for number, row in enumerate(parquet_rows(stream, row_filter), 1):
            yield f"{name}: row {number}", row_filter.from_row, row
    else:
        start = stream.peek(1024).lstrip(BOM).lstrip().split(b"\n")[0].rstrip()
        if start == b"{" or start.startswith(b"[") and not start.endswith(b"]"):
            raise ValueError(f"it is an array, or one value over several lines, and {ROWS}")
        for number, line in enumerate(stream, 1):
            line = line.lstrip(BOM)         # in the middle, too, as files may be concatenated
            if line.strip():
                yield f"{name}:{number}", row_filter.from_json, line


def parquet_rows(stream, row_filter):
    """Yields the rows of a parquet file as dicts with the columns that the filter asks for."""
    from pyarrow.parquet import ParquetFile
    table = ParquetFile(stream, buffer_size=2 ** 20)
    have = table.schema_arrow.names
    columns = {key if key in have else key.split(".")[0]
               for key in row_filter.columns()} & set(have)
    for batch in table.iter_batches(16, columns=sorted(columns), use_threads=False):
        yield from to_rows(batch) if columns else [dict.fromkeys(have)] * len(batch)


def to_rows(batch):
    """The rows of a batch as dicts; a Skip for a row with a value that Python cannot have."""
    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError, LookupError) as error:
        if len(batch) > 1:
            return [row for k in range(len(batch)) for row in to_rows(batch.slice(k, 1))]
        return [Skip("not UTF-8", "is not UTF-8") if isinstance(error, UnicodeDecodeError)
                else Skip("not readable", f"cannot be read: {error}")]


def all_texts(files, row_filter, strict=False):
    """The documents of Files as a list, and how many rows were lost. Exits if there is none."""
    with tqdm(total=sum(file.size for file in files), unit="B", unit_scale=True, desc="reading",
              disable=None) as bar:
        reader = TextReader(files, row_filter, strict, bar.update)
        texts = list(reader.texts())
    for message in reader.messages:
        print(message, file=sys.stderr)
    if not texts:
        sys.exit("there is no text in these files")
    return texts, reader.lost


# --------------------------------------------------------------------------------------------------
# Documents without a download: every Python has its documentation and its source

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


def split_code(source):
    """The top-level parts of a module, which are two blank lines apart."""
    return re.split(r"\n{3,}(?=\S)", source.strip())


@lru_cache(None)         # all of the demo's sources are made of these parts
def split_docstrings(source):
    """(docstrings, the source without them): no text of the one is in the other. Raises
    SyntaxError."""
    tree, raw = ast.parse(source), source.encode()
    starts, docs = [0, *accumulate(len(line) + 1 for line in raw.split(b"\n"))], []
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


# what a docstring may begin with, to become "Write a function that returns ..."
VERBS = {"add", "build", "call", "check", "compare", "compute", "convert", "create", "decode",
         "delete", "encode", "extract", "find", "format", "generate", "get", "load", "make", "open",
         "parse", "print", "read", "remove", "replace", "return", "send", "set", "sort", "split",
         "test", "write"}


def questions_and_answers(name, source):
    """(question, answer, texts it is made of), from the docstrings of a module and from its short
    functions. Raises SyntaxError."""
    found, functions = [], {}
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    code = split_docstrings(source)[1]
    lines, parts = code.splitlines(), split_code(code)
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 15:
            text = "\n".join(lines[node.lineno - 1:node.end_lineno])
            functions[node.name] = text, *(part for part in parts if text in part)
    todo = [(ast.parse(source), "")]
    while todo:
        parent, prefix = todo.pop()
        for node in parent.body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            todo.append((node, f"{prefix}{node.name}."))
            doc = ast.get_docstring(node)
            answer = doc and doc.split("\n\n")[0].strip()
            if not answer or not answer[0].isupper() or not 30 < len(answer) <= 300:
                continue
            full = f"`{module}.{prefix}{node.name}`"
            forms = (f"What does {full} do?", f"What is {full} for?", f"Explain {full}.",
                     f"Tell me about {full}.")
            if isinstance(node, ast.ClassDef):
                forms = f"What is {full}?", *forms[1:]
            found.append((forms[int(4 * hash_to_unit(full.encode()))], answer, [doc]))
            verb, _, rest = " ".join(answer.split()).partition(" ")
            verb = verb.lower().removesuffix("s")
            if verb in VERBS and not prefix and node.name in functions:
                text, *part = functions[node.name]
                found.append((f"Write a function that {verb}s {rest}", text, [doc, *part]))
    return found
