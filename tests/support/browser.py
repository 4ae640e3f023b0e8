"""A page in a real browser, without a window."""

import shutil
import subprocess
from pathlib import Path

from patience import HANGS

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0",
)  # fmt: skip
PROBE = """<!doctype html><title>unset</title><body style="margin:0"><iframe id="f" style="border:0;width:{width}px;height:900px"
src="{page}"></iframe><script>
window.addEventListener("load", () => {{
  const inner = document.getElementById("f").contentDocument;
  const root = inner.documentElement;
  document.body.dataset.found = [root.scrollWidth, root.clientWidth, inner.title, inner.querySelectorAll("svg").length].join("|");
}});
</script>"""


def dump(page: Path, profile: Path) -> tuple[str, str]:
    """(document after loading, console lines)"""
    assert BROWSER is not None
    command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
