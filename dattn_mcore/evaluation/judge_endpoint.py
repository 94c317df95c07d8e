"""Requests to the judge's endpoint: one at a time, and whether anybody is there at all.

The endpoint is not trusted. A request ends at its time limit however slowly the reply comes, a
reply has a largest size, no redirect is followed, and the key stands in no text that leaves here.
"""

from __future__ import annotations

import asyncio
import http
import json
import ssl
import string
import threading
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import httpx2

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.files import parse_json

REFUSED = frozenset({401, 403, 404, 405})  # the same for every row: a wrong key, model or URL
FINAL = frozenset({400, 413, 422})  # the same at every attempt: this row is too long, or unwanted
REDIRECTS = frozenset({301, 302, 303, 307, 308})
SILENT_ROWS = 3  # so many rows without an answer of HTTP, and no reply yet: the endpoint is down
REPLY_BYTES = 4 * 2**20  # far more than the tokens that are asked for
CONNECT_SECONDS = 15.0
SHOWN = 200  # characters of a foreign text in a message
SECRET_CHARACTERS = 8  # as many of the key in a row are not shown
PLACEHOLDER_CHARACTERS = 3  # keys of local endpoints that want one, such as "x": no secret
_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)


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


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is asked.

    Attributes:
        url: base URL, up to and without `/chat/completions`.
        key: API key; empty: none is sent.
        timeout_seconds: of one request, from the connection to the last byte of the reply.

    Raises:
        ConfigError: the URL is none, or URL or key cannot be sent.
    """

    url: str
    key: str = field(repr=False)
    timeout_seconds: float
    _trusted: ssl.SSLContext = field(
        init=False, repr=False, compare=False, default_factory=ssl.create_default_context
    )

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            _ = parts.port  # raises where it is no number
        except ValueError:
            parts = urllib.parse.SplitResult("", "", "", "", "")
        if "@" in parts.netloc or parts.query or parts.fragment:  # not shown: a secret may be there
            raise ConfigError(
                "--judge-url has a user name, a query or a fragment; give the base URL alone, and "
                "the key in the variable that --judge-key-env names"
            )
        plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
        if not plain or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--judge-url is {self.url!r}; it must be the http(s) base URL of an "
                "OpenAI-compatible endpoint, such as http://localhost:8000/v1"
            )
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise ConfigError(
                "the judge's key has a space, a line break or a character beyond ASCII, which no "
                "request can carry; put the key alone in the variable that --judge-key-env names"
            )

    def reply(self, body: dict[str, Any]) -> str:
        """The text of one reply.

        Args:
            body: of a chat completion.

        Raises:
            ConfigError: the endpoint refuses all requests, such as for a wrong key.
            JudgementFailed: there is no reply, or none with text.
        """
        limit = self.timeout_seconds
        try:
            answer = asyncio.run(asyncio.wait_for(self._exchange(body), limit))
        except asyncio.TimeoutError:
            raise JudgementFailed(f"no whole reply within {limit:g} s") from None
        if not 200 <= answer.status < 300:
            raise self._refusal(answer)
        try:
            content = parse_json(answer.body.decode("utf-8-sig"))["choices"][0]["message"][
                "content"
            ]
        except (ValueError, LookupError, TypeError) as error:
            raise JudgementFailed(
                f"the reply is no chat completion ({self.shown(error)})"
            ) from None
        if not isinstance(content, str):
            raise JudgementFailed("the reply has no text")
        return without_key(content, self.key)

    async def _exchange(self, body: dict[str, Any]) -> _Answer:
        """Sends one request and reads what comes, up to the largest size."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        connect = min(CONNECT_SECONDS, self.timeout_seconds / 2)
        timeout = httpx2.Timeout(None, connect=connect)  # the whole has a limit of its own
        try:
            client = httpx2.AsyncClient(
                timeout=timeout, follow_redirects=False, verify=self._trusted
            )
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise ConfigError(
                "a proxy that the environment names (HTTPS_PROXY, ALL_PROXY) cannot be used "
                f"({type(error).__name__})"
            ) from None
        async with client:
            request = client.build_request(
                "POST", self.target, content=json.dumps(body).encode(), headers=headers
            )
            try:
                response = await client.send(request, stream=True)
            except httpx2.RequestError as error:
                raise JudgementFailed(
                    f"no answer of HTTP ({self.shown(error)})", silent=True
                ) from None
            try:
                return await self._read(response)
            except httpx2.RequestError as error:
                raise JudgementFailed(f"the reply is cut ({self.shown(error)})") from None
            finally:
                await response.aclose()

    async def _read(self, response: httpx2.Response) -> _Answer:
        coding = response.headers.get("content-encoding", "identity").lower()
        if coding != "identity":  # a small one could become any size
            raise JudgementFailed("the reply is compressed, which was not asked for")
        raw = bytearray()
        async for chunk in response.aiter_raw():
            raw += chunk
            if len(raw) > REPLY_BYTES:
                raise JudgementFailed(f"the reply has more than {REPLY_BYTES // 2**20} MiB")
        return _Answer(response.status_code, bytes(raw), response.headers.get("location", ""))

    @property
    def target(self) -> str:
        """Where requests go."""
        return f"{self.url.rstrip('/')}/chat/completions"

    def _refusal(self, answer: _Answer) -> Exception:
        """What a status other than 200 means."""
        if answer.status in REDIRECTS:
            return ConfigError(
                f"--judge-url {self.url} redirects ({answer.status}) to "
                f"{self.shown(answer.location)!r}; the key is sent to no other place: give the URL "
                "that answers"
            )
        names = {status.value: status.phrase for status in http.HTTPStatus}
        said = self.shown(answer.body.decode(errors="replace"))
        problem = f"{answer.status} {names.get(answer.status, '')}".strip() + (said and f": {said}")
        if answer.status in REFUSED:
            return ConfigError(
                f"--judge-url {self.url} refuses ({problem}); check the URL, --judge-model and the "
                "key"
            )
        return JudgementFailed(problem, final=answer.status in FINAL)

    def shown(self, foreign: object) -> str:
        """The beginning of a foreign text, or an error, on one line and without the key."""
        named = f"{type(foreign).__name__}: " if isinstance(foreign, Exception) else ""
        text = " ".join(without_key(str(foreign), self.key).split())
        return named + "".join(c if c.isprintable() else "?" for c in text[:SHOWN])


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    location: str


def without_key(text: str, key: str) -> str:
    """The text without the key, or parts of it: 8 characters in a row, in small or capitals."""
    width = min(len(key), SECRET_CHARACTERS)
    if width <= PLACEHOLDER_CHARACTERS:
        return text
    small, secret = text.translate(_SMALL), key.translate(_SMALL)
    hidden = bytearray(len(text))
    for start in range(len(secret) - width + 1):
        part = secret[start : start + width]
        at = small.find(part)
        while at >= 0:
            hidden[at : at + width] = b"\1" * width
            at = small.find(part, at + 1)
    if not any(hidden):
        return text
    shown = [
        "[key]" if hidden[i] and not (i and hidden[i - 1]) else "" if hidden[i] else c
        for i, c in enumerate(text)
    ]
    return "".join(shown)
