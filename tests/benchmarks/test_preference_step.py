"""The step benchmark: all arms do the same work, one that does not is caught, and nothing is left over when it is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import HANGS
from safetensors.numpy import save_file

from isdaa.models.packed import last_layer, logprobs, patched_forward

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
import preference_step  # noqa: E402
from _memory import BASE, GIB, Budget  # noqa: E402
from _summary import (  # noqa: E402
    LABELS,
    OTHER_WORK,
    fastest,
    is_same_work,
    judge_half,
    loss_tolerance,
    losses_apart,
    weights_apart,
    wrong,
)
from _worker import time_product, took_by_one  # noqa: E402
from performance_tables import overview, together  # noqa: E402
from shapes import EOS, PAD, SHAPES, TINY_SHAPE, Product, Size, draw_pairs, lengths_of, products, saved, tiny  # noqa: E402

pytestmark = pytest.mark.slow  # what measures, not what is measured; `make test-slow` runs it


def command(*options: object) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "preference_step.py"), *map(str, options)]


SOME = ["isdaa_dpo", "isdaa_is_dpo", "isdaa_bare", "trl_best", "two_rows"]  # that start from one process, in seconds


def run_tiny(folder: Path, *options: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = folder / "there" / "step.json"
    called = command("--tiny", "--threads", 1, "--out", out, *options)
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("preference_step-*")), "temporary folders are left"
    return done, json.loads(out.read_text())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    return run_tiny(tmp_path_factory.mktemp("bench"), "--arms", *SOME)


def check(report: dict[str, Any], arms: list[str]) -> None:
    """Every arm is timed and does the same work."""
    assert report["finished"]
    (cell,) = report["cells"]
    assert list(cell["arms"]) == arms
    assert not cell["left_out"] and not cell["failed"]
    for name, arm in cell["arms"].items():
        assert len(arm["seconds"]) == report["settings"]["rounds"] == 2
        assert len(arm["losses"]) == 3  # the warm-up's, too
        assert arm["time_ratio"]["least"] <= arm["time_ratio"]["median"] <= arm["time_ratio"]["largest"]
        assert arm["peak"] >= arm["memory"] > 0
        if name == BASE:
            assert arm["time_ratio"]["median"] == arm["memory_ratio"] == 1
        elif name not in OTHER_WORK:
            assert arm["comparison"]["same_work"], (name, arm["comparison"])
            assert arm["comparison"]["loss_difference"] < 2e-6 < arm["comparison"]["loss_moved"]


def test_the_arms_do_the_same_work_but_for_the_weighted_one(ran: Any) -> None:
    _, report = ran
    check(report, SOME)
    arms = report["cells"][0]["arms"]
    weighted = arms["isdaa_is_dpo"]["losses"]
    assert weighted[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses_apart(weighted, arms[BASE]["losses"]) > 1e-4


@pytest.mark.slow
def test_all_arms_do_the_same_work(tmp_path: Path) -> None:
    done, report = run_tiny(tmp_path, "--arms", *LABELS)
    check(report, list(LABELS))
    assert all(label in done.stdout for label in LABELS.values())


def test_rounds_ratios_and_definitions_are_in_the_file(ran: Any) -> None:
    done, report = ran
    (cell,) = report["cells"]
    assert all(sorted(order) == sorted([*SOME, "matrix products"]) for order in cell["orders"])
    assert len(cell["matmul_seconds"]) == len(cell["orders"]) == 2
    arm, base = cell["arms"]["two_rows"], cell["arms"][BASE]
    rounds = [a / b for a, b in zip(arm["seconds"], base["seconds"], strict=True)]
    assert arm["time_ratio"]["least"] == pytest.approx(min(rounds))
    assert cell["cost_of_weighting"]["median"] > 0 and cell["cost_of_trainer"]["median"] > 0
    assert {"step", "time_ratio", "matmul_share", "peak", "same_work"} <= set(report["definitions"])
    assert report["machine"]["threads"] == 1 and "torch" in report["machine"]["versions"]
    assert "TRL, best settings" in done.stdout and "round 2 of 2" in done.stderr


# ---- an arm that does other work ----


class Losses:
    """A gate that stands open."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def ready(self) -> None: ...

    def step(self, loss: float) -> None:
        self.seen.append(loss)


def trained(arm: str, folder: Path) -> tuple[list[float], Path]:
    rows = draw_pairs(TINY_SHAPE, 512, 6, 0, 200)
    gate = Losses()
    model = peers.ARMS[arm](peers.Job(arm, folder / "initial", folder / arm, rows, 2, 512), gate)
    path = folder / f"{arm}-{uuid.uuid4().hex}.safetensors"
    save_file({name: p.detach().numpy() for name, p in model.named_parameters()}, path)
    return gate.seen, path


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float], Path]:
    folder = tmp_path_factory.mktemp("arms")
    peers.make_model(tiny(512), folder / "initial")
    return folder, *trained("isdaa_bare", folder)


