"""A hundred mutated inputs, always the same, and the fuzzer's own promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from fuzz_inputs import ROWS, encoded
from fuzz_mutations import mutate_bytes, mutate_file, mutate_json, mutate_jsonl, mutate_safetensors
from patience import HANGS

FUZZ = Path(__file__).with_name("fuzz.py")


def fuzzed(*arguments: str, cwd: Path, program: str | None = None) -> subprocess.CompletedProcess[str]:
    """The fuzzer in a process of its own, for it forks before anything is computed. program: code that runs before it."""
    start = (
        [sys.executable, "-c", f"{program}\nimport runpy\nrunpy.run_path({str(FUZZ)!r}, run_name='__main__')"]
        if program
        else None
    )
    return subprocess.run(
        [*(start or [sys.executable, str(FUZZ)]), *arguments], cwd=cwd, capture_output=True, text=True, timeout=HANGS
    )


@pytest.mark.slow
def test_a_hundred_mutated_inputs_end_as_they_should(tmp_path: Path) -> None:
    ended = fuzzed("--seed", "16", "--trials", "100", "--out", "outcomes.jsonl", cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    outcomes = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert len(outcomes) == 100
    assert {outcome["kind"] for outcome in outcomes} == {"data", "yaml", "options", "records", "models"}
    # Mutations are neither all refused nor all harmless: both ways through are tried.
    assert {outcome["status"] for outcome in outcomes} >= {0, 2}


FAILURES = {
    "raise ValueError('a fault')": "ValueError",
    "os.kill(os.getpid(), signal.SIGSEGV)": "signal 11",
    "time.sleep(99)": "more than 2 s",
    "return 1": "status 1",
    "print('isdaa: error: two'); print('lines', file=sys.stderr); return 2": "not one line",
    "open('out.json', 'w'); os.mkdir('out'); open('out/metrics.json', 'w').write('[NaN]'); return 0": "not finite: metrics.json",
    "bytearray(1 << 44)": "MemoryError",
}


def test_every_kind_of_failure_is_found_and_can_be_repeated(tmp_path: Path) -> None:
    program = (
        "import json, os, signal, sys, time\n"
        f"sys.path.insert(0, {str(FUZZ.parent)!r})\n"
        "import isdaa.cli, fuzz\n"
        "fuzz.warm, fuzz.make_valid = lambda: None, lambda folder: fuzz.inputs.write_files(folder)\n"
        f"for body in {list(FAILURES)!r}:\n"
        "    exec('def main(argv):\\n    ' + body)\n"
        "    isdaa.cli.main = main\n"
        f"    fuzz.SECONDS = 2 if 'sleep' in body else {HANGS}\n"
        "    sys.argv = ['fuzz.py', '--only', 'yaml', '--trials', '1']\n"
        "    print('\\nSTATUS', fuzz.main(), flush=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    told = ended.stdout.split("\nSTATUS ")
    assert [text.splitlines()[0] for text in told[1:]] == ["1"] * len(FAILURES), ended.stdout + ended.stderr
    for text, words in zip(told, FAILURES.values(), strict=False):
        assert words in text and "--seed 1 --only yaml --case 0" in text, text


def test_a_case_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    program = (
        f"import sys, json\nsys.path.insert(0, {str(FUZZ.parent)!r})\nimport fuzz\nfrom random import Random\n"
        "import os\nfrom pathlib import Path\nfuzz.inputs.write_files(Path('.'))\n"
        "print(json.dumps([fuzz.TRIALS[kind](Random('1:5')) for kind in ('data', 'yaml', 'options')]))\n"
    )
    made = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        made.append(
            subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True).stdout
        )
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".jsonl.gz", ".csv.xz", ".json.bz2"]
)
@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_inputs_that_are_mutated_are_valid(name: str, suffix: str, tmp_path: Path) -> None:
    from isdaa.data.reading.sources import load_pairs

    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(encoded(ROWS[name], suffix))
    pairs, counts = load_pairs(str(path))
    assert len(pairs) == len(ROWS[name]) == counts.kept


def test_mutations_change_what_they_are_given(tmp_path: Path) -> None:
    text = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}})
    assert sum(mutate_json(text, Random(seed))[0] != text.encode() for seed in range(200)) > 180
    lines = f"{text}\n{text}\n"
    assert sum(mutate_jsonl(lines, Random(seed))[0] != lines.encode() for seed in range(200)) > 180
    data = bytes(range(256))
    assert sum(mutate_bytes(data, Random(seed))[0] != data for seed in range(200)) > 190
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(8)
    assert sum(mutate_safetensors(weights, Random(seed))[0] != weights for seed in range(200)) > 190
    for seed in range(60):
        path = tmp_path / f"{seed}.json"
        path.write_text(text)
        mutate_file(path, Random(seed))
        special = path.is_symlink() or not path.is_file() or os.stat(path).st_mode & 0o777 == 0
        assert special or path.read_bytes() != text.encode()


def test_what_is_left_running_is_ended(tmp_path: Path) -> None:
    program = (
        "import os, sys, time, subprocess\n"
        f"sys.path.insert(0, {str(FUZZ.parent)!r})\n"
        "import isdaa.cli, fuzz\n"
        "def main(argv):\n    child = subprocess.Popen(['sleep', '300'])\n"
        f"    open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n    return 0\n"
        "isdaa.cli.main = main\n"
        "fuzz.warm, fuzz.make_valid = lambda: None, lambda folder: fuzz.inputs.write_files(folder)\n"
        "sys.argv = ['fuzz.py', '--only', 'yaml', '--trials', '1']\n"
        "sys.exit(fuzz.main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.1)
    gone = not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text()
    if not gone:
        os.kill(child, signal.SIGKILL)
    assert gone
