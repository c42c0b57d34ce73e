"""The demo's Math & Code: forks from the demo after its first stage, and continues with four
fifths of code.

    python train.py config_demo.py                 up to the end of its first stage, then
    python train.py config_demo_code.py

A minute or two on two CPU cores with bf16. At its end it is better at code than the demo,
and worse at prose (README, Results).
"""
from config_demo import *

_mixture = {"demo-prose": 0.2, "demo-code": 0.8}
stages = [stages[0],
          stages[1] | {"mixture": _mixture},
          stages[2] | {"mixture": _mixture}]
fork_from = "out/demo/step_00000440"
