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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.judged import Judged
from dattn_mcore.evaluation.files import parse_json, take, write_json_lines
from dattn_mcore.evaluation.judge_endpoint import Endpoint, JudgementFailed, Line
from dattn_mcore.evaluation.scores import Score

logger = logging.getLogger(__name__)

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
        timeout_seconds: of one request, to the last byte of its reply.
        parallel: requests at once.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    attempts: int = 5
    wait_seconds: float = 2.0
    timeout_seconds: float = 120.0
    parallel: int = 8


class Judge:
    """Asks the endpoint, and keeps the replies.

    Args:
        settings: see `JudgeSettings`.

    Raises:
        ConfigError: the URL is none, or the key cannot be sent.
    """

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings = settings
        self.endpoint = Endpoint(settings.url, settings.key, settings.timeout_seconds)

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
            unheard = self._ask_for_missing(benchmark, conversations, keys, kept)
        records = []
        for i, key in enumerate(keys):
            reply = kept.replies.get(key)
            figures = None if reply is None else benchmark.read_judgement(reply)
            records.append(benchmark.review(i, reply or "", figures))
        write_json_lines(reviews, records, "reviews")
        try:
            score = benchmark.score_reviews(records)
        except DataError as error:
            raise DataError(f"{error}; {unheard}" if unheard else str(error)) from None
        score.notes[:0] = [f"judge {self.settings.model}", *([unheard] if unheard else [])]
        return score

    def _ask_for_missing(
        self,
        benchmark: Judged,
        conversations: list[list[dict[str, str]]],
        keys: list[str],
        kept: Kept,
    ) -> str:
        """Asks for what is not kept; returns why it gave up before the end, or nothing."""
        open_ = [i for i, key in enumerate(keys) if key not in kept.replies]
        line = Line()

        def ask(i: int) -> None:
            if line.down.is_set():
                return
            try:
                reply = self._judgement(benchmark, conversations[i], line)
            except JudgementFailed as error:
                line.failed(error)
                logger.warning("%s, row %d: judgement failed (%s)", benchmark.title, i, error)
                return
            except BaseException:  # it ends the judging: no further request
                line.down.set()
                raise
            line.heard()
            kept.add(keys[i], reply)

        with ThreadPoolExecutor(self.settings.parallel) as pool:
            asked = [pool.submit(ask, i) for i in open_]
            try:
                for future in asked:
                    future.result()
            except BaseException:
                line.down.set()
                pool.shutdown(cancel_futures=True)
                raise
        if not line.down.is_set():
            return ""
        gave_up = f"--judge-url {self.settings.url} does not answer ({line.reason})"
        logger.warning("%s: %s; the other rows were not asked", benchmark.title, gave_up)
        return gave_up

    def _key(self, benchmark: Judged, messages: list[dict[str, str]]) -> str:
        asked = [self.settings.model, benchmark.temperature, benchmark.max_tokens, messages]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def _judgement(self, benchmark: Judged, messages: list[dict[str, str]], line: Line) -> str:
        """A reply that holds a score."""
        at, problem, silent = self.settings, "", True
        for attempt in range(at.attempts):
            if attempt:
                wait = at.wait_seconds * 2 ** (attempt - 1)
                if line.down.wait(min(wait, LONGEST_WAIT)):
                    break
            # After a reply without a score, a reminder and more chance for another one.
            worded = problem.startswith("no score") and benchmark.reminder
            last = {**messages[-1], "content": messages[-1]["content"] + (worded or "")}
            heat = 0.5 * attempt if problem.startswith("no score") else 0.0
            body = {
                "model": at.model,
                "messages": [*messages[:-1], last],
                "temperature": min(benchmark.temperature + heat, 2.0),
                "max_tokens": benchmark.max_tokens,
            }
            try:
                reply = self.endpoint.reply(body)
            except JudgementFailed as error:
                problem, silent = str(error), silent and error.silent
                if error.final:
                    break
                continue
            silent = False
            if benchmark.read_judgement(reply) is not None:
                return reply
            problem = f"no score in {reply[:60]!r}"
        raise JudgementFailed(f"{problem}, attempt {attempt + 1}", silent=silent)


class Kept:
    """Replies on disk, by what was asked.

    Args:
        path: JSON lines file; a last line cut by a kill is dropped.

    Raises:
        DataError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
                record = parse_json(line.decode())
                self.replies[take(record, "key", str, "line")] = take(record, "reply", str, "line")
            except (ValueError, DataError):
                raise DataError(f"{path} holds a damaged line; remove the file") from None

    def add(self, key: str, reply: str) -> None:
        """Keeps a reply, on disk at once.

        Raises:
            DataError: it cannot be written.
        """
        line = json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n"
        with self.lock:
            self.replies[key] = reply
            try:
                self.file.write(line.encode())
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as error:
                raise DataError(
                    f"judgements {self.path} cannot be written ({error.strerror})"
                ) from None

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