def verdict(right: tuple[Path, list[float], Path]) -> bool:
    folder, losses, weights = right
    other_losses, other = trained("two_rows", folder)
    rows = draw_pairs(TINY_SHAPE, 512, 6, 0, 200)
    found = {"loss_difference": losses_apart(other_losses, losses), "loss_tolerance": loss_tolerance([lengths_of(rows)], 512)}
    return is_same_work(found | weights_apart(other, weights, folder / "initial" / "model.safetensors"))


def test_every_arm_has_a_label() -> None:
    assert list(LABELS) == list(peers.ARMS)


def test_arms_by_name() -> None:
    def arms(*given: str) -> tuple[str, ...]:
        return preference_step._settings(preference_step.build_parser().parse_args(["--arms", *given])).arms

    assert set(arms("all")) | set(arms("without")) == set(LABELS)
    assert set(arms("all")) & set(arms("without")) == {BASE}
    assert arms(BASE, "without_tie") == (BASE, "without_tie")


@pytest.mark.parametrize(
    ("arm", "module", "part"),
    [
        ("without_last_layer", last_layer, "_keep"),
        ("without_direction", logprobs, "_scaled"),
        ("without_tie", patched_forward, "embed"),
    ],
)
def test_what_an_arm_does_without_is_not_called(
    right: Any, monkeypatch: pytest.MonkeyPatch, arm: str, module: Any, part: str
) -> None:
    folder, losses, _ = right
    calls = []
    original = getattr(module, part)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(part)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, part, staticmethod(counted) if isinstance(module, type) else counted)
    assert losses_apart(trained(arm, folder)[0], losses) < 2e-6
    assert not calls
    trained(BASE, folder)
    assert calls


def test_a_plain_script_does_the_same_work(right: Any) -> None:
    assert verdict(right)


