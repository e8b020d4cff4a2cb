"""Headless Chromium, driven over the DevTools protocol."""

import base64
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request

import websocket

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
)


class Browser:
    """A page. `problems` collects errors and warnings of the console, and uncaught exceptions."""

    def __init__(self, profile):
        argv = [CHROMIUM, *_FLAGS, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = _wait(lambda: _port(pathlib.Path(profile) / "DevToolsActivePort"))
            self._socket = websocket.create_connection(_wait(lambda: _page(port)), timeout=60, suppress_origin=True)
        except BaseException:
            self._process.kill()
            raise
        self._id, self.problems = 0, []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """The result of a DevTools command."""
        self._id += 1
        self._socket.send(json.dumps({"id": self._id, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            self._note(message)
            if message.get("id") == self._id:
                assert "error" not in message, message["error"]
                return message["result"]

    def _note(self, message):
        event = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(event["exceptionDetails"].get("exception", {}).get("description"))
        if message.get("method") == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning"):
            self.problems.append([argument.get("value") for argument in event["args"]])
        if message.get("method") == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.problems.append(event["entry"]["text"])

    def run(self, script):
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def open(self, file, hash=""):
        """Opens a report from disk, at an address behind `#`, and waits until its charts are drawn."""
        self.call("Page.navigate", url="about:blank")  # an address that differs behind the # alone loads nothing
        self.call("Page.navigate", url=file.resolve().as_uri() + hash)
        _wait(lambda: self.run("document.documentElement?.dataset.ready") == "yes")

    def look(self, width=1280, height=900, dark=False):
        """Sets the window and the colour scheme that the system asks for."""
        mobile = {"mobile": width < 600, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key, code=None, text=None):
        """A key of the keyboard, down and up."""
        key_event = {"key": key, "code": code or key, "windowsVirtualKeyCode": {"Tab": 9, "Enter": 13}.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key_event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **key_event)

    def screenshot(self, file, whole=False):
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        pathlib.Path(file).write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, file, **options):
        """The page as it is printed."""
        printed = self.call("Page.printToPDF", printBackground=True, **options)
        pathlib.Path(file).write_bytes(base64.b64decode(printed["data"]))

    def close(self):
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)


def _port(file):
    return file.read_text().splitlines()[0] if file.exists() and file.read_text() else None


def _page(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
        pages = [page for page in json.load(answer) if page["type"] == "page"]
    return pages[0]["webSocketDebuggerUrl"] if pages else None


def _wait(condition, deadline=60):
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError("the browser did not answer in time")
