"""Proofs of decode.c: it computes what the model computes in PyTorch, for all kinds of weights, on
all CPUs and with any C compiler."""
import copy
import ctypes
import math
import os
import platform
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import decoder as decoder_module
import model as model_module
from decoder import Decoder, StepOnCPU
from device import compile_c
from files import InputError
from model import KVCache, Llama, ModelConfig
from quantize import FrozenLinear, freeze_for_inference, round_input

COMPILER = os.environ.get("CC") or "cc"
pytestmark = pytest.mark.skipif(not shutil.which(shlex.split(COMPILER)[0]),
                                reason="there is no C compiler")

# no width is a multiple of 64, two have an odd number of groups; heads of 22, three to a key head
CONFIG = ModelConfig(n_layer=2, d_model=132, n_head=6, n_kv_head=2, d_ff=300, vocab_size=101,
                     context=64)
KINDS = [None, "int8", "int4"]
FP32, BF16 = torch.float32, torch.bfloat16


def random_model(kind=None, dtype=FP32, tied=False, spoil=False):
    """A frozen model whose norms differ, and whose blocks add as much as the embedding. `spoil`
    makes one weight NaN."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**vars(CONFIG) | {"tie_embeddings": tied})).init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
        elif "embed" not in name:
            p.data.mul_(2)
    if spoil:
        model.blocks[1].mlp.down.weight.data[3, 290] = math.nan
    return freeze_for_inference(model.to(dtype), kind)


def in_fp32(model):
    """The same frozen weights, but all else is computed in fp32."""
    model = copy.deepcopy(model).float()
    for layer in model.modules():
        if isinstance(layer, FrozenLinear):
            layer.dtype = FP32
    return model


def random_cache(dtype, rows):
    """Rows of different lengths; also what they have not reached is not 0."""
    torch.manual_seed(1)
    cache = KVCache(CONFIG, rows, 24, dtype=FP32)
    cache.layers = [tuple(tensor.normal_().to(dtype) for tensor in layer) for layer in cache.layers]
    cache.lengths.copy_(torch.tensor([3, 0, 11][:rows]))
    cache.is_empty = False
    return cache


def error_of_each(found, expected):
    """The relative error of each row of the last dimension."""
    return ((found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten()


@pytest.fixture
def compare(monkeypatch):
    """compare(model, rows, steps, threads) asserts that steps of so many tokens are those of the
    model computed in fp32, of which only keys and values are rounded as the cache's: logits, what
    was added to the cache, and that the rest of it is as it was.

    The two add up in another order. Where that carries a number over the middle between two whole
    numbers, or between two of bf16, it is rounded the other way, which may show in all that follows
    in this text, by a hundredth or two. A mistake shows everywhere, or by far more."""
    update_cache = model_module.update_cache

    @torch.inference_mode()
    def compare(model, rows, steps, threads=1):
        dtype, errors = model.embed.weight.dtype, []
        monkeypatch.setattr(model_module, "update_cache", lambda cache, new, positions:
                            update_cache(cache, new.to(dtype), positions))
        cache, before = random_cache(dtype, rows), random_cache(dtype, rows)
        expected = random_cache(dtype, rows)
        expected.layers = [tuple(tensor.float() for tensor in layer) for layer in expected.layers]
        step, exact = StepOnCPU(model, cache), in_fp32(model)
        for T in steps:
            ids = torch.randint(CONFIG.vocab_size, (rows, T))
            torch.set_num_threads(threads)
            logits = step(ids, cache)
            torch.set_num_threads(1)
            assert logits.shape == (rows, T, CONFIG.vocab_size)
            errors.append(error_of_each(logits, exact(ids, cache=expected)))
        assert torch.equal(cache.lengths, expected.lengths)
        places = torch.arange(cache.size)
        added = ((before.lengths[:, None] <= places) & (places < cache.lengths[:, None]))
        for layers in zip(cache.layers, expected.layers, before.layers):
            for found, right, old in zip(*layers):
                found, right, old = (x.transpose(1, 2) for x in (found, right, old))  # (R, S, K, D)
                errors.append(error_of_each(found[added], right[added]))
                assert torch.equal(found[~added], old[~added])
        errors = torch.cat(errors)
        assert errors.max() < 0.05 and (errors < 1e-5).float().mean() > 0.5

    return compare


@pytest.mark.parametrize("kind, dtype", [
    (None, FP32), (None, BF16), ("int8", FP32), ("int4", FP32), ("int4", BF16),
    pytest.param("int8", BF16, marks=pytest.mark.slow)])
def test_steps_are_those_of_pytorch(kind, dtype, compare):
    """A group that is not full, a head that is no vector, another row's position: the text goes on,
    only worse. In bf16 weights and cache are rounded, and nothing else is."""
    model = random_model(kind, dtype)
    compare(model, 3, (1, 1))
    compare(model, 1, (3, 1, 3))
    if kind or dtype == FP32:        # in full, more than three tokens are left to PyTorch, in dtype
        compare(model, 3, (3, 1, 3))


@pytest.mark.parametrize("kind", [None, "int4"])
def test_threads_share_a_step(kind, compare):
    """A thread that reads what another has not written yet; and a head that has no weight of its
    own."""
    model = random_model(kind, tied=True)
    for _ in range(5):
        compare(model, 3, (1, 1), threads=2)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler({flag: replacement}) makes one that takes other flags, "" for none, and a cache of
    its own."""
    def compiler(flags):
        cases = "".join(f"{flag}) a={other};; " for flag, other in flags.items())
        (tmp_path / "cc").write_text(f"""#!/bin/sh
            for a; do
                case $a in {cases}esac
                shift
                set -- "$@" $a
            done
            exec {COMPILER} "$@"
            """)
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    return compiler


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are instructions of x86-64")
@pytest.mark.parametrize("kind, dtype, flags", [
    ("int4", FP32, {"-march=native": "-march=x86-64", "-fopenmp": ""}),
    ("int4", FP32, {"-march=native": "-march=x86-64-v3"}),
    (None, BF16, {"-march=native": "-march=x86-64-v3"})])
