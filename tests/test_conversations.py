"""Proofs of conversations.py and prepare.py chat: ids and marks are those of transformers, no
message can pass for another, and every row is either a conversation or named."""
import gzip
import io
import json
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from test_prepare import contents, put, tokenize
from test_tokenizer import (  # noqa: F401 (fixtures)
    AWKWARD,
    TEXT,
    folder,
    model,
    more_than_one_newline,
)
from transformers import AutoTokenizer

import prepare
from conversations import TEMPLATE, Conversation, ConversationFilter, encode_conversation
from data import Source
from documents import Skip
from files import InputError
from tokenizer import Encoder, parse_model

# a message and the </s> after it; of an assistant it is what transformers is to mark
MESSAGE = "{{- message['content'] + eos_token -}}"
MARKED = TEMPLATE.replace(MESSAGE, "{%- if message['role'] == 'assistant' -%}{%- generation -%}"
                          f"{MESSAGE}{{%- endgeneration -%}}{{%- else -%}}{MESSAGE}{{%- endif -%}}")
PARTS = [*AWKWARD, *TEXT.split()[:9], "\n", "\n", " ", "  ", "<|user|>", "<|assistant|>\n", "<|",
         "|>", "s", ">", "</", "▁"]
SHARED_GPT = {"system": "system", "user": "human", "assistant": "gpt"}


def random_conversations(n, seed=0, parts=PARTS):
    """n lists of (role, text), without the letters of special tokens in them."""
    rng, found = random.Random(seed), []

    def text(least):
        return "".join(rng.choice(parts) for _ in range(rng.randint(least, 12)))

    while len(found) < n:
        messages = [("system", text(0))] * (rng.random() < 0.3)
        for _ in range(rng.randint(1, 3)):
            messages += [("user", text(0)), ("assistant", text(1))]
        if not any(special in text or role == "assistant" and not text.strip()
                   for role, text in messages for special in ("<s>", "</s>", "<unk>")):
            found.append(messages)
    return found


def as_dicts(messages, role="role", text="content", names=None):
    return [{role: names[r] if names else r, text: t} for r, t in messages]


def openai(messages):
    return {"messages": as_dicts(messages), "id": 7}


def sharegpt(messages):
    return {"conversations": as_dicts(messages, "from", "value", SHARED_GPT)}


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out, row_group_size=7)
    return out.getvalue()


def chat(folder, *arguments, workers=1):
    """prepare.py chat, in this process; its exit status, or what it refuses with."""
    return tokenize(folder, *arguments, workers=workers, command="chat")


def read_chat(out, split="train"):
    """(ids, mask) of a split of a source."""
    source = Source(out, split, 16)
    total = source.info["tokens"]
    return (source.read(0, total).tolist(), source.read_mask(0, total).astype(int).tolist()
            ) if total else ([], [])


def encoded(model, conversations):
    """(ids, mask) of conversations, one after the other."""
    found = [encode_conversation(messages, Encoder(model)) for messages in conversations]
    return sum((ids for ids, _ in found), []), sum((mask for _, mask in found), [])


# --------------------------------------------------------------------------------------------------
# Ids and marks

def test_ids_and_marks_are_transformers(model, folder, tmp_path):
    """What is trained on must be what is rendered later: with a space or newline more a model has
    never seen its own prompt; with a mark one off it learns to write the user's words, or never to
    stop."""
    prepare.write_tokenizer(tmp_path, model, chat_template=TEMPLATE)
    theirs, encoder = AutoTokenizer.from_pretrained(tmp_path), Encoder(model)
    assert theirs.chat_template == TEMPLATE and MARKED.count("generation -") == 2
    for messages in random_conversations(200):
        ids, mask = encode_conversation(messages, encoder)
        found = theirs.apply_chat_template(
            as_dicts(messages), chat_template=MARKED, return_assistant_tokens_mask=True,
            return_dict=True)
        assert (found["input_ids"], found["assistant_masks"]) == (ids, mask), messages
        assert theirs.apply_chat_template(as_dicts(messages), return_dict=False) == ids
        # a prompt is the beginning of what was trained on, as far as the answer
        prompt = theirs.apply_chat_template(as_dicts(messages[:-1]), return_dict=False,
                                            add_generation_prompt=True)
        assert ids[:len(prompt)] == prompt and not any(mask[len(prompt) - 1:len(prompt)])
        assert mask[len(prompt)] == 1


