#!/usr/bin/env bash
# A model of 120M parameters on 2.4B tokens, on one box with GPUs: environment, corpora, training,
# evaluation. By arithmetic ten hours on one RTX 4090, three on one A100.
#
# Before: hf auth login (Llama 2's tokenizer and StarCoder want their licenses accepted), and
# a disk with 20 GB for the tokens. The corpora are streamed: 1.2 TB pass through the network once,
# though one document in 400 is kept. With a copy on disk, set SLIMPAJAMA and STARCODER to its folder.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
gpus=$(nvidia-smi -L | wc -l)
slimpajama=${SLIMPAJAMA:-hf://datasets/cerebras/SlimPajama-627B/train}
starcoder=${STARCODER:-hf://datasets/bigcode/starcoderdata}

# 1. What is going to happen, before anything does.
pip install -q ".[data,eval,plot]" huggingface_hub
python train.py config_120m.py --plan --gpus="$gpus"

# 2. Corpora: 1.7B tokens of SlimPajama without its GitHub part, 0.7B of StarCoder.
hf download meta-llama/Llama-2-7b-hf tokenizer.model --local-dir=.
python prepare.py tokenize "$slimpajama" --tokenizer=tokenizer.model --fraction=0.0026 \
    --exclude=meta.redpajama_set_name=RedPajamaGithub --out=data/slimpajama
python prepare.py tokenize "$starcoder" --tokenizer=tokenizer.model --fraction=0.0026 \
    --text_key=content --out=data/starcoder

# 3. Training. Stopped, by whatever, the same command continues.
torchrun --nproc-per-node="$gpus" train.py config_120m.py "$@"

# 4. Pictures, text, and the seven tasks of the paper's table.
python plot.py out/120m
python sample.py out/120m --prompt="The meaning of life is"
python eval.py out/120m
