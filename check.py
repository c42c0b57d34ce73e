"""Is what this machine computes right? python check.py

A GPU, a driver or a new PyTorch can be silently wrong: a mask that lets one token through, a kernel
that confuses heads, a graph that is compiled to something else. So each part of training and
generation is computed here as in a run, and once more slowly and surely: attention in fp64, a
training step and greedy text on the CPU (in fp32, where nearly equal tokens are rare).

Prints OK or BAD for each, with the largest relative error, and exits with status 1 where one is
BAD. It takes four minutes on two CPU cores, less with a GPU: most of it is compiling six graphs,
each in a way that a run would, and exact attention on the CPU.
"""
import sys
from contextlib import nullcontext
from functools import lru_cache

import torch
from torch.nn.attention import sdpa_kernel

import model
import parallel
import train
from decoder import Decoder
from device import compile_error, device_name, find_device, find_dtype
from files import run_program
from quantize import LINEAR_TYPES, freeze_for_inference
from sample import generate

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32

# (what, batch, queries, keys, with a mask, in training): every form of attention that a run uses
ATTENTION = [("training", 1, 2048, 2048, False, True), ("a prompt", 1, 100, 100, False, False),
             ("a token", 1, 1, 640, True, False), ("tokens of 16 texts", 16, 1, 640, True, False),
             ("draft tokens", 3, 5, 640, True, False)]


def relative_error(ours, exact):
    """|ours - exact| / |exact|, in fp64."""
    ours, exact = (tensor.detach().cpu().double() for tensor in (ours, exact))
    return ((ours - exact).norm() / exact.norm()).item()


def attention_errors(device, dtype, B, T, S, masked=False, training=False):
    """{what: relative error} of attention with TinyLlama's heads, for T queries, the last of S
    positions: of the output, and in training of the gradients."""
    torch.manual_seed(0)
    exact = [torch.randn(B, heads, n, 64).to(dtype).double().requires_grad_()
             for heads, n in ((32, T), (4, S), (4, S))]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if masked:                                   # keys at random, and at least one for each query
        seen = seen & (torch.rand(B, 1, T, S) < 0.7) | torch.eye(T, S, dtype=torch.bool)
    k, v = (x.repeat_interleave(8, dim=1) for x in exact[1:])
    z = (exact[0] @ k.mT / 8).masked_fill(~seen, -torch.inf).softmax(-1) @ v

    ours = [x.detach().to(device, dtype).requires_grad_(training) for x in exact]
    with nullcontext() if training else sdpa_kernel(model.WITHOUT_CUDNN):
        y = model.attention(*ours, seen.to(device) if masked else None)
        errors = {"output": relative_error(y, z)}
        if training:
            dz = torch.randn_like(z)
            gradients = zip(torch.autograd.grad(y, ours, dz.to(device, dtype)),
                            torch.autograd.grad(z, exact, dz))
            for name, (ours, exact) in zip("qkv", gradients):
                errors[f"gradient of {name}"] = relative_error(ours, exact)
    return errors


def training_step(device, dtype, compiled=False, checkpointing=False):
    """{what: tensor} of the loss and all gradients, from the same weights and tokens anywhere."""
    model.LOSS_CHUNK = 512                       # so that the loss is computed in two chunks
    config = model.ModelConfig(n_layer=2, vocab_size=4096, context=512)
    with torch.device("meta"):
        llama = model.Llama(config)
    wrapped_model = parallel.parallelize(llama, parallel.World(device), "none", dtype, compiled,
                                         checkpointing, recompute=checkpointing)
    torch.manual_seed(0)
    llama.load_state_dict(model.Llama(config).init_weights().state_dict())
    x, y = (torch.randint(3, 4096, (2, 512)).to(device) for _ in range(2))
    with train.autocast(device, dtype):
        loss = wrapped_model(x, y)
    loss.backward()
    return {"loss": loss} | {f"gradient of {n}": p.grad for n, p in llama.named_parameters()}


PROMPTS = [5, 6, 7], [9] * 40


def random_decoder(device, quantize, compile=False):
    torch.manual_seed(0)
    llama = model.Llama(model.ModelConfig(n_layer=2, d_model=512, n_head=8, n_kv_head=2, d_ff=1408,
                                          vocab_size=2048, context=512)).init_weights()
    llama = freeze_for_inference(llama.to(device), quantize)
    return Decoder(llama, len(PROMPTS), 200, 2048, compile)


@lru_cache                                       # the CPU's text is needed twice
def greedy_text(quantize):
    """The likeliest 40 tokens after each prompt, in fp32, on the CPU."""
    steps = generate(random_decoder(CPU, quantize), PROMPTS, 1, 40, set(),
                     lambda logits: logits.argmax(-1))
    return torch.tensor([sum(row, []) for row in zip(*steps)])


@torch.inference_mode()
def text_errors(device, quantize, compile):
    """How many of the CPU's tokens the device would not have chosen after the same text: from one
    of two that are almost equally likely on, texts of their own would have nothing in common."""
    text, decoder = greedy_text(quantize), random_decoder(device, quantize, compile)
    found = [decoder.prefill(PROMPTS).argmax(-1)]
    for ids in text.to(device).split(1, dim=1)[:-1]:
        found.append(decoder.decode(ids)[:, -1].argmax(-1))
    return {"the tokens": (torch.stack(found, 1).cpu() != text).float().mean().item()}


def main(argv):
    if argv:
        sys.exit(__doc__)
    device, bad = find_device(), []
    error = compile_error(device)
    print(f"torch {torch.__version__}, {device_name(device)}, cuDNN "
          f"{torch.backends.cudnn.version()}, {f'not compiled: {error}' if error else 'compiled'}")

    def report(what, limit, find_errors, *how):
        """Prints whether all of the errors that find_errors returns are within the limit."""
        try:
            errors = find_errors(device, *how)
            # not a number is unequal to itself: it counts as the largest error
            worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
            right = errors[worst] <= limit
            words = f"{errors[worst]:.1e} in {worst}, at most {limit:.0e}"
        except Exception as failure:
            right, words = False, f"{type(failure).__name__}: {failure}".splitlines()[0]
        if not right:
            bad.append(what)
        print(f"{'OK ' if right else 'BAD'} {what}: {words}", flush=True)

    exact_step = training_step(CPU, FP32)

    def step_errors(*how):
        return {name: relative_error(value, exact_step[name])
                for name, value in training_step(*how).items()}

    limits = {FP32: 1e-4, BF16: 1e-2} if find_dtype(device)[0] == BF16 else {FP32: 1e-4}
    ways = {"": False} if error else {"": False, ", compiled": True}
    for dtype, limit in limits.items():
        for what, *how in ATTENTION:
            report(f"attention in {dtype}, {what}", limit, attention_errors, dtype, *how)
        for words, compiled in ways.items():
            report(f"a step in {dtype}{words}", 3 * limit, step_errors, dtype, compiled)
    if not error:                                # another graph, in the dtype that runs have here
        report(f"a step in {dtype}, compiled, checkpointed", 3 * limit,
               step_errors, dtype, True, True)
    for quantize in LINEAR_TYPES:
        for words, compiled in ways.items():
            report(f"text, {quantize or 'full'} weights{words}", 0.05,
                   text_errors, quantize, compiled)
    sys.exit(f"{len(bad)} BAD: do not train or generate here with this PyTorch" if bad else 0)


if __name__ == "__main__":
    run_program(main)
