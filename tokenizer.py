"""Llama's kind of tokenizer: SentencePiece models trained, loaded, written for others, and fast.

Byte-pair encoding starts from single characters and joins two neighbours, again and again, whenever
together they are a piece of the vocabulary, the best piece first. This file leaves that to
SentencePiece, and asks it as little as possible.

A piece that reached over the place between two characters a and b would contain "ab". So where "ab"
is in no piece, nothing is ever joined over that place, whatever stands around; and as joining looks
at nothing but neighbours, what happens on one side does not depend on the other:

    ids(left + right) = ids(left) + ids(right)

There a text can be cut, and the parts repeat endlessly and can be remembered. To be exact:

-  It holds for the text as SentencePiece normalizes it, where a space is U+2581.
-  Pieces marked unused count: they are joined first and taken apart afterwards. Control and byte
   pieces never match text.
-  Without byte fallback unknown characters in a row become one <unk>, so no cut between two such.
-  Not for unigram models, which weigh all ways to take a text apart, by sums that are rounded:
   SentencePiece encodes them alone.

Llama's vocabulary joins letters with letters of their script, punctuation with punctuation, and a
space with what follows; it joins digits, newlines and Chinese characters with nothing. So a text is
cut into words, by str.split; a word that is new into runs of letters and of punctuation, by a
regular expression; only a run that is new is SentencePiece's; and characters that join nothing are
looked up in a table. Each is remembered as the bytes that go to disk, so that split, a dict and
bytes.join, which are written in C, do the rest.

On one core and with Llama's tokenizer that is 40 to 60 MB/s of English and code that was met before
and 150 of Chinese, 8 to 12 times and 4 times SentencePiece's own speed; and 11 MB/s where a tenth
of the words is new, twice its speed and more (bench.py prepare; README, Corpora and Encoding).
"""
import io
import json
import os
import re
import sys
from hashlib import sha256
from itertools import accumulate, pairwise

import numpy as np
import sentencepiece

from data import Header

# --------------------------------------------------------------------------------------------------
# Models

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


def merged(model, number):
    """{field: its last value} of the message in field 2 (trainer_spec) or 3 (normalizer_spec) of a
    SentencePiece model (bytes). Field numbers are those of sentencepiece_model.proto."""
    found = {}
    for message in protobuf(model).get(number, []):
        found |= {field: values[-1] for field, values in protobuf(message).items()}
    return found


