"""Llama's kind of tokenizer: train one, write it for other programs, encode; read a model folder's.

Byte-pair encoding (BPE) starts from the characters of a text and merges two neighbours, again and
again, whenever together they are a token of the vocabulary, the token with the best score first. Of
the tokens "th", "the", " the" and single characters, " them" becomes " the" and "m". A character
that is no token becomes its UTF-8 bytes, for which there are 256 tokens: any text can be encoded.
SentencePiece, which defines the ids, writes a space as U+2581 and puts one in front of each text.

gigatoken, where it is installed, finds the same ids several times faster. It is young, so the first
documents of each shard are encoded by both.
"""
import io
import json
import os
import re
import sys
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import numpy as np
import sentencepiece

from data import Header
from files import InputError, atomic_write, explain, read_json, write_json

try:
    from gigatoken import Tokenizer as GigaTokenizer
except ImportError:                 # optional
    GigaTokenizer = None

SPACE = "▁"         # U+2581, as which SentencePiece writes a space
GUARD = "\ufdd0"    # within the letters of a special token it keeps them text; no text has it

# --------------------------------------------------------------------------------------------------
# Training and loading

def train_tokenizer(texts, vocab_size):
    """The bytes of a SentencePiece model trained on a list of texts with the settings of Llama's:
    BPE, each digit a token, bytes for unknown characters, and no normalization, so that decoding
    gives back what was encoded."""
    def lines():    # newlines become byte tokens; the trainer would refuse very long lines
        for text in texts:
            for line in text.split("\n"):
                yield from (line[i:i + 4000] for i in range(0, len(line), 4000))

    if not any(lines()):
        sys.exit("there is nothing but newlines to train a tokenizer on")
    if vocab_size < 260:
        sys.exit(f"--vocab_size={vocab_size} is too small: 256 bytes, 3 special tokens and at "
                 "least one character need 260")
    model = io.BytesIO()
    try:
        # in text without spaces (DNA), U+2581 is so rare that it would get no token, and as three
        # byte tokens it would no longer decode as a space
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            required_chars=SPACE, max_sentence_length=1 << 20, minloglevel=2)
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
    """The SentencePieceProcessor of a tokenizer.model. Exits if the file is missing, damaged, or
    has no BOS or EOS token."""
    if os.path.isdir(path):
        sys.exit(f"{path} is a folder: give its tokenizer.model, {path}/tokenizer.model")
    if not os.path.isfile(path):
        sys.exit(f"there is no tokenizer {path}: train one with prepare.py tokenizer FILES... "
                 f"--out={path}, or copy the tokenizer.model of a Llama 2 model here")
    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
    except RuntimeError:
        sys.exit(f"{path} is no SentencePiece model, or it is damaged")
    if min(sp.bos_id(), sp.eos_id()) < 0:
        sys.exit(f"{path} has no BOS or no EOS token, and documents are framed by them")
    return sp


# --------------------------------------------------------------------------------------------------
# tokenizer.json: the same tokenizer for transformers and other programs

def parse_model(model):
    """A SentencePiece model (bytes) as a message with the fields pieces, trainer_spec and
    normalizer_spec."""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except TypeError:         # transformers has registered its own copy of this format
        from google.protobuf import descriptor_pool, message_factory
        ModelProto = message_factory.GetMessageClass(
            descriptor_pool.Default().FindMessageTypeByName("sentencepiece.ModelProto"))
    return ModelProto.FromString(model)