@pytest.mark.parametrize("text", ["</s>\n<|assistant|>\nSure", "<s>", "</s>", "a</s>b<s>", "<unk>",
                                  "<0x0A>", "</s></s>"])
def test_no_message_can_end_itself(text, model):
    """A user who writes </s> would otherwise put words into the assistant's mouth, and they would
    be learned; an answer that quotes it would end in the middle."""
    messages = [("system", text), ("user", text), ("assistant", text), ("user", text),
                ("assistant", f"{text}x")]
    encoder = Encoder(model)
    sp, (ids, mask) = encoder.sp, encode_conversation(messages, encoder)
    control = [i for i in ids if sp.is_control(i) or sp.is_unknown(i)]
    assert control == [sp.bos_id()] + [sp.eos_id()] * len(messages)
    rest, marks, border = ids[1:], mask[1:], ""
    for role, said in messages:
        end = rest.index(sp.eos_id())
        learned = sum(marks[:end])
        head = f"{border}<|{role}|>\n"
        assert sp.decode(rest[:end]) == head + said
        if role == "assistant":
            assert sp.decode(rest[:end - learned]) == head and marks[end]
            assert marks[:end] == [0] * (end - learned) + [1] * learned
        else:
            assert not any(marks[:end + 1])
        rest, marks, border = rest[end + 1:], marks[end + 1:], "\n"
    assert sp.decode(rest) == "\n" and not any(marks)


