"""Proofs of model.py: against transformers, against a naive attention, against itself by another
way."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import decoder
import model as model_module
from files import InputError
from model import (
    FusedLinearCrossEntropy,
    KVCache,
    Llama,
    ModelConfig,
    apply_rope,
    attention,
    chunked_attention,
    cross_entropy_and_grad,
    fused_linear,
    rope_cos_sin,
)

TINY = dict(n_layer=3, d_model=48, n_head=6, n_kv_head=2, d_ff=80, vocab_size=97, context=32)


def tiny(**changes):
    """A model whose weights are large enough that attention is far from uniform and every part
    shows in the logits."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**TINY | changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)
    return model


def tokens(B=2, T=20, seed=1):
    return torch.randint(0, TINY["vocab_size"], (B, T),
                         generator=torch.Generator().manual_seed(seed))


def assert_close(a, b, tolerance=1e-5):
    """Equal within `tolerance` of their spread: sums of fp32 in another order differ by about 1e-6
    of it."""
    assert a.shape == b.shape
    assert ((a - b).abs().max() / b.std()).item() < tolerance


# --------------------------------------------------------------------------------------------------
# The shape

def test_parameter_count_is_the_papers():
    """A padded vocabulary, a bias or full-width keys would change it."""
    with torch.device("meta"):
        model = Llama(ModelConfig())
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_flops_are_6n_plus_12_lct():
    """Counting key/value heads for query heads, or the embedding not at all, would flatter the MFU
    by 5 to 15 %."""
    with torch.device("meta"):
        model = Llama(ModelConfig())
    assert model.flops_per_token() == 6 * 1_100_048_384 + 12 * 22 * 2048 * 2048
    assert model.flops_per_token(512) == 6 * 1_100_048_384 + 12 * 22 * 2048 * 512


@pytest.mark.parametrize("changes, words", [
    (dict(n_head=5), "d_model 48"), (dict(n_kv_head=4), "n_kv_head 4"),
    (dict(n_layer=0), "n_layer"), (dict(vocab_size=0), "vocab_size")])
def test_impossible_shapes_are_refused(changes, words):
    """An odd head or a remainder of heads would fail deep inside a view, or not at all."""
    with pytest.raises(InputError, match=words):
        tiny(**changes)


def test_initial_stds():
    """An initialisation that is skipped on the meta device leaves whatever memory held: the
    original's v1.0 trained from PyTorch's defaults for that reason."""
    config = ModelConfig(n_layer=4, d_model=256, n_head=4, n_kv_head=2, d_ff=704,
                         vocab_size=1000, context=64)
    with torch.device("meta"):
        model = Llama(config)
    model.to_empty(device="cpu").init_weights()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
            continue
        residual = name.endswith(("o.weight", "down.weight"))
        std = 1 / math.sqrt(256) / 4 if residual else math.sqrt(0.4 / 256)
        assert abs(p.std().item() / std - 1) < 0.02 and abs(p.mean().item()) < 0.02 * std, name


def test_first_loss_is_that_of_guessing():
    """Too large a head or embedding starts above ln V and wastes the first steps unlearning it."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**TINY)).init_weights()
    assert abs(model(tokens(), tokens(seed=2)).item() - math.log(97)) < 0.3


# --------------------------------------------------------------------------------------------------
# The same numbers as transformers

SHAPES = [(6, 2, False), (4, 1, True), (4, 4, False), (8, 4, True)]


@pytest.mark.parametrize("n_head, n_kv_head, tied", SHAPES)
def test_logits_match_transformers_from_them(n_head, n_kv_head, tied, tmp_path):
    """Interleaved rotary pairs, repeated instead of interleaved groups, gate and up exchanged: each
    passes shape checks."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=n_head,
        num_key_value_heads=n_kv_head, vocab_size=97, max_position_embeddings=32, rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}, tie_word_embeddings=tied,
        initializer_range=0.3)).eval()
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 5000.0 and ours.config.tie_embeddings == tied
    with torch.no_grad():
        assert_close(ours(tokens()), theirs(tokens()).logits)


@pytest.mark.parametrize("n_head, n_kv_head, tied", SHAPES)
def test_logits_match_transformers_from_us(n_head, n_kv_head, tied, tmp_path):
    """A config.json that says less than the weights need is completed by their defaults, and the
    model talks nonsense."""
    ours = tiny(n_head=n_head, n_kv_head=n_kv_head, tie_embeddings=tied, rope_theta=500.0)
    ours.save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_close(theirs(tokens()).logits, ours(tokens()))
    again = Llama.from_pretrained(tmp_path)
    assert again.config == ours.config and torch.equal(again(tokens()), ours(tokens()))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"]


