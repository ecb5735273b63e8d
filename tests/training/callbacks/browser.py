"""A page in Chromium, over the pipe of its DevTools protocol."""

import json
import os
import re
import select
import shutil
import subprocess
import tempfile
import time

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


class Page:
    """A file that is open in a browser.

    Attributes
    ----------
    errors : list of str
        What the browser complained of.
    requests : list of str
        Addresses that were asked for, the page's own and those inside it ("data:") left out.
    """

    def __init__(self, path, limit=60):
        self.url = path.absolute().as_uri()
        self.errors, self.requests, self._events = [], [], []
        self._number, self._buffer, self._session = 0, b"", None
        self._deadline = time.monotonic() + limit

    def __enter__(self):
        (theirs, self._out), (self._in, back) = os.pipe(), os.pipe()
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

        def place():  # the browser reads from descriptor 3 and writes to 4
            high = os.dup(theirs), os.dup(back)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self._process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--remote-debugging-pipe", "--disable-background-networking",
                f"--user-data-dir={self._profile.name}", "about:blank",
            ],
            pass_fds=(3, 4),
            preexec_fn=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(back)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=self.url)
        self._until("Page.loadEventFired")
        time.sleep(0.2)
        self.evaluate("1")  # what was on its way has arrived
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def evaluate(self, expression):
        """The value of an expression in JavaScript."""
        return self._call("Runtime.evaluate", expression=expression)["result"]["value"]

    def resize(self, width):
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def colors(self, scheme):
        """Red, green and blue of paper and ink, for somebody who prefers a light or a dark scheme."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        style = "getComputedStyle(document.body)"
        texts = (self.evaluate(f"{style}.backgroundColor"), self.evaluate(f"{style}.color"))
        return tuple(tuple(map(int, re.findall(r"\d+", text)[:3])) for text in texts)

    def _call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _until(self, method):
        while not any(event["method"] == method for event in self._events):
            self._read()

    def _read(self):
        while b"\0" not in self._buffer:
            left = self._deadline - time.monotonic()
            assert left > 0, "the browser does not answer"
            if select.select([self._in], [], [], min(left, 1))[0]:
                chunk = os.read(self._in, 1 << 20)
                assert chunk, "the browser is gone"
                self._buffer += chunk
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(raw)
        if "method" in message:
            self._note(message["method"], message["params"])
            self._events.append(message)
        return message

    def _note(self, method, parameters):
        if method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if url != self.url and not url.startswith("data:"):
                self.requests.append(url)
        elif method == "Log.entryAdded":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(parameters["args"]))
