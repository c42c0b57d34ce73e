"""Hugging Face folders, in and out: config.json, safetensors, and where a model may be found.

A checkpoint of ours is such a folder, which `transformers`, vLLM and llama.cpp's converter read.
And any Llama folder of theirs is a model of ours. The two use other names for the same things. Both
use half-split RoPE, so no weight is permuted.
"""
import difflib
import math
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from os.path import getmtime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import InputError, atomic_write, explain, read_json, write_json

HF_MODULES = {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
              "head": "lm_head", "attn_norm": "input_layernorm", "attn": "self_attn",
              "mlp_norm": "post_attention_layernorm",
              "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
              "gate": "gate_proj", "up": "up_proj", "down": "down_proj",
              "qkv": "qkv_proj", "gate_up": "gate_up_proj"}       # joined by quantize.py

HF_CONFIG = {"n_layer": "num_hidden_layers", "d_model": "hidden_size",
             "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
             "d_ff": "intermediate_size", "vocab_size": "vocab_size",
             "context": "max_position_embeddings", "norm_eps": "rms_norm_eps",
             "rope_theta": "rope_theta", "tie_embeddings": "tie_word_embeddings"}

# settings of config.json of which model.py implements one value
HF_FIXED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False}


def hf_name(name):
    """blocks.0.attn.q.weight -> model.layers.0.self_attn.q_proj.weight"""
    return ".".join(HF_MODULES.get(part, part) for part in name.split("."))


def config_from_hf(hf, config_class):
    """The `config_class`, a model.ModelConfig, of a config.json (a dict). Raises InputError naming
    each setting that model.py does not implement."""
    hf = {key: value for key, value in hf.items() if value is not None}
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}          # transformers 5 | 4
    if not isinstance(rope, dict):
        raise InputError(f"config.json: the rope settings must be an object, got {rope!r}")
    # where a config.json is silent, `transformers` assumes these values
    hf = {"num_key_value_heads": hf.get("num_attention_heads"), "rms_norm_eps": 1e-6,
          "max_position_embeddings": 2048, "rope_theta": 10_000.0, "tie_word_embeddings": False,
          "model_type": None, "rope_type": rope.get("type", "default")} | hf | rope
    only = HF_FIXED | {"rope_type": "default", "partial_rotary_factor": 1.0,
                       "quantization_config": None}
    refused = [f"{key} = {hf[key]!r} (only {value!r})" for key, value in only.items()
               if hf.get(key, value) != value]
    if refused:
        raise InputError(f"unsupported config.json: {', '.join(refused)}")
    for ours, theirs in HF_CONFIG.items():
        kind, value = type(getattr(config_class, ours)), hf.get(theirs)
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise InputError(f"config.json: {theirs} must be {kind.__name__}, got {value!r}")
    config = config_class(**{ours: hf[theirs] for ours, theirs in HF_CONFIG.items()})
    if hf.get("head_dim", config.head_dim) != config.head_dim:
        raise InputError(f"unsupported config.json: head_dim = {hf['head_dim']} "
                         f"(only hidden_size / num_attention_heads = {config.head_dim})")
    return config


def safetensors_files(folder):
    """The files that hold a folder's weights: the whole one, which `transformers` takes before an
    index, else those that the index names, or shards that have none."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists():
        if index.exists():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise InputError(f"{index} has no weight_map")
            names = set(map(str, names.values()))
        else:
            names = {path.name for path in folder.glob("model-*-of-*.safetensors")} or names
    absent = [name for name in sorted(names) if not (folder / name).is_file()]
    if absent:
        raise InputError(f"{folder} has no {', '.join(absent)} "
                         "(of weights, only safetensors files are read)")
    return [folder / name for name in sorted(names)]


@contextmanager
def open_weights(path):
    """A safetensors file, opened. Raises InputError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read, it is truncated or no safetensors file "
                         f"({explain(path, error)})") from None


def read_config(folder, config_class):
    """The `config_class` of a model folder. Where it says that embedding and head are tied, and
    the files hold two different matrices, they are not, as in `transformers`."""
    config, found = config_from_hf(read_json(folder / "config.json"), config_class), []
    if config.tie_embeddings:
        for path in safetensors_files(folder):
            with open_weights(path) as file:
                found += [file.get_slice(name) for name in file.keys()           # noqa: SIM118
                          if name in ("model.embed_tokens.weight", "lm_head.weight")]
    differ = len(found) == 2 and not torch.equal(*(matrix[:] for matrix in found))
    return replace(config, tie_embeddings=config.tie_embeddings and not differ)