def llama_style(model):
    """Whether a SentencePiece model (bytes) is BPE with byte fallback that changes nothing but
    spaces to U+2581, with one put in front: then tokenizer.json can say the same."""
    trainer, normalizer = merged(model, 2), merged(model, 3)
    kinds = {protobuf(piece).get(3, [1])[0] for piece in protobuf(model)[1]}
    return (trainer.get(3) == 2 and trainer.get(35) == 1 and not normalizer.get(2)
            and normalizer.get(3, 1) and not normalizer.get(4, 1) and normalizer.get(5, 1)
            and not trainer.get(24, 0)
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
# Encoding

LONGEST = 64            # characters of a text that is worth remembering
MEMORY = 128 * 10 ** 6  # bytes, about, of each of an encoder's memories
SLICE = 2 ** 15         # characters that are encoded at a time


class Memory(dict):
    """{text: what `work` gives for it}, worked out when first asked for; when it is full it starts
    anew."""

    def __init__(self, work):
        self.work, self.room = work, MEMORY

    def __missing__(self, text):
        ids = self.work(text)
        if len(text) <= LONGEST:
            self.room -= len(text) + len(ids) + 200            # 200: two objects, and the table
            if self.room < 0:
                self.clear()
                self.room = MEMORY
            self[text] = ids
        return ids


def families(joins, known, byte_fallback, space):
    """The characters that stand side by side in pieces, directly or over others: a list of strings.
    Two neighbours of different families are joined by no piece."""
    parent = {}

    def root(char):
        while parent.setdefault(char, char) != char:
            char = parent[char]
        return char

    for a, b in joins:
        a, b = (b if a == space else a), (a if b == space else b)
        parent[root(a)] = root(b)
    found = {}
    for char in parent:
        found.setdefault(root(char), []).append(char)
    found.pop(space, None)
    large = sorted((chars for chars in found.values() if len(chars) > 1), key=len, reverse=True)
    small = [char for chars in found.values() if len(chars) == 1 for char in chars]
    # Those alone in theirs, which join only spaces or themselves, do as one family: a cut too few
    # changes nothing. Without byte fallback unknown characters in a row become one <unk>, so
    # families with such are not listed, and make up one with all that is not listed.
    return ["".join(sorted(chars)) for chars in [*large, small]
            if chars and (byte_fallback or known.issuperset(chars))]


class Encoder:
    """Encodes as SentencePieceProcessor.encode does with the same model (bytes), to the bytes of a
    token file: little-endian, 2 an id, or 4 where the vocabulary needs it."""

    def __init__(self, model):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        # protobuf merges messages that follow one another: with this normalizer_spec behind it the
        # model normalizes nothing and puts no space in front
        self.bare = sentencepiece.SentencePieceProcessor(
            model_proto=model + b"\x1a\x06\x12\x00\x18\x00\x20\x00")
        self.tokenizer = sha256(model).hexdigest()
        self.dtype = Header(len(self.sp), 0, 0, "").dtype
        self.id_bytes = [i.to_bytes(self.dtype.itemsize, "little") for i in range(len(self.sp))]
        self.plain = llama_style(model)          # all it normalizes is spaces, one put in front
        self.prefix = " " if self.plain else ""
        trainer, normalizer = (merged(model, number) for number in (2, 3))
        self.cuts = trainer.get(3) == 2 and normalizer.get(5, 1)      # BPE, and spaces are U+2581
        self.byte_fallback = trainer.get(35) == 1
        self.find_cuts()
        self.words, self.joining, self.runs = map(
            Memory, (self.encode_word, self.encode_joining, self.encode_run))
        self.ids_of_char = np.zeros((4, 0x110000), self.dtype)   # filled as needed
        self.size_of_char = np.zeros(0x110000, np.uint8)

    def find_cuts(self):
        """Sets joins, known, by_words, joins_others and find_runs from the pieces of the model.

        Of the pieces " the", "((" and single characters, with byte fallback, find_runs finds
        " *(?:[eht]+|[(]+)", " +" and "[^ eht(]+", and the characters that join others are " eht(".
        """
        sp = self.sp
        pieces = {i: sp.id_to_piece(i).replace("▁", " ") for i in range(len(sp))
                  if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))}
        self.joins = {piece[k:k + 2] for piece in pieces.values() for k in range(len(piece) - 1)}
        self.known = {piece for i, piece in pieces.items()
                      if len(piece) == 1 and not sp.is_unused(i)}
        # spaces stand before what they join, as in most models, or behind it, or anywhere
        before = all(a == " " for a, b in self.joins if b == " ")
        behind = all(b == " " for a, b in self.joins if a == " ")
        if not self.byte_fallback and " " not in self.known:
            before = behind = False
        space = " " if before or behind else ""
        listed = families(self.joins, self.known, self.byte_fallback, space)
        classes = [f"[{re.escape(chars)}]+" for chars in listed]
        joining = space + re.escape("".join(listed))
        others = f"[^{joining}]+" if joining else "(?s:.+)"
        if not self.byte_fallback:
            classes.append(others)
        either = f"(?:{'|'.join(classes or ['(?!)'])})"
        run = f" *{either}| +" if before else f"{either} *| +" if behind else either
        self.joins_others = np.zeros(0x110000, bool)
        self.joins_others[[ord(char) for char in space + "".join(listed)]] = True
        self.find_runs = re.compile(f"{run}|{others}").findall
        self.by_words = (before and self.byte_fallback
                         and not any("\n" in join for join in self.joins))

    def encode(self, texts):
        """Yields (text, its ids as bytes) for each of any number of texts."""
        batch, size = [], 0
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= SLICE:
                yield from zip(batch, self.encode_batch(batch), strict=True)
                batch, size = [], 0
        yield from zip(batch, self.encode_batch(batch), strict=True)

    def encode_batch(self, texts):
        if not self.cuts:
            return map(self.pack, self.sp.encode(texts, num_threads=1))
        texts = list(map(self.normalize, texts))
        if sum(map(len, texts)) < 2 * SLICE:
            return self.encode_slices([self.prefix + text if text else "" for text in texts])
        return (b"".join(self.encode_slices([part])[0] for part in self.slices(text))
                for text in texts)

    def normalize(self, text):
        return (text if self.plain else self.sp.normalize(text)).replace("▁", " ")

    def slices(self, text):
        """A normalized text in parts of about SLICE characters, each with the ids it has in the
        whole."""
        start = 0
        while start < len(text):
            stop = start + SLICE
            while stop < len(text) and not self.may_cut(text[stop - 1:stop + 1]):
                stop += 1
            yield ("" if start else self.prefix) + text[start:stop]
            start = stop

    def may_cut(self, pair):
        return pair not in self.joins and (self.byte_fallback
                                           or not self.known.isdisjoint(pair))

    def encode_slices(self, texts):
        found = [self.encode_words(text) if self.has_words(text) else None for text in texts]
        if None in found:
            rest = iter(self.encode_rest([text for text, ids in zip(texts, found) if ids is None]))
            found = [next(rest) if ids is None else ids for ids in found]
        return found

    def has_words(self, text):
        """Whether it is worth while, and right, to cut the text at spaces first."""
        return (self.by_words and text.count(" ", 0, 1000) * 16 > min(len(text), 1000)
                and "\1" not in text and "\2" not in text)

    def encode_words(self, text):
        # Spaces in a row stay together: \1 stands for each, and text is cut at the single ones that
        # are left and at newlines. So each word lacks the space before it, but for the first, which
        # \2 marks, and those with a newline there instead: " a  b c\nd" becomes "\2", "a\1\1b",
        # "c" and "\nd".
        raw = b"\2" + text.encode().replace(b"  ", b"\1\1").replace(b"\1 ", b"\1\1").replace(
            b"\n", b" \n")
        return b"".join(map(self.words.__getitem__, raw.split(b" ")))

    def encode_word(self, word):
        text, first = word.decode().replace("\1", " "), word[:1]
        return self.encode_joining(
            text[1:] if first == b"\2" else text if first == b"\n" else " " + text)

    def encode_joining(self, text):
        return b"".join(map(self.runs.__getitem__, self.find_runs(text)))

    def encode_rest(self, texts):
        """Of texts without words: stretches of characters that join others from memory, and the
        characters between, which stand in no piece but their own, from a table."""
        if not self.byte_fallback:
            return [self.encode_joining(text) for text in texts]
        text, ends = "".join(texts), list(accumulate(map(len, texts), initial=0))
        chars = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.intp)
        joins = self.joins_others[chars]
        edges = np.zeros(len(chars) + 1, bool)
        edges[1:-1] = joins[1:] != joins[:-1]
        edges[ends] = True
        bounds = np.flatnonzero(edges)
        raw, starts = self.ids_of_chars(chars, joins)
        parts = [self.joining[text[a:b]] if joining else raw[start:stop]
                 for joining, (a, b), (start, stop) in zip(
                     joins[bounds[:-1]].tolist(), pairwise(bounds.tolist()),
                     pairwise(starts[bounds].tolist()))]
        return [b"".join(parts[a:b])
                for a, b in pairwise(np.searchsorted(bounds, ends).tolist())]

    def ids_of_chars(self, chars, joins):
        """(bytes of the ids of all characters but those that join others, where in it the ids of
        each begin and the last one's end)."""
        sizes = self.size_of_char[chars]                         # of those that join it stays 0
        if not (joins | (sizes > 0)).all():
            for char in np.unique(chars[~joins & (sizes == 0)]).tolist():
                ids = self.bare.encode(chr(char))
                self.ids_of_char[:len(ids), char] = ids
                self.size_of_char[char] = len(ids)
            sizes = self.size_of_char[chars]
        starts = np.zeros(len(chars) + 1, np.intp)
        np.cumsum(sizes, out=starts[1:])
        ids = np.empty(starts[-1], self.dtype)
        for k in range(4):
            more = np.flatnonzero(sizes > k)
            ids[starts[more] + k] = self.ids_of_char[k].take(chars[more])
        return ids.tobytes(), starts * self.dtype.itemsize

    def encode_run(self, text):
        return self.pack(self.bare.encode(text.replace(" ", "▁")))

    def pack(self, ids):
        return b"".join(map(self.id_bytes.__getitem__, ids))
