"""The Llama 2 decoder as TinyLlama uses it (arXiv 2401.02385), whole: 22 blocks between an
embedding and a head.

    idx (B, T) ── embed ── x (B, T, C) ──▶ block × 22 ──▶ RMSNorm ── head ──▶ logits (B, T, V)

One block adds to the residual stream x twice and never replaces it:

    x ─┬─ RMSNorm ─ q, k, v ─ rotate q, k ─ attention ─ o ──(+)──▶ x
       └─────────────────────────────────────────────────────┘
    x ─┬─ RMSNorm ─ silu(gate) × up ─ down ──(+)──▶ x
       └──────────────────────────────────────┘

Letters, here and in every shape comment: B batch, T time (tokens), S length of the cache,
C = d_model, F = d_ff, V = vocab_size, H query heads, K key/value heads, D = C / H head dimension,
L layers.

Where TinyLlama's 1,100,048,384 parameters are, with C 2048, H 32, K 4, D 64, F 5632, V 32000:

    embed and head        2 × V·C         131,072,000
    22 × q and o          2 × C·C         184,549,376
    22 × k and v          2 × C·K·D        23,068,672   multi-head attention would have 184,549,376
    22 × gate, up, down   3 × C·F         761,266,176
    45 norms              C each               92,160

The model learns to predict the next token: the logits at position t are scored against token t + 1,
so targets are inputs shifted by one. The loss is the mean cross-entropy in nats per token, and
exp(loss) the perplexity: guessing among so many equally likely tokens would cost the same. A target
below 0 is not learned: it counts neither in the loss nor in a gradient.
Attention crosses the borders of documents inside a window, as the original's does. There is no
dropout: tokens are seen once or a few times, too seldom to be memorized. Sharding, mixed
precision and compilation are applied from outside and change nothing here.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from files import InputError
from hf import HuggingFaceFolder

try:
    from flash_attn import flash_attn_func
except ImportError:      # it needs a CUDA compiler to install, and nothing here needs it
    flash_attn_func = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The defaults are TinyLlama 1.1B's."""
    n_layer: int = 22              # blocks
    d_model: int = 2048            # width of the residual stream
    n_head: int = 32               # query heads
    n_kv_head: int = 4             # key/value heads; each serves n_head / n_kv_head query heads
    d_ff: int = 5632               # hidden width of SwiGLU
    vocab_size: int = 32_000
    context: int = 2048            # longest sequence trained on
    norm_eps: float = 1e-5         # added to the mean square in RMSNorm
    rope_theta: float = 10_000.0   # base of the rotary frequencies
    tie_embeddings: bool = False   # one matrix for embedding and head

    @property
    def head_dim(self):
        return self.d_model // self.n_head

    def __post_init__(self):
        for key in ("n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "context", "norm_eps",
                    "rope_theta"):
            if not 0 < getattr(self, key) < math.inf:
                raise InputError(f"{key} must be above 0, got {getattr(self, key)}")
        if self.d_model % (2 * self.n_head):
            raise InputError(f"d_model {self.d_model} must be a multiple of 2 x n_head = "
                             f"{2 * self.n_head}: each head rotates pairs of its numbers")
        if self.n_head % self.n_kv_head:
            raise InputError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467). LayerNorm without its mean
    and bias: it trains as well, and is less to compute."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


def rope_cos_sin(positions, head_dim, theta):
    """cos and sin, (B, 1, T, D) each in fp32, of the rotary angles at positions (B, T).

    Pair i of a head is turned by theta^(-2i/D) per position (RoFormer, arXiv 2104.09864), so that
    the score of a query and a key depends on how far apart they are, not on where they stand. The
    angles are computed anew in each forward, which costs next to nothing; a table in the model
    would be lost on the meta device and rounded by .to(bfloat16).
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device,
                                        dtype=torch.float32) / head_dim)
    angle = positions[..., None, :, None] * frequency                        # (B, 1, T, D / 2)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """x (B, H, T, D) with each pair (x[i], x[i + D/2]) turned by its angle: the half-split layout,
    which is Hugging Face's. In fp32 whatever x is: in bf16 the angles of neighbouring positions
    near 2,048 would be the same number."""
    left, right = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v (B, H, T, D), of q (B, H, T, D), k and v (B, K, T, D). Causal: a query
    sees the keys up to its own position. With a mask, see masked_attention.

    Grouped-query attention (arXiv 2305.13245): several query heads share one key/value head, here 8
    of 32 one of 4, so a cache of keys and values is an eighth as large.
        query heads   0 .. 7   8 .. 15   16 .. 23   24 .. 31
        k, v heads       0        1         2          3
    """
    if mask is not None:
        return masked_attention(q, k, v, mask)
    assert q.shape[2] == k.shape[2], f"{q.shape[2]} queries of {k.shape[2]} keys need a mask"
    backend, _ = attention_backend(q.device, q.dtype, q.shape[-1])
    if backend == "flash-attn":                     # it wants and returns (B, T, heads, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(q, k, v, causal=True).transpose(1, 2)
    if backend == "query-chunked matmuls":
        return chunked_attention(q, k, v)
    # in fp32 on a GPU grouped heads would fall back to a kernel that writes all T × T scores
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                          enable_gqa=q.shape[1] != k.shape[1])


