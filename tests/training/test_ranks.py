"""Two processes on the CPU, under DDP, do what one does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_helpers import largest_difference, moved, tiny_model, token_rows, trainer_of

from isdaa import Objective
from isdaa.models.forward import prepare
from isdaa.training.batches import TokenisedPairs
from isdaa.training.checkpoints import defect
from isdaa.training.monitor import MetricsFile
from isdaa.training.reference import reference_logps

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_ranks
test_ranks.run(Path({folder!r}), batch_size=2, gradient_accumulation_steps=2)
"""


def run(folder: Path, **settings: Any) -> None:
    """22 and 7 pairs: neither divides among two ranks, so that fill-ins are needed. Weights span the global batch."""
    model = moved(tiny_model()).double()
    held_out = TokenisedPairs(token_rows(7, seed=9))
    train = TokenisedPairs(token_rows(22, weight=[1.0 + i % 3 for i in range(22)]))
    objective = Objective(weight="shuffled", normalize="batch", beta=0.3)
    settings |= {"optimizer": "sgd", "logging_steps": 1, "save_steps": 3, "learning_rate": 0.02}
    own: dict[str, Any] = {"starts_at_reference": False, "callbacks": [MetricsFile(folder / "metrics.jsonl")]}
    # The process group exists from here on: reference logps are shared out among the ranks.
    data = []
    reference = prepare(tiny_model())
    if "WORLD_SIZE" in os.environ:
        import torch

        torch.distributed.init_process_group("gloo")
    for pairs in (train, held_out):
        data.append(pairs.with_reference(*reference_logps(reference, pairs, key={}, cache_dir=folder / "cache")))
    trainer = trainer_of(model, folder / "checkpoints", *data, objective, own=own, **settings)
    trainer.train()


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    run(tmp_path / "one", batch_size=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = PROGRAM.format(here=str(Path(__file__).parent), folder=str(tmp_path / "two"))
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    assert len(one) == len(two) == 4
    for line, other in zip(one, two, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if "time/" not in key:
                assert other[key] == pytest.approx(line[key], rel=2e-4, abs=1e-5), key
    folders = [tmp_path / name / "checkpoints" / "checkpoint-3" for name in ("one", "two")]
    assert all(defect(folder) is None for folder in folders)
    assert (folders[1] / "rng_state_1.pth").is_file()
    weights, others = (load_file(folder / "model.safetensors") for folder in folders)
    assert largest_difference(others, weights) < 5e-6
    assert len(list((tmp_path / "two" / "cache").iterdir())) == 2
