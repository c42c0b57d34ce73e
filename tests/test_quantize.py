"""Proofs of quantize.py: rounding is to the nearest, and the sums that are compiled are the matmul
that is not."""
import pytest
import torch

from model import Llama, ModelConfig
from quantize import LINEAR_TYPES, Int4, Int8, freeze_for_inference, in_large_pages


@pytest.mark.parametrize("kind", [*LINEAR_TYPES])
@pytest.mark.parametrize("O, I", [(7, 48), (64, 256), (33, 5632), (6, 4098), (5, 16384), (3, 10)])
def test_gemv_is_matmul(kind, O, I):
    """What is compiled for few rows and what runs for many are two programs for one result: sizes
    that no group or lane divides, and rows of more than 4,096, each have a path of their own."""
    torch.manual_seed(0)
    layer, x = LINEAR_TYPES[kind](torch.randn(O, I)), torch.randn(3, I)
    expected = layer.matmul(x)
    assert torch.stack([layer.gemv(row) for row in x]).sub(expected).abs().max() < 1e-5 * I ** 0.5
    assert layer(x).equal(expected) and layer(x[None]).shape == (1, 3, O)


def test_rounding_is_to_the_nearest():
    """A scale for the wrong row or group, halves of a byte exchanged: half a step is what rounding
    may take, and the largest of a group of int4, which is -8 steps, is exact."""
    torch.manual_seed(0)
    weight = torch.randn(12, 192) * torch.logspace(-3, 1, 12)[:, None]
    weight[3] = 0
    for layer in Int8(weight), Int4(weight):
        found = layer.matmul(torch.eye(192)).T
        step = layer.scale.abs().reshape(12, -1, 1)
        away = (found - weight).view(12, step.shape[1], -1).abs()
        most = 0.501 if isinstance(layer, Int8) else 1.001       # int4 has no 8, where it has a -8
        assert (away <= step * most).all() and (away <= step * 0.501).float().mean() > 0.98
        assert (found[3] == 0).all()
    groups = weight.view(12, 3, 64)
    largest = groups.abs().argmax(2, keepdim=True)
    assert found.view(12, 3, 64).gather(2, largest).allclose(groups.gather(2, largest), rtol=1e-5)


def test_a_tied_model_is_quantized_too(tmp_path):
    """Its head has no weight of its own."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(n_layer=1, d_model=64, n_head=2, n_kv_head=1, d_ff=64, vocab_size=100,
                              context=32, tie_embeddings=True)).init_weights()
    ids = torch.arange(10)[None]
    expected = model(ids)
    assert torch.allclose(freeze_for_inference(model)(ids), expected, atol=1e-5)
    assert isinstance(freeze_for_inference(Llama(model.config).init_weights(), "int8").head, Int8)


def test_large_pages_hold_the_same():
    """A view that is short by a page, or of memory that is gone, reads what others wrote."""
    tensor = torch.randn(700, 1100)
    copied = in_large_pages(tensor)
    assert tensor.nbytes > 2 ** 21 and copied.equal(tensor)
    small = torch.ones(3)
    assert in_large_pages(small) is small
