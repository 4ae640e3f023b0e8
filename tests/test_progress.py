"""Progress: no phase is silent for ten seconds, no line is printed twice, and the line of step n is of step n."""

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from isdaa import terminal
from isdaa.training.trainer.callbacks import TrainingProgress


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SILENCE", 0.1)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at every change, where there is no terminal."""
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", 0.0)
    monkeypatch.setattr(terminal, "SILENCE", 60.0)


def silent_for(seconds: float, capsys: pytest.CaptureFixture[str]) -> list[str]:
    time.sleep(seconds)
    return capsys.readouterr().err.splitlines()


def heard(capsys: pytest.CaptureFixture[str], count: int = 1, what: str = "") -> list[str]:
    """The lines said by themselves, once there are so many that end like this; a busy machine may take its time."""
    found: list[str] = []
    until = time.monotonic() + 30
    while sum(line.endswith(what) for line in found) < count and time.monotonic() < until:
        found += silent_for(0.05, capsys)
    return found


def test_less_than_ten_seconds_pass_between_two_lines() -> None:
    assert terminal.SILENCE < 10 and terminal.PLAIN_INTERVAL <= 10


def test_a_call_that_counts_nothing_is_heard_of(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.working("loading a model"):
        said = heard(capsys, 2)
        assert len(said) >= 2 and all(re.fullmatch(r"loading a model: at work for \d:\d\d", line) for line in said)
        with terminal.progress("logps", 8) as bar:
            bar.update(3, note="of before")
            bar.within = "pass 2 of 4"
            inside = heard(capsys)
        assert inside and all(line.startswith("logps: 3/8 after") and line.endswith("pass 2 of 4") for line in inside)
        assert "loading a model" in heard(capsys)[-1]
    assert silent_for(0.3, capsys) == [] and not any(t.name == "isdaa progress" for t in threading.enumerate())


def test_a_short_phase_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.working("loading a model"), terminal.progress("logps", 8) as bar:
        bar.update(8)
    assert capsys.readouterr().err == ""


def test_the_watch_ends_after_an_error_and_with_bars_that_close_out_of_order(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError), terminal.working("loading"):
        raise KeyError
    first, second = terminal.progress("first", 2), terminal.progress("second", 2)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert heard(capsys)[0].startswith("second")
    second.__exit__(None, None, None)
    assert silent_for(0.3, capsys) == []


def test_lines_in_silence_do_not_put_off_the_line_of_what_is_done(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL", 0.2)
    with terminal.progress("train", 3) as bar:
        for step in (1, 2):
            bar.within = f"in step {step}"
            heard(capsys, 3, bar.within)  # more than the interval
            bar.within = ""
            bar.update(1, note=f"loss {step}")
            assert f"train: {step}/3 after " in (line := capsys.readouterr().err) and f"loss {step}" in line


def test_on_a_terminal_a_phase_alone_draws_no_bar(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(terminal, "console", terminal.Terminal(file=stream, force_terminal=True, width=200, color_system=None))
    with terminal.working("loading"):
        assert heard(capsys) and stream.getvalue() == ""
        with terminal.progress("training", 4) as bar:
            bar.update(1, note="loss 0.5")
            bar.within = "pass 1 of 3"
            assert silent_for(0.4, capsys) == []  # the bar itself shows the time
            with terminal.working("saving"):
                pass
    assert "loss 0.5  pass 1 of 3" in stream.getvalue()


def test_the_last_line_comes_once(eager: None, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress("logps", 2) as bar:
        bar.update(1)
        bar.update(1)
    assert [line.split(" after")[0] for line in capsys.readouterr().err.splitlines()] == ["logps: 1/2", "logps: 2/2"]


def test_the_pace_is_that_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = terminal.Bar("train", 100, None, first=90)
    bar.started -= 10
    bar.update(5)
    assert bar.count() == "95/100" and bar.share() == 0.95 and bar.left() == pytest.approx(10, rel=0.1)


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that the test sets forward."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.mark.parametrize("inner", [True, False])
def test_at_an_even_pace_the_time_left_only_runs_down(hands: Callable[[float], None], inner: bool) -> None:
    """Ten checkpoints of 64 answers, each batch a minute long: all answers of a batch end together."""
    left: list[float] = []
    with terminal.progress("evaluating", 640) as outer:
        for _ in range(10):
            with outer.part(64, "  policy"), terminal.progress("  policy samples", 64) as bar:
                for second in range(60):
                    hands(1.0)
                    if inner:
                        bar.ahead = 64 * (second + 1) / 60
                    if (found := outer.left()) is not None:
                        left.append(found)
                bar.update(64)
    assert left and all(later <= earlier + 1e-6 for earlier, later in pairwise(left))
    assert len(left) >= (595 if inner else 530), "a first estimate within ten seconds, where the unit tells how far it is"
    assert abs(left[0] - (600 - (600 - len(left) + 1))) < 15


def test_the_time_left_goes_up_where_the_work_becomes_slower(hands: Callable[[float], None]) -> None:
    with terminal.progress("work", 10) as bar:
        hands(2.0)
        bar.update()
        first = bar.left()
        hands(20.0)
        waiting = bar.left()
        bar.update()
        assert first == pytest.approx(18) and waiting == pytest.approx(16) and bar.left() == pytest.approx(88)


def test_what_is_ahead_is_not_counted_twice(hands: Callable[[float], None]) -> None:
    with terminal.progress("work", 8) as bar:
        hands(1.0)
        bar.ahead = 2.0
        assert (bar.count(), bar.share()) == ("0/8", 0.25)
        hands(0.05)
        bar.ahead = 3.0
        assert bar.ahead == 2.0, "too soon to be drawn again"
        bar.update(2)
        assert (bar.count(), bar.share(), bar.ahead) == ("2/8", 0.25, 0.0)
        bar.ahead = 0.0
        bar.update(6)
        assert (bar.share(), bar.left()) == (1.0, 0.0)


def test_a_phase_that_counts_nothing_shows_no_count_and_no_time_left() -> None:
    with terminal.progress("saving", alone=False) as bar:
        task: Any = SimpleNamespace(fields={"bar": bar})
        assert terminal._Count().render(task).plain == terminal._Left().render(task).plain == ""
        bar.update(3)
        assert terminal._Count().render(task).plain == "3"


# --- training


def steps(
    capsys: pytest.CaptureFixture[str],
    every: int,
    begin: int = 0,
    end: int = 5,
    evaluating: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[Any]:
    """The lines of a run of `end` steps that logs every so many, in the Trainer's order of events."""
    progress = TrainingProgress("train")
    state, control = TrainerState(global_step=begin, max_steps=end, is_world_process_zero=True), TrainerControl()
    callback: Any = progress
    callback.on_train_begin(None, state, control)
    for step in range(begin, end):
        callback.on_step_begin(None, state, control)
        state.global_step = step + 1
        tick()
        control.should_log = (step + 1) % every == 0 or step + 1 == end
        callback.on_step_end(None, state, control)
        yield from capsys.readouterr().err.splitlines()
        if control.should_log:
            control.should_log = False
            callback.on_log(None, state, control, logs={"loss": float(step + 1), "loss/unweighted": 0.5, "weights/mean": 1.0})
            yield from capsys.readouterr().err.splitlines()
        if evaluating:
            callback.on_log(None, state, control, logs={"eval_loss": 77.0})
    callback.on_log(None, state, control, logs={"train_runtime": 1.0, "train_loss": 88.0})
    callback.on_train_end(None, state, control)
    yield from capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("begin", [0, 2])
def test_the_line_of_a_step_has_its_own_figures_and_comes_once(
    begin: int, eager: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = list(steps(capsys, every=1, begin=begin, evaluating=True))
    found = [re.search(r"(\d)/5 .*loss (\d)  unweighted 0.5  weight 1$", line) for line in lines]
    assert [match and match.groups() for match in found] == [(str(n), str(n)) for n in range(begin + 1, 6)]


def test_a_short_run_has_a_line_of_its_first_figures_and_one_of_its_last(capsys: pytest.CaptureFixture[str]) -> None:
    """34 seconds of stages of less than ten each said nothing but that they had ended."""
    lines = list(steps(capsys, every=2, end=7))
    assert [line.partition(" after ")[0] for line in lines] == ["train: 2/7", "train: 7/7"]
    assert "loss 2  unweighted 0.5  weight 1" in lines[0] and "loss 7  unweighted 0.5  weight 1" in lines[1]
    assert len(list(steps(capsys, every=1, end=1))) == 1


def test_lines_of_training_come_every_ten_seconds_at_most(
    hands: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SILENCE", 1e9)
    lines = []
    for line in steps(capsys, every=1, end=40, tick=lambda: hands(2.5)):
        lines.append(int(re.search(r"(\d+)/40", line).group(1)))  # type: ignore[union-attr]
    assert lines == [1, *range(5, 40, 4), 40]


def test_on_a_terminal_the_bar_alone_shows_the_first_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "console", terminal.Terminal(file=io.StringIO(), force_terminal=True))
    assert list(steps(capsys, every=1)) == []


def test_figures_of_several_steps_say_of_which(eager: None, capsys: pytest.CaptureFixture[str]) -> None:
    lines = list(steps(capsys, every=2))
    notes = [(re.search(r"(\d)/5", line).group(1), line.partition("loss ")[2]) for line in lines]  # type: ignore[union-attr]
    two, four = (f"{n}  unweighted 0.5  weight 1 (mean of steps {n - 1} to {n})" for n in (2, 4))
    assert notes == [("1", ""), ("2", two), ("3", two), ("4", four), ("5", "5  unweighted 0.5  weight 1")]


def test_a_step_without_figures_of_its_own_says_whose_it_shows(eager: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint ends an interval, so that the next one may be of one step."""
    progress: Any = TrainingProgress("train")
    state, control = TrainerState(global_step=0, max_steps=9, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(None, state, control)
    state.global_step = 1
    progress.on_log(None, state, control, logs={"loss": 1.0})
    state.global_step = 2
    progress.on_step_end(None, state, control)
    progress.close()
    assert [line.partition("loss ")[2] for line in capsys.readouterr().err.splitlines()] == ["1", "1 (of step 1)"]


def test_an_unweighted_loss_is_shown_beside_a_weighted_one_alone(eager: None, capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = TrainingProgress("train")
    state, control = TrainerState(global_step=0, max_steps=2, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(None, state, control)
    state.global_step = 1
    progress.on_log(None, state, control, logs={"loss": 1.0, "loss/unweighted": 1.0})
    progress.on_log(None, state, control, logs={"guard/kl": 2.0, "guard/win_rate": 0.5})
    assert progress.bar.note == "loss 1  win rate 0.5  KL 2"
    progress.close()


def test_what_a_step_does_is_told_while_it_lasts(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    progress: Any = TrainingProgress("train")
    state, control = TrainerState(global_step=3, max_steps=9, is_world_process_zero=True), TrainerControl()
    progress.on_train_begin(None, state, control)
    progress.on_step_begin(None, state, control)
    assert any(line.endswith("in step 4") for line in heard(capsys, 1, "in step 4"))
    progress.within(4, "pass 2 of 3")
    assert any(line.endswith("in step 4: pass 2 of 3") for line in heard(capsys, 1, "pass 2 of 3"))
    state.global_step = 4
    progress.on_step_end(None, state, SimpleNamespace(should_log=False))
    assert progress.bar.within == ""
    progress.close()
