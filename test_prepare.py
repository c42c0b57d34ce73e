"""Proofs of prepare.py: what is tokenized decodes to itself, other programs agree on every id, and
bad input is refused whole."""
import ast
import json
import random

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

import prepare
from data import Source

TEXT = ("The quick brown fox jumps over the lazy dog, 1984 times.\n" * 3
        + "def f(x):\n    return x ** 2  # übermäßig\n\n" * 5 + "\ttabs\t\tand     spaces   \n"
        + "Sphinx of black quartz, judge my vow; pack my box with five dozen liquor jugs.\n")

AWKWARD = ["", " ", "  ", "a", " a", "  a ", "a  b   c    d", "\n", "\n\n\n", " \n ", "\t", "a\tb",
           "\r\n", "\x00", "a\x00b", "\x1b[0m\x7f", "Hello, world!", "1234567890", "١٢٣", "é",
           "e\u0301", "ﬁ", "Å", "中文字符", "日本語のテキスト", "🙂", "👩‍👩‍👧‍👦🏳️‍🌈", "\u200b\u200d\ufeff",
           "\u3000wide\u00a0", "\U0010ffff", "\ue000", "نص", "ह िन्दी",
           "for i in range(10):\n        print(i)", "<0x0A>", "<pad>", "[INST]", " leading",
           "trailing ", "MiXeD cAsE", "...", "!!??", "a" * 300, " " * 70, "▁▁x".replace("▁", " ")]


@pytest.fixture(scope="module")
def model():
    return prepare.train_tokenizer([TEXT], 320)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    prepare.write_tokenizer(folder, model)
    return folder


def write_files(folder, **files):
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(
            content if isinstance(content, bytes) else content.encode())
    return [str(folder / name.replace("_", ".")) for name in files]


# --------------------------------------------------------------------------------------------------
# The tokenizer

