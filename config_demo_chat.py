"""The demo learns to answer: fine-tuning of its last checkpoint on data/demo-chat, questions about
Python's library with what the documentation says.

    python train.py config_demo.py                 the demo, to its end
    python train.py config_demo_chat.py
    python chat.py out/demo_chat

Three epochs, a minute on two CPU cores with bf16. At its end answers begin as documentation
does, and end (README, Chat); what they say is made up. Half the batch, double the batch, and
learning rates of 3e-3 and 6e-3 all came within one percent.
"""
from config_demo import *

init_from = "out/demo/step_00001345"
stages = [{"tokens": 1_200_000, "batch": 4096, "mixture": {"demo-chat": 1}}]
learning_rate, min_lr = 4e-3, 0.0
eval_every = 100