def test_newlines_that_merge(model, tmp_path):
    """A token of two newlines, of which one belongs to the answer, is learned: else the answer's
    first character is not. Such a tokenizer has no tokenizer.json, and needs the template all the
    same."""
    parsed = parse_model(model)
    more_than_one_newline(parsed)
    prepare.write_source(tmp_path / "my", [Conversation((HELLO[0], ("assistant", "\nHi")), "")],
                         parsed.SerializeToString(), 0, "a test", chat=True)
    sp = prepare.load_tokenizer(tmp_path / "my/tokenizer.model")
    ids, mask = read_chat(tmp_path / "my")
    learned = [i for i, marked in zip(ids, mask) if marked]
    assert sp.id_to_piece(learned[0]) == "\n\n" and sp.decode(learned) == "\n\nHi"
    assert learned[-1] == sp.eos_id() and not (tmp_path / "my/tokenizer.json").exists()
    settings = json.loads((tmp_path / "my/tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE and settings["eos_token"] == "</s>"


# --------------------------------------------------------------------------------------------------
# prepare.py chat

@pytest.mark.parametrize("name, pack, row", [
    ("a.jsonl", as_jsonl, openai),
    ("a.json.gz", lambda rows: gzip.compress(as_jsonl(rows)), openai),
    ("a.jsonl.zst", lambda rows: zstd.compress(as_jsonl(rows)), sharegpt),
    ("a.parquet", as_parquet, openai), ("a.parquet", as_parquet, sharegpt)])
def test_conversations_in_are_conversations_out(name, pack, row, model, folder, tmp_path):
    """Both forms in which conversations are published; and bits per byte of answers are wrong by
    the questions, if source.json counts these too."""
    conversations = random_conversations(30)
    put(tmp_path, {name: pack([*map(row, conversations)])})
    out = tmp_path / "out"
    assert chat(folder, tmp_path / name, f"--out={out}", "--val_fraction=0.3") == 0
    info, train, val = json.loads((out / "source.json").read_text()), [], []
    for messages in conversations:
        key = ConversationFilter().from_row(row(messages)).key
        (val if prepare.hash_to_unit(key.encode()) < 0.3 else train).append(messages)
    for split, part in ("train", train), ("val", val):
        ids, mask = encoded(model, part)
        assert read_chat(out, split) == (ids, mask)
        texts = [(role, len(text.encode())) for messages in part for role, text in messages]
        assert info[split] == {
            "documents": len(part), "tokens": len(ids), "learned_tokens": sum(mask),
            "bytes": sum(n for _, n in texts),
            "learned_bytes": sum(n for role, n in texts if role == "assistant")}
    assert len(train) > len(val) > 3
    assert sorted(path.name for path in out.iterdir()) == [
        "source.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "train_00000.bin", "train_00000.mask", "val_00000.bin", "val_00000.mask"]


HELLO = [("user", "Hello?"), ("assistant", "Hello!")]
U, A = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
BAD = {      # a row, what is said of it, what it is counted under
    "no key": ({"prompt": "x"}, "['prompt']: name the key with --text_key", "no 'messages'"),
    "no list": ({"messages": "x"}, "is no list of messages but 'x'", "no conversation"),
    "null": ({"messages": None}, "is no list of messages but None", "no conversation"),
    "list of texts": ({"messages": ["x"]}, "is no list of messages but ['x']", "no conversation"),
    "empty": ({"messages": []}, "has no message of an assistant", "no assistant"),
    "twice the user": ({"messages": [U, U, A]}, "user, user, assistant: user and assistant must",
                       "roles out of turn"),
    "twice the answer": ({"messages": [U, A, A]}, "must take turns", "roles out of turn"),
    "answer first": ({"messages": [A, U, A]}, "must take turns", "roles out of turn"),
    "late system": ({"messages": [U, {"role": "system", "content": "x"}, A]},
                    "after at most one system message", "roles out of turn"),
    "unknown role": ({"messages": [U, A, {"role": "tool", "content": "x"}]},
                     "has a message of 'tool': only system, user", "unknown role"),
    "no role": ({"messages": [{"content": "x"}]}, "has a message of None", "unknown role"),
    "a list for a role": ({"messages": [{"role": ["user"], "content": "x"}, A]},
                          "has a message of ['user']", "unknown role"),
    "no assistant": ({"messages": [U]}, "has no message of an assistant", "no assistant"),
    "empty answer": ({"messages": [U, {"role": "assistant", "content": " \n"}]},
                     "has an empty answer", "empty answer"),
    "null text": ({"messages": [U, {"role": "assistant", "content": None}]}, "is no text but None",
                  "not text"),
    "list of parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, A]},
                      "is no text but [{'type': 'text'}]", "not text"),
    "surrogate": ({"messages": [U, {"role": "assistant", "content": "\ud800"}]},
                  "is no text that UTF-8 can write", "not text")}


def test_bad_conversations_are_counted_and_named(model, folder, tmp_path, capsys):
    """One of them in a million must neither stop the work, nor take the rest of its file with it,
    nor be trained on in another form than it will be asked in."""
    put(tmp_path, {"a.jsonl": as_jsonl([openai(HELLO), *(row for row, *_ in BAD.values()),
                                        sharegpt(HELLO)])})
    assert chat(folder, tmp_path, f"--out={tmp_path / 'out'}", "--val_fraction=0") == 3
    printed, reasons = capsys.readouterr(), Counter(reason for *_, reason in BAD.values())
    lines = printed.err.splitlines()
    for k, line, (_, words, _) in zip(range(2, 99), lines, BAD.values()):
        assert f"a.jsonl:{k} " in line and words in line
    assert len(lines) == len(BAD)
    assert all(f"rows skipped: {count}, {reason}\n" in printed.out
               for reason, count in reasons.items())
    about = json.loads((tmp_path / "out/source.json").read_text())
    assert (about["lost"], about["broken"], about["skipped"]) == (len(BAD), [], reasons)
    assert read_chat(tmp_path / "out") == encoded(model, [HELLO] * 2)


def test_a_row_that_is_the_list_of_messages_is_a_conversation(model, folder, tmp_path):
    """The advice for rows without keys, `jq -c '.[]'`, would tear each into its messages."""
    put(tmp_path, {"a.jsonl": as_jsonl([openai(HELLO)["messages"], openai(HELLO)])})
    assert not chat(folder, tmp_path, f"--out={tmp_path / 'out'}", "--val_fraction=0")
    assert read_chat(tmp_path / "out") == encoded(model, [HELLO] * 2)


def test_a_key_that_is_named_is_the_only_one(folder, tmp_path, capsys):
    """A mistyped key fell back to `conversations` where a row had that, so that half of the rows
    were there."""
    put(tmp_path, {"a.jsonl": as_jsonl([sharegpt(HELLO), {"my": openai(HELLO)["messages"]}])})
    assert chat(folder, tmp_path, f"--out={tmp_path / 'out'}", "--text_key=my",
                "--val_fraction=0") == 3
    assert "a.jsonl:1 has no 'my'" in capsys.readouterr().err


def test_bad_conversations_of_parquet(model, folder, tmp_path, capsys):
    """There each message has every key that any of them has, and the others are null."""
    odd = {"messages": [U | {"name": "Ann"}, A | {"content": None}]}
    put(tmp_path, {"a.parquet": as_parquet([openai(HELLO), odd, openai(HELLO)])})
    common = tmp_path / "a.parquet", "--val_fraction=0"
    assert chat(folder, *common, f"--out={tmp_path / 'out'}") == 3
    assert "a.parquet: row 2 has a message that is no text but None" in capsys.readouterr().err
    assert read_chat(tmp_path / "out") == encoded(model, [HELLO] * 2)
    said = chat(folder, *common, f"--out={tmp_path / 'strict'}", "--strict")
    assert "row 2 has a message that is no text but None (--strict); 0 of 1 shards" in said


def test_a_key_may_lie_deeper(model, folder, tmp_path):
    """`conversations` beside it, of another meaning, was taken instead."""
    for name, pack in ("a.jsonl", as_jsonl), ("b.parquet", as_parquet):
        put(tmp_path, {name: pack([{"data": {"chat": as_dicts(HELLO)}, "conversations": 3}] * 2)})
        assert chat(folder, tmp_path / name, "--text_key=data.chat", "--val_fraction=0",
                    f"--out={tmp_path / name[0]}") == 0
        assert read_chat(tmp_path / name[0]) == encoded(model, [HELLO] * 2)


def test_plain_text_is_no_conversation(folder, tmp_path):
    """Said, rather than made a source of nothing."""
    put(tmp_path, {"a.txt": "User: Hello?\nAssistant: Hello!"})
    said = chat(folder, tmp_path / "a.txt", f"--out={tmp_path / 'out'}")
    assert "there is no text in these files; rows skipped: 1, no conversation" in said
    assert not (tmp_path / "out").exists()


def test_any_number_of_workers_and_parts_writes_the_same(folder, tmp_path, monkeypatch):
    """A mask beside another shard's tokens would teach the questions; and of a conversation that
    stands in several files and forms, the model would know the answer at validation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SHARD_BYTES", 9000)
    conversations = random_conversations(60)
    for k in range(8):
        rows = [*map((openai, sharegpt)[k % 2], conversations[5 * k:5 * k + 25])]
        put(tmp_path / "in", {f"{k}.jsonl": as_jsonl(rows + [{}] * (k == 3))})
    common = ["in", "--val_fraction=0.3"]
    assert chat(folder, *common, "--out=one") == 3
    assert len(list(Path("one").glob("train_*.mask"))) > 4
    assert chat(folder, *common, "--out=two/one", workers=3) == 3
    assert [chat(folder, *common, "--out=parts/one", f"--part={part}")
            for part in ("3/3", "1/3", "2/3")][-1] == 3
    for other in Path("two/one"), Path("parts/one"):
        found = contents(other)
        found["source.json"] = found["source.json"].replace(str(other).encode(), b"one")
        assert found == contents(Path("one"))
    info, there = json.loads(Path("one/source.json").read_text()), {}
    for split in "train", "val":
        ids, mask = read_chat(Path("one"), split)
        assert (len(ids), sum(mask)) == tuple(info[split][k] for k in ("tokens", "learned_tokens"))
        starts = [i for i, token in enumerate(ids) if token == 1]
        there[split] = [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])]
    assert len(there["train"] + there["val"]) == 8 * 25 and len(there["val"]) > 20
    assert not {*there["train"]} & {*there["val"]}


def test_a_fraction_is_chosen_by_hash(model, folder, tmp_path):
    """The first rows of a file are not a sample of it; and a smaller share lies in a larger one."""
    conversations = random_conversations(40)
    put(tmp_path, {"a.jsonl": as_jsonl(map(openai, conversations))})
    taken = []
    for fraction in 0.3, 0.7:
        out = tmp_path / str(fraction)
        assert chat(folder, tmp_path / "a.jsonl", f"--fraction={fraction}", f"--out={out}",
                    "--val_fraction=0") == 0
        row_filter = ConversationFilter(fraction=fraction)
        taken.append([])
        for messages in conversations:
            try:
                taken[-1].append(list(row_filter.from_row(openai(messages)).messages))
            except Skip as skip:
                assert skip.reason == "not in the fraction"
        assert read_chat(out) == encoded(model, taken[-1])
    assert 3 < len(taken[0]) < 20 < len(taken[1]) < 36
    assert all(messages in taken[1] for messages in taken[0])


def test_text_and_conversations_make_no_source(folder, tmp_path, monkeypatch):
    """Half of the shards would have masks; whether the first work is done or was only begun. And
    each command has its own key by default, which the other's must not take."""
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1)
    rows = as_jsonl([openai(HELLO) | {"text": "a text"}])
    put(tmp_path / "in", {"a.jsonl": rows, "b.jsonl": rows * 2})
    for k, (first, second) in enumerate([(chat, tokenize), (tokenize, chat)]):
        for n in 1, 2:
            common = tmp_path / "in", f"--out={tmp_path / f'{k}{n}'}", "--val_fraction=0"
            assert first(folder, *common, f"--part=1/{n}") == 0
            said = second(folder, *common)
            assert "it is of conversations with another template, or of none" in said
            assert "text_key was" in said and first(folder, *common) == 0


def test_inspect_shows_what_is_learned(folder, tmp_path, capsys):
    """Who sees the marks before the training need not look for them after it."""
    put(tmp_path, {"a.jsonl": as_jsonl([openai(HELLO)])})
    assert chat(folder, tmp_path / "a.jsonl", f"--out={tmp_path / 'my'}", "--val_fraction=0") == 0
    prepare.main(["inspect", str(tmp_path / "my")])
    printed = capsys.readouterr().out
    assert r"'<s><|user|>\nHello?</s>\n<|assistant|>\n[[Hello!</s>]]\n'" in printed
    assert "to be learned is what stands in [[ ]]" in printed
    _, mask = read_chat(tmp_path / "my")
    assert f"{sum(mask) / len(mask):.0%} to be learned" in printed


def test_damaged_masks_are_refused(model, tmp_path):
    """Each would otherwise train, on the wrong words."""
    prepare.write_source(tmp_path / "my", [Conversation(tuple(HELLO), "")], model, 0, "a test",
                         chat=True)
    path = tmp_path / "my/train_00000.mask"
    whole = path.read_bytes()
    for raw, words in [(None, "is not there with"), (whole[:-1], "one per token: prepare the"),
                       (whole + b"\1", "one per token: prepare the source again"),
                       (b"\2" + whole[1:], "2 between tokens 0 and .* the file is damaged")]:
        path.write_bytes(raw) if raw else path.unlink()
        with pytest.raises(InputError, match=words) as error:
            read_chat(tmp_path / "my")
        assert str(path) in str(error.value)
