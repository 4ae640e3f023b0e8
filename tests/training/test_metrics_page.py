"""docs/metrics.md says what runs write, under which names, and the limits that the code goes by: no key more, no key less."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import CHAIN, ROOT, read_lines, train
from training_helpers import moved, tiny_model, token_rows, trainer_of, with_reference
from transformers.integrations.integration_utils import rewrite_logs

from isdaa import Objective
from isdaa.training.trainer.callbacks import metrics_line

PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
FILES = ("metrics.jsonl", "reward/metrics.jsonl", "sft/metrics.jsonl")
ROW = re.compile(r"^\| `", re.MULTILINE)


def section(title: str) -> str:
    found = re.search(rf"^## [^\n]*`{re.escape(title)}`[^\n]*\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found.group(1)


def rows(file: str) -> list[tuple[list[str], list[str]]]:
    """Of every row of the section's tables: keys of the file, the cells behind them."""
    lines = [line.replace("\\|", "/") for line in section(file).splitlines() if ROW.match(line)]
    return [(re.findall(r"`([^`]+)`", cells[0]), cells[1:]) for cells in (line.strip("|").split("|") for line in lines)]


def in_the_trackers(key: str) -> str:
    """The page's rule for the name of a key in TensorBoard, W&B and Trackio."""
    if key.startswith("time/eval_"):
        return "eval/" + key.removeprefix("time/eval_")
    return key if key.startswith("eval/") else f"train/{key}"


