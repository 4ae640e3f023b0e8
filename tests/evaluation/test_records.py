"""Blocks of records: whole or absent, whatever a kill left behind."""

import json
import multiprocessing

import pytest
from patience import HANGS

from isdaa.errors import UserError
from isdaa.evaluation.records import Blocks, locked

ROWS = [{"prompt_id": str(i), "sample": 0, "text": f"ä {i}", "ids": [i], "tokens": 1, "finished": True} for i in range(3)]


def filled(path) -> Blocks:
    blocks = Blocks(path)
    blocks.add("samples", "a", {"model": "m", "seed": 0}, ROWS)
    blocks.add("samples", "b", {"model": "n", "seed": 0}, ROWS[:2])
    return blocks


def test_written_and_read_again(tmp_path):
    path = tmp_path / "samples.jsonl"
    first, again = filled(path), Blocks(path)
    assert "a" in again and "c" not in again
    assert again["b"] == first["b"] == [{"block": "b", **row} for row in ROWS[:2]]
    assert again.headers["a"] == {"header": "samples", "block": "a", "count": 3, "model": "m", "seed": 0}
    with pytest.raises(UserError, match="run the evaluation again"):
        again["c"]


def test_cut_anywhere_every_finished_block_stays_and_the_last_can_be_redone(tmp_path):
    filled(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    first_block = sum(len(line) for line in whole.splitlines(keepends=True)[:4])
    for cut in range(0, len(whole) + 1, 7):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        blocks = Blocks(path)
        assert ("a" in blocks) == (cut >= first_block)
        assert "b" not in blocks or cut == len(whole)
        if "b" not in blocks:
            blocks.add("samples", "b", {"model": "n", "seed": 0}, ROWS[:2])
        again = Blocks(path)
        assert len(again["b"]) == 2 and ("a" in again) == ("a" in blocks)


def test_lines_of_somebody_else_are_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"prompt": "x"}) + "\n")
    with pytest.raises(UserError, match=r"samples.jsonl.*isdaa did not write"):
        Blocks(path)
    path.write_text('{"header": "samples"\n')
    with pytest.raises(UserError, match=r"samples.jsonl:1: not valid JSON"):
        Blocks(path)


def _try(folder, answer):
    try:
        with locked(folder):
            answer.put("free")
    except UserError as error:
        answer.put(str(error))


def test_one_process_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with locked(tmp_path / "evaluation"):
        process = context.Process(target=_try, args=(tmp_path / "evaluation", answer))
        process.start()
        assert "another isdaa process" in answer.get(timeout=HANGS)
        process.join()
    _try(tmp_path / "evaluation", answer)
    assert answer.get(timeout=HANGS) == "free"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"), locked(tmp_path / "file"):
        pass
