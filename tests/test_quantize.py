"""Proofs of quantize.py: rounding is to the nearest, the sums that are compiled are the matmul
that is not, and a folder of rounded weights is the model that they were made from."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_prepare import TEXT

import eval
import quantize
import sample
import train
from checkpoint import check_init
from files import InputError
from model import Llama, ModelConfig
from prepare import train_tokenizer, write_tokenizer
from quantize import Int4, Int8, freeze_for_inference, in_groups, load_frozen, round_weight

CPU, BF16 = torch.device("cpu"), torch.bfloat16
CONFIG = ModelConfig(n_layer=2, d_model=72, n_head=6, n_kv_head=2, d_ff=100, vocab_size=320,
                     context=64)


@pytest.mark.parametrize("kind", [Int8, Int4])
@pytest.mark.parametrize("O, I", [(7, 48), (33, 5632), (6, 4098), (3, 10)])
def test_gemv_is_matmul(kind, O, I):
    """What a GPU's compiler is given for few rows never unpacks the weight: an offset or a half of
    a byte that is forgotten is a wrong number in each sum."""
    torch.manual_seed(0)
    layer, x = kind(torch.randn(O, I)), torch.randn(3, I)
    weight = layer.matmul(torch.eye(I)).T                    # rows that rounding does not change
    found = torch.stack([layer.gemv(row) for row in in_groups(x)])
    assert (found - x @ weight.T).abs().max() < 1e-5 * I ** 0.5


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_rounding_is_to_the_nearest(kind):
    """A scale for the wrong row or group, halves of a byte exchanged: half a step is what rounding
    takes, of all but the largest weights, which may be cut off."""
    torch.manual_seed(0)
    weight = torch.randn(12, 192) * torch.logspace(-3, 1, 12)[:, None]
    weight[3] = 0
    layer = kind(weight)
    found = layer.matmul(torch.eye(192)).T
    groups, step = in_groups(weight), layer.scale.abs().float()[..., None]
    away = (found - weight).view_as(groups).abs()
    most = 2 ** (layer.bits - 1) - 1
    inside = groups.abs() <= most * step
    assert (away <= step * 0.51)[inside].all() and inside.float().mean() > 0.95
    assert (away <= step * 3).all() and (found[3] == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_no_scale_is_worse_than_that_of_the_largest(bits):
    """A search that takes what fits the sum of errors worse than the plain rule. What bf16 takes
    from a scale is counted for both."""
    torch.manual_seed(0)
    weight = torch.cat([torch.randn(30, 192), torch.randn(30, 192) ** 3, torch.rand(30, 192)])
    groups = in_groups(weight)
    integers, scales = round_weight(weight, bits)

    def error(scale):
        q = (groups / scale).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
        return (groups - q * scale).square().sum(2)

    found = (groups - integers * scales.float()[..., None]).square().sum(2)
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    plain = error((largest / -2 ** (bits - 1)).bfloat16().float())
    assert (found <= plain * 1.05).all()
    assert found.sum() < plain.sum() * (0.96 if bits == 4 else 1.001)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_stay_and_what_is_not_finite_too(bits):
    """0 / 0 in a group of zeros, or NaN that becomes some whole number: a model of either talks."""
    weight = torch.zeros(4, 130)
    weight[1, 3], weight[2, 129], weight[3] = math.nan, -math.inf, 1e-39
    integers, scales = round_weight(weight, bits)
    floats = integers * scales.float()[..., None]
    assert (floats[0] == 0).all() and floats.isfinite().all(2).tolist() == [
        [True] * 3, [False, True, True], [True, True, False], [True] * 3]
    assert not scales[1, 0].isfinite() and not scales[2, 2].isfinite()


def test_a_tied_model_is_quantized_too(tmp_path):
    """Its head has no weight of its own."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(n_layer=1, d_model=64, n_head=2, n_kv_head=1, d_ff=64, vocab_size=100,
                              context=32, tie_embeddings=True)).init_weights()
    ids = torch.arange(10)[None]
    expected = model(ids)
    assert torch.allclose(freeze_for_inference(model)(ids), expected, atol=1e-5)
    assert isinstance(freeze_for_inference(Llama(model.config).init_weights(), "int8").head, Int8)