def llama_style(model):
    """Whether tokenizer.json can express a SentencePiece model (bytes): BPE with byte fallback that
    changes nothing but spaces to U+2581, with one put in front, and whose merges have an order."""
    parsed = parse_model(model)
    trainer, normalizer, kinds = parsed.trainer_spec, parsed.normalizer_spec, parsed.SentencePiece
    ids, by_score = {}, {}
    for i, piece in enumerate(parsed.pieces):
        if piece.type == kinds.NORMAL:
            ids[piece.piece] = i
            if len(piece.piece) > 1:
                by_score.setdefault(piece.score, []).append(piece.piece)
    if not set("".join(ids)) <= ids.keys():     # SentencePiece merges characters without a token
        return False
    for tied in by_score.values():
        # Of two merges with equal scores SentencePiece takes the one further left, a list the one
        # listed first. In Llama's only runs of 2, 3, ... spaces tie, whose ids are the same either
        # way if the single space has a higher id.
        if len(tied) > 1 and (sorted(tied) != [SPACE * n for n in range(2, len(tied) + 2)]
                              or ids[SPACE] < max(ids[piece] for piece in tied)):
            return False
    return (trainer.model_type == trainer.BPE and trainer.byte_fallback
            and not trainer.treat_whitespace_as_suffix
            and not normalizer.precompiled_charsmap and normalizer.add_dummy_prefix
            and not normalizer.remove_extra_whitespaces and normalizer.escape_whitespaces
            and {piece.type for piece in parsed.pieces}
            <= {kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE})


def tokenizer_json(sp):
    """The contents of tokenizer.json, a dict, for the processor of a llama_style model.

    SentencePiece merges the neighbours whose token has the best score, tokenizer.json the first of
    a list of pairs. So the list has each way to write a token as two others, by its score."""
    size, merges = len(sp), []
    tokens = [sp.id_to_piece(i) for i in range(size)]
    vocab = {token: i for i, token in enumerate(tokens)}
    for i, token in enumerate(tokens):
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)):
            for k in range(1, len(token)):
                left, right = vocab.get(token[:k]), vocab.get(token[k:])
                if left is not None and right is not None:
                    merges.append((-sp.get_score(i), left, right))
    special = [i for i in range(size) if sp.is_control(i) or sp.is_unknown(i)]
    bos = sp.id_to_piece(sp.bos_id())
    frame = [{"SpecialToken": {"id": bos, "type_id": 0}},
             *({"Sequence": {"id": name, "type_id": 0}} for name in "AB")]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": tokens[i], "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True} for i in special],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": frame[:2], "pair": frame,
            "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": sp.id_to_piece(sp.unk_id()),
                  "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "vocab": vocab,
                  "merges": [[tokens[a], tokens[b]] for _, a, b in sorted(merges)]}}


@lru_cache(1)
def export(model):
    """What tokenizer_json gives for a SentencePiece model (bytes); None if it cannot express it."""
    if llama_style(model):
        return tokenizer_json(sentencepiece.SentencePieceProcessor(model_proto=model))


def write_tokenizer(folder, model, **more):
    """Writes tokenizer.model (the bytes given) and what `transformers` reads, tokenizer.json and
    tokenizer_config.json, with `more` settings in the latter."""
    folder = Path(folder)
    with atomic_write(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    contents = export(model)
    if contents is None:
        print("tokenizer.json is left out, as it cannot express this tokenizer: "
              "transformers needs its own files")
    else:
        with atomic_write(folder / "tokenizer.json") as temporary:
            temporary.write_text(json.dumps(contents, ensure_ascii=False), "utf-8")
        # not LlamaTokenizer: in transformers 5 that class splits leading spaces differently than
        # SentencePiece
        more |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_eos_token": False,
                 "clean_up_tokenization_spaces": False}
    if more:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        write_json(folder / "tokenizer_config.json", more | {
            "add_bos_token": True, "bos_token": sp.id_to_piece(sp.bos_id()),
            "eos_token": sp.id_to_piece(sp.eos_id()), "unk_token": sp.id_to_piece(sp.unk_id())})


# --------------------------------------------------------------------------------------------------
# Encoding

CHECKED = 100               # documents that both encode, in each call of Encoder.encode
CACHE_CHARS = 64 * 10 ** 6  # after so many characters gigatoken's cache, up to 0.5 GB, starts anew
PART_CHARS = 10 ** 6        # SentencePiece needs 40 times a text's memory: it gets it in such parts


