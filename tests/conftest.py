"""Every test runs on few threads and without the network: nothing here may reach the Hub."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

# What tests write need not survive a power cut: on a busy disk they would wait for it most of the time.
os.fsync = lambda descriptor: None  # type: ignore[assignment]

# A key of the tests' own: they neither read nor make the user's.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="isdaa-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)


# Files that take longest go first, so that no process is left with one of them in the end.
LONGEST = (
    *("test_sweep", "test_ranks", "test_kill", "test_plan", "test_going_on", "test_judged_samples", "test_guard", "test_stages"),
    *("test_provenance", "test_misbehaving_judge", "test_finite_steps", "test_foreign_runs", "test_own_reward", "test_demo"),
    *("test_memory", "test_paper_configs", "test_inspect", "test_tokens_in_context", "test_wheel", "test_full_disk"),
    *("test_judge_serve", "test_first_use", "test_any_text", "test_benchmark_run"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by `LONGEST`, the others as they come."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8" width="8" height="8"></svg>'


@pytest.fixture(autouse=True, scope="module")
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pictures are drawn for tests/report and for modules with `DRAWN_PICTURES`: each takes a good part of a second."""
    from isdaa.report.charts.render import Painter

    with pytest.MonkeyPatch.context() as patch:
        if "report" not in request.path.parent.name and "DRAWN_PICTURES" not in vars(request.module):
            patch.setattr(Painter, "svg", lambda self, specification, version: PICTURE)
            patch.setattr(Painter, "png", lambda self, svg, scale: b"\x89PNG")
        yield


@pytest.fixture(scope="session")
def my_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with a chat template, to be copied or linked to."""
    from chains import chat_model

    folder = tmp_path_factory.mktemp("models") / "my_model"
    chat_model(folder)
    return folder


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A sweep's task that a test runs in this process sets torch's threads, and with them the last bits of all later tests."""
    yield
    torch = sys.modules.get("torch")
    wanted = int(os.environ["OMP_NUM_THREADS"])
    if torch is not None and torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