# --------------------------------------------------------------------------------------------------
# Folders

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tokenizer and a chat template, in two shards."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    Llama(CONFIG).init_weights().save_pretrained(folder)
    write_tokenizer(folder, train_tokenizer([TEXT], 320))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors"
              for name in tensors}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard},
                  folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "training").mkdir()
    return folder


def same_tensors(found, expected):
    found, expected = ({**dict(m.named_parameters()), **dict(m.named_buffers())}
                       for m in (found, expected))
    return found.keys() == expected.keys() and all(
        found[name].dtype == t.dtype and found[name].equal(t) for name, t in expected.items())


@pytest.fixture(scope="module", params=[4, 8])
def rounded(request, source, tmp_path_factory):
    """(bits, a folder of weights of so many)."""
    out = tmp_path_factory.mktemp("rounded") / "new/m"
    quantize.main([str(source), f"--bits={request.param}", f"--out={out}"])
    return request.param, out


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_folder_is_the_model_it_was_made_from(source, rounded, dtype):
    """Bit for bit, with all that belongs to it: a buffer for another's, or a folder that answers
    in another chat format."""
    bits, out = rounded
    expected = freeze_for_inference(Llama.from_pretrained(source, dtype=BF16), f"int{bits}")
    if dtype != BF16:
        for p in expected.parameters():
            p.data = p.data.to(dtype)
    for wanted in None, f"int{bits}":
        assert same_tensors(load_frozen(out, CPU, dtype, wanted), expected)
    left_out = {"model.safetensors.index.json", "training",
                *(file.name for file in source.glob("*-of-*"))}
    names = {file.name for file in source.iterdir()} - left_out
    assert {file.name for file in out.iterdir()} == names | {"model.safetensors"}
    assert "chat_template.jinja" in names and "tokenizer.json" in names
    for name in names - {"config.json"}:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert not list(out.parent.glob("*.tmp"))


def test_a_tied_model_of_a_run_has_a_folder(tmp_path):
    """The head is rounded, the embedding it is tied to is not; both are in the file. A run is its
    newest checkpoint, as everywhere."""
    tied = Llama(ModelConfig(**vars(CONFIG) | {"tie_embeddings": True})).init_weights()
    tied.bfloat16().save_pretrained(tmp_path / "run/step_00000007")
    quantize.main([str(tmp_path / "run"), f"--out={tmp_path / 'm'}"])
    found = load_frozen(tmp_path / "m", CPU, BF16)
    assert found.config.tie_embeddings and same_tensors(found, freeze_for_inference(tied, "int4"))


def test_quantizing_again(rounded, tmp_path):
    """What is rounded is not rounded a second time, to other bits."""
    bits, out = rounded
    quantize.main([str(out), f"--bits={bits}", f"--out={tmp_path / 'same'}"])
    assert all((tmp_path / "same" / file.name).read_bytes() == file.read_bytes()
               for file in out.iterdir())
    with pytest.raises(InputError, match=f"the weights in {out} are int{bits}"):
        quantize.main([str(out), f"--bits={12 - bits}", f"--out={tmp_path / 'other'}"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"),
                                   SafetensorError("I/O error: No space left on device")])
