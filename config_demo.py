"""A Llama on a laptop."""
n_layer, d_model, n_head, n_kv_head, d_ff = 4, 192, 3, 1, 512
context = 256
stages = [
    {"tokens": 400_000, "batch": 4096, "mixture": {"demo-prose": 1}},
    {"tokens": 600_000, "batch": 4096, "mixture": {"demo-prose": 0.5, "demo-code": 0.5}, "ramp": 100_000},
    {"tokens": 200_000, "batch": 8192, "mixture": {"demo-prose": 0.5, "demo-code": 0.5}},
]
micro_batch = 16
learning_rate, min_lr, warmup_steps = 3e-3, 3e-4, 20
log_every, eval_every, save_every = 20, 100, 100
