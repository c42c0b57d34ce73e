"""Proofs of tokenizer.py: decoding gives the text back, and transformers and gigatoken agree with
SentencePiece on every id."""
import base64
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import prepare
import tokenizer
from data import Source

HERE = Path(__file__).parents[1]

TEXT = ("The quick brown fox jumps over the lazy dog, 1984 times.\n" * 3
        + "def f(x):\n    return x ** 2  # übermäßig\n\n" * 5 + "\ttabs\t\tand     spaces   \n"
        + "Sphinx of black quartz, judge my vow; pack my box with five dozen liquor jugs.\n")
CHINESE = "今天天气很好，我们去公园散步。不知道明天会不会下雨？中文 mixed 文字 123。\n" * 9

AWKWARD = ["", " ", "  ", "a", " a", "  a ", "a  b   c    d", "\n", "\n\n\n", " \n ", "\t", "a\tb",
           "\r\n", "\x00", "a\x00b", "\x1b[0m\x7f", "Hello, world!", "1234567890", "١٢٣", "é",
           "e\u0301", "ﬁ", "Å", "中文字符", "日本語のテキスト", "🙂",
           "👩‍👩‍👧‍👦🏳️‍🌈", "\u200b\u200d\ufeff",
           "\u3000wide\u00a0", "\U0010ffff", "\ue000", "نص", "ह िन्दी",
           "for i in range(10):\n        print(i)", "<0x0A>", "<pad>", "[INST]", " leading",
           "trailing ", "MiXeD cAsE", "...", "!!??", "a" * 300, " " * 70, "▁▁x".replace("▁", " ")]
LITERAL = ["<s>", "</s>", "a</s>b", "<unk>", "<0x41>", "▁", "a▁b", "▁▁"]    # text, not tokens
EVERY = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)


def sp_of(model):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def model():
    return tokenizer.train_tokenizer([TEXT], 320)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.write_tokenizer(folder, model)
    return folder


def random_texts(sp, n):
    """n strings of tokens and of odd characters without meaning, and of real text."""
    rng = random.Random(0)
    tokens = [sp.id_to_piece(i).replace("▁", " ") for i in range(len(sp))]
    odd = [*AWKWARD[1:-4], *LITERAL, "☃☂", "\u1100\u1161", "\n", " ", "  "]
    for k in range(n):
        source = (TEXT, CHINESE)[k % 2]
        start = rng.randrange(len(source))
        yield (source[start:start + rng.randint(1, 300)] if k % 5 == 0 else "".join(
            rng.choice(tokens if rng.random() < 0.6 else odd) for _ in range(rng.randint(0, 40))))


# --------------------------------------------------------------------------------------------------
# Models

def test_decoding_gives_the_text_back(model):
    """Llama's settings lose nothing; those SentencePiece has by default fold spaces and recompose
    accents."""
    sp = sp_of(model)
    for text in [*AWKWARD, TEXT, EVERY.replace("▁", "")]:
        assert sp.decode(sp.encode(text)) == text
    assert sp.decode(sp.encode("a▁b")) == "a b"    # the one exception: it is how a space is written
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (0, 1, 2, -1)
    assert (sp.encode("1984", out_type=str) == ["▁", "1", "9", "8", "4"]
            and tokenizer.llama_style(model))


def test_spaces_survive_where_text_has_hardly_any():
    """In a corpus of DNA the space was so rare that it got no token: three bytes of U+2581 stood
    for it, which do not decode as a space, and stood in front of every document."""
    rng = random.Random(7)
    dna = ["".join(rng.choices("ACGT", k=6000)) for _ in range(30)]
    sp = sp_of(tokenizer.train_tokenizer(dna, 300))
    for text in [*dna, "AC GT", " A"]:
        assert sp.decode(sp.encode(text)) == text
    assert not sp.is_byte(sp.encode("ACGT")[0])


@pytest.mark.parametrize("vocab_size, words", [
    (5000, "more than this text can fill: at most"), (262, "too small.*need")])