class HuggingFaceFolder:
    """What model.Llama inherits: loading and saving. `config_class` is its configuration's type."""

    def save_pretrained(self, folder, bos_id=1, eos_id=2, tensors=None):
        """Writes config.json, generation_config.json and model.safetensors in the spelling that
        every version of `transformers`, vLLM and llama.cpp's converter reads. `tensors` {name:
        tensor} replace the parameters of a process that holds shards only."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {hf_name(name): p.detach().cpu().contiguous()
                   for name, p in (tensors or dict(self.named_parameters())).items()}
        tokens = {"bos_token_id": bos_id, "eos_token_id": eos_id}
        write_json(folder / "config.json", HF_FIXED | tokens | {
            "rope_scaling": None, "use_cache": True,
            "initializer_range": math.sqrt(2 / 5 / self.config.d_model),
            "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
            **{theirs: getattr(self.config, ours) for ours, theirs in HF_CONFIG.items()}})
        # no sampling by default: it made evaluations of the original irreproducible
        write_json(folder / "generation_config.json", tokens | {"max_length": self.config.context})
        with atomic_write(folder / "model.safetensors") as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", temporary)     # save_file makes it its owner's

    @classmethod
    def from_pretrained(cls, folder, device=None, dtype=torch.float32):
        """The model of a Hugging Face Llama folder (safetensors, one file or several), its weights
        in `dtype`. Raises InputError for a folder that lacks something or is of another model."""
        config = read_config(Path(folder), cls.config_class)
        with torch.device("meta"):
            model = cls(config)
        try:
            model = model.to(dtype).to_empty(device=device or "cpu")
        except RuntimeError as error:                      # the allocator's, of a GPU or a CPU
            raise InputError(f"{folder} cannot be put on {device or 'cpu'}: {error}") from None
        model.load_tensors(Path(folder))
        return model

    @torch.no_grad()
    def load_tensors(self, folder, part=lambda p: (p, slice(None))):
        """Fills the parameters from the safetensors files of `folder`, one tensor in memory at a
        time. `part(parameter)` returns the tensor to fill and the rows that belong in it."""
        parameters = {hf_name(name): p for name, p in self.named_parameters()}
        if self.config.tie_embeddings:           # some writers store the one matrix as the head
            parameters["lm_head.weight"] = self.embed.weight
        parameters |= {hf_name(name): buffer for name, buffer in self.named_buffers()}
        filled, unknown = set(), []
        for path in safetensors_files(folder):
            with open_weights(path) as file:
                names = list(file.keys())
            for name in names:
                # opened for each tensor, as pages of an open file count as memory
                with open_weights(path) as file:
                    if name in parameters:
                        p, tensor = parameters[name], file.get_slice(name)
                        if tuple(tensor.get_shape()) != p.shape:
                            raise InputError(f"{path}: {name} is {tuple(tensor.get_shape())}, "
                                             f"but config.json makes it {tuple(p.shape)}")
                        local, rows = part(p)
                        local.copy_(tensor[rows])
                        filled.add(id(p))
                    elif not name.endswith("rotary_emb.inv_freq"):          # computed, not learned
                        unknown.append(name)
        missing = [name for name, p in parameters.items() if id(p) not in filled]
        if missing or unknown:
            raise InputError(f"{folder} does not hold the model of its config.json: "
                             f"missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")


# --------------------------------------------------------------------------------------------------
# Where a model may be found

def checkpoints(run):
    """The checkpoints in the folder of a run, {step: path}, oldest first."""
    found = {int(p.name[5:]): p for p in Path(run).glob("step_*")
             if re.fullmatch(r"step_\d+", p.name)}
    return dict(sorted(found.items()))


def newest(run):
    return next(reversed(checkpoints(run).values()), None)


def find_model(name):
    """The folder of a checkpoint: `name` is a folder, the folder of a run (its newest checkpoint),
    or a hub name; None means the newest checkpoint under out/. Exits where there is none."""
    if name is None:
        found = [state for run in sorted(Path("out").glob("*")) if (path := newest(run))
                 and (state := path / "training/state.json").exists()]
        if not found:
            sys.exit("there is no checkpoint under out/: "
                     "train one with python train.py config_demo.py, or name a folder")
        # copying changes the time of a file; but older checkpoints have not recorded theirs
        last = max(found, key=lambda state: (read_json(state).get("time", 0), getmtime(state)))
        return last.parent.parent
    folder = Path(name)
    if folder.is_dir():
        return folder if (folder / "config.json").exists() else newest(folder) or folder
    if folder.exists():
        sys.exit(f"{name} is a file: give the folder of its model, {folder.parent}")
    # OWNER/NAME is of the hub, unless it begins as a path here does
    if not re.fullmatch(r"\w[^/]*/[^/]+", name) or folder.parent.name == "out" \
            or folder.parent.is_dir():
        near = difflib.get_close_matches(name, map(str, folder.parent.glob("*")), 3)
        sys.exit(f"there is no folder {name}" + (f", nearest: {', '.join(near)}" if near else "")
                 + " (a name on the hub is OWNER/NAME, and no folder OWNER is here)")
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]))
    except ImportError:
        sys.exit(f"there is no folder {name}; to take it from the hub: pip install huggingface_hub")
    except Exception as error:      # of the network, the hub or the name: its own words say which
        sys.exit(f"there is no folder {name}, and the hub did not give it: {error}")
