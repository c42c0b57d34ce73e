#!/usr/bin/env bash
# TinyLlama in miniature, from nothing to text: environment, data, training, a sample. No download
# but the packages. About three minutes on two CPU cores. Every command is shown as it runs.
#
#     bash runs/demo.sh                          or with options for train.py:
#     bash runs/demo.sh --out_dir=out/mine --learning_rate=1e-3
set -euo pipefail
. "$(dirname "$0")/environment.sh"

# 1. Packages, into .venv, unless another environment is active.
pip install -q -r requirements.txt

# 2. Text to tokens: the documentation and the modules of this Python become two sources.
python prepare.py demo

# 3. Training. A second run of the same command continues where the first one was stopped.
python train.py config_demo.py "$@"

# 4. Text from the newest checkpoint.
python sample.py --prompt="class " --max_new_tokens=100
