"""Steps of generation: a model and its KV cache, filled with prompts, then decoded by tokens.

Prefill runs whole prompts through the model and keeps their keys and values. A decode step runs one
new position per text (or several, to verify a draft), and shapes never change from step to step. So
one compiled graph serves all steps, and on a GPU one CUDA graph, which starts the hundreds of
kernels of a step by a single call.
"""
import ctypes
import math
import sys
from os.path import commonprefix
from pathlib import Path
from timeit import timeit

import torch

from device import compile_c, compile_error, compile_function
from files import InputError
from model import KVCache, Llama, rope_cos_sin
from quantize import FrozenLinear

PREFILL_TOKENS = 512         # short prompts run together, as long as they have no more tokens
CACHE_MULTIPLE = 128         # caches are a multiple of this long, so that compiled code is reused
KEY_CHUNK = 64               # keys that one multiprocessor of a GPU attends to
THREADS = torch.get_num_threads()
SHORT_STEP = 0.02            # seconds: about a step that is shorter nobody has to think


def count_parameters(model):
    """The number of its parameters, however they are stored."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(model.config).parameters())


def should_compile(model, steps):
    """Whether compiling pays off in so many decode steps. For a CPU it takes half a second, once,
    and always does. For a GPU it takes some 20 seconds, 5 from the cache, and a quarter of the
    kernels are left of a step: by estimate a millisecond of TinyLlama's less, and three with
    quantized weights, which otherwise are turned into floats for each token."""
    weights_read = steps * count_parameters(model)
    on_cpu = model.embed.weight.device.type == "cpu"
    return on_cpu or weights_read > (1.5e12 if model.head.bits else 5e12)


def split_mask(mask, config, dtype):
    """The mask (B, 1, T, S) as masked_attention adds it to the scores of P chunks of the keys:
    (B, K P, H / K T, S / P)."""
    mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -1e30)     # softmax(-inf) is NaN
    mask = mask[:, 0].repeat(1, config.n_head // config.n_kv_head, 1)        # (B, H / K T, S)
    return mask.unflatten(2, (-1, KEY_CHUNK)).transpose(1, 2).repeat(1, config.n_kv_head, 1, 1)


def compile_steps(model):
    """A function like model(ids, cache=cache), compiled for a GPU and fixed shapes: all blocks
    share one graph, so that compiling takes seconds."""
    def inputs(ids, cache):
        positions, mask = cache.positions_and_mask(ids.shape[1])
        if mask.is_cuda and model.config.head_dim % 8 == 0:  # the kernel takes no other
            mask = split_mask(mask, model.config, cache.layers[0][0].dtype)
        cos, sin = rope_cos_sin(positions, model.config.head_dim, model.config.rope_theta)
        return model.embed(ids), cos, sin, positions, mask

    # independent kernels become one, and the sizes of their blocks are tuned
    options = {"combo_kernels": True, "coordinate_descent_tuning": True}
    inputs, run_block, logits = (compile_function(function, options=options) for function in (
        inputs, lambda block, *args: block(*args), lambda x: model.head(model.norm(x))))

    def step(ids, cache):
        x, cos, sin, positions, mask = inputs(ids, cache)
        for block, layer in zip(model.blocks, cache.layers):
            x = run_block(block, x, cos, sin, layer, positions, mask)
        cache.lengths += ids.shape[1]
        return logits(x)

    return step


def compile_decode(model):
    """The library of decode.c for a frozen model. Raises InputError where there is no compiler."""
    c, layer = model.config, model.blocks[0].attn.o
    return compile_c(
        Path(__file__).with_name("decode.c"), C=c.d_model, F=c.d_ff, H=c.n_head, K=c.n_kv_head,
        L=c.n_layer, V=c.vocab_size, EPS=f"{float(c.norm_eps)}f", MAX_TOKENS=layer.max_tokens,
        BITS=layer.bits, HEAD_BITS=model.head.bits, FLOAT=int(layer.dtype == torch.float32))


def step_error(model, device):
    """Why a compiled step of the frozen model does not work here, None if it does."""
    if device.type != "cpu":
        return compile_error(device)
    try:
        compile_decode(model)
    except InputError as error:
        return str(error)


class StepOnCPU:
    """model(ids, cache=cache) for a frozen model and one cache, by decode.c. More ids than it is
    made for go to the model itself."""

    def __init__(self, model, cache):
        self.model, self.library, self.tensors = model, compile_decode(model), []
        for block, cached in zip(model.blocks, cache.layers):
            self.add(block.attn_norm, block.attn.qkv, block.attn.o,
                     block.mlp_norm, block.mlp.gate_up, block.mlp.down)
            self.tensors += cached
        self.add(model.norm, model.head)
        self.pointers = (ctypes.c_void_p * len(self.tensors))(
            *(0 if t is None else t.data_ptr() for t in self.tensors))

    def add(self, *modules):
        """Adds the weights of modules, in the order of the structs in decode.c."""
        for module in modules:
            self.tensors += ([module.weight, getattr(module, "scale", None)]
                             if isinstance(module, FrozenLinear) else [module.weight.float()])

    def __call__(self, ids, cache):
        c, (R, T) = self.model.config, ids.shape
        if self.model.blocks[0].attn.o.max_tokens < R * T:
            return self.model(ids, cache=cache)
        positions, _ = cache.positions_and_mask(T)
        cos, sin = rope_cos_sin(positions, c.head_dim, c.rope_theta)
        x = self.model.embed(ids).contiguous()
        logits = x.new_empty(R, T, c.vocab_size)
        sizes = [ctypes.c_long(n) for n in (R * T, T, cache.size)]
        self.library.decode(self.pointers, torch.get_num_threads(), *sizes, *(
            ctypes.c_void_p(t.data_ptr()) for t in (positions, cos, sin, x, logits)))
        cache.lengths += T
        return logits


class Decoder:
    """A model and the KV cache of a number of rows, each a text: `prefill` prompts, then `decode`
    any number of tokens per row and step. Ids from `vocabulary` on only pad the model's vocabulary
    to a round size: their logits are dropped."""

    def __init__(self, model, rows, size, vocabulary, compile=False):
        weight = model.embed.weight
        self.model, self.vocabulary = model, vocabulary
        size = math.ceil(size / CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.cache = KVCache(model.config, rows, size, weight.device, weight.dtype)
        self.step_model = (model if not compile else compile_steps(model)
                           if weight.device.type == "cuda" else StepOnCPU(model, self.cache))
        self.cache.is_empty = False                          # prefill fills it from other caches
        self.is_async = weight.device.type == "cuda"         # a GPU works while the host goes on
        self.graphs, self.largest_logit = {}, torch.zeros((), device=weight.device)
        self.generator = torch.Generator(weight.device)      # the one that `pick` may draw from

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
        self.largest_logit.copy_(logits.amax())
        self.require_finite()
        return logits.repeat_interleave(n, 0)

    def decode(self, ids, pick=None):
        """Logits (R, T, V) after each of ids (R, T), which continue the rows; with `pick`, where T
        is 1, the ids (R,) that it returns for logits (R, V). Use them before the next step: a CUDA
        graph always leaves its result in the same place. There is a graph for each pick."""
        if ids.device.type != "cuda":
            return self.step(ids, pick)
        if (ids.shape, pick) not in self.graphs:
            self.graphs[ids.shape, pick] = self.capture(ids.clone(), pick)
        graph, graph_ids, result = self.graphs[ids.shape, pick]
        if ids.data_ptr() != graph_ids.data_ptr():
            graph_ids.copy_(ids)
        graph.replay()
        return result

    def step(self, ids, pick):
        """What decode returns, without a graph."""
        logits = self.step_model(ids, cache=self.cache)[..., :self.vocabulary]
        self.largest_logit.copy_(self.largest_logit.maximum(logits.amax()))  # NaN is the largest
        return pick(logits[:, -1]) if pick else logits.float()

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

    def choose_threads(self):
        """Sets the number of threads by which a step takes least: all, half of them or one, which
        it says. On a busy machine threads wait for one another. To be called before prefill."""
        seconds = {}
        for n in THREADS, THREADS // 2, 1:
            if self.is_async or n < 1 or seconds and seconds[THREADS] < SHORT_STEP:
                break
            torch.set_num_threads(n)
            seconds[n] = timeit(lambda: self.warmup(1), number=4) / 4
        fastest = min(seconds, key=seconds.get, default=THREADS)
        torch.set_num_threads(fastest)
        if fastest < THREADS:
            print(f"{fastest} of {THREADS} threads: more are slower, as the machine is busy",
                  file=sys.stderr)

    def capture(self, ids, pick):
        """A CUDA graph of one step, which starts its hundreds of kernels by a single call; the
        tensor it reads ids from; the tensor it leaves its result in."""
        lengths = self.cache.lengths.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):               # compiles, and lets libraries make their plans
            for _ in range(3):
                self.step(ids, pick)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)       # each replay draws other numbers
        with torch.cuda.graph(graph):
            result = self.step(ids, pick)
            if pick:                                # left where the next step reads it
                result = ids.copy_(result[:, None])[:, 0]
        self.cache.lengths.copy_(lengths)
        return graph, ids, result


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
        self.largest_logit.copy_(logits.amax())
        self.require_finite()
        return logits
