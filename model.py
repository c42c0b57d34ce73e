"""The Llama 2 decoder as TinyLlama uses it (arXiv 2401.02385), whole: 22 blocks between an
embedding and a head.

    idx (B, T) ── embed ── x (B, T, C) ──▶ block × 22 ──▶ RMSNorm ── head ──▶ logits (B, T, V)

One block adds to the residual stream x twice and never replaces it:

    x ─┬─ RMSNorm ─ q, k, v ─ rotate q, k ─ attention ─ o ──(+)──▶ x
       └─────────────────────────────────────────────────────┘
    x ─┬─ RMSNorm ─ silu(gate) × up ─ down ──(+)──▶ x
       └──────────────────────────────────────┘

Letters, here and in every shape comment:
    B batch, T time (tokens), S time with what the cache holds, C = d_model, F = d_ff,
    V = vocab_size, H query heads, K key/value heads, D = C / H numbers a head

Where TinyLlama's 1,100,048,384 parameters are, with C 2048, H 32, K 4, D 64, F 5632, V 32000:

    embed and head        2 × V·C         131,072,000
    22 × q and o          2 × C·C         184,549,376
    22 × k and v          2 × C·K·D        23,068,672   multi-head attention would have 184,549,376
    22 × gate, up, down   3 × C·F         761,266,176
    45 norms              C each               92,160

What is put on from outside (sharding, precision, compilation) changes nothing here.
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend

from files import InputError, atomic_write, read_json, write_json

try:
    from flash_attn import flash_attn_func
except ImportError:      # it needs a CUDA compiler to install, and nothing here needs it
    flash_attn_func = None


class ModelError(InputError):
    """A model that cannot be built, or a folder that does not hold one we can read; the message
    says which and why."""


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
                raise ModelError(f"{key} must be above 0, got {getattr(self, key)}")
        if self.d_model % (2 * self.n_head):
            raise ModelError(f"d_model {self.d_model} must be a multiple of 2 x n_head = "
                             f"{2 * self.n_head}: each head rotates pairs of its numbers")
        if self.n_head % self.n_kv_head:
            raise ModelError(f"n_head {self.n_head} must be a multiple of "
                             f"n_kv_head {self.n_kv_head}")


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467): LayerNorm without mean and
    bias."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.type_as(x), self.eps)


def rope_cos_sin(positions, head_dim, theta):
    """cos and sin, (1, T, D) each in fp32, of the rotary angles at positions (T,); (B, 1, T, D) at
    positions (B, T) (RoFormer, arXiv 2104.09864).

    Pair i of a head turns by theta^(-2i/D) a position. They are computed anew each forward, which
    costs nothing beside it; a table kept in the model would be lost on the meta device and rounded
    by .to(bfloat16).
    """
    frequency = theta ** -(torch.arange(0, head_dim, 2, device=positions.device,
                                        dtype=torch.float32) / head_dim)
    angle = positions[..., None, :, None] * frequency
    angle = torch.cat((angle, angle), dim=-1)                                # ([B,] 1, T, D)
    return angle.cos(), angle.sin()


def apply_rope(x, cos, sin):
    """x (B, H, T, D) with the pairs (x[i], x[i + D/2]) turned by their angle: the half-split
    layout, that of Hugging Face.

    In fp32 whatever x is: in bf16 the angles of neighbouring positions near 2,048 would be the same
    number.
    """
    left, right = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).type_as(x)


def attention_backend(device, dtype, head_dim):
    """(what computes causal attention there: "flash-attn", "SDPA" or "plain products", why)."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        return "plain products", "SDPA takes three times as long on CPUs in bf16"
    if flash_attn_func is None or device.type != "cuda":
        return "SDPA", "PyTorch's own"
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return "SDPA", f"flash-attn has no kernel for heads of {head_dim} in {dtype}"
    if torch.cuda.get_device_properties(device).major != 8:
        return "SDPA", "flash-attn 2 is known to be as fast on Ampere and Ada alone"
    if not hasattr(torch.ops.flash_attn, "_flash_attn_forward"):           # before version 2.7
        return "SDPA", "this flash-attn is too old for torch.compile"
    return "flash-attn", "it is installed, and this GPU is what it was written for"