def test_impossible_vocabularies_are_refused(vocab_size, words, tmp_path):
    """SentencePiece answers with a line of its C++; the number that would work is in it."""
    (tmp_path / "a.txt").write_text(TEXT)
    command = ["tokenizer", str(tmp_path / "a.txt"), f"--out={tmp_path / 'my.model'}"]
    with pytest.raises(SystemExit, match=words) as error:
        prepare.main([*command, f"--vocab_size={vocab_size}"])
    limit = int(str(error.value).replace(",", "").replace(":", "").split(
        "at most " if vocab_size > 999 else "need ")[1].split()[0])
    assert not (tmp_path / "my.model").exists()
    prepare.main([*command, f"--vocab_size={limit}"])
    assert len(tokenizer.load_tokenizer(tmp_path / "my.model")) == limit
    with pytest.raises(SystemExit, match="exists already"):
        prepare.main([*command, f"--vocab_size={limit}"])
    command[-1] = f"--out={tmp_path / 'x'}"
    for size in -1, 0, 259:
        with pytest.raises(SystemExit, match=f"{size} is too small: .* need 260"):
            prepare.main([*command, f"--vocab_size={size}"])
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(SystemExit, match="nothing but newlines"):
        prepare.main(command)
    with pytest.raises(SystemExit, match="names nothing"):
        prepare.main([*command[:-1], "--out="])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "my.model"]


# --------------------------------------------------------------------------------------------------
# tokenizer.json

def test_transformers_gives_the_same_ids(model, folder):
    """tokenizer.json says by a list of merges what SentencePiece does by scores; and transformers'
    LlamaTokenizer class takes leading spaces apart differently, which no error tells."""
    sp, theirs = sp_of(model), AutoTokenizer.from_pretrained(folder)
    rng = random.Random(0)
    tokens = [sp.id_to_piece(i).replace("▁", " ") for i in range(259, len(sp))] + [
        "\n", "  ", "中", "🙂", "\x01"]
    texts = ["".join(rng.choices(tokens, k=rng.randint(1, 30))) for _ in range(500)]
    for text in [*AWKWARD, TEXT, *texts]:
        ids = sp.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.encode(text) == [1, *ids]             # it puts <s> in front, as Llama's does
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def train(**options):
    """A SentencePiece model (bytes) of several scripts, by default not of Llama's kind."""
    out, text = io.BytesIO(), TEXT + CHINESE + "Ωμέγα привет мир café naïve 한국어 ﬁ\n" * 9
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_writer=out, minloglevel=2, **dict(
            model_type="bpe", vocab_size=600, hard_vocab_limit=False, character_coverage=0.995,
            normalization_rule_name="identity", remove_extra_whitespaces=False) | options)
    return out.getvalue()


LLAMA = dict(byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True)
MODELS = {              # options, of Llama's kind
    "Llama's way": (LLAMA, True),
    "pieces over scripts": (dict(byte_fallback=True, split_by_unicode_script=False,
                                 split_by_number=False), True),
    "spaces inside pieces": (dict(LLAMA, split_by_whitespace=False), True),
    "no byte fallback": (dict(allow_whitespace_only_pieces=True), False),
    "nmt_nfkc": (dict(byte_fallback=True, normalization_rule_name="nmt_nfkc"), False),
    "spaces stripped": (dict(byte_fallback=True, remove_extra_whitespaces=True), False),
    "no dummy prefix": (dict(byte_fallback=True, add_dummy_prefix=False), False),
    "spaces behind words": (dict(byte_fallback=True, treat_whitespace_as_suffix=True), False),
    "user-defined": (dict(LLAMA, user_defined_symbols=["\n\n", "the", "▁over"]), False),
    "unigram": (dict(byte_fallback=True, model_type="unigram"), False)}


@pytest.mark.parametrize("name", MODELS)
def test_only_what_it_can_say_gets_a_tokenizer_json(name, tmp_path, capsys):
    """A tokenizer.json that says something else than tokenizer.model would train on some ids and
    generate from others."""
    options, llama_style = MODELS[name]
    model = train(**options)
    assert tokenizer.llama_style(model) == llama_style
    tokenizer.write_tokenizer(tmp_path, model)
    assert (tmp_path / "tokenizer.json").exists() == llama_style
    assert ("left out" in capsys.readouterr().out) == (not llama_style)
    if llama_style:
        theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        sp = sp_of(model)
        for text in random_texts(sp, 300):
            if not any(special in text for special in ("<s>", "</s>", "<unk>")):
                assert theirs.encode(text, add_special_tokens=False).ids == sp.encode(text)


def equal_scores(parsed):
    for piece in parsed.pieces[300:]:
        piece.score = 0.0


def without_characters(parsed):
    pieces = [piece for piece in parsed.pieces if piece.type != 1 or piece.piece not in "eai"]
    del parsed.pieces[:]
    parsed.pieces.extend(pieces)


def more_than_one_newline(parsed):
    piece = parsed.pieces.add()
    piece.piece, piece.score = "\n\n", -0.1