class Linear(nn.Linear):
    """x @ weightᵀ, without bias; its initial values are set by Llama.init_weights only."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        pass


def fused_linear(x, layers):
    """The output of each of the layers for x, fused QKV or gate/up: one matmul with their weights
    concatenated. That fills a GPU which k and v, 256 wide, leave idle, and the backward pass writes
    one gradient of x instead of adding up several. For generation quantize.py joins them."""
    fused = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return fused.split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.d_model, config.d_model)
        self.k = Linear(config.d_model, config.n_kv_head * config.head_dim)
        self.v = Linear(config.d_model, config.n_kv_head * config.head_dim)
        self.o = Linear(config.d_model, config.d_model)
        self.qkv = None                                          # quantize.py joins q, k and v

    def forward(self, x, cos, sin, cache=None, positions=None, mask=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x) if self.qkv else fused_linear(x, (self.q, self.k, self.v))
        v = v.contiguous()      # kept for the backward pass: a view would keep the fused output
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2)
                   for y in (q, k, v))                                      # (B, H or K, T, D)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            for old, new in zip(cache, (k, v)):
                update_cache(old, new, positions)
            if mask is not None:            # the tokens before these are in the cache, not in x
                k, v = cache                                                # (B, K, S, D)
        y = attention(q, k, v, mask)
        return self.o(y.transpose(1, 2).reshape(B, T, C))                   # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff)
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)
        self.gate_up = None

    def forward(self, x):
        gate, up = self.gate_up(x) if self.gate_up else fused_linear(x, (self.gate, self.up))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, positions=None, mask=None):
        """x (B, T, C) -> (B, T, C). `cache` is this layer's keys and values; those of x are written
        into it at positions (B, T)."""
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, positions, mask)
        return x + self.mlp(self.mlp_norm(x))


def cross_entropy_and_grad(logits, targets):
    """The sum of the cross-entropies in nats of logits (N, V) with targets (N,), softmax in fp32;
    and its gradient with respect to the logits (N, V), in their dtype: p, less 1 at the target. Of
    rows with a target below 0 the sum has nothing, and the gradient means nothing."""
    targets = targets[:, None]                                               # (N, 1)
    learned, targets = targets >= 0, targets.clamp(min=0)
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)               # (N, V)
    target_log_p = log_p.gather(1, targets)
    grad = log_p.exp_().to(logits.dtype)
    grad.scatter_(1, targets, (target_log_p.exp() - 1).to(logits.dtype))
    return -target_log_p.where(learned, 0).sum(), grad


LOSS_CHUNK = 4096        # tokens whose logits exist at the same time


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x weightᵀ, of x (N, C) and targets (N,), over the targets
    that are not below 0. Rows of x with other targets must be 0, or they would change the gradient.

    The logits are the largest tensor of a training step: 384 kB per token, counting them in bf16,
    in fp32 and their gradients. So they never exist whole. For a chunk of tokens at a time, the
    gradient of the logits is computed, and from it those of x and weight. So the backward pass has
    nothing left to do but to scale these.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cross_entropy_and_grad, needs_grad):
        loss, dw = 0, torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        if torch.is_autocast_enabled(x.device.type):              # cast once, not for each chunk
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        dx, n_chunks = torch.empty_like(x), math.ceil(len(x) / LOSS_CHUNK)
        count = (targets >= 0).sum().clamp(min=1)
        for x_chunk, dx_chunk, target_chunk in zip(*(t.chunk(n_chunks) for t in (x, dx, targets))):
            chunk_loss, grad = cross_entropy_and_grad(F.linear(x_chunk, weight), target_chunk)
            loss = loss + chunk_loss
            if needs_grad:
                torch.mm(grad, weight, out=dx_chunk)
                if x.is_cuda and x.dtype != torch.float32:        # cuBLAS itself adds up in fp32
                    torch.addmm(dw, grad.mT, x_chunk, out_dtype=torch.float32, out=dw)
                else:
                    dw += grad.mT @ x_chunk
            del grad                           # before the next chunk's is allocated
        if needs_grad:
            ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        return dx.mul_(grad / count), dw.mul_(grad / count), None, None, None


class Llama(HuggingFaceFolder, nn.Module):
    """The decoder. `model(idx, targets)` is the loss, `model(idx)` the logits,
    `model(idx, cache=cache)` those of a continuation. Its weights are whatever memory holds until
    `init_weights` or `from_pretrained` (hf.py) has set them."""
    config_class = ModelConfig

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise InputError(f"vocab_size must be at least 1, got {config.vocab_size}")
        self.config = config
        # made like this, it draws no initial values of its own
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model),
                                                  freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocab_size)
        self.cross_entropy_and_grad = cross_entropy_and_grad       # parallel.py may compile it

    @torch.no_grad()
    def init_weights(self):
        """The model, with the initial values of every parameter set. After building on the meta
        device and `to_empty` this is all that is needed."""
        for name, p in self.named_parameters():
            self.init_parameter(name, p)
        return self

    def init_parameter(self, name, p):
        """Fills p, of the shape of the parameter so named, with its initial values, those of the
        original's code (lit_gpt/model.py at bf12224, line 40).

        The two matrices per block that write to the residual stream start smaller than others: 2L
        of them are added up over L layers, and x should not grow with depth. GPT-2 divides
        their standard deviation by √(2L), so that their sum is about as large as one. Here it is
        divided by L √(2/5), more from six layers on: at first blocks are nearly the identity.
        """
        C, L = self.config.d_model, self.config.n_layer
        if p.ndim == 1:                                                      # norms
            p.fill_(1.0)
        elif name.endswith(("attn.o.weight", "mlp.down.weight")):
            p.normal_(std=1 / math.sqrt(C) / L)
        else:
            p.normal_(std=math.sqrt(2 / 5 / C))

    def hidden_states(self, idx, cache=None):
        """The hidden states (B, T, C) after the last norm, from which the head makes logits."""
        T, mask = idx.shape[1], None
        if cache is None or cache.is_empty:      # from the start of a text: plain causal attention
            assert cache is None or cache.size >= T, (
                f"{T} tokens do not fit a cache of {cache.size}")
            positions = torch.arange(T, device=idx.device)[None]
        else:
            positions, mask = cache.positions_and_mask(T)
        cos, sin = rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed(idx)                                                  # (B, T, C)
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[i]
            x = block(x, cos, sin, layer_cache, positions, mask)
        if cache is not None:
            cache.lengths += T
            cache.is_empty = False
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V); with targets (B, T) the mean cross-entropy in nats per
        learned token. With a cache, idx continues what the cache holds, and is added to it."""
        x = self.hidden_states(idx, cache)
        if targets is None:                                                  # (B, T, V)
            return self.head(x) if hasattr(self, "head") else F.linear(x, self.embed.weight)
        weight = self.embed.weight if self.config.tie_embeddings else self.head.weight
        # what is not learned gets no gradient, and gives none to the head
        x = x.masked_fill(targets[..., None] < 0, 0)
        return FusedLinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(),
                                             self.cross_entropy_and_grad, torch.is_grad_enabled())

    def flops_per_token(self, T=None):
        """FLOPs to train on one token of a sequence of T (the context if None): 6N + 12LCT (PaLM,
        arXiv 2204.02311, appendix B), N all parameters: 2 FLOPs each forward and 4 backward;
        attention as if it were not causal."""
        N, c = sum(p.numel() for p in self.parameters()), self.config
        return 6 * N + 12 * c.n_layer * c.d_model * (T or c.context)