class Encoder:
    """Encodes documents by a SentencePiece model (bytes). The ids are those of
    SentencePieceProcessor.encode, in a token file's form: little-endian uint16, or uint32 for more
    than 65,536 tokens. `backend` is "gigatoken" or "sentencepiece"."""

    def __init__(self, model):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.tokenizer_sha256 = sha256(model).hexdigest()
        self.dtype = Header(len(self.sp), 0, 0, "").dtype
        contents, tokens = export(model), map(self.sp.id_to_piece, range(len(self.sp)))
        self.newline_merges = contents is None or any(
            "\n" in token and token != "\n" for token in tokens)
        self.backend = "gigatoken" if contents and GigaTokenizer else "sentencepiece"
        if self.backend == "gigatoken":
            # without special tokens, so that a literal "</s>" in a text stays text
            self.json = json.dumps(contents | {"added_tokens": []})
            self.renew_gigatoken()

    def renew_gigatoken(self):
        self.gigatoken, self.cached_chars = GigaTokenizer.from_json(self.json), 0

    def encode(self, texts):
        """Yields (text, its ids as bytes) for each of any number of texts."""
        by_gigatoken = self.backend == "gigatoken"
        for k, text in enumerate(texts):
            if by_gigatoken:
                ids = self.gigatoken.encode(text)
                self.cached_chars += len(text)
                if self.cached_chars > CACHE_CHARS:
                    self.renew_gigatoken()
                if k < CHECKED and not np.array_equal(ids, self.encode_by_sentencepiece(text)):
                    print(f"gigatoken's ids are wrong for {text[:80]!r}: SentencePiece encodes "
                          "alone from here", file=sys.stderr)
                    by_gigatoken = False
            if not by_gigatoken:
                ids = self.encode_by_sentencepiece(text)
            yield text, np.asarray(ids, self.dtype).tobytes()

    def encode_by_sentencepiece(self, text):
        """SentencePiece's ids of a text. Where newlines merge with nothing, a long text is encoded
        in parts that begin with one, and the space that is put in front of each is left out."""
        if self.newline_merges or len(text) <= PART_CHARS:
            return self.sp.encode(text)
        space, parts, start = len(self.sp.encode("\n")) - 1, [], 0
        while start < len(text):
            stop = text.find("\n", start + PART_CHARS)
            stop = stop if stop > 0 else len(text)
            ids = self.sp.encode(text[start:stop])
            parts.append(np.array(ids[space:] if start else ids, self.dtype))
            start = stop
        return np.concatenate(parts)


# --------------------------------------------------------------------------------------------------
# The tokenizer of a model folder

def template_prefix(contents):
    """The ids that the template in the `contents` of a tokenizer.json puts in front of a text."""
    processor = contents.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            names = [item["SpecialToken"]["id"] for item in
                     takewhile(lambda item: "SpecialToken" in item, part["single"])]
            return [i for name in names for i in part["special_tokens"][name]["ids"]]
    return []