def runs_of_spaces(parsed, last=True):
    """As in Llama's vocabulary: tokens of 2 to 16 spaces with one score. The token of a single
    space comes later."""
    pieces = [piece for piece in parsed.pieces if set(piece.piece) != {"▁"}]
    single = next(piece for piece in parsed.pieces if piece.piece == "▁")
    runs = [type(single)(piece="▁" * n, score=-1e9) for n in range(2, 17)]
    del parsed.pieces[:]
    parsed.pieces.extend([*pieces[:259], *[single] * (not last), *runs, *pieces[259:],
                          *[single] * last])


def space_before_its_runs(parsed):
    runs_of_spaces(parsed, last=False)


def some_runs_of_spaces(parsed):
    runs_of_spaces(parsed)
    del parsed.pieces[262]


def unused(parsed):
    parsed.pieces[400].type = 5


def spaces_stay(parsed):
    parsed.normalizer_spec.escape_whitespaces = False


def test_runs_of_spaces_may_have_equal_scores(tmp_path, unchecked):
    """Llama's own vocabulary has them, and would otherwise get no tokenizer.json."""
    parsed = tokenizer.parse_model(train(**LLAMA))
    runs_of_spaces(parsed)
    model, rng = parsed.SerializeToString(), random.Random(0)
    tokenizer.write_tokenizer(tmp_path, model)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoder = tokenizer.Encoder(model)
    texts = [*(" " * n for n in range(70)), *random_texts(encoder.sp, 100), *(
        "".join(rng.choices([" ", "  ", " " * 15, " " * 17, "the", "\n", "x"], k=9))
        for _ in range(300))]
    for text in texts:
        if not any(special in text for special in ("<s>", "</s>", "<unk>")):
            assert theirs.encode(text, add_special_tokens=False).ids == encoder.sp.encode(text)
    same_ids(encoder, texts)
    assert encoder.backend == "gigatoken"


@pytest.mark.parametrize("edit", [equal_scores, without_characters, more_than_one_newline, unused,
                                  spaces_stay, space_before_its_runs, some_runs_of_spaces])
