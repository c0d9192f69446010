"""Headless Chromium over a pipe: opens a page at a width and in a colour scheme, and says what is wrong with it.

A page has faults if it scrolls sideways, if text has too little contrast or is too small in a drawing, if it asks for
anything but files beside it, or if the console has errors.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desktop": 1280}
SCHEMES = ("light", "dark")
LEAST_PIXELS = 9.0  # height of letters' line in a drawing, as shown
LEAST_CONTRAST = 4.5  # of text to what is behind it (WCAG 2.1, level AA)

# Returns the faults that can be measured in the page. Colours are mixed with what is behind them, up to the page.
MEASURE = """
(() => {
  const faults = [], root = document.documentElement;
  document.querySelectorAll('details').forEach(one => one.open = true);
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > root.clientWidth
      + 1 && !e.closest('.scroll, .wide, svg *, pre'));
    faults.push(`scrolls sideways: ${root.scrollWidth} > ${root.clientWidth}, ${wide.slice(0, 3).map(
      e => e.tagName + '.' + e.getAttribute('class') + ' ' + (e.textContent || '').trim().slice(0, 40))}`);
  }
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const parsed = text => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = '#000'; canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = e => {
    const layers = [];
    for (let at = e; at; at = at.parentElement) layers.push(parsed(getComputedStyle(at).backgroundColor));
    return layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const seen = new Set();
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const box = e.getBoundingClientRect(), style = getComputedStyle(e);
    if (!own || !box.width || !box.height || style.visibility === 'hidden' || e.closest('title, style')) continue;
    const drawn = e.closest('svg');
    const size = parseFloat(style.fontSize) * (drawn ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1);
    const words = e.textContent.trim().slice(0, 40);
    if (drawn && size < %LEAST%) {
      const key = 'size ' + Math.round(size * 10);
      if (!seen.has(key)) faults.push(`text of ${size.toFixed(1)} pixels in a drawing: ${words}`);
      seen.add(key);
    }
    const ground = behind(drawn ? drawn.parentElement : e);
    const ink = over(parsed(drawn ? style.fill : style.color), ground);
    const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a), contrast = (high + 0.05) / (low + 0.05);
    if (contrast < %CONTRAST%) {
      const key = 'contrast ' + ink + ground;
      if (!seen.has(key)) faults.push(`contrast of ${contrast.toFixed(2)}: ${words}`);
      seen.add(key);
    }
  }
  return faults;
})()
"""


def executable() -> str | None:
    """Returns the path of Chromium or Chrome; None if there is neither."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One Chromium with one tab, for a `with` statement."""

    def __enter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        (theirs_in, self._to), (self._from, theirs_out) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        options += ["--disable-background-networking", "--allow-file-access-from-files"]
        options += [f"--user-data-dir={self._folder.name}", "about:blank"]
        # Chromium reads its commands from descriptor 3 and answers on 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(executable()), *options],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._answers = os.fdopen(self._from, "rb")
        self._number, self._read, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        tabs = self._call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._answers.close()
        os.close(self._to)
        self._folder.cleanup()

    def all_faults(self, page: Path) -> list[str]:
        """Returns what is wrong with a page at any width in any colour scheme."""
        return [
            f"{page.name} on a {name} in {scheme}: {fault}"
            for name, width in WIDTHS.items()
            for scheme in SCHEMES
            for fault in self.faults(page, width, scheme)
        ]

    def faults(self, page: Path, width: int, scheme: str, picture: Path | None = None) -> list[str]:
        """Returns what is wrong with a page in this width and colour scheme; a `picture` of it is written if asked."""
        self.events.clear()
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._call("Page.navigate", url=page.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._next()
        measure = MEASURE.replace("%LEAST%", str(LEAST_PIXELS)).replace("%CONTRAST%", str(LEAST_CONTRAST))
        answer = self._call("Runtime.evaluate", expression=measure, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        found: list[str] = answer["result"]["value"]
        if picture is not None:
            self._call(
                "Runtime.evaluate", expression="document.querySelectorAll('details').forEach(d => d.open = false)"
            )
            drawn = self._call("Page.captureScreenshot", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(drawn["data"]))
        for event in self.events:
            what = event["params"]
            if event["method"] == "Network.requestWillBeSent" and not what["request"]["url"].startswith("file:"):
                found.append(f"asks for {what['request']['url'][:80]}")
            if event["method"] == "Log.entryAdded" and what["entry"]["level"] == "error":
                found.append(f"console: {what['entry']['text']}")
            if event["method"] == "Runtime.exceptionThrown":
                found.append(f"console: {what['exceptionDetails'].get('exception', {}).get('description', what)}")
            if event["method"] == "Runtime.consoleAPICalled" and what["type"] == "error":
                found.append(f"console: {[one.get('value') for one in what['args']]}")
        return found

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        """Reads the next message; keeps it in `events` if it is one."""
        while b"\0" not in self._read:
            part = self._answers.read1(1 << 20)
            assert part, "the browser has ended"
            self._read += part
        line, self._read = self._read.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
