"""Llama's kind of tokenizer: train one, load one, write it for other programs, encode documents.

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
import sys
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import numpy as np
import sentencepiece

from data import Header
from files import atomic_write, read_json, write_json

try:
    from gigatoken import Tokenizer as GigaTokenizer
except ImportError:                 # optional
    GigaTokenizer = None

SPACE = "▁"         # U+2581, as which SentencePiece writes a space

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

    def train(**options):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20, minloglevel=2, **options)
        return model.getvalue()

    if not any(lines()):
        sys.exit("there is nothing but newlines to train a tokenizer on")
    if vocab_size < 260:
        sys.exit(f"--vocab_size={vocab_size} is too small: 256 bytes, 3 special tokens and at "
                 "least one character need 260")
    try:
        model = train()
        # In text without spaces (DNA), U+2581 is so rare that it gets no token. As three byte
        # tokens it would no longer decode as a space.
        if not sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id(SPACE):
            model = train(required_chars=SPACE)
    except (RuntimeError, ValueError) as error:
        numbers = [int(word.strip(".")) for word in str(error).split() if word.strip(".").isdigit()]
        if "too high" in str(error):
            sys.exit(f"--vocab_size={vocab_size} is more than this text can fill: "
                     f"at most {numbers[-1]}, or give more text")
        if "smaller than required_chars" in str(error):
            sys.exit(f"--vocab_size={vocab_size} is too small for the characters of this text, "
                     f"which with the 256 bytes and 3 special tokens need {numbers[-1]}: give more")
        raise
    return model


def load_tokenizer(path):
    """The SentencePieceProcessor of a tokenizer.model. Exits if the file is missing, damaged, or
    has no BOS or EOS token."""
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


def write_tokenizer(folder, model):
    """Writes tokenizer.model (the bytes given) and what `transformers` reads, tokenizer.json and
    tokenizer_config.json."""
    folder = Path(folder)
    with atomic_write(folder / "tokenizer.model") as temporary:
        temporary.write_bytes(model)
    contents = export(model)
    if contents is None:
        print("tokenizer.json is left out, as it cannot express this tokenizer: "
              "transformers needs its own files")
        return
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    with atomic_write(folder / "tokenizer.json") as temporary:
        temporary.write_text(json.dumps(contents, ensure_ascii=False), "utf-8")
    # not LlamaTokenizer: in transformers 5 that class splits leading spaces differently than
    # SentencePiece
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
        "add_eos_token": False, "clean_up_tokenization_spaces": False,
        "bos_token": sp.id_to_piece(sp.bos_id()), "eos_token": sp.id_to_piece(sp.eos_id()),
        "unk_token": sp.id_to_piece(sp.unk_id())})


# --------------------------------------------------------------------------------------------------
# Encoding

CHECKED = 100               # documents that both encode, in each call of Encoder.encode
CACHE_CHARS = 64 * 10 ** 6  # after so many characters gigatoken's cache, up to 0.5 GB, starts anew
PART_CHARS = 10 ** 6        # SentencePiece needs 40 times a text's memory: it gets it in such parts


class Encoder:
    """Encodes documents by a SentencePiece model, given as bytes or as a path. The ids are those of
    SentencePieceProcessor.encode, in a token file's form: little-endian uint16, or uint32 for more
    than 65,536 tokens. `backend` is "gigatoken" or "sentencepiece"."""

    def __init__(self, model):
        if not isinstance(model, bytes):
            load_tokenizer(model)                       # exits if it is none
            model = Path(model).read_bytes()
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
# The tokenizer of a model

class Tokenizer:
    """The tokenizer of a model folder: `encode` and `decode`, without special tokens; `size`;
    `bos_id`, with which a text begins, and `eos_ids`, which end it. It is read from tokenizer.model
    by sentencepiece, or else from tokenizer.json by tokenizers."""

    def __init__(self, folder):
        folder = Path(folder)
        hf = read_json(folder / "config.json")
        if (folder / "generation_config.json").exists():
            hf |= read_json(folder / "generation_config.json")
        eos = hf.get("eos_token_id", 2)
        self.bos_id = hf.get("bos_token_id", 1)
        self.eos_ids = set(eos) if isinstance(eos, list) else {eos}
        try:
            if (folder / "tokenizer.model").exists():
                sp = sentencepiece.SentencePieceProcessor(
                    model_file=str(folder / "tokenizer.model"))
                self.size, self.encode, self.decode = len(sp), sp.encode, sp.decode
                self.token = sp.id_to_piece
            elif (folder / "tokenizer.json").exists():
                import tokenizers
                fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
                self.size, self.decode = fast.get_vocab_size(), fast.decode
                self.encode = lambda text: fast.encode(text, add_special_tokens=False).ids
                self.token = fast.id_to_token
            else:
                sys.exit(f"{folder} has no tokenizer: "
                         "put its tokenizer.model (or tokenizer.json) there")
        except ImportError as error:
            sys.exit(f"{folder} has a tokenizer.json only: pip install {error.name}")
        except Exception as error:      # both libraries raise bare ones for a damaged file
            sys.exit(f"the tokenizer of {folder} cannot be read: {error}")

    def vocabulary(self):
        return [self.token(i) for i in range(self.size)]