# for text and evaluation: cuDNN plans anew for each length, and was wrong in silence for fewer than
# 8 key heads on Blackwell, where it is PyTorch's first choice (pytorch/pytorch#193893). Training
# keeps it: one length and no mask, for which no fault is known
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v, q (B, H, T, D), k and v (B, K, S, D). Causal, q being the last T of the
    S positions; or each query sees what mask (B, 1, T, S) says.

    Grouped-query attention (arXiv 2305.13245), here with H = 8 and K = 2: four query heads share
    one key/value head, so the cache is a quarter as large.
        query heads   0 1 2 3   4 5 6 7
        k, v heads       0         1
    """
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    if mask is None:
        backend, _ = attention_backend(q.device, q.dtype, D)
        if backend == "flash-attn":  # (B, T, H, D); its causal mask is aligned to the last position
            return flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                   causal=True).transpose(1, 2)
        if backend == "plain products":
            return chunked_attention(q, k, v)
        if T == S:
            if q.is_cuda and q.dtype == torch.float32:   # for grouped heads PyTorch has no kernel
                k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))   # there: all scores
            return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                  enable_gqa=H != k.shape[1])
        # SDPA aligns is_causal to the first position, which is wrong after a cache: query t sees
        # S - T + t + 1 keys
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T)
    # query heads that share a key head become its queries, so each key is read once
    q = q.reshape(B, K, -1, D).to(k.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, H // K, 1))
    return y.reshape(B, H, T, D)     # CUDA's kernels return (B, T, H, D) memory: view would fail


QUERY_CHUNK = 64


def chunked_attention(q, k, v, rows=QUERY_CHUNK):
    """attention by plain products, `rows` queries at a time against the keys that they see: what is
    masked is never computed, but for a corner of each part, and a part's scores stay in the CPU's
    cache. Query heads that share a key head are rows of one product.

    On a CPU in bf16 it takes a third of the time of SDPA's kernel; what it keeps for the backward
    pass, H·S / 2 numbers a token, is what that kernel computes again.
    """
    (B, H, T, D), (K, S), G = q.shape, k.shape[1:3], q.shape[1] // k.shape[1]
    k, v = k.reshape(B * K, S, D), v.reshape(B * K, S, D)
    q = (q * D ** -0.5).reshape(B * K, G, T, D)
    parts = []
    for start in range(0, T, rows):
        part = q[:, :, start:start + rows]                                  # (BK, G, rows, D)
        n = part.shape[2]
        seen = S - T + start + n                                            # by its last query
        mask = torch.full((n, seen), -math.inf, dtype=q.dtype, device=q.device)
        scores = torch.baddbmm(mask.triu(seen - n + 1).repeat(G, 1), part.flatten(1, 2),
                               k[:, :seen].mT)                              # (BK, G rows, seen)
        parts.append((scores.softmax(-1) @ v[:, :seen]).unflatten(1, (G, n)))
    return torch.cat(parts, dim=2).view(B, H, T, D)


class KVCache:
    """Keys and values of the positions seen so far, for one generation of B rows and at most `size`
    tokens. The model writes into them and advances `length`.

    `layers` holds a pair of tensors (B, K, size, D) for each layer, which never change shape or
    place. `length` is a number as long as all rows have as many positions, as in a prompt; later a
    tensor (B,), each row its own. No shape depends on that, so one compiled graph serves every
    step; what a row has not reached yet is masked.
    """

    def __init__(self, config, batch, size, device=None, dtype=None):
        shape = (batch, config.n_kv_head, size, config.head_dim)
        self.layers = [(torch.zeros(shape, device=device, dtype=dtype),
                        torch.zeros(shape, device=device, dtype=dtype))
                       for _ in range(config.n_layer)]
        self.length, self.size = 0, size

    def rows(self, some):
        """A cache of the rows in a slice, empty, in the same place."""
        part = copy.copy(self)
        part.layers, part.length = [(k[some], v[some]) for k, v in self.layers], 0
        return part

    def places(self, T):
        """Where T more tokens of each row stand: (positions (T,) or (B, T), mask (B, 1, T, size) of
        what they see or None where that is all before them). A row that has ended may be stepped
        on; it stays in its last place."""
        device = self.layers[0][0].device
        steps = torch.arange(T, device=device)
        if not torch.is_tensor(self.length):
            assert self.length + T <= self.size, (
                f"{T} tokens behind {self.length} do not fit a cache of {self.size}")
            return self.length + steps, None
        positions = (self.length[:, None] + steps).clamp(max=self.size - 1)
        mask = torch.arange(self.size, device=device) <= positions[..., None]
        return positions, mask[:, None]

    def layer(self, i, T):
        """Keys and values of layer i, as far as T more tokens see."""
        k, v = self.layers[i]
        if torch.is_tensor(self.length):
            return k, v
        stop = self.length + T
        return k[:, :, :stop], v[:, :, :stop]


def update_cache(cache, new, positions):
    """Writes new (B, K, T, D) into keys or values (B, K, S, D): at positions (B, T), or last."""
    T = new.shape[2]
    if positions.ndim == 1:
        cache[:, :, -T:] = new
    else:
        rows = torch.arange(len(cache), device=cache.device)[:, None]
        cache[rows, :, positions] = new.transpose(1, 2).to(cache.dtype)      # (B, T, K, D)


class Linear(nn.Linear):
    """x @ weightᵀ, without bias and without initial values of its own: Llama.init_weights sets them
    all, once."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):
        pass


