"""The tokenising benchmark: its data is what it says, its record is whole."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tokenise


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "VOCABULARY", 900)
    monkeypatch.setattr(tokenise, "TRAINING_POSTS", 30)
    monkeypatch.setattr(tokenise, "WORDS", 1000)


@pytest.mark.parametrize("kind", ["byte_level", "whole"])
def test_a_small_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tokenise.json"
    assert tokenise.main(["--rows", "40", "--tokenizer", kind, "--shuffled", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert (record["rows"], record["kept"], record["vocabulary"], record["tokenizer"]) == (40, 40, 900, kind)
    names = ["read and check", "digest of the content", "write", "tokenise into a fresh cache", "tokenise from the cache"]
    assert [name.strip() for name in record["parts"]][:4] == names[:4]
    assert list(record["parts"])[-1] == names[-1]
    assert record["seconds"] == pytest.approx(
        sum(record["parts"][name]["seconds"] for name in ("read and check", "tokenise into a fresh cache")), abs=0.02
    )
    assert "tokenise from the cache" in capsys.readouterr().out


def test_posts_and_their_pairs() -> None:
    pairs = list(tokenise.Writer(0).pairs(14, 6))
    assert [pair["prompt"] == pairs[0]["prompt"] for pair in pairs] == [True] * 6 + [False] * 8
    assert len({pair["prompt"] for pair in tokenise.Writer(0).pairs(14, 1)}) == 14
    assert pairs == list(tokenise.Writer(0).pairs(14, 6))
    assert all(pair["prompt"].endswith("TL;DR:") and pair["chosen"] != pair["rejected"] for pair in pairs)


@pytest.mark.parametrize("kind", ["byte_level", "whole"])
def test_the_tokenizer_loses_nothing(kind: str) -> None:
    writer = tokenise.Writer(0)
    tokenizer = tokenise.make_tokenizer(kind, (writer.post() for _ in range(30)))
    text = writer.post() + " Käse 猫"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)