def test_decoding_gives_the_text_back(model):
    """Llama's settings lose nothing; those SentencePiece has by default fold spaces and recompose
    accents."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    every = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 0x2581)
    for text in [*AWKWARD, TEXT, every]:
        assert sp.decode(sp.encode(text)) == text
    assert sp.decode(sp.encode("a▁b")) == "a b"    # the one exception: it is how a space is written
    assert (sp.unk_id(), sp.bos_id(), sp.eos_id(), sp.pad_id()) == (0, 1, 2, -1)
    assert (sp.encode("1984", out_type=str) == ["▁", "1", "9", "8", "4"]
            and prepare.llama_style(model))


def test_transformers_gives_the_same_ids(model, folder):
    """tokenizer.json says by a list of merges what SentencePiece does by scores; and transformers'
    LlamaTokenizer class takes leading spaces apart differently, which no error tells."""
    sp, theirs = (sentencepiece.SentencePieceProcessor(model_proto=model),
                  AutoTokenizer.from_pretrained(folder))
    rng = random.Random(0)
    pieces = [sp.id_to_piece(i).replace("▁", " ") for i in range(259, len(sp))] + [
        "\n", "  ", "中", "🙂", "\x01"]
    random_texts = ["".join(rng.choices(pieces, k=rng.randint(1, 30))) for _ in range(500)]
    for text in [*AWKWARD, TEXT, *random_texts]:
        ids = sp.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, repr(text)
        assert theirs.encode(text) == [1, *ids]             # it puts <s> in front, as Llama's does
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)


def test_another_kind_of_tokenizer_gets_no_tokenizer_json(tmp_path, capsys):
    """A tokenizer.json that says something else than tokenizer.model would train on some ids and
    generate from others."""
    for k, options in enumerate([
            dict(model_type="unigram"), dict(model_type="bpe", normalization_rule_name="nmt_nfkc"),
            dict(model_type="bpe", normalization_rule_name="identity",
                 remove_extra_whitespaces=True),
            dict(model_type="bpe", normalization_rule_name="identity", add_dummy_prefix=False)]):
        out = prepare.io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")), model_writer=out, vocab_size=310,
            byte_fallback=True, minloglevel=2, **options)
        assert not prepare.llama_style(out.getvalue()), options
        (tmp_path / str(k)).mkdir()
        prepare.write_tokenizer(tmp_path / str(k), out.getvalue())
        assert [p.name for p in (tmp_path / str(k)).iterdir()] == ["tokenizer.model"]
        assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("vocab_size, words", [
    (5000, "more than this text can fill: at most"), (262, "too small.*need")])
def test_impossible_vocabularies_are_refused(vocab_size, words, tmp_path):
    """SentencePiece answers with a line of its C++; the number that would work is in it."""
    files = write_files(tmp_path, a_txt=TEXT)
    with pytest.raises(SystemExit, match=words) as error:
        prepare.main(["tokenizer", *files, f"--vocab_size={vocab_size}",
                      f"--out={tmp_path / 'my.model'}"])
    limit = int(str(error.value).replace(",", "").replace(":", "").split(
        "at most " if vocab_size > 999 else "need ")[1].split()[0])
    assert not (tmp_path / "my.model").exists()
    prepare.main(["tokenizer", *files, f"--vocab_size={limit}", f"--out={tmp_path / 'my.model'}"])
    assert len(prepare.load_tokenizer(tmp_path / "my.model")) == limit
    with pytest.raises(SystemExit, match="exists already"):
        prepare.main(["tokenizer", *files, f"--vocab_size={limit}",
                      f"--out={tmp_path / 'my.model'}"])
    for size in -1, 0, 259:
        with pytest.raises(SystemExit, match=f"{size} is too small: .* need 260"):
            prepare.main(["tokenizer", *files, f"--vocab_size={size}", f"--out={tmp_path / 'x'}"])
    (tmp_path / "a.txt").write_text("\n\n")
    with pytest.raises(SystemExit, match="nothing but newlines"):
        prepare.main(["tokenizer", *files, f"--out={tmp_path / 'x'}"])
    with pytest.raises(SystemExit, match="names nothing"):
        prepare.main(["tokenizer", *files, "--out="])


# --------------------------------------------------------------------------------------------------
# Sources

def test_documents_in_are_documents_out(folder, tmp_path):
    """Framing once wrong (only BOS, only EOS) cannot be mended later; a text on both sides makes
    validation worthless."""
    texts = [f"Document {k}: {'word ' * (k % 7)}{AWKWARD[k % len(AWKWARD)]}\n" for k in range(300)]
    rows = "".join(json.dumps({"content": text, "other": 1}) + "\n" for text in texts[1:])
    files = write_files(tmp_path, first_txt=texts[0], rest_jsonl=rows)
    out = tmp_path / "data/my"
    prepare.main(["tokenize", *files, f"--tokenizer={folder / 'tokenizer.model'}", f"--out={out}",
                  "--text_key=content", "--val_fraction=0.2"])
    sp, info, found = (prepare.load_tokenizer(out / "tokenizer.model"),
                       json.loads((out / "source.json").read_text()), {})
    for split in "train", "val":
        source = Source(out, split, 16)
        ids = source.read(0, source.info["tokens"])
        assert ids[0] == 1 and ids[-1] == 2
        documents = np.split(ids, np.flatnonzero(ids == 1)[1:])
        assert all(d[-1] == 2 and (d == 2).sum() == 1 for d in documents)
        found[split] = [sp.decode(d[1:-1].tolist()) for d in documents]
        assert len(documents) == info[split]["documents"]
        assert sum(len(text.encode()) for text in found[split]) == info[split]["bytes"]
        assert found[split] == [text for text in texts if text in set(found[split])]  # in order
    assert sorted(found["train"] + found["val"]) == sorted(texts) and 30 < len(found["val"]) < 90
    assert not set(found["train"]) & set(found["val"])
    assert sorted(p.name for p in out.iterdir()) == [
        "source.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "train_00000.bin", "val_00000.bin"]


def test_inspect_prints_what_is_there(folder, tmp_path, capsys):
    """Who cannot look at the tokens finds out after training what they were."""
    files = write_files(tmp_path, a_txt="Hello there. General greeting.", b_txt="The last words")
    prepare.main(["tokenize", *files, f"--tokenizer={folder / 'tokenizer.model'}",
                  f"--out={tmp_path / 'my'}", "--val_fraction=0"])
    capsys.readouterr()
    prepare.main(["inspect", str(tmp_path / "my")])
    printed = capsys.readouterr().out
    assert "2 documents" in printed and "bytes per token" in printed
    assert "train begins '<s>Hello there. General" in printed and "The last words</s>'" in printed
    assert "vocabulary of 320" in printed and "val begins" not in printed


@pytest.mark.parametrize("name, content, words", [
    ("a_txt", b"", "is empty"), ("a_jsonl", b"", "is empty"),
    ("a_txt", b"good \xff bad", "not UTF-8: byte 5 is 0xff"),
    ("a_jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2 is not UTF-8"),
    ("a_jsonl", b'{"text": "x"}\n{"te', ":2 is not JSON"),
    ("a_jsonl", b'{"content": "x"}\n', "--text_key"),
    ("a_jsonl", b'{"text": 7}\n', "'text' is no text"),
    ("a_jsonl", b'[1]\n', "no 'text', it is a list"),
    ("a_jsonl", b'{"text": "\\ud800"}\n', "no text that UTF-8"),
    ("a_jsonl", b'{"text": ""}\n\n', "no text in"), ("a_csv", b"x", "only .txt"),
    ("a_txt", None, "no file")])
def test_bad_input_is_refused_whole(name, content, words, folder, tmp_path):
    """One sentence with the place and the fix, and no folder that looks like a source."""
    files = write_files(tmp_path, good_txt="fine", **{name: content or b""})
    if content is None:
        (tmp_path / "a.txt").unlink()
    before = sorted(p.name for p in tmp_path.iterdir())
    for command in (["tokenize", f"--tokenizer={folder / 'tokenizer.model'}"],
                    ["tokenizer", "--vocab_size=300"]):
        with pytest.raises(SystemExit, match=words):
            prepare.main([command[0], *(files if "no text" not in words else files[1:]),
                          *command[1:], f"--out={tmp_path / 'out'}"])
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_bad_arguments_are_refused(folder, tmp_path):
    """A refusal after the work, or with half of it left behind, is worse than none."""
    files = write_files(tmp_path, a_txt="some text", bad_model=b"not a model")
    good = f"--tokenizer={folder / 'tokenizer.model'}"
    for arguments, words in [(["--tokenizer=nowhere.model"], "no tokenizer nowhere.model"),
                             ([f"--tokenizer={files[1]}"], "no SentencePiece model"),
                             ([good, "--val_fraction=1.5"], "val_fraction"),
                             ([good, "--val_fraction=0.9999999999"], "fell to validation")]:
        with pytest.raises(SystemExit, match=words):
            prepare.main(["tokenize", files[0], *arguments, f"--out={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        prepare.main(["tokenize", files[0], good, f"--out={tmp_path / 'out'}"])


# --------------------------------------------------------------------------------------------------
# The embedded corpus

def test_docstrings_are_cut_out():
    """A docstring left in the code would be in both sources, and what is learned from one would
    show in the other."""
    source = '''"""Module."""\nimport os\nclass A:\n    """A\n    doc."""\n    x = "kept"\n\
    def only(self):\n        """Only é."""\n
def one(): "on the line"\nasync def two():\n    "first"; y = 1\n    return """kept too"""\n'''
    docs, code = prepare.split_docstrings(source)
    assert docs == ["Module.", "A\ndoc.", "Only é.", "on the line", "first"]
    assert not any(doc in code for doc in docs) and code.count("kept") == 2
    tree = ast.parse(code)
    assert not [n for n in ast.walk(tree)
                if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(n)]
    compile(code, "x", "exec")


def test_the_demo_builds_two_sources(tmp_path, monkeypatch, capsys):
    """The demo is what newcomers meet first: it must build from whatever this Python brings, with
    one tokenizer for both."""
    monkeypatch.setattr(prepare, "embedded_corpus", lambda: (
        [f"Prose number {k}. " * 9 for k in range(60)],
        [f"x{k} = {k} + 1\n" * 9 for k in range(60)]))
    prepare.main(["demo", f"--data_dir={tmp_path}", "--vocab_size=300"])
    prose, code = (Source(tmp_path / name, "train", 32) for name in ("demo-prose", "demo-code"))
    assert prose.header.tokenizer == code.header.tokenizer and prose.windows > 10 < code.windows
    assert Source(tmp_path / "demo-prose", "val", 32).windows > 0
    prepare.main(["demo", f"--data_dir={tmp_path}", "--vocab_size=300"])  # again: in the same place
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo-code", "demo-prose"]


def test_no_text_is_in_both_demo_sources(monkeypatch):
    """Learning of prose would otherwise be measured as learning of code."""
    modules = prepare.library_modules()
    assert sum(map(len, modules.values())) > 4 * 10 ** 6
    some = {name: modules[name] for name in sorted(modules)[::8]}
    monkeypatch.setattr(prepare, "library_modules", lambda: some)
    prose, code = prepare.embedded_corpus()
    whole, long = "\n".join(code), [text.strip() for text in prose if len(text) > 200]
    assert len(long) > 200 and len(whole) > 10 ** 5
    assert sum(text in whole for text in long) == 0