def test_several_files_with_an_index(tmp_path):
    """Models above a few GB come in several files."""
    ours = tiny()
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:7],
             "model-00002-of-00002.safetensors": names[7:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens()), ours(tokens()))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": null}}')
    with pytest.raises(InputError, match="has no None"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("names", [["lm_head.weight"],
                                   ["lm_head.weight", "model.embed_tokens.weight"]])
def test_a_tied_matrix_may_be_stored_as_the_head(names, tmp_path):
    """Some writers store the one matrix of a tied model as the head, or twice: it was called
    missing."""
    ours = tiny(tie_embeddings=True)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    matrix = tensors.pop("model.embed_tokens.weight")
    save_file(tensors | {name: matrix.clone() for name in names}, tmp_path / "model.safetensors")
    assert torch.equal(Llama.from_pretrained(tmp_path)(tokens()), ours(tokens()))


def test_both_spellings_of_rope(tmp_path):
    """transformers 5 writes rope_parameters and no rope_theta: read as absent, the base would
    silently be 10,000."""
    tiny(rope_theta=123.0).save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["rope_theta"] == 123.0 and Llama.from_pretrained(tmp_path).config.rope_theta == 123.0
    del hf["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(
        hf | {"rope_parameters": {"rope_theta": 321.0, "rope_type": "default"}}))
    assert Llama.from_pretrained(tmp_path).config.rope_theta == 321.0
    (tmp_path / "config.json").write_text(json.dumps(          # given twice: the newer spelling
        hf | {"rope_theta": 9.0, "rope_parameters": {"rope_theta": 321.0}}))
    assert Llama.from_pretrained(tmp_path).config.rope_theta == 321.0


@pytest.mark.parametrize("change, word", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"),
    ({"model_type": "mistral"}, "model_type"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ({"head_dim": 16}, "head_dim"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "48"}, "hidden_size must be int"), ({"num_hidden_layers": 2.5}, "must be int"),
    ({"rope_parameters": [1]}, "rope settings"), ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    ({"vocab_size": 98}, "97, 48"),
    ({"num_hidden_layers": 4}, "layers.3"), ({"num_hidden_layers": 2}, "layers.2")])
def test_what_we_cannot_honour_is_refused_by_name(change, word, tmp_path):
    """A setting that is ignored gives a model that runs and is wrong."""
    tiny().save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | change))
    with pytest.raises(InputError, match=word):
        Llama.from_pretrained(tmp_path)


