"""Steps of generation: a model and its KV cache, filled with prompts, then decoded by tokens.

Prefill runs whole prompts through the model and keeps their keys and values. A decode step runs one
new position per text (or several, to verify a draft), and shapes never change from step to step. So
one compiled graph serves all steps, and on a GPU one CUDA graph, which starts the hundreds of
kernels of a step by a single call.
"""
import copy
import math
from os.path import commonprefix

import torch

from device import compile_function
from files import InputError
from model import KVCache, Llama

PREFILL_TOKENS = 512         # short prompts run together, as long as they have no more tokens
CACHE_MULTIPLE = 128         # caches are a multiple of this long, so that compiled code is reused


def count_parameters(model):
    """The number of its parameters, however they are stored."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(model.config).parameters())


def should_compile(model, quantize, steps):
    """Whether compiling pays off in so many decode steps. It takes some ten seconds. Afterwards a
    token of TinyLlama takes half the time on a CPU, and far less with quantized weights, which
    without a compiler are turned into floats as a whole for each token."""
    on_cpu = model.embed.weight.device.type == "cpu"
    weights_read = steps * count_parameters(model)
    return weights_read > (1e10 if quantize else 1.5e11 if on_cpu else 1e13)


def compile_steps(model):
    """The same model, sharing its weights, with blocks and head compiled for fixed shapes: all
    blocks share one graph, so that compiling takes seconds."""
    weights = (*model.parameters(), *model.buffers())
    compiled = copy.deepcopy(model, {id(weight): weight for weight in weights})
    for module in (*compiled.blocks, compiled.head):         # a product and its sum are one FMA
        module.forward = compile_function(
            module.forward, options={"cpp.enable_floating_point_contract_flag": "fast"})
    return compiled


class Decoder:
    """A model and the KV cache of a number of rows, each a text: `prefill` prompts, then `decode`
    any number of tokens per row and step. Ids from `vocabulary` on only pad the model's vocabulary
    to a round size: their logits are dropped."""

    def __init__(self, model, rows, size, vocabulary, compile=False):
        weight = model.embed.weight
        self.model, self.vocabulary = model, vocabulary
        self.step_model = compile_steps(model) if compile else model
        size = math.ceil(size / CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.cache = KVCache(model.config, rows, size, weight.device, weight.dtype)
        self.cache.is_empty = False                          # prefill fills it from other caches
        self.is_async = weight.device.type == "cuda"         # a GPU works while the host goes on
        self.graphs, self.largest_logit = {}, torch.zeros((), device=weight.device)

    def prefill(self, prompts, n=1):
        """Logits (R, V) after prompts (lists of ids), with n rows per prompt: R = n len(prompts).
        Each prompt runs through the model once, whatever n is."""
        weight, last_states = self.model.embed.weight, []
        start = 0
        while start < len(prompts):
            # short prompts run together, padded to the longest of them
            stop = start + 1
            while stop < len(prompts) and (stop + 1 - start) * max(
                    map(len, prompts[start:stop + 1])) <= PREFILL_TOKENS:
                stop += 1
            group = prompts[start:stop]
            T = max(map(len, group))
            idx = torch.tensor([prompt + [0] * (T - len(prompt)) for prompt in group],
                               device=weight.device)                         # (B, T)
            new = KVCache(self.model.config, len(group), T, weight.device, weight.dtype)
            x = self.model.hidden_states(idx, new)                           # (B, T, C)
            last_states += [x[b, len(prompt) - 1] for b, prompt in enumerate(group)]
            # every row of a prompt gets its keys and values. Those of the padding stay masked,
            # until the row's own tokens overwrite them
            rows = slice(start * n, stop * n)
            for layer, new_layer in zip(self.cache.layers, new.layers):
                for cached, tensor in zip(layer, new_layer):
                    cached[rows, :, :T] = tensor.repeat_interleave(n, 0)
            start = stop
        lengths = torch.tensor([len(prompt) for prompt in prompts for _ in range(n)])
        self.cache.lengths[:len(lengths)] = lengths
        logits = self.model.head(torch.stack(last_states))[:, :self.vocabulary].float()
        self.largest_logit = logits.amax()
        self.require_finite()
        return logits.repeat_interleave(n, 0)

    def decode(self, ids):
        """Logits (R, T, V) after each of ids (R, T), which continue the rows. Use them before the
        next step: a CUDA graph always leaves its logits in the same place."""
        if ids.device.type != "cuda":
            logits = self.step_model(ids, cache=self.cache)
        else:
            if ids.shape not in self.graphs:
                self.graphs[ids.shape] = self.capture(ids.clone())
            graph, graph_ids, logits = self.graphs[ids.shape]
            graph_ids.copy_(ids)
            graph.replay()
        logits = logits[..., :self.vocabulary].float()
        self.largest_logit = self.largest_logit.maximum(logits.amax())      # NaN is the largest
        return logits

    def require_finite(self):
        """Raises InputError if a logit since the prefill was NaN or infinite: what was sampled then
        means nothing. To be called at the end, as it waits for the device."""
        if not math.isfinite(self.largest_logit):
            raise InputError("logits are not finite: the weights hold NaN or infinite numbers, or "
                             "are too large for this precision, and --dtype=float32 helps")

    @torch.inference_mode()
    def warmup(self, T):
        """Runs and discards a step of T tokens, so that later ones find their code compiled; to be
        called before prefill."""
        self.decode(self.cache.lengths.new_zeros(len(self.cache.lengths), T)).sum().item()

    def capture(self, ids):
        """A CUDA graph of one step, which starts its hundreds of kernels by a single call; the
        tensor it reads ids from; the tensor it leaves logits in."""
        lengths = self.cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):               # compiles, and lets libraries make their plans
            for _ in range(3):
                self.step_model(ids, cache=self.cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.step_model(ids, cache=self.cache)
        self.cache.lengths.copy_(lengths)
        return graph, ids, logits


class ChatDecoder(Decoder):
    """A Decoder of one text, whose prefill reads only what its cache does not hold yet. `ids` are
    those whose keys and values it holds, as far as `lengths` reaches; `read` is how many the last
    prefill has read."""
    ids, read = [], 0

    def prefill(self, prompts, n=1):
        """Logits (1, V) after the only prompt."""
        prompt, = prompts
        cached = self.ids[:self.cache.lengths.item()]
        # the last id is read in any case: its logits are wanted
        start = min(len(commonprefix([cached, prompt])), len(prompt) - 1)
        self.cache.lengths.fill_(start)
        self.ids, self.read = prompt, len(prompt) - start
        new = torch.tensor([prompt[start:]], device=self.cache.lengths.device)   # (1, T)
        for chunk in new.split(PREFILL_TOKENS, dim=1):
            x = self.model.hidden_states(chunk, self.cache)                  # (1, T, C)
        logits = self.model.head(x[:, -1])[:, :self.vocabulary].float()
        self.largest_logit = logits.amax()
        self.require_finite()
        return logits
