"""Is what this machine computes right? python check.py

A GPU, a driver or a new PyTorch can be wrong without a word: a mask that lets one token through, a
kernel that confuses heads, a graph compiled to something else. Here each piece of training and
generation is computed by this machine as it would be in a run, and once more slowly and surely:
attention in fp64, a step and greedy text (in fp32, where few tokens are nearly equal) on the CPU.
OK or BAD, a line each, with the largest relative error; exit status 1 where one is BAD; 2 minutes.
"""
import sys
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import model
import parallel
import sample
import train
from device import compile_error, device_name, find_device, find_dtype
from quantize import LINEAR_TYPES, freeze_for_inference

CPU, BF16, FP32 = torch.device("cpu"), torch.bfloat16, torch.float32


def distance(*tensors):
    """|ours - exact| / |exact|, in fp64."""
    ours, exact = (tensor.detach().cpu().double() for tensor in tensors)
    return ((ours - exact).norm() / exact.norm()).item()


def attention_errors(device, dtype, B, T, S, masked=False, training=False):
    """{what: error} of attention with TinyLlama's heads: T queries, the last of S positions, or as
    a mask says; in training of the gradients, too, and cuDNN may be chosen."""
    torch.manual_seed(0)
    exact = [torch.randn(B, heads, n, 64).to(dtype).double().requires_grad_()
             for heads, n in ((32, T), (4, S), (4, S))]
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if masked:
        seen = seen & (torch.rand(B, 1, T, S) < 0.7) | torch.eye(T, S, dtype=torch.bool)
    k, v = (x.repeat_interleave(8, dim=1) for x in exact[1:])
    z = (exact[0] @ k.mT / 8).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    ours = [x.detach().to(device, dtype).requires_grad_(training) for x in exact]
    with sdpa_kernel(model.WITHOUT_CUDNN + [SDPBackend.CUDNN_ATTENTION] * training):
        y = model.attention(*ours, seen.to(device) if masked else None)
        errors, up = {"output": distance(y, z)}, torch.randn_like(z)
        if training:
            pairs = zip("qkv", torch.autograd.grad(y, ours, up.to(device, dtype)),
                        torch.autograd.grad(z, exact, up))
            errors |= {f"gradient of {name}": distance(a, b) for name, a, b in pairs}
    return errors


def step(device, dtype, compiled=False, checkpointing=False):
    """{what: value} of a micro-batch, loss and gradients: the same weights and tokens anywhere."""
    model.LOSS_CHUNK = 512                                                         # so in two parts
    torch.manual_seed(0)
    cfg = train.TrainConfig(n_layer=2, vocab_size=4096, context=512)
    weights = model.Llama(cfg).init_weights().state_dict()
    with torch.device("meta"):
        llama = model.Llama(cfg)
    called = parallel.parallelize(llama, parallel.World(device), "none", dtype, compiled, checkpointing,
                               recompute=checkpointing)
    llama.load_state_dict(weights)
    x, y = (torch.randint(3, 4096, (2, 512)).to(device) for _ in range(2))
    with train.autocast(device, dtype):
        loss = called(x, y)
    loss.backward()
    return {"loss": loss} | {f"gradient of {n}": p.grad for n, p in llama.named_parameters()}


def text(device, quantize, compile=False):
    """The likeliest 40 tokens after two prompts, in fp32."""
    torch.manual_seed(0)
    llama = model.Llama(model.ModelConfig(n_layer=4, d_model=512, n_head=8, n_kv_head=2, d_ff=1408,
                                          vocab_size=4096, context=512)).init_weights()
    llama = freeze_for_inference(llama.to(device), quantize)
    steps = sample.generate(sample.Decoder(llama, 2, 200, 4096, compile), [[5, 6, 7], [9] * 40], 1,
                            40, set(), lambda logits: logits.argmax(-1))
    return torch.tensor([sum(row, []) for row in zip(*steps)])


def main(argv):
    if argv:
        sys.exit(__doc__)
    device, bad = find_device(), []
    error = compile_error(device)
    print(f"torch {torch.__version__}, {device_name(device)}, cuDNN "
          f"{torch.backends.cudnn.version()}, {f'not compiled: {error}' if error else 'compiled'}")

    def report(what, most, errors):
        try:
            found = errors()                                      # not a number is the largest
            worst = max(found, key=lambda name: (found[name] != found[name], found[name]))
            fine, words = found[worst] <= most, f"{found[worst]:.1e} in {worst}, at most {most:.0e}"
        except Exception as failure:
            fine, words = False, f"{type(failure).__name__}: {failure}".splitlines()[0]
        bad.extend([] if fine else [what])
        print(f"{'OK ' if fine else 'BAD'} {what}: {words}", flush=True)

    exact = step(CPU, FP32)
    for dtype, most in ((FP32, 1e-4), (BF16, 1e-2))[:1 + (find_dtype(device)[0] == BF16)]:
        for what, *how in (("training", 1, 2048, 2048, False, True), ("a prompt", 1, 100, 100),
                           ("its next chunk", 1, 512, 1000, True), ("a token", 1, 1, 640, True),
                           ("tokens of 16 texts", 16, 1, 640, True), ("a draft", 3, 5, 640, True),
                           ("a tree of answers", 4, 200, 200, True)):
            report(f"attention in {dtype}, {what}", most,
                   partial(attention_errors, device, dtype, *how))
        for compiled, again in ((False, False), (True, False), (True, True))[:1 if error else 3]:
            report(f"a step in {dtype}{', compiled' * compiled}{', checkpointed' * again}",
                   3 * most, lambda: {name: distance(value, exact[name]) for name, value in
                                      step(device, dtype, compiled, again).items()})
    for quantize in LINEAR_TYPES:
        right = text(CPU, quantize)
        for compile in (False, True)[:1 if error else 2]:
            report(f"text, {quantize or 'full'} weights{', compiled' * compile}", 0.05, lambda: {
                "the tokens": (text(device, quantize, compile) != right).float().mean().item()})
    sys.exit(f"{len(bad)} BAD: do not train or generate here with this PyTorch" if bad else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
