"""Two processes of gloo, started once for all tests that need them: starting them takes most of the time."""

from __future__ import annotations

from pathlib import Path

import torch

RANKS = 2


def work(rank: int, folder: Path) -> None:
    from tests.rules import test_projection_fsdp, test_shards

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    test_projection_fsdp.work(rank, folder)
    test_shards.work(rank, folder)
    torch.distributed.destroy_process_group()


def run(folder: Path) -> Path:
    torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
    return folder