def fused_linear(x, layers):
    """What each of the layers makes of x. In training by one product with their joined weights: it
    fills a GPU that k and v alone, 256 wide, leave idle, and its backward pass writes one gradient
    of x instead of adding up several. Joining weights costs about what casting them does, which
    generating, a token at a time, should not pay."""
    if not layers[0].training:
        return [layer(x) for layer in layers]
    joined = F.linear(x, torch.cat([layer.weight for layer in layers]))
    return joined.split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q = Linear(config.d_model, config.d_model)
        self.k = Linear(config.d_model, config.n_kv_head * config.head_dim)
        self.v = Linear(config.d_model, config.n_kv_head * config.head_dim)
        self.o = Linear(config.d_model, config.d_model)

    def forward(self, x, cos, sin, cache=None, positions=None, mask=None):
        B, T, C = x.shape
        q, k, v = fused_linear(x, (self.q, self.k, self.v))
        # the backward pass needs v, and a view would keep all of the joined product alive for it
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2)          # (B, H or K, T, D)
                   for y in (q, k, v.contiguous()))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            for seen, new in zip(cache, (k, v)):
                update_cache(seen, new, positions)
            k, v = cache                                                    # (B, K, S, D)
        y = attention(q, k, v, mask)
        return self.o(y.transpose(1, 2).reshape(B, T, C))                   # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff)
        self.up = Linear(config.d_model, config.d_ff)
        self.down = Linear(config.d_ff, config.d_model)

    def forward(self, x):
        gate, up = fused_linear(x, (self.gate, self.up))
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, positions=None, mask=None):
        """x (B, T, C); cache: keys and values of this layer, into which those of x are written at
        positions."""
        x = x + self.attn(self.attn_norm(x), cos, sin, cache, positions, mask)
        return x + self.mlp(self.mlp_norm(x))


def cross_entropy_and_grad(logits, targets):
    """(sum of the cross-entropies of logits (N, V) with targets (N,) in nats, its gradient by the
    logits, in their dtype); softmax in fp32."""
    targets = targets[:, None]                                               # (N, 1)
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)               # (N, V)
    right = log_p.gather(1, targets)
    grad = log_p.exp_().to(logits.dtype)
    return -right.sum(), grad.scatter_(1, targets, (right.exp() - 1).to(logits.dtype))


LOSS_CHUNK = 4096


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x weightᵀ, of x (N, C) and targets (N,).

    The logits are the largest tensor of a step, 384 kB a token in bf16 and fp32 with their
    gradients, so those of many tokens never exist whole: at most LOSS_ROWS rows at a time they
    become their gradient, and that at once x's and the weight's. The backward pass only hands these
    on.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cross_entropy_and_grad, learning):
        loss, dw = 0, torch.zeros_like(weight, dtype=torch.float32) if learning else None
        if torch.is_autocast_enabled(x.device.type):                 # once, not for each part
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        dx, parts = torch.empty_like(x), math.ceil(len(x) / LOSS_CHUNK)
        for x_part, dx_part, part in zip(*(t.chunk(parts) for t in (x, dx, targets))):
            some, grad = cross_entropy_and_grad(F.linear(x_part, weight), part)
            loss = loss + some
            if learning:
                torch.mm(grad, weight, out=dx_part)
                if x.is_cuda and x.dtype != torch.float32:           # a product that adds in fp32
                    torch.addmm(dw, grad.mT, x_part, out_dtype=torch.float32, out=dw)
                else:
                    dw += grad.mT @ x_part
            del grad                                         # or the next would come beside it
        if learning:
            ctx.save_for_backward(dx, dw)
        return loss / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad / len(dx)), dw.mul_(grad / len(dx)), None, None, None


