"""The benchmark's two ways do the same work: plain code gives the KL that ours gives, and its samples are as long."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from isdaa.models.packed.forward import prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import evaluation_pass


def small(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=12, max_position_embeddings=64, initializer_range=0.5, pad_token_id=0, eos_token_id=2, **shape
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def work() -> evaluation_pass.Work:
    prompts = [[1, *range(3, 4 + i % 7)] for i in range(20)]
    ours = (prepare(small(0)), prepare(small(1)))
    return evaluation_pass.Work(prompts, {2}, 0, 10, 8, ours, (small(0), small(1)))


def test_both_ways_find_the_same_kl(work: evaluation_pass.Work) -> None:
    rows, states = evaluation_pass.our_samples(work, 3)
    ours = evaluation_pass.our_kl(work, rows, states)
    torch.testing.assert_close(ours, evaluation_pass.plain_kl(work, rows, []), rtol=1e-4, atol=1e-4)
    theirs, none = evaluation_pass.plain_samples(work, 3)
    assert none == [] and [prompt for prompt, _ in theirs] == [prompt for prompt, _ in rows] == work.prompts
    for samples in (rows, theirs):
        assert all(len(ids) == 10 or ids[-1] == 2 for _, ids in samples) and len({len(ids) for _, ids in samples}) > 2


def test_table_and_files(work: evaluation_pass.Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(evaluation_pass, "load_work", lambda *given: work)
    evaluation_pass.main(
        [
            "--model_path",
            "a",
            "--reference",
            "b",
            "--prompts",
            "20",
            "--rounds",
            "2",
            "--threads",
            "1",
            "--out",
            str(tmp_path / "x"),
        ]
    )
    printed = capsys.readouterr().out
    assert printed.startswith("| prompts | step |") and printed.count("| 20 |") == 3
    found = json.loads((tmp_path / "x.json").read_text())
    first = found["results"]["20"][0]
    assert first["ratio"]["both"] == pytest.approx(first["plain"]["both"] / first["ours"]["both"])
    assert (tmp_path / "x.md").read_text() == printed
