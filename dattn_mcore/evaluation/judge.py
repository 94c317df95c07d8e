"""A judge behind any OpenAI-compatible endpoint: asked once for each answer, kept, retried.

Judgements are appended to a file as they come, keyed by what was asked of which model; a run that
was stopped asks for the others only. A reply without a score, or an endpoint that keeps failing, is
a failed judgement: kept as such in the review file, counted, never scored, asked again next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.benchmarks.judged import Judged
from dattn_mcore.evaluation.files import write_json_lines
from dattn_mcore.evaluation.scores import Score

logger = logging.getLogger(__name__)

REFUSED = frozenset({401, 403, 404, 405})  # the same for every row: a wrong key, model or URL
FINAL = frozenset({400, 413, 422})  # the same at every attempt: this row is too long, or unwanted
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge, and how patiently it is asked.

    Attributes:
        url: base URL of the endpoint, up to and without `/chat/completions`.
        model: name of the judge model.
        key: API key; empty: none is sent.
        attempts: requests for one judgement at most.
        wait_seconds: before the second attempt; doubles with each.
        timeout_seconds: of one request.
        parallel: requests at once.
    """

    url: str
    model: str
    key: str = ""
    attempts: int = 5
    wait_seconds: float = 2.0
    timeout_seconds: float = 120.0
    parallel: int = 8


class JudgementFailed(Exception):
    """One judgement could not be had; `final`: nor will another attempt have it."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class Judge:
    """Asks the endpoint, and keeps the replies.

    Args:
        settings: see `JudgeSettings`.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        if not settings.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--judge-url is {settings.url!r}; it must be the http(s) base URL of an "
                "OpenAI-compatible endpoint, such as http://localhost:8000/v1"
            )
        self.settings = settings

    def __call__(self, benchmark: Judged, answers: Sequence[str | None], reviews: Path) -> Score:
        """Judges answers and scores the judgements.

        Args:
            benchmark: whose answers they are.
            answers: text for each row.
            reviews: review file to write; replies are kept beside it.

        Raises:
            ConfigError: the endpoint refuses the request, such as for a wrong key.
            DataError: an answer or a file is missing, or no judgement succeeded.
        """
        conversations = benchmark.conversations(answers)
        keys = [self._key(benchmark, messages) for messages in conversations]
        with Kept(reviews.with_name(f"{reviews.stem}.judgements.jsonl")) as kept:
            self._ask_for_missing(benchmark, conversations, keys, kept)
        records = []
        for i, key in enumerate(keys):
            reply = kept.replies.get(key)
            figures = None if reply is None else benchmark.read_judgement(reply)
            records.append(benchmark.review(i, reply or "", figures))
        write_json_lines(reviews, records, "reviews")
        score = benchmark.score_reviews(records)
        score.notes.insert(0, f"judge {self.settings.model}")
        return score

    def _ask_for_missing(
        self,
        benchmark: Judged,
        conversations: list[list[dict[str, str]]],
        keys: list[str],
        kept: Kept,
    ) -> None:
        open_ = [i for i, key in enumerate(keys) if key not in kept.replies]

        def ask(i: int) -> None:
            try:
                reply = self._judgement(benchmark, conversations[i])
            except JudgementFailed as error:
                logger.warning("%s, row %d: judgement failed (%s)", benchmark.title, i, error)
                return
            kept.add(keys[i], reply)

        with ThreadPoolExecutor(self.settings.parallel) as pool:
            asked = [pool.submit(ask, i) for i in open_]
            try:
                for future in asked:
                    future.result()
            except ConfigError:
                pool.shutdown(cancel_futures=True)
                raise

    def _key(self, benchmark: Judged, messages: list[dict[str, str]]) -> str:
        asked = [self.settings.model, benchmark.temperature, benchmark.max_tokens, messages]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _judgement(self, benchmark: Judged, messages: list[dict[str, str]]) -> str:
        """A reply that holds a score."""
        problem = ""
        for attempt in range(self.settings.attempts):
            if attempt:
                wait = self.settings.wait_seconds * 2 ** (attempt - 1)
                time.sleep(min(wait, LONGEST_WAIT))
            # After a reply without a score, a reminder and more chance for another one.
            worded = problem.startswith("no score") and benchmark.reminder
            last = {**messages[-1], "content": messages[-1]["content"] + (worded or "")}
            heat = 0.5 * attempt if problem.startswith("no score") else 0.0
            body = {
                "model": self.settings.model,
                "messages": [*messages[:-1], last],
                "temperature": min(benchmark.temperature + heat, 2.0),
                "max_tokens": benchmark.max_tokens,
            }
            try:
                reply = self._request(body)
            except JudgementFailed as error:
                problem = str(error)
                if error.final:
                    break
                continue
            if benchmark.read_judgement(reply) is not None:
                return reply
            problem = f"no score in {reply[:60]!r}"
        raise JudgementFailed(f"{problem}, attempt {attempt + 1}")

    def _request(self, body: dict[str, Any]) -> str:
        """The text of one reply."""
        headers = {"Content-Type": "application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.settings.timeout_seconds) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read(300).decode(errors="replace").split())
            if error.code in REFUSED:
                raise ConfigError(
                    f"--judge-url {url} refuses ({error.code} {error.reason}: {reason}); check the "
                    "URL, --judge-model and the key"
                ) from None
            final = error.code in FINAL
            raise JudgementFailed(f"{error.code} {error.reason}: {reason}", final) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise JudgementFailed(f"{type(error).__name__}: {error}") from None
        if not isinstance(content, str):
            raise JudgementFailed("the reply has no text")
        return content


class Kept:
    """Replies on disk, by what was asked.

    Args:
        path: JSON lines file; a last line cut by a kill is dropped.

    Raises:
        DataError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.replies: dict[str, str] = {}
        self.lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab+")
            self.file.seek(0)
            whole = self.file.read().split(b"\n")[:-1]
            self.file.truncate(sum(len(line) + 1 for line in whole))
        except OSError as error:
            raise DataError(f"judgements {path} cannot be kept ({error.strerror})") from None
        for line in whole:
            try:
                record = json.loads(line)
                self.replies[record["key"]] = record["reply"]
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{path} holds a damaged line; remove the file") from None

    def add(self, key: str, reply: str) -> None:
        """Keeps a reply, on disk at once."""
        line = json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n"
        with self.lock:
            self.replies[key] = reply
            self.file.write(line.encode())
            self.file.flush()
            os.fsync(self.file.fileno())

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
