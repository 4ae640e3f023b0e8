"""The chart library in a process of its own: it aborts on some texts, and that shall cost one picture, not the report.

`python -P pictures.py` reads a request a line and writes an answer a line, as JSON; it loads little but vl-convert.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any

from isdaa.errors import UserError

PROGRAM = __file__
LIMIT = 120.0  # seconds for one picture


class PictureError(UserError):
    """A picture could not be drawn; `str(error)` says why, in a few words."""


class Painter:
    """The process that draws; started when it is first needed, and again after it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def svg(self, specification: dict[str, Any], version: str) -> str:
        """A Vega-Lite specification as an SVG document. Raises PictureError."""
        return self._ask({"specification": specification, "version": version})

    def png(self, svg: str, scale: float) -> bytes:
        """An SVG document as a picture of so many pixels for each of its own. Raises PictureError."""
        return base64.b64decode(self._ask({"svg": svg, "scale": scale}))

    def close(self) -> None:
        """End the process; the next picture starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for end in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    end.close()  # type: ignore[union-attr]
            process.wait()

    def _ask(self, request: dict[str, Any]) -> str:
        if self._process is None:
            command = [sys.executable, "-P", PROGRAM]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        watch = threading.Timer(LIMIT, stop)
        watch.start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            status = process.wait()
            self.close()
            ended = f"took longer than {LIMIT:g} seconds" if late.is_set() else f"ended with status {status}"
            raise PictureError(f"the chart library {ended}") from None
        except BaseException:  # an answer that nobody waits for must not be taken for the next one's
            self.close()
            raise
        finally:
            watch.cancel()
        if "error" in answer:
            raise PictureError(answer["error"])
        return str(answer["drawn"])


painter = Painter()


def draw(request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request."""
    import vl_convert

    try:
        if "svg" in request:
            return {"drawn": base64.b64encode(vl_convert.svg_to_png(request["svg"], scale=request["scale"])).decode()}
        return {"drawn": vl_convert.vegalite_to_svg(request["specification"], vl_version=request["version"])}
    except Exception as error:
        return {"error": f"the chart library says: {' '.join(str(error).split())[:200]}"}


def main() -> None:
    """Answer requests until there are no more; what the library prints is no answer."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        for line in sys.stdin.buffer:
            answers.write(json.dumps(draw(json.loads(line))).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
