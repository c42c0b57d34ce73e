"""TinyLlama v1.0: 3T tokens of SlimPajama and StarCoder, 7:3, in one stage (arXiv 2401.02385v1 and
github.com/jzhang38/TinyLlama at bf12224).

    python prepare.py tokenize ... --out=data/slimpajama     SlimPajama without its GitHub part, and
    python prepare.py tokenize ... --out=data/starcoder      StarCoder, with Llama 2's tokenizer
    torchrun train.py config_v1.py

1,100,048,384 parameters, 3.2 epochs of the original's 950B tokens. The authors used 16 A100-40G; at
their 24,000 tokens/s each it is 34,700 GPU-hours, 90 days. Their result: 52.99 on average over
HellaSwag, OpenBookQA, WinoGrande, ARC, BoolQ and PIQA (52.97 by their own seven numbers).

The shares are those of the sources in the 950B tokens. Which parts of StarCoder the authors left
out ("only code-related data") is not documented; to leave out its issues and commits is our choice.
"""
n_layer, d_model, n_head, n_kv_head, d_ff, vocab_size, context = 22, 2048, 32, 4, 5632, 32_000, 2048

stages = [{"tokens": 3e12, "batch": 1024 * 2048,
           "mixture": {"slimpajama": 0.693584, "starcoder": 0.306416}}]

learning_rate, min_lr, warmup_steps = 4e-4, 4e-5, 2000
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0
micro_batch = 16                                   # of 2,048 tokens; 8 fit the authors' 40 GB
log_every, eval_every, save_every = 10, 5000, 5000
