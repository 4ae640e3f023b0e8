"""How long tests wait for other processes: until nobody would take them for busy any more."""

import os
import signal
import subprocess
import time

HANGS = 1800.0  # seconds


def killed_after(process: subprocess.Popen[str], seconds: float) -> bool:
    """Kill a process and its group after some seconds, as kill -9 does; whether it still ran then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True
