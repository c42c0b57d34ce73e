"""The 120M model of TinyLlama's repository (lit_gpt/config.py at bf12224, tiny_LLaMA_120M) on 20
tokens per parameter, which are best for its compute (Chinchilla, arXiv 2203.15556).

    bash runs/120m.sh                                     corpora, 2.4B tokens, and training
    torchrun --nproc-per-node=N train.py config_120m.py   training alone

121,129,728 parameters, one key/value head. 2.3e18 FLOPs: by arithmetic ten hours on an RTX 4090 at
40 % of its 165 TFLOP/s. The authors trained no such model, so there is no result of theirs; only
the shape is the original's. Ours are: the mixture of v1.0, in one stage; learning rate and batch
of the smallest GPT-3 (125M, arXiv 2005.14165, table 2.1), 6e-4 and half a million tokens; a tenth
of that rate for the end; and the warm-up, 4 % of the run.
"""
n_layer, d_model, n_head, n_kv_head, d_ff, vocab_size, context = 12, 768, 12, 1, 2048, 32_000, 2048

stages = [{"tokens": 20 * 121_129_728, "batch": 256 * 2048,
           "mixture": {"slimpajama": 0.693584, "starcoder": 0.306416}}]

learning_rate, min_lr, warmup_steps = 6e-4, 6e-5, 200
weight_decay, beta1, beta2, grad_clip = 0.1, 0.9, 0.95, 1.0
micro_batch = 16
log_every, eval_every, save_every = 10, 500, 500