def logged_as(key: str) -> str:
    """The name under which the Trainer logs what stands in the file as `key`."""
    if key.startswith("time/eval_"):
        return key.removeprefix("time/")
    return "eval_" + key.removeprefix("eval/") if key.startswith("eval/") else key


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File -> keys that small runs of every family write, and the names in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tmp_path_factory.mktemp("metrics")
    chain = CHAIN | {"stages": ["sft", "label", "reward", "align"], "reward.max_steps": 4, "reward.eval_steps": 2}
    guard = {"guard.steps": 1, "guard.prompts": 8, "sft.logging_steps": 2, "reward.logging_steps": 2}
    trackers = {f"{stage}.report_to": ["tensorboard"] for stage in ("sft", "reward", "align")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert train("first", chain | guard | trackers) == 0
        more = CHAIN | {"stages": ["align"], "model.path": "first/sft", "data.pairs": "first/pairs/train.jsonl"}
        more = {k: v for k, v in more.items() if k not in ("model.random", "data.sft", "data.prompts")}
        assert train("chi", more | {"objective.method": "chi_po", "guard.steps": 2, "guard.scorer": "none"}) == 0
        for method in ("dpo", "ipo", "slic", "rpo", "r_dpo", "cdpo", "wpo", "is_chi_po"):
            assert train(method, more | {"objective.method": method, "align.max_steps": 2}) == 0
        assert train("mean", more | {"objective.weight": "mean", "align.max_steps": 2, "reference.path": "first/sft"}) == 0
    found: dict[str, set[str]] = {}
    for file in FILES:
        found[file] = {key for path in place.glob(f"*/{file}") for line in read_lines(path) for key in line}
    names: dict[str, set[str]] = {}
    for file, stage in zip(FILES, ("align", "reward", "sft"), strict=True):
        events = EventAccumulator(str(place / "first" / "tensorboard" / stage))
        events.Reload()
        names[file] = set(events.Tags()["scalars"])
    return {"keys": found, "tensorboard": names}


@pytest.mark.parametrize("file", FILES)
def test_every_key_that_runs_write_is_explained_and_no_other(file: str, written: dict[str, Any]) -> None:
    explained = [key for keys, _ in rows(file) for key in keys]
    assert len(explained) == len(set(explained))
    assert written["keys"][file] - {"step"} - set(explained) == set(), "a run writes them, and the page does not explain them"
    assert set(explained) - written["keys"][file] == set(), "the page explains them, and no run writes them"


@pytest.mark.parametrize("file", FILES)
def test_names_in_the_trackers_are_those_of_the_page(file: str, written: dict[str, Any]) -> None:
    keys = [key for keys, _ in rows(file) for key in keys]
    told = {in_the_trackers(key) for key in keys}
    assert [in_the_trackers(key) for key in keys] == list(rewrite_logs(dict.fromkeys(map(logged_as, keys))))
    summary = {name for name in written["tensorboard"][file] if re.match(r"train/(train_|total_flos)", name)}
    assert written["tensorboard"][file] - told - summary == set()
    for name in summary:
        assert f"`{name}`" in PAGE, name


def test_the_rule_for_names_in_the_trackers_is_on_the_page() -> None:
    rule = "`train/` before the key (`train/weights/mean`), but for held-out figures, `eval/…`, which keep theirs, "
    rule += "and `time/eval_…`, which are `eval/…`."
    assert rule in re.sub(r"\s+", " ", PAGE)
    assert in_the_trackers("weights/mean") == "train/weights/mean" and in_the_trackers("eval/loss") == "eval/loss"


@pytest.mark.parametrize("file", FILES)
def test_every_key_has_a_meaning_what_is_healthy_and_when_to_worry(file: str) -> None:
    for keys, cells in rows(file):
        assert len(cells) == 3 and all(cell.strip() for cell in cells), keys


def test_the_names_that_are_compared_are_those_that_are_written() -> None:
    for key in ("loss", "eval/loss", "time/eval_runtime", "guard/kl", "time/guard_seconds", "eval/time/pairs_per_second"):
        assert metrics_line({logged_as(key): 1.0, "step": 1}) == {"step": 1, "epoch": None, key: 1.0}


def test_limits_are_those_of_the_code() -> None:
    limits = re.findall(r"^\| `(isdaa\.[\w.]+)` \| ([^|]+) \|", PAGE, re.MULTILINE)
    assert len(limits) >= 10
    for dotted, told in limits:
        module, _, name = dotted.rpartition(".")
        assert float(told.replace("−", "-").split()[0]) == getattr(importlib.import_module(module), name), dotted
    # In the prose and the tables of meanings, too.
    for name in (
        "STALL_ESS",
        "STALL_MEAN_WEIGHT",
        "STALL_STEPS",
        "STALL_PAIRS",
        "START_MEAN",
        "START_RMS",
        "LOG_WEIGHT_CAP",
        "MANY",
        "FIRST",
    ):
        assert any(dotted.endswith(f".{name}") for dotted, _ in limits), name


def test_the_margin_of_chi_po_is_readable_and_what_the_loss_sees_stands_beside_it(tmp_path: Path) -> None:
    """Rewards are β·Δ, as TRL's are; the exponential of one far pair is in the median alone, where it is one of many."""
    policy = tiny_model()
    reference = moved(policy, size=0.3)  # sure of itself, and mostly wrong: Δ is large
    rows = token_rows(9, seed=4)
    pairs, under_policy = with_reference(rows, reference), with_reference(rows, policy)
    trainer = trainer_of(
        policy, tmp_path, pairs, pairs, Objective(beta=0.5, implicit_reward="chi_squared"),
        max_steps=1, learning_rate=0.0, own={"starts_at_reference": False},
    )  # fmt: skip
    found = trainer.evaluate()
    d_w, d_l = (
        torch.tensor(under_policy.floats[name]).double() - torch.tensor(pairs.floats[name]).double()
        for name in ("reference_chosen_logps", "reference_rejected_logps")
    )
    margins = 0.5 * (d_w + d_w.clamp(max=20).exp() - d_l - d_l.clamp(max=20).exp())
    assert found["eval_rewards/margin"] == pytest.approx(0.5 * (d_w - d_l).mean().item(), rel=1e-3)
    assert found["eval_rewards/chi_squared_margin"] == pytest.approx(margins.quantile(0.5).item(), rel=1e-3)
    assert margins.abs().max() > 20 * abs(found["eval_rewards/margin"]), "the case has no exponential worth the name"
    assert found["eval_rewards/accuracy"] == (d_w > d_l).double().mean()
    plain = trainer_of(policy, tmp_path, pairs, pairs, Objective(beta=0.5), max_steps=1, own={"starts_at_reference": False})
    assert "eval_rewards/chi_squared_margin" not in plain.evaluate()