class Llama(nn.Module):
    """The decoder. `model(idx, targets)` is the loss, `model(idx)` the logits,
    `model(idx, cache=cache)` those of a continuation. Its weights are whatever memory holds until
    `init_weights` or `from_pretrained` has set them."""

    def __init__(self, config):
        super().__init__()
        if config.vocab_size < 1:
            raise ModelError(f"vocab_size must be at least 1, got {config.vocab_size}")
        self.config = config
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model),
                                                  freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Linear(config.d_model, config.vocab_size)
        self.cross_entropy_and_grad = cross_entropy_and_grad     # a name by which it can be compiled from outside

    @torch.no_grad()
    def init_weights(self):
        """The initial values of every parameter, those of the original's code (lit_gpt/model.py at
        bf12224, line 40): normal, with a standard deviation of √(2 / 5C) for matrices and of
        1 / (√C n_layer) for the two that write to the residual stream; 1 for norms. After building
        on the meta device and `to_empty` this is all that is needed."""
        for name, p in self.named_parameters():
            self.init_parameter(name, p)
        return self

    def init_parameter(self, name, p):
        """Fills p, of the shape of the parameter so named, with its initial values."""
        C = self.config.d_model
        if p.ndim == 1:
            p.fill_(1.0)
        elif name.endswith(("attn.o.weight", "mlp.down.weight")):
            p.normal_(std=1 / math.sqrt(C) / self.config.n_layer)
        else:
            p.normal_(std=math.sqrt(2 / 5 / C))

    def hidden_states(self, idx, cache=None, places=None):
        """The normed states (B, T, C) of which the head makes logits. `places` says of tokens that
        are not simply one after the other where they stand and what they see, as KVCache.places
        does: positions (B, T) and a mask (B, 1, T, T)."""
        T = idx.shape[1]
        if cache is not None:
            places = cache.places(T)
        positions, mask = places or (torch.arange(T, device=idx.device), None)
        cos, sin = rope_cos_sin(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed(idx)                                                  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, cache and cache.layer(i, T), positions, mask)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) -> logits (B, T, V); with targets (B, T) the mean cross-entropy in nats. With
        a cache, idx continues what the cache holds, and the cache then holds idx too."""
        x = self.hidden_states(idx, cache)
        if targets is None:                                                  # (B, T, V)
            return self.head(x) if hasattr(self, "head") else F.linear(x, self.embed.weight)
        weight = self.head.weight if hasattr(self, "head") else self.embed.weight
        return FusedLinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), self.cross_entropy_and_grad,
                              torch.is_grad_enabled())

    def flops_per_token(self, T=None):
        """FLOPs to train on one token of a sequence of T (the context if None): 6N + 12LCT (PaLM,
        arXiv 2204.02311, appendix B), N all parameters: 2 FLOPs each forward and 4 backward;
        attention as if it were not causal."""
        T = T or self.config.context
        attn = sum(12 * m.o.in_features * T for m in self.modules() if isinstance(m, Attention))
        return 6 * sum(p.numel() for p in self.parameters()) + attn

    def save_pretrained(self, folder, bos_id=1, eos_id=2, tensors=None):
        """Writes config.json, generation_config.json and model.safetensors as `transformers`, vLLM
        and llama.cpp's converter read them. `tensors` {name: tensor} stand in for parameters of
        which this process holds a part only."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {hf_name(name): p.detach().cpu().contiguous()
                   for name, p in (tensors or dict(self.named_parameters())).items()}
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        tokens = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        write_json(folder / "config.json", hf_config(self.config) | tokens | {"torch_dtype": dtype})
        # no sampling by default: a generation_config with it on once made the original's
        # evaluations irreproducible
        write_json(folder / "generation_config.json", tokens | {"max_length": self.config.context})
        with atomic_write(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=torch.float32):
        """The model of a Hugging Face Llama folder (safetensors, one file or several), its weights
        in `dtype`.

        Raises ModelError for a folder that lacks something and for a configuration that this file
        does not implement.
        """
        folder = Path(folder)
        config = config_from_hf(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config)
        model = model.to(dtype).to_empty(device=device or "cpu")
        model.load_tensors(folder)
        return model

    @torch.no_grad()
    def load_tensors(self, folder, part=lambda p: (p, slice(None))):
        """Fills the parameters from the safetensors files of `folder`, one tensor in memory at a
        time. `part` gives of a parameter the tensor to fill and the rows that belong there."""
        missing, unknown = {hf_name(name): p for name, p in self.named_parameters()}, []
        for path in safetensors_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        if name in missing:
                            p, tensor = missing.pop(name), file.get_slice(name)
                            if tuple(tensor.get_shape()) != p.shape:
                                raise ModelError(f"{path}: {name} is {tuple(tensor.get_shape())}, "
                                                 f"but config.json makes it {tuple(p.shape)}")
                            own, rows = part(p)
                            own.copy_(tensor[rows])
                        elif not name.endswith(IGNORED_TENSORS[:1 + self.config.tie_embeddings]):
                            unknown.append(name)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} cannot be read, "
                                 f"it is truncated or no safetensors file ({error})") from None
        if missing or unknown:
            raise ModelError(f"{folder} does not hold the model of its config.json: "
                             f"missing {sorted(missing) or 'nothing'}, "
                             f"unknown {sorted(unknown) or 'nothing'}")


