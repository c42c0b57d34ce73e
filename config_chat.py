"""A chat model: TinyLlama v1.1 (or v1.0) learns to answer from UltraChat 200k, with the settings of
the Zephyr recipe (arXiv 2310.16944).

    hf download TinyLlama/TinyLlama_v1.1 --local-dir=models/TinyLlama_v1.1
    hf download HuggingFaceH4/ultrachat_200k --repo-type=dataset --local-dir=ultrachat
    python prepare.py chat "ultrachat/data/train_sft*" --out=data/ultrachat \\
        --tokenizer=models/TinyLlama_v1.1/tokenizer.model
    torchrun train.py config_chat.py

Of TinyLlama-Chat v1.0 its model card says: v1.0's weights, Zephyr's recipe, UltraChat, then DPO on
UltraFeedback's preferences. Its settings were not published. Here are those of zephyr-7b-beta in
the alignment handbook: one epoch, which with Mistral's tokenizer were 1,090 steps of 128 x 2,048
tokens, a warm-up over a tenth of it, AdamW's usual betas, no weight decay. An hour on one H100 by
its speed in pretraining.

Our choices: only answers are learned (Zephyr's script learned questions, too), and no system
message is added where there is none. DPO is left out.
"""
n_layer, d_model, n_head, n_kv_head, d_ff, vocab_size, context = 22, 2048, 32, 4, 5632, 32_000, 2048
init_from = "models/TinyLlama_v1.1"
stages = [{"tokens": 1090 * 128 * 2048, "batch": 128 * 2048, "mixture": {"ultrachat": 1}}]
learning_rate, min_lr, warmup_steps = 2e-5, 0.0, 109
weight_decay, beta1, beta2, grad_clip = 0.0, 0.9, 0.999, 1.0
micro_batch, log_every, eval_every, save_every = 16, 10, 200, 500
