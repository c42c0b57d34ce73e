"""TinyLlama v1.1 Math & Code: forks from the base model after its first stage, and continues with a
quarter of code and mathematics (arXiv 2401.02385v2, section 2.5 and appendix).

    torchrun train.py config_base.py               up to the end of its first stage, then
    python prepare.py tokenize ... --out=data/starcoder-python     StarCoder, its Python and Jupyter
    python prepare.py tokenize ... --out=data/proof-pile-2         parts only; Proof-Pile-2
    torchrun train.py config_math_code.py

The authors used 64 A100-40G; at their 24,000 tokens/s each, the 500B tokens of its own are 5,800
GPU-hours, 3.8 days. Their result: 15.24 on HumanEval (the base model 6.71) and 18.54 on DROP
(15.21), and 53.75 on average over the seven commonsense tasks (53.63).

What is not said here is the base recipe's, its own choices included. Ours alone is to let the third
stage begin with the second one's shares, with no ramp, as the paper's "same ratios" must mean.
"""
from config_base import *

_mixture = {"slimpajama": 0.75, "starcoder-python": 0.15, "proof-pile-2": 0.10}
stages = [stages[0],
          stages[1] | {"mixture": _mixture, "ramp": 6e9},
          stages[2] | {"mixture": _mixture}]
fork_from = "out/base/step_00817436"
