"""TinyLlama v1.1, the base model: 2T tokens of SlimPajama in three stages under one cosine
(arXiv 2401.02385v2, section 2.5).

    python prepare.py tokenize ... --out=data/slimpajama     SlimPajama without its GitHub part,
                                                             (docs/data.md)
    torchrun train.py config_base.py

1,100,048,384 parameters. The authors used 64 A100-40G; at their 24,000 tokens/s each it is 23,000
GPU-hours, 15 days. Their result: 53.63 on average over HellaSwag, OpenBookQA, WinoGrande, ARC,
BoolQ and PIQA.

Stage 2 is where the Math & Code and Chinese variants fork with mixtures of their own; this one
continues with SlimPajama. Stage 3 "cools down" by four times the batch, as the learning rate is low
already. The paper says "approximately 1.8M" tokens a batch; 64 GPUs x 14 sequences x 2,048 is our
reading of it, and the learning rate, not restated for v1.1, is that of v1.0.
"""
n_layer, d_model, n_head, n_kv_head, d_ff, vocab_size, context = 22, 2048, 32, 4, 5632, 32_000, 2048

_batch = 64 * 14 * 2048                             # 1,835,008 tokens
stages = [
    {"tokens": 1.5e12, "batch": _batch, "mixture": {"slimpajama": 1}},
    {"tokens": 350e9, "batch": _batch, "mixture": {"slimpajama": 1}},
    {"tokens": 150e9, "batch": 4 * _batch, "mixture": {"slimpajama": 1}},
]

learning_rate, min_lr, warmup_steps = 4e-4, 4e-5, 2000
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0
micro_batch = 16                                   # of 2,048 tokens; 8 fit the authors' 40 GB
log_every, eval_every, save_every = 10, 5000, 5000
