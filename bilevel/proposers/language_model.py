"""A language model as proposer: any OpenAI-compatible endpoint, whose answers are data and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bilevel._arguments import explained_class
from bilevel.proposers.expressions import Expression, Grammar, Refused
from bilevel.proposers.replay import read_answer
from bilevel.proposers.trials import Trial, best_of, short_error

__all__ = ["LLMProposer"]

_LONGEST_WAIT = 20.0  # seconds between two attempts, whatever the server asks for


@explained_class
class LLMProposer:
    """Laws by a language model (needs `pip install 'bilevel[openai]'`).

        LLMProposer(grammar, "gpt-4o-mini", context="An isotropic energy of a rubber block ...",
        transcript="runs/talk.jsonl")

    Each proposal is one call: the task, the grammar, the best trials so far from worst to best with their fitted
    numbers
    and losses (or one bounded error sentence), and a request for JSON. A share `explore` of each round has the higher
    temperature. The answer is parsed in the grammar; what cannot be is a failed trial. Nothing of it is executed,
    put into a
    file name, or sent on unparsed: what the model sees again was printed from our own trees and numbers.

    A call ends after `timeout` seconds whatever the server does, an answer after `answer_bytes`. Time-outs, cut
    connections,
    429 and 5xx are tried again `retries` times; every attempt counts. Before each, the budgets are held against
    what it may cost at most; when they do not allow another, `ask` returns fewer proposals, and none ends the run.

    The transcript has every attempt: the messages, the answer or the kind of failure, the tokens, the seconds; never
    the key. It
    is also what a run resumes from: a request that it has an answer to is not sent again, so that a run that was killed
    in the middle of a round pays for nothing twice.

    Args:
      grammar: what a law may be.
      model: the endpoint's name of it.
      context: the task, in words of yours; variables and their meaning.
      base_url: of the endpoint; None: OpenAI's.
      key_variable: the environment variable that holds the key; there is no other way to give it.
      exploit_temperature, explore_temperature, explore: of each round, a share `explore` has the higher one.
      shown: how many of the best trials the model sees; 0: none.
      calls, tokens: budgets of this transcript, attempts and tokens; None: none.
      answer_tokens: the most that a call may answer.
      answer_bytes: the most that is read of an answer.
      timeout: seconds per attempt.
      retries: further attempts after a failure.
      transcript: a file of JSON lines; None: kept nowhere.
      json_mode: ask for `response_format={"type": "json_object"}`, which some endpoints do not know.

    Source of the shares and temperatures: Ma et al., "LLM and Simulation as Bilevel Optimizers", ICML 2024 (4 of 16 at
    0.5, 12 at 1.0, five shown); there the answer is a program and is run.
    """

    def __init__(
        self,
        grammar: Grammar,
        model: str,
        context: str = "",
        *,
        base_url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        exploit_temperature: float = 0.5,
        explore_temperature: float = 1.0,
        explore: float = 0.75,
        shown: int = 5,
        calls: int | None = 200,
        tokens: int | None = 500_000,
        answer_tokens: int = 1000,
        answer_bytes: int = 200_000,
        timeout: float = 60.0,
        retries: int = 2,
        transcript: Any = None,
        json_mode: bool = True,
    ) -> None:
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"LLMProposer(base_url={base_url!r}): an address that begins with http:// or https:// is needed."
            )
        if not 0 <= explore <= 1:
            raise ValueError(f"LLMProposer(explore={explore!r}): a share between 0 and 1 is needed.")
        if not timeout > 0:
            raise ValueError(f"LLMProposer(timeout={timeout!r}): a positive number of seconds is needed.")
        for name, value in (
            ("calls", calls),
            ("tokens", tokens),
            ("answer_tokens", answer_tokens),
            ("retries", retries),
        ):
            least = 0 if name == "retries" else 1
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"LLMProposer({name}={value!r}): an integer of at least {least} is needed.")
        self.grammar, self.model, self.context = grammar, model, context
        self.base_url, self.key_variable = base_url, key_variable
        self.temperatures, self.explore, self.shown = (exploit_temperature, explore_temperature), explore, shown
        self.call_budget, self.token_budget = calls, tokens
        self.answer_tokens, self.answer_bytes = answer_tokens, answer_bytes
        self.timeout, self.retries, self.json_mode = timeout, retries, json_mode
        self.transcript = None if transcript is None else Path(transcript)
        self.calls = self.tokens = 0
        self._answers: dict[str, str] = {}
        self._read_transcript()

    def __repr__(self) -> str:
        return f"LLMProposer({self.model!r}, {self.calls} calls, {self.tokens} tokens)"

    def settings(self) -> dict[str, Any]:
        """What makes it propose as it does; budgets and the endpoint's address are left out."""
        names = ("grammar", "model", "context", "temperatures", "explore", "shown")
        return {name: getattr(self, name) for name in names}

    # ------------------------------------------------------------ ask and tell

    def ask(self, history: Sequence[Trial], count: int, key: jax.Array) -> list[Any]:
        """At most `count` laws, or `Refused` in the place of those that could not be had or read."""
        found: list[Any] = []
        exploiting = round(count * (1 - self.explore))
        seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
        for i in range(count):
            request = {
                "model": self.model,
                "messages": self.messages(history),
                "temperature": self.temperatures[i >= exploiting],
                "max_tokens": self.answer_tokens,
            }
            name = hashlib.sha256(json.dumps([request, seed, i]).encode()).hexdigest()
            answer: str | Refused | None = self._answers.get(name)
            if answer is None:
                answer = self._asked(name, request)
                if answer is None:
                    break
            found.append(answer if isinstance(answer, Refused) else read_answer(answer, self.grammar))
        return found

    def tell(self, results: Sequence[Trial]) -> None:
        """Nothing to remember: `ask` reads the history."""

    def messages(self, history: Sequence[Trial]) -> list[dict[str, str]]:
        """What the model is sent: the task, the rules, and trials as numbers and bounded sentences."""
        grammar = self.grammar
        names, functions = ", ".join(grammar.variables), ", ".join(grammar.functions)
        rules = (
            f"Propose a law as a sum of at most {grammar.parameters} terms in the variables {names}. "
            f"A term may use numbers, + - * /, **2, **3, brackets and the functions {functions}. "
            "Terms without parameters get a fitted coefficient each. Answer with one JSON object "
            '{"analysis": "...", "terms": ["...", ...], '
            '"params": [{"name": "a", "init": 1, "lower": 0, "upper": 10}]}; '
            "leave params empty for fitted coefficients alone."
        )
        lines = []
        for trial in reversed(best_of(history, self.shown) if self.shown else []):
            if isinstance(trial.proposal, Expression):
                lines.append(f"loss {trial.loss:.4g}: {trial.proposal.text(trial.y)}")
        failures = [t.error for t in history if t.failed][-2:]
        lines += [f"failed: {short_error(e)}" for e in failures]
        seen = "Trials so far, from worst to best:\n" + "\n".join(lines) if lines else "There are no trials yet."
        return [
            {"role": "system", "content": "You find laws of physics as short formulas. You answer with JSON."},
            {"role": "user", "content": "\n\n".join(filter(None, (self.context, rules, seen)))},
        ]

    # ------------------------------------------------------------ a call

    def _allowed(self, request: dict[str, Any]) -> bool:
        """Whether the budgets hold, should the attempt cost all that it can."""
        most = _estimate(json.dumps(request["messages"])) + self.answer_tokens
        calls, tokens = self.call_budget, self.token_budget
        return (calls is None or self.calls < calls) and (tokens is None or self.tokens + most <= tokens)

    def _asked(self, name: str, request: dict[str, Any]) -> str | Refused | None:
        """The answer to a request; None where the budget does not allow it."""
        problem = ""
        for attempt in range(self.retries + 1):
            if not self._allowed(request):
                return Refused(f"the model did not answer: {problem}") if problem else None
            began = time.monotonic()
            answer, problem, used, again, wait = self._attempt(request)
            self.calls += 1
            self.tokens += used
            row = {"request": name, "attempt": attempt, **request, "answer": answer, "error": problem, "tokens": used}
            self._write({**row, "seconds": round(time.monotonic() - began, 3)})
            if answer is not None:
                self._answers[name] = answer
                return answer
            if not again:
                break
            if attempt < self.retries and self._allowed(request):
                time.sleep(min(wait if wait is not None else 0.5 * 2**attempt, _LONGEST_WAIT, self.timeout))
        return Refused(f"the model did not answer: {problem}")

    def _attempt(self, request: dict[str, Any]) -> tuple[str | None, str, int, bool, float | None]:
        """(answer, what went wrong, tokens, whether to try again, seconds to wait) of one call, within `timeout`
        seconds."""
        prompt = _estimate(json.dumps(request["messages"]))
        client = self._client()
        box: dict[str, Any] = {}

        def call() -> None:
            try:
                box["bytes"] = self._bytes(client, request)
            except BaseException as error:
                box["error"] = error

        # Time-outs of a connection count from byte to byte; this one counts the whole, whatever the server does.
        worker = threading.Thread(target=call, daemon=True)
        worker.start()
        worker.join(self.timeout)
        if worker.is_alive():
            # Closing the client under a reader would wait for it: the thread ends by itself with the connection's
            # time-out.
            return None, "it took too long", prompt, True, None
        with contextlib.suppress(Exception):
            client.close()
        if (error := box.get("error")) is not None:
            return None, *_failure(error, prompt)
        return self._answer(box["bytes"], prompt)

    def _client(self) -> Any:
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "LLMProposer needs openai, which is not installed: pip install 'bilevel[openai]'."
            ) from error
        secret = os.environ.get(self.key_variable)
        if not secret:
            raise ValueError(
                f"LLMProposer: the environment variable {self.key_variable} is not set; the endpoint's key is taken "
                "from there and from nowhere else."
            )
        url = self.base_url or "https://api.openai.com/v1"
        return openai.OpenAI(api_key=secret, base_url=url, timeout=self.timeout, max_retries=0)

    def _bytes(self, client: Any, request: dict[str, Any]) -> bytes:
        """The body of the answer, at most `answer_bytes` of it."""
        extra = {"response_format": {"type": "json_object"}} if self.json_mode else {}
        body, until = b"", time.monotonic() + self.timeout
        with client.chat.completions.with_streaming_response.create(**request, **extra) as response:
            for piece in response.iter_bytes(8192):
                body += piece
                if len(body) > self.answer_bytes:
                    raise _TooLong
                if time.monotonic() > until:
                    raise TimeoutError
        return body

    def _answer(self, body: bytes, prompt: int) -> tuple[str | None, str, int, bool, float | None]:
        try:
            found = json.loads(body)
            content = found["choices"][0]["message"]["content"]
            if not isinstance(content, str):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None, "what came is no chat completion", prompt, False, None
        usage = found.get("usage")
        used = usage.get("total_tokens") if isinstance(usage, dict) else None
        if isinstance(used, bool) or not isinstance(used, int) or not 0 < used <= 10_000_000:
            used = prompt + _estimate(content)
        return content, "", used, False, None

    # ------------------------------------------------------------ the transcript

    def _write(self, row: dict[str, Any]) -> None:
        if self.transcript is None:
            return
        self.transcript.parent.mkdir(parents=True, exist_ok=True)
        with open(self.transcript, "ab") as file:
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _read_transcript(self) -> None:
        """Answers, calls and tokens of earlier runs; a last line that was being written is cut off."""
        if self.transcript is None or not self.transcript.exists():
            return
        whole = 0
        with open(self.transcript, "rb") as file:
            for number, line in enumerate(file):
                try:
                    row = json.loads(line)
                    name, answer, used = row["request"], row["answer"], row["tokens"]
                    if not (isinstance(name, str) and isinstance(used, int) and isinstance(answer, str | None)):
                        raise TypeError
                except (ValueError, KeyError, TypeError) as error:
                    if not line.endswith(b"\n"):
                        break
                    raise ValueError(
                        f"LLMProposer(transcript={str(self.transcript)!r}): line {number + 1} is no line of a "
                        "transcript. Give another file."
                    ) from error
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self.calls, self.tokens = self.calls + 1, self.tokens + used
                if answer is not None:
                    self._answers[name] = answer
        with open(self.transcript, "r+b") as file:
            file.truncate(whole)


class _TooLong(Exception):
    """An answer is longer than what is read of one."""


def _estimate(text: str) -> int:
    """Tokens of a text, rather too many: three characters each."""
    return len(text) // 3 + 1


def _failure(error: BaseException, prompt: int) -> tuple[str, int, bool, float | None]:
    """(sentence, tokens, whether to try again, seconds to wait); the sentence has nothing of the server's text in
    it."""
    import openai

    if isinstance(error, _TooLong):
        return "its answer is too long", prompt, False, None
    if isinstance(error, openai.APIStatusError):
        status = int(error.status_code)
        wait = None
        with contextlib.suppress(Exception):
            wait = max(0.0, float(error.response.headers.get("retry-after")))
        return f"status {status}", prompt, status in (408, 409, 429) or status >= 500, wait
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "it took too long", prompt, True, None
    if isinstance(error, openai.APIConnectionError):
        return "the connection failed", prompt, True, None
    if isinstance(error, Exception):
        return "the connection was cut", prompt, True, None
    return short_error(type(error).__name__), prompt, False, None