@pytest.mark.parametrize(
    ("name", "value"), [("BETA", 0.11), ("LEARNING_RATE", 1.02e-4), ("MAX_GRAD_NORM", 0.5), ("EPSILON", 1.1e-5)]
)
def test_another_setting_is_caught(right: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    monkeypatch.setattr(peers, name, value)
    assert not verdict(right)


def test_perturbed_weights_are_caught(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(5, 4)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    base = {name: values + np.float32(1e-3) for name, values in start.items()}
    files = {}
    for name, weights in {
        "start": start,
        "base": base,
        "rounding": {k: v * np.float32(1 + 1e-7) for k, v in base.items()},
        "one entry": base | {"b": base["b"] + np.array([0, 2e-5, 0], dtype=np.float32)},
        "not trained": start,
        "not a number": base | {"a": np.full_like(base["a"], np.nan)},
    }.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(weights, files[name])

    def judged(name: str) -> bool:
        found = weights_apart(files[name], files["base"], files["start"])
        return is_same_work(found | {"loss_difference": 0.0, "loss_tolerance": 1e-6})

    assert judged("base") and judged("rounding")
    assert not judged("one entry") and not judged("not trained") and not judged("not a number")
    assert weights_apart(files["base"], files["start"], files["start"])["relative_difference"] == float("inf")
    assert weights_apart(files["one entry"], files["base"], files["start"])["weight_difference"] == pytest.approx(2e-5, rel=0.02)
    save_file({"a": start["a"]}, tmp_path / "other.safetensors")
    with pytest.raises(KeyError, match="b"):
        weights_apart(tmp_path / "other.safetensors", files["base"], files["start"])


def test_losses_that_cannot_be_compared_are_infinitely_apart() -> None:
    assert losses_apart([0.5, 0.25], [0.5, 0.75]) == 0.5
    assert losses_apart([0.5], [0.5, 0.75]) == float("inf")
    assert losses_apart([0.5, float("nan")], [0.5, 0.75]) == float("inf")


def test_a_failed_arm_forbids_success() -> None:
    summary = {"name": "cell", "arms": {}, "left_out": {"two_rows": "out of memory"}, "failed": {}}
    assert wrong(summary) == []
    assert wrong(summary | {"failed": {"trl_best": "ValueError: no"}}) == ["cell: trl_best failed: ValueError: no"]
    assert len(wrong(summary | {"left_out": {BASE: "out of memory"}})) == 1


def test_rounds_of_several_files_are_put_together() -> None:
    def cell(name: str, pairs: int, seconds: list[float]) -> dict[str, Any]:
        arms = {BASE: {"seconds": [2.0] * len(seconds)}, "trl_best": {"seconds": seconds}}
        return {"name": name, "batch_size": pairs, "arms": arms}

    cells = [
        cell("tldr, V = 8, part 1 of 2", 4, [2.0, 4.0, 6.0]),
        cell("tldr, V = 8", 4, [8.0, 10.0, 12.0]),
        cell("tldr, V = 8", 2, [2.0]),
        {"name": "tldr, V = 8", "batch_size": 4, "arms": {BASE: {"seconds": [2.0]}}},
    ]
    rows = list(together(cells))[2:]
    # Of six rounds all lie between the first and the last, with 97 % confidence: 1 - 2 / 2⁶.
    assert rows == [
        f"| tldr, V = 8 | 4 | 6 | {LABELS['trl_best']} | 3.500 [1.000, 6.000] |",
        f"| tldr, V = 8 | 2 | 1 | {LABELS['trl_best']} | 1.000 (too few rounds for an interval) |",
    ]


def test_tables_show_what_forbids_to_trust_a_ratio(ran: Any) -> None:
    _, report = ran
    cell = {**report["cells"][0], "batch_size": 2, "rounds": 2}
    assert "NOT" not in "\n".join(overview([cell]))
    other = json.loads(json.dumps(cell))
    other["arms"]["two_rows"]["comparison"] |= {"same_work": False, "weight_difference": None}
    other["left_out"], other["failed"] = {"trl_whole": "out of memory (9 GiB)"}, {"trl_defaults": "ValueError: no"}
    lines = list(overview([other]))
    (wrong_one,) = (line for line in lines if LABELS["two_rows"] in line)
    assert "∞ / " in wrong_one and "NOT the same work" in wrong_one
    assert [line for line in lines if LABELS["trl_whole"] in line and "| out of memory |" in line]
    assert [line for line in lines if LABELS["trl_defaults"] in line and "ValueError: no" in line]
    assert len({line.count("|") for line in lines}) == 1


def test_half_precision_is_judged_by_how_far_trls_goes() -> None:
    def apart(loss: float | None, weights: float) -> dict[str, Any]:
        return {"loss_difference": loss, "relative_difference": weights, "same_work": False}

    arms = {"isdaa_dpo_bf16": apart(0.01, 0.2), "trl_best_bf16": apart(0.02, 0.1), "trl_whole_bf16": apart(0.001, 0.3)}
    arms |= {"two_rows_bf16": apart(0.03, 0.2), "trl_best": apart(0.5, 0.5)}
    judge_half(arms)
    assert {name: found["same_work"] for name, found in arms.items()} == {
        "isdaa_dpo_bf16": True, "trl_best_bf16": True, "trl_whole_bf16": True, "two_rows_bf16": False, "trl_best": False,
    }  # fmt: skip
    arms["trl_best_bf16"] = apart(None, 0.1)  # a loss that is infinite is no measure
    judge_half(arms)
    assert not arms["isdaa_dpo_bf16"]["same_work"]
    alone = {"isdaa_dpo_bf16": apart(0.01, 0.2)}
    judge_half(alone)
    assert alone["isdaa_dpo_bf16"]["same_work"] is None


def test_the_fastest_are_compared_within_rounds() -> None:
    seconds = {"isdaa_dpo": [2.0, 4.0, 2.0], "isdaa_dpo_bf16": [1.0, 2.0, 1.0], "isdaa_one": [3.0, 3.0, 3.0]}
    found = fastest(seconds | {"trl_best": [8.0, 8.0, 8.0], "trl_whole_bf16": [5.0, 5.0, 5.0], "two_rows": [0.1, 0.1, 0.1]})
    assert {kind: (one["isdaa"], one["trl"], one["rounds"]) for kind, one in found.items()} == {
        "fp32": ("isdaa_dpo", "trl_best", [4.0, 2.0, 4.0]),
        "bf16": ("isdaa_dpo_bf16", "trl_whole_bf16", [5.0, 2.5, 5.0]),
        "any": ("isdaa_dpo_bf16", "trl_whole_bf16", [5.0, 2.5, 5.0]),
    }
    assert fastest(seconds) == {}


# ---- what is trained on, and its products ----


@pytest.mark.parametrize("name", SHAPES)
def test_pairs_have_the_lengths_of_their_shape_whatever_the_vocabulary(name: str) -> None:
    shape = SHAPES[name]
    rows = draw_pairs(shape, 32_000, 400, 1, 4096)
    prompts, chosen, rejected = np.array(lengths_of(rows)).T
    assert abs(prompts.mean() - shape.prompt[0]) < 0.2 * shape.prompt[1]
    assert abs(np.concatenate([chosen, rejected]).mean() - shape.response[0]) < 0.2 * shape.response[1]
    assert min(prompts.min(), chosen.min(), rejected.min()) >= 4
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == EOS for row in rows)
    assert all(EOS not in row["prompt_ids"] and PAD not in row["chosen_ids"] for row in rows)
    assert lengths_of(rows) == lengths_of(draw_pairs(shape, 128_256, 400, 1, 4096))


def test_products_are_six_flops_a_weight_and_token() -> None:
    size = Size(1000)
    lengths = [(50, 10, 7), (20, 5, 5)]
    linear = [product for product in products(size, lengths) if product.batch == 1]
    layers = size.layers * sum(i * o * n for (i, o), n in size.linear.items())
    assert sum(product.flops for product in linear) == 6 * (97 * layers + 27 * size.hidden * size.vocabulary)
    attention = [product for product in products(size, lengths) if product.batch > 1]
    visible = sum((p + c) * (p + c + 1) // 2 + r * p + r * (r + 1) // 2 for p, c, r in lengths)
    assert sum(product.flops for product in attention) == pytest.approx(12 * size.layers * size.hidden * visible, rel=0.02)


def test_products_that_the_last_layer_saves() -> None:
    size, lengths = Size(1000), [(50, 10, 7), (20, 5, 5)]
    parts = list(saved(size, lengths))
    # Of 97 tokens it keeps the two last ones of the prompts and 9 + 6 + 4 + 4 - 2 of the responses: each pair's two share one.
    assert {rows for _, rows in parts} == {97 - (10 + 7 - 1) - (5 + 5 - 1)}
    took = {product: float(product.flops) for product in products(size, lengths)}
    one_layer = sum(took_by_one(took, product) for product, _ in parts)
    assert one_layer == 6 * 97 * 3 * size.hidden * size.intermediate


@pytest.mark.parametrize("form", ["nt", "nn", "tn"])
def test_every_form_of_product_can_be_timed(form: str) -> None:
    assert time_product(Product(form, 1, 3, 4, 5, 2), 1) > 0
    assert time_product(Product(form, 2, 3, 4, 5, 2), 1) > 0


def test_arms_that_do_not_fit_together_are_parted() -> None:
    size, lengths = Size(128_256), [[(1500, 100, 100)] * 4]
    parts, too_large = Budget(size, lengths, list(LABELS), 200 * GIB).parts()
    assert not too_large and len(parts) == 1
    parts, too_large = Budget(size, lengths, list(LABELS), 20 * GIB).parts()
    assert all(part[0] == BASE and len(part) > 1 for part in parts) and len(parts) > 1
    assert sorted(arm for part in parts for arm in part if arm != BASE) + sorted(too_large) == sorted(
        [arm for arm in LABELS if arm not in (BASE, *too_large)]
    ) + sorted(too_large)
    assert "two_rows" in too_large and "GiB" in too_large["two_rows"]
    assert Budget(size, lengths, list(LABELS), None).parts() == ([list(LABELS)], {})


# ---- options, and being killed ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shapes", "tdlr"], "tldr"),
        (["--vocabularies", "many"], "--vocabularies"),
        (["--vocabularies", "3"], "--vocabularies"),
        (["--arms", "trl_best"], BASE),
        (["--arms", "isdaa_dpo", "tlr_best"], "trl_best"),
        (["--rounds", "0"], "--rounds"),
        (["--rounds", "x"], "--rounds"),
        (["--threads", "-1"], "--threads"),
        (["--batch-sise", "4"], "--batch_size"),
        (["--out", "."], "--out"),
    ],
)
def test_bad_options_are_one_line_and_status_2(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert preference_step.main(options) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told and "Traceback" not in told


def processes(tag: str) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if tag.encode() in (folder / "environ").read_bytes() and "Z" not in (folder / "stat").read_text().split(")")[-1]:
                yield int(folder.name)
        except OSError:
            continue


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_when_it_is_killed(tmp_path: Path, how: signal.Signals) -> None:
    tag = uuid.uuid4().hex
    options = ("--tiny", "--threads", 1, "--rounds", 400, "--arms", "isdaa_dpo", "two_rows", "--out", tmp_path / "step.json")
    environment = os.environ | {"BENCHMARK_TEST": tag, "TMPDIR": str(tmp_path)}
    running = subprocess.Popen(command(*options), env=environment, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if "round 1 of" in line:
            break
    assert len(list(processes(tag))) > 3
    running.send_signal(how)
    running.wait(30)
    deadline = time.monotonic() + 30
    while list(processes(tag)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(processes(tag))
    if how == signal.SIGTERM:
        assert running.returncode == 130
        assert not list(tmp_path.glob("preference_step-*"))
