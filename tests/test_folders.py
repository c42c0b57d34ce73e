"""Model folders of others: what `transformers` does with a folder, we do with it."""
import json
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prepare import TEXT
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from files import InputError
from prepare import train_tokenizer, write_tokenizer
from sample import Decoder, Tokenizer, generate, load_model

logging.set_verbosity_error()
logging.disable_progress_bar()

# a space at the beginning, or after a token, is left out: there the class LlamaTokenizer of
# transformers 5 differs from SentencePiece, by which models were trained
CHAT = ["<|im_start|>", "<|im_end|>", "[PAD]"]
PROMPTS = ["Two roads", "<|im_start|>user\nTwo roads<|im_end|>\n<|im_start|>", "a</s>b <s>c",
           "é中\n<unk>"]
WEIGHTS = "model.safetensors"


def edit(path, change):
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


def add_to_json(contents):
    contents["added_tokens"] += [
        {"id": 320 + i, "content": text, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True} for i, text in enumerate(CHAT)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, train_tokenizer([TEXT, "Two roads diverged in a yellow wood."], 320))
    return folder


def make_folder(folder, seed, tokenizer_folder):
    """A model folder as somebody might have made it, by chance; and what was chosen."""
    chance = random.Random(seed)
    shutil.copytree(tokenizer_folder, folder)
    torch.manual_seed(seed)
    choices = {
        "files": chance.choice(["both", "model", "json", "damaged model"]),
        "added": chance.choice([None, "in tokenizer.json", "added_tokens.json", "decoder"]),
        "bos": chance.choice(["template", "none", "null"]),
        "ends": chance.choice(["config", "generation", "list", "null"]),
        "weights": chance.choice(["whole", "sharded", "no index", "stale index", "buffers"]),
        "tied": chance.choice(["", "", "embedding", "head", "differs"]),
        "rows": chance.choice([320, 352, 310]), "dtype": chance.choice(["float32", "bfloat16"]),
        "legacy": chance.choice([None, True, False]),
        "class": chance.choice(["PreTrainedTokenizerFast", "LlamaTokenizer"]),
        "strip": chance.choice([False, False, True])}
    if choices["files"] in ("json", "damaged model") and choices["added"]:
        choices["added"] = "in tokenizer.json"     # transformers gives others ids of its own choice
    known = 323 if choices["added"] else 320
    if choices["added"]:
        choices["rows"] = chance.choice([323, 352])

    # the model
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=choices["rows"],
        num_attention_heads=4, num_key_value_heads=chance.choice([1, 2, 4]),
        max_position_embeddings=128, rms_norm_eps=chance.choice([1e-6, 1e-5]),
        rope_theta=chance.choice([10_000.0, 500_000.0]), tie_word_embeddings=choices["tied"] != "",
        initializer_range=0.3, architectures=["LlamaForCausalLM"], dtype=choices["dtype"])
    model = LlamaForCausalLM(config).to(getattr(torch, choices["dtype"]))
    config.save_pretrained(folder)
    tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & set(tensors):
        tensors[name][known:] = 0                                         # rows that only pad
    if choices["tied"] == "head":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    if choices["tied"] == "differs":
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    if choices["weights"] == "buffers":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    # the tokenizer
    if choices["added"] == "in tokenizer.json":
        if choices["files"] == "model":
            choices["files"] = "both"
        edit(folder / "tokenizer.json", add_to_json)
    elif choices["added"] == "added_tokens.json":
        choices["files"] = "model"
        edit(folder / "added_tokens.json", lambda t: t.update(zip(CHAT, range(320, 323))))
        edit(folder / "special_tokens_map.json",
             lambda t: t.update(additional_special_tokens=CHAT))
    elif choices["added"] == "decoder":
        choices["files"] = "model"
        edit(folder / "tokenizer_config.json", lambda t: t.update(added_tokens_decoder={
            str(320 + i): {"content": text, "special": True, "normalized": False, "lstrip": False,
                           "rstrip": False, "single_word": False} for i, text in enumerate(CHAT)}))
    if choices["bos"] == "none":
        edit(folder / "tokenizer.json", lambda t: t.update(post_processor=None))
        edit(folder / "tokenizer_config.json", lambda t: t.update(add_bos_token=False))
    if choices["strip"]:
        edit(folder / "tokenizer.json", lambda t: [
            token.update(rstrip=True) for token in t["added_tokens"]])
    edit(folder / "tokenizer_config.json", lambda t: t.update(tokenizer_class=choices["class"]))
    if choices["legacy"] is not None:
        edit(folder / "tokenizer_config.json", lambda t: t.update(legacy=choices["legacy"]))
    if choices["files"] == "model":
        (folder / "tokenizer.json").unlink()
    if choices["files"] == "json":
        (folder / "tokenizer.model").unlink()
    if choices["files"] == "damaged model":
        (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")

    # where a text ends
    eos = 321 if choices["added"] else 2
    generation = {"generation": {"eos_token_id": eos}, "list": {"eos_token_id": [2, eos, 17]},
                  "null": {"eos_token_id": 2, "bos_token_id": None}}.get(choices["ends"])
    if generation:
        edit(folder / "generation_config.json", lambda t: t.update(generation))
    edit(folder / "config.json", lambda t: t.update(
        bos_token_id=None if choices["bos"] == "null" else 1,
        eos_token_id=eos if choices["ends"] == "config" else 2))
    return choices


def test_added_tokens_need_no_package(tokenizer_folder, tmp_path, monkeypatch):
    """Where tokenizers is not installed, or there is only tokenizer.model, an added token was spelt
    in pieces. In a document it is text all the same: nobody's text may end it."""
    shutil.copytree(tokenizer_folder, tmp_path / "m")
    LlamaConfig(vocab_size=323).save_pretrained(tmp_path / "m")
    edit(tmp_path / "m/tokenizer.json", add_to_json)
    prompt, document = PROMPTS[1], "a</s>b"
    with_package = Tokenizer(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    without = Tokenizer(tmp_path / "m")
    assert with_package.fast and not without.fast
    ids = without.encode_prompt(prompt)
    assert ids == with_package.encode_prompt(prompt) and ids.count(320) == 2
    assert without.decode(ids) == with_package.decode(ids)
    assert 2 not in without.encode(document) == with_package.encode(document)
    (tmp_path / "m/tokenizer.model").unlink()
    with pytest.raises(SystemExit, match="pip install tokenizers"):
        Tokenizer(tmp_path / "m")


def split_weights(folder, choices):
    """What transformers need not read: shards that have lost their index, for one."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {f"model-0000{k + 1}-of-00002.safetensors": names[k::2] for k in range(2)}
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    if choices["weights"] == "stale index":
        index = {"weight_map": {name: "model-00001-of-00007.safetensors" for name in names}}
    elif choices["weights"] in ("sharded", "no index"):
        (folder / WEIGHTS).unlink()
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / file)
    if choices["weights"] in ("sharded", "stale index"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))


@pytest.mark.parametrize("seed", range(40))
def test_forty_folders_against_transformers(seed, tokenizer_folder, tmp_path):
    """Each kind of folder in which ids, logits or the end of a text once differed: added tokens
    spelt in pieces, BOS where none belongs, a text that never ends."""
    folder = tmp_path / "model"
    choices = make_folder(folder, seed, tokenizer_folder)
    if choices["weights"] == "no index":
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        split_weights(folder, choices)
    else:
        split_weights(folder, choices)
        theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    ours, tokenizer = load_model(folder, dtype=torch.float32)
    for prompt in PROMPTS:
        ids = their_tokenizer(prompt).input_ids
        if max(ids) >= choices["rows"]:
            with pytest.raises(InputError, match="knows only 310"):
                tokenizer.encode_prompt(prompt)
            continue
        assert ids == tokenizer.encode_prompt(prompt), (choices, prompt)
        if prompt not in PROMPTS[:2]:
            continue
        with torch.inference_mode():
            idx = torch.tensor([ids])
            torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)
        expected = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                                   max_new_tokens=20, pad_token_id=0)
        decoder = Decoder(ours, 1, 128, tokenizer.size)
        found = sum((new[0] for new in generate(decoder, [ids], 1, 20, tokenizer.eos_ids,
                                                lambda logits: logits.argmax(-1))), [])
        assert found == expected[0, len(ids):].tolist(), (choices, prompt)