def test_older_processors_compute_the_same(kind, dtype, flags, compiler, compare, tmp_path):
    """They have other code, which nobody with a new one runs; nor does who has OpenMP that of
    compilers without it. (The head of int4 is int8.)"""
    if "v3" in flags["-march=native"] and not torch.cpu._is_avx2_supported():
        pytest.skip("this CPU has no AVX2")
    compiler(flags)
    compare(random_model(kind, dtype), 3, (1, 1))
    library, = (tmp_path / "cache/tinyllama").iterdir()
    assert (b"omp_get_num_threads" in library.read_bytes()) == ("-fopenmp" not in flags)


def test_rounding_and_exponentials_are_those_of_pytorch(tmp_path, monkeypatch):
    """PyTorch reads prompts and decode.c goes on: rounded otherwise, ties, zeros and the smallest
    numbers would be two models. So they are the same bit for bit, and e^x to its digits."""
    torch.manual_seed(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = torch.randn(12, 132) * torch.logspace(-35, 36, 12)[:, None]
    x[1], x[2, :64], x[3, 128:] = 1e-40, 0, 0
    x[4], x[4, ::64] = torch.arange(132) - 63.5, 127          # halves of a step
    x[5, ::64] = math.inf
    x[6, 5] = -math.nan
    source = Path(decoder_module.__file__).with_name("decode.c")
    (tmp_path / "round.c").write_text(f"""
        #include "{source}"
        void round_all(const float *x, float *y) {{
            for (int t = 0; t < 12; t++) {{
                memcpy(input[t], x + t * C, C * sizeof(float));
                for (int g = 0; g < C_GROUPS; g++) round_group(t, g, C);
                for (int i = 0; i < C; i++) y[t * C + i] = rounded[t][i] * scales[t][i / GROUP];
            }}
        }}
        void exp_all(const float *x, float *y) {{
            for (int i = 0; i < 999; i++) y[i] = exponential(x[i]);
        }}""")
    library, found = compile_c(
        tmp_path / "round.c", C=132, F=300, H=6, K=2, L=1, V=5, EPS="1e-5f", MAX_TOKENS=12, BITS=8,
        HEAD_BITS=8, FLOAT=1), torch.empty(12, 132)
    library.round_all(*(ctypes.c_void_p(t.data_ptr()) for t in (x, found)))
    expected = round_input(x)
    assert expected[5].isnan().all() and expected[6, :64].isnan().all()
    assert found.allclose(expected, rtol=0, atol=0, equal_nan=True)

    x, found = torch.linspace(-87, 87, 999), torch.empty(999)
    x[-1] = math.nan
    library.exp_all(*(ctypes.c_void_p(t.data_ptr()) for t in (x, found)))
    assert found.allclose(x.double().exp().float(), rtol=2e-7 * 87, equal_nan=True)
    near = x.abs() < 8
    assert found[near].allclose(x[near].exp(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_seen(kind):
    """Whole numbers hide NaN: its int8 is 0. From a weight, and from a cache."""
    ids = torch.ones(1, 1, dtype=torch.long)
    for spoil in True, False:
        decoder = Decoder(random_model(kind, spoil=spoil), 1, 24, 101, compile=True)
        decoder.cache.layers[0][1][:, :, 0] = 0 if spoil else math.inf
        decoder.cache.lengths.fill_(3)
        with torch.inference_mode():
            decoder.decode(ids)
        with pytest.raises(InputError, match="logits are not finite"):
            decoder.require_finite()


def test_the_fewest_threads_that_are_fastest(monkeypatch, capsys):
    """On a busy machine threads wait for one another: two took a hundred times as long as one. A
    step that is short in any case is not measured again."""
    threads = torch.get_num_threads()
    decoder = Decoder(random_model(), 1, 24, 101)
    monkeypatch.setattr(decoder_module, "THREADS", 4)
    for seconds, expected, measured in (({4: 0.9, 2: 0.5, 1: 0.7}, 2, [4, 2, 1]),
                                        ({4: 0.9, 2: 0.5, 1: 0.1}, 1, [4, 2, 1]),
                                        ({4: 0.1, 2: 0.5, 1: 0.7}, 4, [4, 2, 1]),
                                        ({4: 0.01, 2: 0, 1: 0}, 4, [4])):
        asked = []

        def timeit(run, number):
            asked.append(torch.get_num_threads())
            return seconds[asked[-1]] * number

        monkeypatch.setattr(decoder_module, "timeit", timeit)
        try:
            decoder.choose_threads()
            assert torch.get_num_threads() == expected
            assert capsys.readouterr().err.startswith(f"{expected} of 4") == (expected < 4)
        finally:
            torch.set_num_threads(threads)
        assert asked == measured
