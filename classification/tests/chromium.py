"""A headless Chromium that a test drives, over two pipes (the DevTools protocol): no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import time

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()


class Chromium:
    """One page at a time: `open(url)`, then `run(script)`; `requests` has the address of every request since.

    profile: an empty folder for it.
    """

    def __init__(self, profile):
        read, there = os.pipe()
        here, write = os.pipe()
        argv = [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        command = ["bash", "-c", f'exec "$@" 3<&{here} 4>&{there}', "bash", *argv]
        self.process = subprocess.Popen(command, pass_fds=(here, there), stderr=subprocess.DEVNULL)
        os.close(there), os.close(here)
        self.input, self.output = os.fdopen(write, "wb", 0), os.fdopen(read, "rb")
        self.calls, self.rest, self.session, self.requests, self.faults = 0, b"", None, [], []

    def close(self):
        self.input.close()
        self.process.wait(30)

    def _message(self):
        while b"\0" not in self.rest:
            part = self.output.read1(1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        text, self.rest = self.rest.split(b"\0", 1)
        return json.loads(text)

    def send(self, method, **parameters):
        """A command of the protocol and its result; events that come meanwhile are kept."""
        number = self._write(method, parameters, self.session)
        while (answer := self._message()).get("id") != number:
            event, found = answer.get("method"), answer.get("params", {})
            if event == "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            elif event == "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                self.faults.append(details.get("exception", {}).get("description") or details["text"])
            elif event == "Log.entryAdded" and found["entry"]["level"] == "error":
                self.faults.append(found["entry"]["text"])
            elif event == "Target.attachedToTarget" and found["targetInfo"]["type"] == "worker":
                for domain in ("Network", "Runtime"):  # its requests and faults count as well
                    self._write(f"{domain}.enable", {}, found["sessionId"])
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _write(self, method, parameters, session):
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters}
        message |= {"sessionId": session} if session else {}
        self.input.write(json.dumps(message).encode() + b"\0")
        return self.calls

    def open(self, url, *, size=(1280, 900), dark=False, before=""):
        """A new page; before: a script that runs in it first."""
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.send(f"{domain}.enable")
        self.send("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        self.look(size, dark)
        if before:
            self.send("Page.addScriptToEvaluateOnNewDocument", source=before)
        self.requests.clear(), self.faults.clear()
        self.send("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def look(self, size, dark=False):
        mobile = size[0] < 500
        self.send(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=mobile
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script):
        """The value of an expression of the page, awaited."""
        found = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script, seconds=60):
        """The first true value of an expression."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.faults, self.run("document.body.innerText"))
            time.sleep(0.02)
        return value

    def choose(self, selector, paths):
        """Give files to an <input type=file>."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def picture(self, path, whole=False):
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
