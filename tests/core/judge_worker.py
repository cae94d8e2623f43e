"""Judges labels on this rank of one or several, and writes FOLDER/RANK.pt.

torchrun --nproc_per_node 2 tests/core/judge_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from test_judge import case

from hf_balancemix.core import judge_labels
from hf_balancemix.core.distributed import leave_process_group

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    features, given, _ = case()
    judged = judge_labels(features, given)
    values = [judged.p_clean, judged.probability, *judged.rates, judged.loss_histogram.cells]
    torch.save(values, Path(sys.argv[1], f"{os.environ.get('RANK', 0)}.pt"))
    leave_process_group()
