"""Runs two epochs' ends with either judge on this rank of one or several, and writes FOLDER/RANK.pt.

torchrun --nproc_per_node 2 tests/core/balance_mix_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from test_against_dense import JUDGED, NETWORK, N, case

from hf_balancemix.core import BalanceMix, observed
from hf_balancemix.core.distributed import leave_process_group, world

if __name__ == "__main__":
    torch.set_num_threads(1)
    observed._VALUES_AT_ONCE, observed._FEWEST_TO_PRUNE, observed._MORE_SUSPICIOUS = 500, 20, 3
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    rank, num_ranks = world()
    features, labels, logits = case(0)
    states = []
    for settings in (NETWORK, JUDGED):
        state = BalanceMix(labels, settings)
        if settings.cross_fits:
            state.judge(features)
        for epoch in (1, 2):
            for index in torch.arange(rank, N, num_ranks).split(50):
                state.observe(index, logits[epoch][index])
            state.end_epoch(epoch)
        states.append(state.state_dict())
    torch.save(states, Path(sys.argv[1], f"{rank}.pt"))
    leave_process_group()