# --------------------------------------------------------------------------------------------------
# Which kernel computes attention, and attention where PyTorch's kernels are slow: a CPU in bf16

# Generation and evaluation exclude cuDNN: it plans anew for each length, and for fewer than 8 key
# heads it was silently wrong on Blackwell, where PyTorch tries it first (pytorch/pytorch#193893).
# Training keeps it: there is one length and no mask, for which no fault is known.
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

QUERY_CHUNK = 64


def attention_backend(device, dtype, head_dim):
    """(what computes causal attention, "flash-attn", "SDPA" or "query-chunked matmuls"; why)."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "query-chunked matmuls", "SDPA takes three times as long on CPUs in bf16"
    if flash_attn_func is None or device.type != "cuda":
        return "SDPA", "PyTorch's own"
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return "SDPA", f"flash-attn has no kernel for heads of {head_dim} in {dtype}"
    if torch.cuda.get_device_properties(device).major != 8:
        return "SDPA", "flash-attn 2 is known to be as fast on Ampere and Ada alone"
    if not hasattr(torch.ops.flash_attn, "_flash_attn_forward"):           # before version 2.7
        return "SDPA", "this flash-attn is too old for torch.compile"
    return "flash-attn", "installed, and written for this GPU"


def chunked_attention(q, k, v, chunk=QUERY_CHUNK):
    """Causal attention, q (B, H, T, D), k and v (B, K, T, D), by plain matmuls, `chunk` queries at
    a time against the keys up to the last of them. Almost no masked score is computed, and those of
    a chunk stay in the CPU's cache; the backward pass keeps all, H·T / 2 numbers per token."""
    (B, H, T, D), K = q.shape, k.shape[1]
    G = H // K                                              # query heads that share a key head
    q = (q * D ** -0.5).reshape(B * K, G, T, D)
    k, v = k.reshape(B * K, T, D), v.reshape(B * K, T, D)
    outputs = []
    for start in range(0, T, chunk):
        part = q[:, :, start:start + chunk]                                 # (BK, G, n, D)
        n, num_keys = part.shape[2], start + part.shape[2]
        # query start + i sees keys 0 to start + i; the same for each head of the group
        mask = torch.full((n, num_keys), -math.inf, dtype=q.dtype, device=q.device).triu(start + 1)
        scores = torch.baddbmm(mask.repeat(G, 1), part.flatten(1, 2), k[:, :num_keys].mT)
        outputs.append((scores.softmax(-1) @ v[:, :num_keys]).unflatten(1, (G, n)))
    return torch.cat(outputs, dim=2).view(B, H, T, D)


