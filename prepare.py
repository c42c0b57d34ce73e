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
"""
import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shutil
import sys
import sysconfig
from hashlib import blake2b, sha256
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from data import DataError, Header, Source, TokenWriter


# --------------------------------------------------------------------------------------------------
# Reading documents

def documents(path, text_key):
    """The texts of a file: a .txt is one document, a .jsonl has one a line under `text_key`. Exits
    at what it cannot read."""
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        sys.exit(f"{path}: "
                 "only .txt (a document a file) and .jsonl (a document a line) can be read")
    try:
        if path.suffix == ".txt":
            yield decode(path.read_bytes(), path)
            return
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                if line.strip():
                    yield row_text(decode(line, where), text_key, where)
    except OSError as error:
        sys.exit(f"{path} cannot be read: {error.strerror}")


def decode(raw, where):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        sys.exit(f"{where} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; "
                 "convert it, e.g. with iconv -t utf-8")


def row_text(line, text_key, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        sys.exit(f"{where} is not JSON: {error}")
    if not isinstance(row, dict) or text_key not in row:
        have = f"the keys {list(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        sys.exit(f"{where} has no {text_key!r}, it is {have}: name the key with --text_key=KEY")
    text = row[text_key]
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        sys.exit(f"{where}: {text_key!r} is no text that UTF-8 can write: {text!r:.80}")
    return text


def all_documents(paths, text_key):
    """The non-empty documents of several files, with a bar over their bytes. Exits where there is
    none."""
    found = False
    for path in paths:
        if not os.path.isfile(path):
            sys.exit(f"there is no file {path}")
    with tqdm(total=sum(map(os.path.getsize, paths)), unit="B", unit_scale=True, desc="reading",
              disable=None) as bar:
        for path in paths:
            left = os.path.getsize(path)
            if left == 0:
                sys.exit(f"{path} is empty")
            for text in documents(path, text_key):
                if text:
                    found = True
                    yield text
                read = min(left, len(text.encode()))
                bar.update(read)
                left -= read
            bar.update(left)
    if not found:
        sys.exit(f"no text in {', '.join(map(str, paths))}")


# --------------------------------------------------------------------------------------------------
# The tokenizer: byte-pair encoding as Llama 2 has it

def train_tokenizer(texts, vocab_size):
    """The bytes of a SentencePiece model trained on a list of texts the way Llama's was: BPE,
    digits apart, bytes for characters it lacks, and nothing normalized away, so that decoding gives
    back what was encoded."""
    def lines():    # newlines become byte pieces; the trainer would refuse very long lines
        for text in texts:
            for line in text.split("\n"):
                yield from (line[i:i + 4000] for i in range(0, len(line), 4000))

    if not any(lines()):
        sys.exit("there is nothing but newlines to train a tokenizer on")
    if vocab_size < 260:
        sys.exit(f"--vocab_size={vocab_size} is too small: 256 bytes and 3 special tokens, and one "
                 "character at least, need 260")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20, minloglevel=2)
    except (RuntimeError, ValueError) as error:
        numbers = [int(word.strip(".")) for word in str(error).split() if word.strip(".").isdigit()]
        if "too high" in str(error):
            sys.exit(f"--vocab_size={vocab_size} is more than this text can fill: "
                     f"at most {numbers[-1]}, or give more text")
        if "smaller than required_chars" in str(error):
            sys.exit(f"--vocab_size={vocab_size} is too small for the characters of this text, "
                     f"which with the 256 bytes and 3 special tokens need {numbers[-1]}: give more")
        raise
    return model.getvalue()


def load_tokenizer(path):
    """The SentencePiece processor of a tokenizer.model. Exits where it is none, or has no BOS or
    EOS."""
    if not os.path.isfile(path):
        sys.exit(f"there is no tokenizer {path}: train one with prepare.py tokenizer FILES... "
                 f"--out={path}, or copy the tokenizer.model of a Llama 2 model here")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:
        sys.exit(f"{path} is no SentencePiece model, or it is damaged")
    if min(sp.bos_id(), sp.eos_id()) < 0:
        sys.exit(f"{path} has no BOS or no EOS token, and documents are framed by them")
    return sp


def protobuf(raw):
    """{field number: [values]} of a serialized protobuf message: ints, and bytes for whatever has a
    length."""
    found, i = {}, 0

    def varint():
        nonlocal i
        value = shift = 0
        while True:
            byte, i = raw[i], i + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while i < len(raw):
        tag = varint()
        if tag & 7 == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(tag & 7) or varint()
            value, i = raw[i:i + size], i + size
        found.setdefault(tag >> 3, []).append(value)
    return found


def llama_style(model):
    """Whether a SentencePiece model (bytes) is BPE with byte fallback that changes nothing but
    spaces to U+2581, with one put in front: then tokenizer.json can say the same. Field numbers are
    those of sentencepiece_model.proto."""
    fields = protobuf(model)
    trainer, normalizer = protobuf(fields[2][0]), protobuf(fields[3][0])
    kinds = {protobuf(piece).get(3, [1])[0] for piece in fields[1]}
    return (trainer.get(3) == [2] and trainer.get(35) == [1] and normalizer.get(2, [b""]) == [b""]
            and normalizer.get(3, [1]) == [1] and normalizer.get(4, [1]) == [0]
            and trainer.get(24, [0]) == [0]
            and kinds <= {1, 2, 3, 6})               # normal, unknown, control, byte


def tokenizer_json(sp):
    """tokenizer.json, as `transformers` reads it, of a llama_style model.

    SentencePiece joins the neighbours whose piece has the best score; `tokenizers` goes through a
    list of pairs, so that list is each way to write a piece as two others, by the score of the
    piece.
    """
    size = len(sp)
    vocab = {sp.id_to_piece(i): i for i in range(size)}
    merges = []
    for piece, i in vocab.items():
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)):
            pairs = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
            merges += [(-sp.get_score(i), vocab[a], vocab[b], a, b) for a, b in pairs
                       if a in vocab and b in vocab]
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    bos = sp.id_to_piece(sp.bos_id())
    frame = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": sp.id_to_piece(i), "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True} for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame + [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": frame + [{"Sequence": {"id": "A", "type_id": 0}},
                             {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(sp.unk_id()),
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "vocab": vocab,
                  "merges": [[a, b] for *_, a, b in sorted(merges)]}}


def write_tokenizer(folder, model):
    """Writes tokenizer.model (the bytes given) and what `transformers` reads, tokenizer.json and
    tokenizer_config.json."""
    (folder / "tokenizer.model").write_bytes(model)
    if not llama_style(model):
        print("this tokenizer is not BPE in Llama's manner: "
              "tokenizer.json is left out, transformers needs its own files")
        return
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(sp), ensure_ascii=False),
                                           "utf-8")
    # not LlamaTokenizer: in transformers 5 that class takes leading spaces apart differently than
    # SentencePiece
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
              "add_eos_token": False, "clean_up_tokenization_spaces": False,
              "bos_token": sp.id_to_piece(sp.bos_id()), "eos_token": sp.id_to_piece(sp.eos_id()),
              "unk_token": sp.id_to_piece(sp.unk_id())}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


# --------------------------------------------------------------------------------------------------
# Sources

def is_validation(text, fraction):
    return (int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
            < fraction * 2 ** 64)


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


def write_source(out, texts, model, val_fraction, origin):
    """Tokenizes `texts` with a SentencePiece model (bytes) into the source folder `out`, whole or
    not at all."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    header = Header(len(sp), sp.bos_id(), sp.eos_id(), sha256(model).hexdigest())
    info = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    with new_folder(Path(out)) as folder:
        with (TokenWriter(folder / "train_00000.bin", header) as train,
              TokenWriter(folder / "val_00000.bin", header) as val):
            for text in texts:
                split = "val" if is_validation(text, val_fraction) else "train"
                ids = [sp.bos_id(), *sp.encode(text), sp.eos_id()]
                (val if split == "val" else train).write(ids)
                for key, more in (("documents", 1), ("tokens", len(ids)),
                                  ("bytes", len(text.encode()))):
                    info[split][key] += more
        if not info["train"]["documents"]:
            sys.exit(f"all {info['val']['documents']} documents fell to validation: "
                     f"give more documents, or a --val_fraction below {val_fraction}")
        write_tokenizer(folder, model)
        about = info | {"vocab_size": len(sp), "tokenizer": header.tokenizer, "from": origin,
                        "command": sys.argv}
        (folder / "source.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    describe(out, info)


def describe(out, info):
    print(f"{out}:")
    for split, part in info.items():
        print(f"  {split:5} {part['documents']:>9,} documents {part['tokens']:>13,} tokens "
              f"{part['bytes']:>14,} bytes"
              + (f"  {part['bytes'] / part['tokens']:.2f} bytes per token" if part["tokens"]
                 else ""))


def inspect_source(folder):
    """Prints what is in a source: its counts, and its first and last tokens decoded."""
    train, val = (Source(folder, split, context=1) for split in ("train", "val"))
    sp = load_tokenizer(Path(folder) / "tokenizer.model")
    describe(folder, {"train": train.info, "val": val.info})
    print(f"  vocabulary of {train.header.vocab_size:,}, BOS {train.header.bos_id}, "
          f"EOS {train.header.eos_id}, tokenizer {train.header.tokenizer[:12]}")
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
    topics = importlib.import_module("pydoc_data.topics").topics
    prose, code = [inspect.cleandoc(topics[name]) for name in sorted(topics)], []
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
                             if not is_validation(text, val_fraction)], vocab_size)
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

    p = commands.add_parser("tokenizer", help="train a SentencePiece tokenizer as Llama's was")
    p.add_argument("files", nargs="+",
                   help=".txt (a document a file) or .jsonl (a document a line)")
    p.add_argument("--vocab_size", type=int, default=4096)
    p.add_argument("--out", required=True, help="the file to write")
    p.add_argument("--text_key", default="text", help="the key of the text in .jsonl")

    p = commands.add_parser("tokenize", help="write the token files of a source")
    p.add_argument("files", nargs="+",
                   help=".txt (a document a file) or .jsonl (a document a line)")
    p.add_argument("--tokenizer", required=True, help="a SentencePiece model")
    p.add_argument("--out", required=True, help="the folder to write, data/NAME")
    p.add_argument("--text_key", default="text", help="the key of the text in .jsonl")
    p.add_argument("--val_fraction", type=float, default=0.001,
                   help="share of the documents kept for validation")

    p = commands.add_parser("inspect", help="print what is in a source")
    p.add_argument("source", help="data/NAME")

    return parser.parse_args(argv)


def main(argv):
    args = parse_args(argv)
    if args.command == "demo":
        demo(args.data_dir, args.vocab_size)
    elif args.command == "inspect":
        inspect_source(args.source)
    elif not Path(args.out).name:
        sys.exit(f"--out={args.out} names nothing: give a file for a tokenizer, "
                 "a folder for a source")
    elif os.path.exists(args.out):
        sys.exit(f"{args.out} exists already: remove it first, or choose another --out")
    elif args.command == "tokenizer":
        model = train_tokenizer(list(all_documents(args.files, args.text_key)), args.vocab_size)
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(out.name + ".tmp").write_bytes(model)
        os.replace(out.with_name(out.name + ".tmp"), out)
        print(f"{out}: {args.vocab_size} pieces")
    else:
        if not 0 <= args.val_fraction < 1:
            sys.exit(f"--val_fraction={args.val_fraction} must be at least 0 and below 1")
        load_tokenizer(args.tokenizer)
        write_source(args.out, all_documents(args.files, args.text_key),
                     Path(args.tokenizer).read_bytes(), args.val_fraction, args.files)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped")
