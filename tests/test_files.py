"""Folders that appear whole or not at all, also where several processes write the same one; text files read right or refused."""

import gzip
import os
import stat
import time
from pathlib import Path

import pytest

from isdaa.config import load_config
from isdaa.errors import UserError
from isdaa.files import write_folder_atomically, write_jsonl
from isdaa.foreign import iterate_jsonl, opened_text, read_json, read_jsonl


def write(folder: Path, text: str) -> None:
    write_folder_atomically(folder, lambda aside: (aside / "f").write_text(text) and None)


def test_two_writers_at_once_and_the_last_wins(tmp_path: Path) -> None:
    folder = tmp_path / "cache"

    def fill(aside: Path) -> None:
        (aside / "f").write_text("outer")
        write(folder, "inner")

    write_folder_atomically(folder, fill)
    assert (folder / "f").read_text() == "outer"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_put_there_between_the_two_renames_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename, seen = tmp_path / "cache", os.rename, []

    def racing(source: Path, target: Path) -> None:
        if target == folder and not seen:
            seen.append(source)
            folder.mkdir()
            (folder / "f").write_text("theirs")
        rename(source, target)

    monkeypatch.setattr(os, "rename", racing)
    write(folder, "ours")
    assert seen and (folder / "f").read_text() == "ours"
    assert list(tmp_path.iterdir()) == [folder]


def test_permissions_and_leftovers(tmp_path: Path) -> None:
    young, old = tmp_path / ".writing-cache-abcdefgh", tmp_path / ".old-cache-abcdefgh"
    other = tmp_path / ".writing-cache-two-abcdefgh"
    for path in (young, old, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (time.time() - 100_000,) * 2)
    mask = os.umask(0o027)
    try:
        write(tmp_path / "cache", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o750
    assert young.exists() and other.exists() and not old.exists()
    with pytest.raises(ZeroDivisionError):
        write_folder_atomically(tmp_path / "cache", lambda aside: 1 // 0 and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name, "cache"]
    assert (tmp_path / "cache" / "f").read_text() == "x"


def test_files_that_a_library_writes_for_their_owner_alone_are_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    def fill(aside: Path) -> None:
        (aside / "inner").mkdir()
        for path in (aside / "model.safetensors", aside / "inner" / "run.sh"):
            path.write_text("x")
        (aside / "model.safetensors").chmod(0o600)
        (aside / "inner" / "run.sh").chmod(0o700)

    mask = os.umask(0o027)
    try:
        write_folder_atomically(tmp_path / "model", fill)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {"model.safetensors": 0o640, "run.sh": 0o740}


def test_json_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    records = [{"a": "x\u2028y\x85z\x00\r\n\ufeff", "b": [{"c": None}, {"c": 1}]}, {"": {"": {}}}, {}]
    write_jsonl(tmp_path / "a.jsonl", records)
    assert read_jsonl(tmp_path / "a.jsonl") == records
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert read_jsonl(tmp_path / "a.jsonl.gz") == records


def test_json_lines_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' * 100_000 + b"{")
    lines = iterate_jsonl(path)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(UserError, match=r"a\.jsonl:100001: not valid JSON"):
        list(lines)


def test_text_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    for name, words in (("absent.jsonl", "no such file"), ("absent.csv.gz", "no such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=words), opened_text(tmp_path / name):
            pass
    (tmp_path / "folder.jsonl.gz").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl\.gz: Is a directory"):
        read_jsonl(tmp_path / "folder.jsonl.gz")


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seed: 1\nmodel: {path: m}\nseed: 1\n", "seed", (1, 3)),
        ("data:\n  pairs: a\n  limit: 3\n  'pairs': b\n", "pairs", (2, 4)),
        ("model: {random: {a: [{b: 1, b: 2}]}}\n", "b", (1, 1)),
        ("align: &a {epochs: 1}\nsft:\n  <<: *a\n  epochs: 2\n  epochs: 2\n", "epochs", (4, 5)),
    ],
)
def test_a_config_with_a_key_twice_is_refused(text: str, key: str, lines: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert f"{path}:{lines[1]}: key '{key}' is given twice, first on line {lines[0]}" in str(caught.value)


def test_a_config_may_override_what_it_merges_and_be_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = (
        "model: {path: m}\ndata: {pairs: é.jsonl}\nalign:\n  <<: {epochs: 1, batch_size: 3}\n  <<: {warmup_steps: 7}\n"
        "  epochs: 2\n"
    )
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(text, encoding=encoding)
        config = load_config(path)
        assert (config.align.epochs, config.align.batch_size, config.align.warmup_steps) == (2, 3, 7)
        assert config.data.pairs == "é.jsonl"


def test_a_config_that_is_no_yaml_is_refused_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for content in (b"output_dir: \xe9", b"output_dir: !!timestamp 2024-99-99", b"a: " + b"[" * 600, b"? [1]\n: 2\n? {}\n: 3"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"run\.yaml: not a YAML file"):
            load_config(path)


@pytest.mark.parametrize(
    ("line", "place"),
    [('{"a": 1', "column 8"), ('{"a" 1}', "column 6"), ('{"a": [1, 2}', "column 12"), ("", ""), ("nonsense", "column 1")],
)
def test_a_broken_line_is_told_by_its_column(tmp_path: Path, line: str, place: str) -> None:
    """JSON's own count of lines would begin anew in every line of the file."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    if not line:
        assert len(read_jsonl(path)) == 2
        return
    with pytest.raises(UserError, match=rf"rows.jsonl:2: not valid JSON \(.*, {place}\); mend or remove the line") as caught:
        read_jsonl(path)
    assert " line 2" not in str(caught.value)


def test_a_broken_file_is_told_by_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": 1,\n "b" 2}\n')
    with pytest.raises(UserError, match=r"run.json: not valid JSON \(.*, line 2, column 6\)"):
        read_json(tmp_path / "run.json")
