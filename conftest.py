"""What all tests share: one thread a process, and no network. Tiny models lose more by sharing out
their work than they win, and on a busy machine the waiting multiplies."""
import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"                 # read where huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"                # of the processes that tests start
torch.set_num_threads(1)