def test_damaged_folders_are_named(tmp_path):
    """A truncated download must not become a stack trace of another library, or a model with some
    weights random."""
    with pytest.raises(InputError, match="no folder"):
        Llama.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="config.json"):
        Llama.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 73492013\n"
    for part, word in ((whole[:len(whole) // 2], ""), (whole[:4], ""), (b"", ""),
                       (pointer, ".*git lfs pull")):
        (tmp_path / "model.safetensors").write_bytes(part)
        with pytest.raises(InputError, match="model.safetensors" + word):
            Llama.from_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(pointer)
    with pytest.raises(InputError, match="config.json.*git lfs pull"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(config)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="only safetensors"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json"):
        Llama.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------
# Attention, and what the model may look at

def naive_attention(q, k, v):
    """What attention means, one query at a time: q (H, T, D), k and v (K, S, D), the queries last
    among the S positions."""
    (H, T, D), (K, S, _) = q.shape, k.shape
    out = torch.empty_like(q)
    for h in range(H):
        group = h // (H // K)                   # heads 0..H/K-1 share key/value head 0, and so on
        for t in range(T):
            num_keys = S - T + t + 1
            p = (k[group, :num_keys] @ q[h, t] / math.sqrt(D)).softmax(0)
            out[h, t] = p @ v[group, :num_keys]
    return out


@pytest.mark.parametrize("T, S", [(9, 9), (1, 9), (4, 9)])
def test_attention_is_what_it_means(T, S):
    """A mask aligned to the first key would show a query after a cache one key instead of all; a
    query head that reads its neighbour's key head still has the right shape."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    expected = torch.stack([naive_attention(*row) for row in zip(q, k, v)])
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(2, 1, T, S)
    assert_close(attention(q, k, v, mask), expected)
    if T == S:
        assert_close(attention(q, k, v), expected)
        for chunk in 1, 4, 64:
            assert_close(chunked_attention(q, k, v, chunk), expected)


def test_chunked_attention_has_sdpas_gradients(monkeypatch):
    """Queries are cut anywhere, also where the last chunk is short; a key that a chunk does not see
    must get nothing from it. A CPU takes it in bf16, where both are as far from fp32."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, n, 150, 16, requires_grad=True) for n in (6, 2, 2, 6))

    def gradients(f, dtype):
        out = f(*(x.to(dtype) for x in (q, k, v)))
        return [x.float() for x in (out, *torch.autograd.grad(out, (q, k, v), g.to(dtype)))]

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def distance(ours, exact):
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact))

    exact = gradients(sdpa, torch.float32)
    for ours, theirs in zip(gradients(chunked_attention, torch.float32), exact):
        assert_close(ours, theirs)
    bf16 = gradients(chunked_attention, torch.bfloat16)
    assert distance(bf16, exact) < 1.5 * distance(gradients(sdpa, torch.bfloat16), exact) < 0.02
    calls = []
    monkeypatch.setattr(model_module, "chunked_attention", lambda *qkv: calls.append(1))
    attention(*(x.bfloat16() for x in (q, k, v)))
    attention(q, k, v)
    assert len(calls) == 1


def flash_stand_in(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """flash_attn_func's contract, on any device: (B, T, heads, D), grouped heads, the causal mask
    aligned to the last key."""
    T, S = q.shape[1], k.shape[1]
    groups = q.shape[2] // k.shape[2]
    q, k, v = (q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(groups, 1),
               v.transpose(1, 2).repeat_interleave(groups, 1))
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p,
                                          scale=softmax_scale).transpose(1, 2)


def test_flash_attention_gets_what_it_expects(monkeypatch):
    """flash-attn's layout is (B, T, heads, D): without the transpose it attends over heads, and the
    shapes still fit."""
    model, idx = tiny(), tokens()
    calls = []

    def spy(*args, **kwargs):
        calls.append(args[0].shape)
        return flash_stand_in(*args, **kwargs)

    def run():
        cache = KVCache(model.config, 2, 20)
        parts = [model(part, cache=cache) for part in idx.split([12, 3, 1, 4], dim=1)]
        return model(idx, idx), torch.cat(parts, 1)

    plain = run()
    monkeypatch.setattr(model_module, "flash_attn_func", spy)
    assert run()[0] == plain[0] and not calls, "in fp32 on a CPU flash-attn must not be asked"
    monkeypatch.setattr(model_module, "attention_backend", lambda *_: ("flash-attn", ""))
    flash = run()
    assert_close(flash[1], plain[1])
    assert abs(flash[0] - plain[0]) < 1e-5
    assert calls[0] == (2, 12, 6, 8) and calls[-1] == (2, 20, 6, 8)


def test_future_tokens_do_not_leak():
    """A mask one off lets a position read its own answer: the loss is wonderful and the model
    useless."""
    model, idx = tiny(), tokens()
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 97
    a, b = model(idx), model(changed)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.allclose(a[:, 12], b[:, 12])


def test_rope_depends_only_on_distance():
    """The score of two rotated vectors must be the same wherever the pair stands."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)

    def score(i, j):
        return (apply_rope(q, *rope_cos_sin(torch.tensor([i]), 64, 1e4))
                * apply_rope(k, *rope_cos_sin(torch.tensor([j]), 64, 1e4))).sum()

    for distance in (0, 1, 7, 300):
        scores = torch.stack([score(j + distance, j) for j in (0, 5, 1000, 1700)])
        # angles near 2,000 are exact to 1e-4 in fp32
        assert scores.std() < 1e-3 * q.norm() * k.norm()
    assert abs(score(1, 0) - score(0, 1)) > 1e-2                 # and left is not right


def test_rotation_stays_exact_in_bf16():
    """In bf16 neighbouring positions near 2,048 have the same angle: cos and sin must not be
    rounded before they are used."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 4, 64)
    cos, sin = rope_cos_sin(torch.arange(2040, 2044), 64, 1e4)
    exact, rounded = apply_rope(x, cos, sin), apply_rope(x.bfloat16(), cos, sin)
    assert cos.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 2 ** -7 * x.abs().max()


def test_gqa_equals_repeated_heads():
    """Grouped-query attention is multi-head attention whose keys and values stand several times,
    next to one another."""
    grouped, full = tiny(), tiny(n_kv_head=6)
    weights = grouped.state_dict()
    for name in weights:
        if ".attn.k." in name or ".attn.v." in name:
            weights[name] = weights[name].view(2, 8, 48).repeat_interleave(3, dim=0).reshape(48, 48)
    full.load_state_dict(weights)
    assert_close(full(tokens()), grouped(tokens()))


# --------------------------------------------------------------------------------------------------
# The cache

class Kernels:
    """Stands for torch.nn.functional: counts the calls of SDPA, and returns what `kernel` does."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def scaled_dot_product_attention(self, q, k, v, **how):
        self.calls.append((q.shape[1], k.shape[1], how))
        return self.kernel(q, k, v, **how)

    def __getattr__(self, name):
        return getattr(F, name)


def test_attention_takes_what_cudas_kernels_return(monkeypatch):
    """CUDA's memory-efficient kernel returns memory in the order (B, T, H, D): a view of it as
    (B, H, T, D) failed at the second token of every generation on most GPUs."""
    def run():
        cache = KVCache(model.config, 2, 20)
        model(idx[:, :12], cache=cache)
        return torch.cat([model(idx[:, 12:15], cache=cache), model(idx[:, 15:16], cache=cache)], 1)

    model, idx = tiny(), tokens()
    expected = run()
    monkeypatch.setattr(model_module, "F", Kernels(
        lambda *qkv, **how: F.scaled_dot_product_attention(*qkv, **how).transpose(1, 2)
        .contiguous().transpose(1, 2)))
    assert torch.equal(run(), expected) and len(model_module.F.calls) == 9


def test_no_attention_computes_all_scores_on_a_gpu(monkeypatch):
    """For grouped heads in fp32, and for a mask with grouped heads, PyTorch has no kernel but the
    one that writes all scores: 97 GB where 51 were counted. (Fake tensors: no GPU is needed.)"""
    monkeypatch.setattr(model_module, "F", Kernels(lambda q, k, v, **how: torch.empty_like(q)))
    with torch._subclasses.FakeTensorMode():
        for dtype in torch.float32, torch.bfloat16:
            q, k, v, late = (torch.empty(2, heads, T, 8, device="cuda", dtype=dtype)
                             for heads, T in ((6, 16), (2, 16), (2, 16), (6, 4)))
            mask = torch.ones(2, 1, 4, 16, dtype=torch.bool, device="cuda")
            assert attention(q, k, v).shape == q.shape
            assert attention(late, k, v, mask).shape == late.shape
    causal, masked, grouped, _ = model_module.F.calls
    assert causal == (6, 6, {"is_causal": True, "enable_gqa": False})
    assert grouped == (2 * 3, 2, {"is_causal": True, "enable_gqa": True})
    for q_heads, k_heads, how in (masked, model_module.F.calls[-1]):
        assert q_heads == k_heads == 2 and "enable_gqa" not in how


def test_attention_to_chunks_of_keys_is_attention(monkeypatch):
    """Of four chunks some are unseen as a whole by some rows, and must not count. The kernel, which
    only a GPU has, returns its sums for a multiple of 32 queries, and memory of its own order."""
    def kernel(q, k, v, bias, with_sums):
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        sums = F.pad(scores.logsumexp(-1), (0, -q.shape[2] % 32), value=math.nan)
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().transpose(1, 2)
        return y, sums, None, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernel)
    monkeypatch.setattr(decoder, "KEY_CHUNK", 8)
    config, cache = tiny().config, KVCache(tiny().config, 3, 32)
    cache.lengths.copy_(torch.tensor([0, 9, 40]))
    D, H, K = config.head_dim, config.n_head, config.n_kv_head
    for T in 1, 3:
        _, mask = cache.positions_and_mask(T)
        q, k, v = torch.randn(3, H, T, D), torch.randn(3, K, 32, D), torch.randn(3, K, 32, D)
        split = decoder.split_mask(mask, config, torch.float32)
        assert split.shape == (3, 4 * K, H // K * T, 8)
        assert_close(attention(q, k, v, split), attention(q, k, v, mask))


def test_flash_attention_is_chosen_where_it_serves(monkeypatch):
    """Version 2 displaced a faster kernel on Hopper, and versions that torch.compile cannot trace
    ended training at its first step."""
    def backend(major=8, dtype=torch.bfloat16, device="cuda", head_dim=64, traces=True):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(
            major=major))
        monkeypatch.setattr(torch.ops, "flash_attn", SimpleNamespace(
            **{"_flash_attn_forward": 1} if traces else {}), raising=False)
        return model_module.attention_backend(torch.device(device), dtype, head_dim)[0]

    assert backend() == "SDPA", "it is not installed"
    monkeypatch.setattr(model_module, "flash_attn_func", flash_stand_in)
    assert backend() == "flash-attn"
    assert {backend(major=9), backend(major=7), backend(dtype=torch.float32), backend(traces=False),
            backend(head_dim=320), backend(device="cpu", dtype=torch.float32)} == {"SDPA"}
    assert backend(device="cpu") == "query-chunked matmuls"


@pytest.mark.parametrize("cuts", [[1] * 20, [20], [7, 5, 1, 1, 6], [19, 1]])
def test_cached_equals_full(cuts):
    """A position counted from zero after the prompt, or a mask aligned to the wrong end, shows only
    with a cache."""
    model, idx = tiny(), tokens()
    cache = KVCache(model.config, 2, 24)
    addresses = [t.data_ptr() for t in (*cache.layers[1], cache.lengths)]
    parts = [model(part, cache=cache) for part in idx.split(cuts, dim=1)]
    assert_close(torch.cat(parts, 1), model(idx))
    assert cache.lengths.tolist() == [20, 20]
    assert addresses == [t.data_ptr() for t in (*cache.layers[1], cache.lengths)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_each_row_has_its_own_length(dtype, tolerance):
    """Rows of different length in one cache: a mask of the longest shows the others what is not
    theirs, and a position of the longest rotates them too far."""
    model, idx = tiny().to(dtype), tokens(3, 20)
    cache, lengths = KVCache(model.config, 3, 32, dtype=dtype), [3, 11, 7]
    model(idx[:, :11], cache=cache)
    cache.lengths.copy_(torch.tensor(lengths))
    for k, v in cache.layers:                        # what comes after its end must not be seen
        for b, n in enumerate(lengths):
            k[b, :, n:], v[b, :, n:] = 9, 9
    steps = [torch.stack([idx[b, n + t:n + t + m] for b, n in enumerate(lengths)])
             for t, m in ((0, 1), (1, 4), (5, 1))]
    got = torch.cat([model(step, cache=cache) for step in steps], 1)             # (3, 6, V)
    for b, n in enumerate(lengths):
        expected = model(idx[b:b + 1])[0, n:n + 6]
        assert (got[b] - expected).abs().max() < tolerance * expected.abs().max()
    assert cache.lengths.tolist() == [n + 6 for n in lengths]


def test_a_row_that_has_ended_may_be_stepped_on():
    """After its end it would write outside the cache, or into its neighbour."""
    model, idx = tiny(), tokens()
    cache = KVCache(model.config, 2, 12)
    model(idx[:, :12], cache=cache)
    cache.lengths.copy_(torch.tensor([4, 12]))
    got = torch.cat([model(idx[:, t:t + 1], cache=cache) for t in range(4, 10)], 1)
    assert_close(got[0], model(idx[:1])[0, 4:10])


def test_a_full_cache_says_so():
    """Writing after its end would drop tokens silently."""
    model = tiny()
    with pytest.raises(AssertionError, match="20 tokens do not fit a cache of 8"):
        model(tokens(), cache=KVCache(model.config, 2, 8))


# --------------------------------------------------------------------------------------------------
# Training

def test_loss_is_the_cross_entropy_of_the_logits():
    """Targets moved by one, or a sum for a mean, still make a loss that falls."""
    model, x, y = tiny(), tokens(), tokens(seed=2)
    picked = model(x).log_softmax(-1).gather(-1, y[..., None])
    assert abs(model(x, y) + picked.mean()) < 1e-4


@pytest.mark.parametrize("N", [1, 5, 8, 37])
def test_chunked_loss_is_the_whole_loss(N, monkeypatch):
    """Loss and both gradients, where tokens divide into equal chunks and where they do not, and
    scaled as the loss of a micro-batch is."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 5)
    torch.manual_seed(0)
    x, weight = torch.randn(N, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (N,))
    whole = F.cross_entropy(x @ weight.T, targets)
    chunked = FusedLinearCrossEntropy.apply(x, weight, targets, cross_entropy_and_grad, True)
    assert abs(chunked - whole) < 1e-5
    for ours, theirs in zip(torch.autograd.grad(0.3 * chunked, (x, weight)),
                            torch.autograd.grad(0.3 * whole, (x, weight))):
        assert_close(ours, theirs)
    with torch.no_grad():
        assert chunked == FusedLinearCrossEntropy.apply(x, weight, targets, cross_entropy_and_grad,
                                                        False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("learned", [0, 1, 17, 40])
def test_what_is_not_learned_counts_nowhere(learned, tied, monkeypatch):
    """Divided by all tokens, a batch of few answers hardly learns; and where a whole chunk is only
    read, or the batch, there is no 0/0. As PyTorch's ignore_index, gradients included."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 5)
    model, x, y = tiny(tie_embeddings=tied), tokens(), tokens(seed=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    y.view(-1)[order[learned:]] = -100
    y[0, 5:10] = -100
    loss, parameters = model(x, y), list(model.parameters())
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-100,
                               reduction="sum") / max(1, (y >= 0).sum())
    assert abs(loss - expected) < 1e-5
    ours, theirs = (torch.cat([g.flatten() for g in torch.autograd.grad(some, parameters)])
                    for some in (loss, expected))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("grad", [False, True])
def test_logits_never_exist_whole(grad, monkeypatch):
    """The largest tensor of a step, in bf16 and fp32 and as a gradient, is what runs out of memory
    first."""
    monkeypatch.setattr(model_module, "LOSS_CHUNK", 16)
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **kwargs or {})
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numbers = max(self.numbers, t.numel())
            return out

    model = tiny(vocab_size=4000, d_model=12)
    with Largest() as largest, torch.set_grad_enabled(grad):
        loss = model(tokens(4, 32), tokens(4, 32, seed=2))
        if grad:
            loss.backward()
    assert largest.numbers <= max(4 * 32 * 4000 / 8, 4000 * 12)


def test_fused_layers_are_the_layers():
    """In training several layers are one matmul, in generation each is its own: a wrong split would
    give part of k to v."""
    model = tiny()
    attn, x = model.blocks[0].attn, torch.randn(2, 5, 48)
    layers = attn.q, attn.k, attn.v
    found = {}
    for training in True, False:
        model.train(training).zero_grad()
        out = torch.cat(list(fused_linear(x, layers)), dim=-1)
        out.square().sum().backward()
        found[training] = [out, *(layer.weight.grad for layer in layers)]
    for fused, alone in zip(found[True], found[False]):
        assert_close(fused, alone)


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_a_gradient(tied):
    """A module that is built and not called, or a tie that is lost, trains nothing and says
    nothing."""
    model = tiny(tie_embeddings=tied)
    model(tokens(), tokens(seed=2)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == 97 * 48 * (2 - tied) + sum(
        p.numel() for p in model.blocks.parameters()) + 48


def test_one_graph_no_breaks():
    """A graph break costs speed silently: fullgraph makes it an error."""
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens()), model(tokens()))
    assert torch._dynamo.explain(model)(tokens(), tokens(seed=2)).graph_count == 1


def test_all_blocks_share_one_graph():
    """A graph per block would take minutes to compile instead of seconds, and fail at the ninth."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(n_layer=12)
    expected = model(tokens())
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False,
                                      backend="eager")
    assert torch.equal(model(tokens()), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_overfits_one_batch():
    """A model that cannot learn 40 tokens by heart has a fault between loss and weights."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**TINY)).init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens(), tokens(seed=2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1


def test_the_model_does_not_know():
    """Ranks, files of tokens and optimizers stay outside: model.py is to be read, and used,
    alone."""
    text = Path(model_module.__file__).read_text()
    for word in ("distributed", "optim", "print(", "environ", "from data import",
                 "from train import"):
        assert word not in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_bf16_is_near_fp32():
    """The backend that SDPA takes on a GPU in bf16 (flash-attn where installed) must give what fp32
    gives on the CPU."""
    model = tiny().eval()
    expected = model(tokens()).detach()
    got = model.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        logits = got(tokens().cuda()).float().cpu().detach()
    assert_close(logits, expected, tolerance=0.1)       # bf16 keeps 8 bits, three layers of them