# --------------------------------------------------------------------------------------------------
# Hugging Face folders: other names for the same things. Both rotate half-split, so no weight is
# permuted.

HF_MODULES = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
              "head": "lm_head", "attn_norm": "input_layernorm", "attn": "self_attn",
              "mlp_norm": "post_attention_layernorm",
              "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
              "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

HF_CONFIG = {"n_layer": "num_hidden_layers", "d_model": "hidden_size",
             "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
             "d_ff": "intermediate_size", "vocab_size": "vocab_size",
             "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
             "rope_theta": "rope_theta", "tie_embeddings": "tie_word_embeddings"}

# tensors some writers store that follow from others: the rotary frequencies and, where tied, the
# head
IGNORED_TENSORS = ("rotary_emb.inv_freq", "lm_head.weight")


def hf_name(name):
    """The name Hugging Face gives a parameter: blocks.0.attn.q.weight ->
    model.layers.0.self_attn.q_proj.weight."""
    return ".".join(HF_MODULES.get(part, part) for part in name.split("."))


def hf_config(config):
    """The config.json of a ModelConfig, in the spelling that every version of `transformers` and
    vLLM reads."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "use_cache": True,
            "initializer_range": math.sqrt(2 / 5 / config.d_model)} | {
            theirs: getattr(config, ours) for ours, theirs in HF_CONFIG.items()}


def config_from_hf(hf):
    """The ModelConfig of a config.json (a dict). Raises ModelError naming each setting that this
    model cannot honour."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}          # transformers 5 | 4
    if not isinstance(rope, dict):
        raise ModelError(f"config.json: the rope settings must be an object, got {rope!r}")
    heads, width = hf.get("num_attention_heads"), hf.get("hidden_size")
    can = {"model_type": (hf.get("model_type"), "llama"),
           "architectures": (hf.get("architectures") or ["LlamaForCausalLM"], ["LlamaForCausalLM"]),
           "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
           "partial_rotary_factor": (
               rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)), 1.0),
           "hidden_act": (hf.get("hidden_act", "silu"), "silu"),
           "attention_bias": (hf.get("attention_bias", False), False),
           "mlp_bias": (hf.get("mlp_bias", False), False),
           "quantization_config": (hf.get("quantization_config"), None)}
    if type(heads) is type(width) is int and heads:
        can["head_dim"] = (hf.get("head_dim") or width // heads, width // heads)
    refused = [f"{key} = {value!r} (only {only!r})" for key, (value, only) in can.items()
               if value != only]
    if refused:
        raise ModelError(f"this config.json is not of a model we implement: {', '.join(refused)}")
    # the values `transformers` assumes where a config.json is silent
    silent = {"num_key_value_heads": heads, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
              "rope_theta": rope.get("rope_theta", 10_000.0), "tie_word_embeddings": False}
    found = silent | {key: value for key, value in hf.items() if value is not None}
    lacking = [theirs for theirs in HF_CONFIG.values() if found.get(theirs) is None]
    if lacking:
        raise ModelError(f"config.json lacks {', '.join(lacking)}")
    for ours, theirs in HF_CONFIG.items():
        kind, value = type(getattr(ModelConfig, ours)), found[theirs]
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise ModelError(f"config.json: {theirs} must be {kind.__name__}, got {value!r}")
    return ModelConfig(**{ours: found[theirs] for ours, theirs in HF_CONFIG.items()})


def safetensors_files(folder):
    """The files that hold a folder's weights: those its index names, or the only one."""
    index = folder / "model.safetensors.index.json"
    weight_map = {"all": "model.safetensors"}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map")
    names = set(weight_map.values())
    absent = [name for name in sorted(names) if not (folder / name).is_file()]
    if absent:
        raise ModelError(f"{folder} has no {', '.join(absent)} "
                         "(of weights, only safetensors files are read)")
    return [folder / name for name in sorted(names)]