def test_vocabularies_that_merges_cannot_express(edit, tmp_path):
    """Vocabularies put together from two models (Chinese-LLaMA's) have equal scores, where
    SentencePiece takes the merge further left; and it merges characters that are no tokens."""
    parsed = tokenizer.parse_model(train(**LLAMA))
    assert tokenizer.llama_style(parsed.SerializeToString())
    edit(parsed)
    model = parsed.SerializeToString()
    tokenizer.write_tokenizer(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    same_ids(tokenizer.Encoder(model), [*AWKWARD, *LITERAL, *random_texts(sp_of(model), 100)])


def test_the_format_is_known_beside_transformers():
    """transformers brings a copy of SentencePiece's message format, and protobuf refuses a second
    one of the same name."""
    code = """if True:
        import transformers.utils.sentencepiece_model_pb2_new, tokenizer
        print(tokenizer.llama_style(tokenizer.train_tokenizer(["some text abc"], 272)))"""
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr


# --------------------------------------------------------------------------------------------------
# Encoding

def same_ids(encoder, texts):
    texts = list(texts)
    found = list(encoder.encode(texts))
    assert [text for text, _ in found] == texts
    for text, ids in found:
        assert np.frombuffer(ids, encoder.dtype).tolist() == encoder.sp.encode(text), repr(text)


@pytest.fixture
def unchecked(monkeypatch):
    """gigatoken alone, without SentencePiece, which would hide its mistakes."""
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(tokenizer, "CHECKED", 0)


@pytest.mark.parametrize("name", [name for name, (_, llama_style) in MODELS.items() if llama_style])
def test_gigatoken_gives_the_same_ids(name, unchecked):
    """One wrong id in a thousand would be learned, and never be seen."""
    encoder = tokenizer.Encoder(train(**MODELS[name][0]))
    assert encoder.backend == "gigatoken"
    same_ids(encoder, [*AWKWARD, *LITERAL, EVERY, *random_texts(encoder.sp, 500)])
    same_ids(encoder, map(chr, [*range(0xD800), *range(0xE000, 0x110000, 499)]))


@pytest.mark.slow
def test_gigatoken_gives_the_same_ids_in_thousands_of_strings(unchecked):
    """The rare cases are rare."""
    for options in [options for options, llama_style in MODELS.values() if llama_style]:
        encoder = tokenizer.Encoder(train(**options))
        same_ids(encoder, EVERY)                                        # each a document
        same_ids(encoder, random_texts(encoder.sp, 20_000))


def test_a_difference_ends_the_use_of_gigatoken(model, capsys):
    """gigatoken is young: SentencePiece, which defines the ids, has to notice."""
    pytest.importorskip("gigatoken")

    class Wrong:
        def encode(self, text):
            return np.array(encoder.sp.encode(text) if text == "fine" else [5], np.uint32)

    encoder = tokenizer.Encoder(model)
    encoder.gigatoken = Wrong()
    same_ids(encoder, ["fine", "quick brown fox", "over the lazy dog"] * 100)
    assert capsys.readouterr().err.count("wrong for 'quick brown fox'") == 1
    late = dict(encoder.encode(["fine"] * tokenizer.CHECKED + ["later"]))
    assert late["later"] == b"\5\0"                   # the check ends: it is a sample, not a proof


@pytest.mark.parametrize("fast", [True, False])
def test_no_gigatoken_will_do(fast, model, monkeypatch):
    """gigatoken is optional, and there are not wheels of it for every machine."""
    if not fast:
        monkeypatch.setattr(tokenizer, "GigaTokenizer", None)
    encoder = tokenizer.Encoder(model)
    assert fast or encoder.backend == "sentencepiece"
    same_ids(encoder, [*AWKWARD, *LITERAL, TEXT])


def test_long_texts_are_encoded_in_parts(model, monkeypatch):
    """SentencePiece takes 2 GB for a document of 50 MB. A part that began without a newline, or
    kept the space that SentencePiece puts in front, would have other ids."""
    for some in model, train(**LLAMA), train(**MODELS["nmt_nfkc"][0]):
        encoder, whole = tokenizer.Encoder(some), sp_of(some).encode
        for size in 1, 2, 7, 50:
            monkeypatch.setattr(tokenizer, "PART_CHARS", size)
            for text in [*AWKWARD, TEXT, CHINESE, "\n \n  x\n\n\ny", *random_texts(encoder.sp, 50)]:
                assert list(encoder.encode_by_sentencepiece(text)) == whole(text), repr(text)


def test_the_cache_of_gigatoken_is_bounded(model, unchecked, monkeypatch):
    """On a corpus that never repeats itself what is remembered would grow without end."""
    monkeypatch.setattr(tokenizer, "CACHE_CHARS", 2000)
    encoder, used = tokenizer.Encoder(model), set()
    for text in ["x" * 700] * 7:
        same_ids(encoder, [text])
        used.add(id(encoder.gigatoken))
        assert encoder.cached_chars <= 2000
    assert encoder.cached_chars == 700 and len(used) > 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("fast", [True, False])
def test_a_document_of_50_megabytes(fast, folder, tmp_path):
    """SentencePiece takes 2 GB for it."""
    rng = random.Random(0)
    words = [TEXT, CHINESE, "🙂 ", *(f"{rng.randrange(10 ** 9):x} " for _ in range(10 ** 5))]
    text = "".join(rng.choices(words, weights=[3, 3, 3, *[1] * 10 ** 5], k=6_000_000))
    while len(text.encode()) > 5 * 10 ** 7:
        text = text[:-10 ** 5]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    code = f"""if True:
        import prepare, tokenizer
        if not {fast}:
            tokenizer.GigaTokenizer = None
        prepare.main(["tokenize", "a.jsonl", "--tokenizer={folder / 'tokenizer.model'}",
                      "--out=out", "--workers=1", "--val_fraction=0"])
        print(open("/proc/self/status").read())"""            # getrusage counts its parent's peak
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, check=True,
                         capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert int(run.stdout.split("VmHWM:")[1].split()[0]) < 10 ** 6               # kilobytes
    source = Source(tmp_path / "out", "train", 16)
    ids = source.read(1, source.info["tokens"] - 1)
    expected = np.array(tokenizer.load_tokenizer(folder / "tokenizer.model").encode(text))
    assert np.array_equal(ids, expected) and len(text.encode()) > 4.9e7


def test_text_without_words_is_not_slow(model, unchecked):
    """Base64 in notebooks, where every run of characters is new, once took eight times as long as
    SentencePiece alone."""
    rng, encoder = random.Random(0), tokenizer.Encoder(model)
    seconds = {"ours": [], "theirs": []}
    for _ in range(3):
        texts = [base64.b64encode(rng.randbytes(3000)).decode() for _ in range(50)]
        for name, encode in ("ours", encoder.encode), ("theirs", encoder.sp.encode):
            start = time.perf_counter()
            list(encode(texts))
            seconds[name].append(time.perf_counter() - start)
    assert min(seconds["ours"]) < 2 * min(seconds["theirs"]), seconds
