"""Requests to the judge's endpoint: one at a time, and whether anybody is there at all."""

from __future__ import annotations

import http.client
import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from dattn_mcore.errors import ConfigError

REFUSED = frozenset({401, 403, 404, 405})  # the same for every row: a wrong key, model or URL
FINAL = frozenset({400, 413, 422})  # the same at every attempt: this row is too long, or unwanted
# Not even an answer of HTTP: nobody listens, or something else does.
SILENCE = (urllib.error.URLError, http.client.BadStatusLine, ConnectionError)
SILENT_ROWS = 3  # so many of them and no reply yet: the endpoint is down


class JudgementFailed(Exception):
    """One judgement could not be had.

    Args:
        message: why.
        final: nor will another attempt have it.
        silent: nobody answered.
    """

    def __init__(self, message: str, final: bool = False, silent: bool = False) -> None:
        super().__init__(message)
        self.final, self.silent = final, silent


class Line:
    """Whether anybody is at the other end, as the requests of one benchmark find out.

    Attributes:
        down: set when the first rows had no answer at all; no other row is asked then.
        reason: why.
    """

    def __init__(self) -> None:
        self.down = threading.Event()
        self.reason = ""
        self._lock = threading.Lock()
        self._silent, self._heard = 0, False

    def failed(self, error: JudgementFailed) -> None:
        """A row has no judgement."""
        with self._lock:
            self._silent += error.silent
            self._heard |= not error.silent
            if self._silent >= SILENT_ROWS and not self._heard and not self.down.is_set():
                self.reason = str(error)
                self.down.set()

    def heard(self) -> None:
        """A row has its judgement."""
        with self._lock:
            self._heard = True


def is_base_url(text: str) -> bool:
    """Whether requests can be sent there: http(s), a host, a port that is a number."""
    try:
        parts = urllib.parse.urlsplit(text)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    plain = text.isascii() and text.isprintable() and " " not in text
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname)


def request_reply(url: str, key: str, timeout_seconds: float, body: dict[str, Any]) -> str:
    """The text of one reply.

    Args:
        url: base URL of the endpoint.
        key: API key; empty: none is sent.
        timeout_seconds: of the request.
        body: of a chat completion.

    Raises:
        ConfigError: the endpoint refuses all requests, such as for a wrong key.
        JudgementFailed: there is no reply, or none with text.
    """
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    url = f"{url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        reason = _body(error)
        if error.code in REFUSED:
            raise ConfigError(
                f"--judge-url {url} refuses ({error.code} {error.reason}: {reason}); check the "
                "URL, --judge-model and the key"
            ) from None
        final = error.code in FINAL
        raise JudgementFailed(f"{error.code} {error.reason}: {reason}", final) from None
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise JudgementFailed(told, silent=isinstance(error, SILENCE)) from None
    if not isinstance(content, str):
        raise JudgementFailed("the reply has no text")
    return content


def _body(error: urllib.error.HTTPError) -> str:
    """The beginning of what came with an error status, on one line."""
    try:
        return " ".join(error.read(300).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):  # cut
        return ""
