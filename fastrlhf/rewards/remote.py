"""Judges that answer late: coroutines and addresses, with time-outs and retries.

An address is sent `{"prompts": […], "completions": […], …columns}` as JSON by POST and answers
`{"scores": […]}`, or the list alone. What may pass (a time-out, a refused connection, statuses 408,
425, 429 and 5xx) is tried again, each time after twice the wait; then the run ends with a sentence.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ..errors import UserError

__all__ = ["RemoteReward", "attempts", "wait_for"]

T = TypeVar("T")
PASSING = (408, 425, 429)


def wait_for(answer: Awaitable[T], timeout: float) -> T:
    """What a coroutine returns, within ``timeout`` seconds; works within an event loop too.

    Raises:
        TimeoutError: it did not.
    """

    async def within() -> T:
        return await asyncio.wait_for(answer, timeout)

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, within()).result()


def attempts(
    call: Callable[[], T], name: str, *, timeout: float, retries: int, wait: float = 0.5
) -> T:
    """``call()``, again after what may pass: at most ``retries`` more times.

    Raises:
        UserError: it failed each time; names the judge and how often it was asked.
    """
    for attempt in range(retries + 1):
        try:
            return call()
        except (TimeoutError, ConnectionError) as error:
            reason: Exception = error
        if attempt < retries:
            time.sleep(wait * 2**attempt)
    late = isinstance(reason, TimeoutError)
    said = f"did not answer within {timeout:g} s" if late else f"failed ({reason})"
    raise UserError(
        f"the judge {name!r} {said}, {retries + 1} times; raise reward_timeout or reward_retries, "
        "or see whether it is running"
    ) from reason


class RemoteReward:
    """A judge at an address.

    Args:
        url: http:// or https://.
        timeout: seconds for each answer.
    """

    def __init__(self, url: str, timeout: float = 60.0):
        self.url, self.timeout = url, timeout
        self.__name__ = url

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: object = None,
        **columns: Any,
    ) -> list[Any]:
        """Scores in the completions' order.

        Raises:
            TimeoutError, ConnectionError: what may pass. UserError: what does not.
        """
        given = {"prompts": list(prompts), "completions": list(completions), **columns}
        request = urllib.request.Request(
            self.url,
            json.dumps(given, default=str).encode(),
            {"Content-Type": "application/json", "Accept": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code in PASSING or error.code >= 500:
                raise ConnectionError(f"status {error.code}") from error
            raise UserError(f"the judge {self.url} answered with status {error.code}") from error
        except TimeoutError:
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise TimeoutError from error
            raise ConnectionError(str(error.reason)) from error
        except ValueError as error:
            raise UserError(
                f'the judge {self.url} did not answer with JSON; answer {{"scores": […]}}'
            ) from error
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list):
            raise UserError(
                f'the judge {self.url} answered without scores; answer {{"scores": […]}}'
            )
        return scores
