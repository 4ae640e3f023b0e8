"""Every test runs on few threads and without the network: nothing here may reach the Hub."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

# A key of the tests' own: they neither read nor make the user's.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="isdaa-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A sweep's task that a test runs in this process sets torch's threads, and with them the last bits of all later tests."""
    yield
    torch = sys.modules.get("torch")
    wanted = int(os.environ["OMP_NUM_THREADS"])
    if torch is not None and torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
