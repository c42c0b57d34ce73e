"""TinyLlama's recipe in miniature, on the text that every Python brings along: prose, then prose
and code with a ramp between the two, then a cooldown by a batch four times as large.

    python prepare.py demo
    python train.py config_demo.py

1.6 million parameters, 1.5 million tokens, about three minutes on two CPU cores without bf16.
Shape, vocabulary, batch and learning rate won over seven others at equal time (README, Results).
"""
n_layer, d_model, n_head, n_kv_head, d_ff, context = 3, 128, 2, 1, 352, 256

_both = {"demo-prose": 0.5, "demo-code": 0.5}
stages = [
    {"tokens": 400_000, "batch": 2048, "mixture": {"demo-prose": 1}},
    {"tokens": 800_000, "batch": 2048, "mixture": _both, "ramp": 160_000},
    {"tokens": 300_000, "batch": 8192, "mixture": _both},
]

learning_rate, min_lr, warmup_steps = 5e-3, 5e-4, 20
micro_batch = 16
log_every, eval_every, eval_tokens, save_every = 10, 100, 2 ** 15, 300