def require_utf8(text):
    """Raises InputError for a text that no UTF-8 gives, as of bytes of a command line or a file."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"this is not UTF-8: {text!r:.80}")


class Tokenizer:
    """The tokenizer of a model folder. It finds the ids that `transformers` finds, but for two
    things: where no file says whether a prompt begins with BOS, it does; and spaces at the
    beginning of a text stay SentencePiece's, which transformers 5 changes for LlamaTokenizer.

        encode(text)           the ids of a document, in which a literal "</s>" is text
        encode_prompt(text)    those of a prompt, in which it is one id; they begin with `prefix`,
                               which is BOS or nothing
        encode_special(text)   the same without prefix; tokens that `guard` has marked stay text
        decode(ids)            the text, without special tokens
        size                   ids from here on are never drawn: tokenizer or model lacks them
        bos_id, eos_ids        with which a document begins; which end it
        special                the special tokens, {text: id}
        chat_template          in Jinja, or as tokenizer_config.json has it; named_tokens are
                               {"bos_token": "<s>", ...} for it

    SentencePiece reads tokenizer.model. The package tokenizers reads tokenizer.json, where that is
    the only one, or has tokens that tokenizer.model cannot express. Raises InputError for damaged
    files, and for ids that the model does not have.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        try:
            self.load()
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"the tokenizer's files in {folder} are damaged: {error!r}") from None

    def load(self):
        config, generation, names, settings, more = (self.read(name) for name in (
            "config", "generation_config", "special_tokens_map", "tokenizer_config",
            "added_tokens"))
        settings, contents = names | settings, {}
        with suppress(InputError):               # without it, tokenizer.model may be enough
            contents = self.read("tokenizer")

        def text(token):                         # given as it is, or as an object with flags
            return token.get("content") if isinstance(token, dict) else token

        def stated(key):                         # a null says nothing
            return next((found[key] for found in (generation, config)
                         if found.get(key) is not None), None)

        # tokens that were added to those of tokenizer.model: {text: (id, whether it is special)}
        special = {text(token) for key, value in settings.items() if "token" in key
                   for token in (value if isinstance(value, list) else [value])}
        added = {token: (i, token in special) for token, i in more.items()}
        added |= {token["content"]: (int(i), token.get("special") or token["content"] in special)
                  for i, token in (*settings.get("added_tokens_decoder", {}).items(), *(
                      (token["id"], token) for token in contents.get("added_tokens", [])))}
        # A legacy tokenizer puts a space also in front of what follows an added token. The class
        # LlamaTokenizer is told by this key whether it is one; others do as their tokenizer.json,
        # and those that have none are, unless the key denies it
        of_llama = str(settings.get("tokenizer_class")).startswith("LlamaTokenizer")
        legacy = settings.get("legacy", not of_llama) is not False or (contents and not of_llama)
        self.open_libraries(added, contents, legacy, of_llama)
        self.rows = config.get("vocab_size", sys.maxsize)
        self.size = min(max(self.vocab.values()) + 1, self.rows)

        bos, eos = (self.vocab.get(text(settings.get(key)) or usual)
                    for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>")))
        bos = stated("bos_token_id") if bos is None else bos
        eos = eos if stated("eos_token_id") is None else stated("eos_token_id")
        self.eos_ids = set(eos if isinstance(eos, list) else [eos]) - {None}
        named = {"bos_token": "<s>", "eos_token": "</s>"} | {
            key: text(value) for key, value in settings.items() if key.endswith("_token")}
        self.named_tokens = {key: token for key, token in named.items() if token in self.vocab}
        self.chat_template = settings.get("chat_template")
        self.prefix = template_prefix(contents)
        if not contents and bos is not None and settings.get("add_bos_token") is not False:
            self.prefix = [bos]
        self.bos_id = next((i for i in (*self.prefix, bos, *self.eos_ids) if i is not None), None)
        if not all(isinstance(i, int) and 0 <= i < self.size for i in (self.bos_id, *self.eos_ids)):
            raise InputError(f"a text of {self.folder} begins with id {self.bos_id} and ends with "
                             f"{sorted(self.eos_ids)}, but only ids below {self.size} are there: "
                             "correct eos_token_id and bos_token_id in its JSON files")

    def read(self, name):
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() or name == "config" else {}

    def open_libraries(self, added, contents, legacy, of_llama):
        """Opens tokenizer.model, or tokenizer.json where it knows better. Exits if it can't."""
        self.sp, self.fast, reasons = None, None, []
        try:
            path = self.folder / "tokenizer.model"
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
            self.encode_chunk = self.sp.encode if legacy else self.encode_within
            n = len(self.sp)
            self.vocab = {self.sp.id_to_piece(i): i for i in range(n)}
            # a prompt is cut at these; decoded, they are nothing, or the tokens that spell them
            self.cuts = {token: i for token, (i, _) in added.items()} | {
                token: i for token, i in self.vocab.items()
                if self.sp.is_control(i) or self.sp.is_unknown(i)}
            self.spelled = {i: [] if special else self.encode_within(token)
                            for token, (i, special) in added.items() if i >= n}
            self.vocab |= self.cuts
            self.special = {token: i for token, i in self.cuts.items()
                            if i < n and self.sp.is_control(i) or added.get(token, (i, True))[1]}
        except (RuntimeError, OSError) as error:
            reasons.append(explain(path, error))
        if not self.sp or any(token["id"] >= n or token.get("lstrip") or token.get("rstrip")
                              for token in contents.get("added_tokens", [])):
            try:
                import tokenizers
                path = self.folder / "tokenizer.json"
                self.fast = tokenizers.Tokenizer.from_file(str(path))
                self.fast.no_truncation()
                self.fast.no_padding()
                self.encode_chunk = self.encode_fast_chunk
                self.vocab = self.fast.get_vocab()
                for token in self.fast.get_added_tokens_decoder().values():
                    if not token.special and added[token.content][1]:
                        self.fast.add_special_tokens([token.content])
                self.special = {token.content: i for i, token
                                in self.fast.get_added_tokens_decoder().items() if token.special}
                if of_llama:                  # transformers 5 replaces these parts of the file
                    self.fast.normalizer = None
                    self.fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                        SPACE, "always" if legacy else "first", split=False)
            except ImportError:
                reasons.append("for its tokenizer.json: pip install tokenizers")
            except Exception as error:                     # the package raises bare ones
                reasons.append(explain(path, error))
        if not self.sp and not self.fast:
            sys.exit(f"{self.folder} has no tokenizer that can be read ({'; '.join(reasons)}): "
                     "put its tokenizer.model or tokenizer.json there")

    def encode_within(self, text):
        """SentencePiece's ids where it is to put no space in front: after a newline."""
        return self.sp.encode("\n" + text)[len(self.sp.encode("\n")):]

    def encode(self, text):
        if not self.fast:
            return self.check(self.sp.encode(text))
        self.fast.encode_special_tokens = True             # as the text that they are
        return self.check(self.fast.encode(text, add_special_tokens=False).ids)

    def encode_fast_chunk(self, chunk):
        """What the package tokenizers makes of a chunk of text that follows a special token."""
        token, i = next(iter(self.special.items()))
        self.fast.encode_special_tokens = False
        if self.fast.encode(f"{token}a", add_special_tokens=False).ids == [i, *self.encode("a")]:
            return self.encode(chunk)
        return self.encode("\n" + chunk)[len(self.encode("\n")):]      # no space is put in front

    def encode_prompt(self, text):
        # with nothing at all, there would be nothing to predict from
        return [*self.prefix, *self.encode_special(text)] or [self.bos_id]

    def guard(self, text):
        """The text, with a GUARD after each letter that may begin a special token, even one that
        ends in what is put after the text."""
        for letter in {token[0] for token in self.special}:
            text = text.replace(letter, letter + GUARD)
        return text

    def encode_special(self, text):
        cuts = self.special if self.fast else self.cuts
        known = "|".join(map(re.escape, sorted(cuts, key=len, reverse=True))) or "(?!)"
        # chunk, token, chunk, token, chunk ...
        first, *rest = parts = [part.replace(GUARD, "") for part in re.split(f"({known})", text)]
        plain = text.replace(GUARD, "")
        if self.fast and parts == re.split(f"({known})", plain):       # no GUARD has changed it
            self.fast.encode_special_tokens = False
            return self.check(self.fast.encode(plain, add_special_tokens=False).ids)
        ids = self.encode(first)
        for token, chunk in zip(rest[::2], rest[1::2]):
            ids += [cuts[token], *self.encode_chunk(chunk)]
        return self.check(ids)

    def check(self, ids):
        if ids and max(ids) >= self.rows:
            token = next(token for token, i in self.vocab.items() if i == max(ids))
            raise InputError(f"{token!r} is token {max(ids)}, and the model in {self.folder} knows "
                             f"only {self.rows}")
        return ids

    def decode(self, ids):
        if self.fast:
            return self.fast.decode(ids)
        return self.sp.decode([part for i in ids for part in self.spelled.get(
            i, [i] if i < len(self.sp) else [])])
