"""A headless Chromium, moved through chromedriver's own protocol."""

import json
import pathlib
import re
import subprocess
import urllib.request
from base64 import b64decode
from typing import Any

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # key of an element in WebDriver's replies


class Browser:
    """A window, as a context manager."""

    def __init__(self, chromium: str, chromedriver: str, profile: pathlib.Path, size: tuple[int, int]) -> None:
        self._driver = subprocess.Popen([chromedriver, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                self._url = f"http://127.0.0.1:{found[1]}"
                break
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        arguments += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        options = {"binary": chromium, "args": arguments}
        always = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._do("POST", "/session", {"capabilities": {"alwaysMatch": always}})
        self._url += f"/session/{session['sessionId']}"

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._do("DELETE", "")
        self._driver.terminate()
        self._driver.wait()
        assert self._driver.stdout is not None
        self._driver.stdout.close()

    def _do(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, page: pathlib.Path) -> None:
        self._do("POST", "/url", {"url": page.absolute().as_uri()})

    def run(self, script: str) -> Any:
        """Returns the result of JavaScript, the body of a function."""
        return self._do("POST", "/execute/sync", {"script": script, "args": []})

    def _find(self, selector: str) -> str:
        return self._do("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def click(self, selector: str) -> None:
        self._do("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._do("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def errors(self) -> list[str]:
        """Returns the errors that the page logged."""
        return [entry["message"] for entry in self._do("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: pathlib.Path) -> None:
        path.write_bytes(b64decode(self._do("GET", "/screenshot")))
