#!/usr/bin/env bash
# TinyLlama v1.1: 1.1B parameters on 2T tokens, on machines with GPUs: environment, corpus, training,
# evaluation. 23,148 GPU-hours at the paper's 24,000 tokens/s per A100-40G; on one H100 bench.py
# measured 71,907 tokens/s, which makes 7,700.
#
# On several machines start this on each, with NODES, NODE (0, 1, ...) and HEAD (the first one's
# address) set, an environment active, and this folder on a file system that all share.
#
# Before: hf auth login (Llama 2's tokenizer wants its license accepted), and disks with
# 895 GB for SlimPajama as published and 1.3 TB for its 659B tokens. Tokenizing takes some 45 core-hours.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
gpus=$(nvidia-smi -L | wc -l) nodes=${NODES:-1} node=${NODE:-0} head=${HEAD:-localhost}

# 1. What is going to happen, before anything does.
pip install -q ".[data,eval,plot]" huggingface_hub
python train.py config_base.py --plan --gpus=$((gpus * nodes))
python check.py                          # does this machine compute right?

# 2. The corpus, by the first machine, on all its cores. What is done already is not done again.
if [ "$node" = 0 ]; then
    hf download meta-llama/Llama-2-7b-hf tokenizer.model --local-dir=.
    hf download cerebras/SlimPajama-627B --repo-type=dataset --include="train/*" \
        --local-dir=SlimPajama-627B
    python prepare.py tokenize SlimPajama-627B/train --tokenizer=tokenizer.model \
        --exclude=meta.redpajama_set_name=RedPajamaGithub --out=data/slimpajama
fi
until [ -f data/slimpajama/source.json ]; do sleep 60; done

# 3. Training. Stopped, by whatever, the same command continues.
torchrun --nnodes="$nodes" --node-rank="$node" --nproc-per-node="$gpus" --master-addr="$head" \
    --master-port=29500 train.py config_base.py "$@"

# 4. Pictures, text, and the seven tasks of the paper's table.
if [ "$node" = 0 ]; then
    python plot.py out/base
    python sample.py out/base --prompt="The meaning of life is"
    python eval.py out/base
fi
