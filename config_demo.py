"""TinyLlama's recipe in miniature, on the text that every Python brings along: prose, then prose
and code with a ramp between the two, then a cooldown by a batch four times as large.

    python prepare.py demo
    python train.py config_demo.py

1.6 million parameters, 3.2 million tokens, three minutes on two CPU cores with bf16. Shape,
vocabulary and batch won over others in equal time, the learning rate on equal tokens
(docs/log.md).
"""
n_layer, d_model, n_head, n_kv_head, d_ff, context = 3, 128, 2, 1, 352, 256

_both = {"demo-prose": 0.5, "demo-code": 0.5}
stages = [
    {"tokens": 900_000, "batch": 2048, "mixture": {"demo-prose": 1}},
    {"tokens": 1_700_000, "batch": 2048, "mixture": _both, "ramp": 340_000},
    {"tokens": 600_000, "batch": 8192, "mixture": _both},
]

learning_rate, min_lr, warmup_steps = 8e-3, 8e-4, 20
micro_batch = 8                                    # in all stages, so that one graph is compiled
log_every, eval_every, eval_tokens, save_every = 25, 250, 2 ** 15, 1000