def test_a_folder_is_whole_or_not_there(error, source, tmp_path, monkeypatch):
    """Half a folder would be loaded, or what was there is gone; and a full disk is a sentence."""
    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(quantize, "save_file", fail)
        with pytest.raises((KeyboardInterrupt, OSError, InputError), match="space left|^$"):
            quantize.main([str(source), f"--out={tmp_path / 'm'}"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").mkdir()
    with pytest.raises(SystemExit, match="m exists: remove it, or give another --out"):
        quantize.main([str(source), f"--out={tmp_path / 'm'}"])
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize("config", [
    {"quant_method": "tinyllama", "bits": 5, "group_size": 64},
    {"quant_method": "tinyllama", "bits": 4, "group_size": 32},
    {"quant_method": "tinyllama", "bits": 4}, {"quant_method": "tinyllama", "bits": [4]},
    {"quant_method": "gptq", "bits": 4}, "int4", [4], 4, True])
def test_another_packing_is_refused(config, rounded, tmp_path):
    """Read as if it were ours, it is noise, or a stack trace."""
    shutil.copytree(rounded[1], tmp_path / "m")
    written = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(written | {"quantization_config": config}))
    with pytest.raises(InputError, match="only 4 and 8 are read|quantization_config = "):
        load_frozen(tmp_path / "m", CPU)


def test_a_damaged_folder_is_one_sentence(rounded, tmp_path):
    """A tensor that is missing, or of another number of bits than config.json says."""
    shutil.copytree(rounded[1], tmp_path / "m")
    tensors = load_file(rounded[1] / "model.safetensors")
    for change, words in ({"lm_head.scale": None}, "missing"), ({"x": torch.zeros(1)}, "unknown"), (
            {"lm_head.weight": torch.zeros(320, 1, 64, dtype=torch.uint8)}, "config.json makes it"):
        changed = {name: t for name, t in (tensors | change).items() if t is not None}
        save_file(changed, tmp_path / "m/model.safetensors")
        with pytest.raises(InputError, match=words):
            load_frozen(tmp_path / "m", CPU)


def test_who_reads_rounded_weights(rounded, tmp_path, capsys):
    """A text is measured with them; transformers and training do not know them, and say so."""
    (bits, out), text = rounded, tmp_path / "a.txt"
    text.write_text(TEXT)
    eval.main([str(out), f"--text={text}"])
    printed = capsys.readouterr()
    assert "bits per byte" in printed.out and f"int{bits} weights" in printed.out + printed.err
    with pytest.raises(SystemExit, match=f"{out} has int{bits} weights, which go with --text only"):
        eval.evaluate_checkpoint(out, {"some task": None}, None, eval.parse_args([str(out)]))
    with pytest.raises(SystemExit, match=f"init_from {out}: .*quantization_config = "):
        check_init(out, train.TrainConfig(**vars(CONFIG)), {})


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_of_nan_are_said_in_few_bits(kind, source, tmp_path, capsys):
    """Whole numbers have no NaN: it has to go on in a scale. (By decode.c: test_decode.py.)"""
    model = Llama.from_pretrained(source)
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[3, 5] = math.nan
    shutil.copytree(source, tmp_path / "m", ignore=shutil.ignore_patterns("*safetensors*"))
    model.save_pretrained(tmp_path / "m")
    quantize.main([str(tmp_path / "m"), f"--bits={kind[3]}", f"--out={tmp_path / 'rounded'}"])
    for how in [str(tmp_path / "m"), f"--quantize={kind}"], [str(tmp_path / "rounded")]:
        with pytest.raises(InputError, match="logits are not finite"):
            sample.main([*how, "--prompt=Two", "--compile=False"])


MEMORY = """
import re, sys, torch, torch._dynamo    # which the meta device imports
from quantize import load_frozen
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")                     # what imports took does not count
before = peak()
model = load_frozen(sys.argv[1], torch.device("cpu"), torch.bfloat16)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted otherwise")
def test_weights_are_in_memory_once(tmp_path):
    """A model that fits only once: neither the embedding, of which a text needs a few rows, nor the
    file besides what is read from it."""
    config = ModelConfig(n_layer=16, d_model=512, n_head=8, n_kv_head=2, d_ff=2048,
                         vocab_size=60_000, context=64)
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(BF16).to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(1e-2)
    model.save_pretrained(tmp_path / "m")
    quantize.main([str(tmp_path / "m"), f"--out={tmp_path / 'rounded'}"])
    used = int(subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path / "rounded")], check=True,
                              capture_output=True, cwd=Path(__file__).parents[1]).stdout)
    size = (tmp_path / "rounded/model.safetensors").stat().st_size
    embedding = 60_000 * 512 * 2
    # besides, the largest tensor, the head of half an embedding, while it is read
    assert used < size - embedding + embedding / 2 + 15e6
