"""TinyLlama v1.1 Chinese: forks from the base model after its first stage, and continues with as
much Chinese as English (arXiv 2401.02385v2, section 2.5 and appendix).

    torchrun train.py config_base.py               up to the end of its first stage, then
    python prepare.py tokenize ... --out=data/skypile             SkyPile, with Llama 2's tokenizer
    torchrun train.py config_chinese.py

The authors used 64 A100-40G; at their 24,000 tokens/s each, the 500B tokens of its own are 5,800
GPU-hours, 3.8 days. Their result: 58.37 on average over XWinograd, XStoryCloze, XNLI and XCOPA in
Chinese (the base model 47.46), and 53.41 over the seven commonsense tasks (53.63).

What is not said here is the base recipe's, its own choices included. The tokenizer stays Llama 2's,
which spells most Chinese characters by bytes.
"""
from config_base import *

_mixture = {"slimpajama": 0.5, "skypile": 0.5}
stages = [stages[0],
          stages[1] | {"mixture": _mixture, "ramp": 6e9},
          stages[2] | {"mixture": _mixture}]
fork_from = "out/base/step_00817436"