# --------------------------------------------------------------------------------------------------
# Cached decoding: keys and values are computed once per token and kept

class KVCache:
    """Keys and values of the tokens so far, for B rows of at most `size` tokens each: `layers`, a
    pair of tensors (B, K, size, D) per layer, and `lengths` (B,), how many tokens each row has.
    Only contents change, never shape or place, so that one compiled graph or CUDA graph serves
    every step; what a row has not reached yet is masked."""

    def __init__(self, config, batch, size, device=None, dtype=None):
        shape = (batch, config.n_kv_head, size, config.head_dim)
        self.layers = [(torch.zeros(shape, device=device, dtype=dtype),
                        torch.zeros(shape, device=device, dtype=dtype))
                       for _ in range(config.n_layer)]
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.is_empty = True          # what `lengths` says, without waiting for the device
        self.size = size

    def positions_and_mask(self, T):
        """Positions (B, T) of the next T tokens of each row, and a mask (B, 1, T, size) of the keys
        that each of them sees. A row that has ended may go on: it stays at the last position."""
        device = self.lengths.device
        positions = self.lengths[:, None] + torch.arange(T, device=device)
        positions = positions.clamp(max=self.size - 1)
        mask = torch.arange(self.size, device=device) <= positions[..., None]
        return positions, mask[:, None]


def update_cache(cache, new, positions):
    """Writes new (B, K, T, D) into keys or values (B, K, size, D) at positions (B or 1, T)."""
    rows = torch.arange(len(cache), device=cache.device)[:, None]
    # (B, T, K, D): indexed dimensions come first
    cache[rows, :, positions] = new.transpose(1, 2).to(cache.dtype)


def masked_attention(q, k, v, mask):
    """attention with keys and values (B, K, S, D), where each query sees what mask (B, 1, T, S)
    says. PyTorch's fast kernels take no mask with grouped heads; so the query heads that share a
    key head are made queries of one head, and each key is read once. With decoder.split_mask, P
    chunks of the keys are heads of their own, for a GPU to work on all at the same time; their
    outputs are averaged, weighted by their sums of exp(score) (Flash-Decoding)."""
    (B, H, T, D), K = q.shape, k.shape[1]
    q, P = q.reshape(B, K, H // K * T, D).to(k.dtype), mask.shape[1] // K
    if mask.dtype == torch.bool:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, H // K, 1))
        return y.reshape(B, H, T, D)     # no view: CUDA's kernels return (B, T, H, D) memory
    q, k, v = q.repeat_interleave(P, 1), *(x.reshape(B, K * P, -1, D) for x in (k, v))
    y, log_sum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    y, log_sum = (x.unflatten(1, (K, P)) for x in (y, log_sum[:, :, :q.shape[2], None]))
    return (log_sum.expand(y.shape).softmax(2) * y).sum(2).reshape(B, H, T, D)
