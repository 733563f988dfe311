"""Judges that answer late: coroutines and addresses, with time-outs and retries.

Coroutines run in one event loop, so that a session of theirs lives from one rollout to the next.
One that blocks is late like any other; the loop that it blocks is left to it, and another begins.

An address is sent `{"prompts": […], "completions": […], …columns}` as JSON by POST and answers
`{"scores": […]}`, or the list alone. What may pass (a time-out, a refused connection, statuses 408,
425, 429 and 5xx) is tried again, each time after twice the wait; then the run ends with a sentence.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import UserError

__all__ = ["RemoteReward", "attempts", "in_thread", "wait_for"]

T = TypeVar("T")
PASSING = (408, 425, 429)
# Seconds after which an event loop that does nothing is blocked.
BLOCKED = 1.0


def wait_for(answer: Awaitable[T], timeout: float) -> T:
    """What a coroutine returns, within ``timeout`` seconds; works within an event loop too.

    Raises:
        TimeoutError: it did not.
    """

    async def awaited() -> T:
        return await answer

    loop = event_loop()
    future = asyncio.run_coroutine_threadsafe(awaited(), loop)
    try:
        return future.result(timeout)
    finally:
        if not future.done():
            future.cancel()
            free = threading.Event()
            loop.call_soon_threadsafe(free.set)
            if not free.wait(BLOCKED):
                event_loop.cache_clear()


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """The one that all coroutines run in, in a thread that ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def in_thread(call: Callable[[], T], timeout: float) -> T:
    """``call()`` within ``timeout`` seconds; what is late goes on in a thread of its own.

    Raises:
        TimeoutError: it did not return. Whatever it raises.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # for whoever waits
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(timeout)


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
        timeout: seconds for each answer, from the first byte sent to the last one read.
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

        def ask() -> Any:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())

        try:
            # The time-out above is of each piece that arrives.
            answer = in_thread(ask, self.timeout)
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
        except http.client.HTTPException as error:
            raise ConnectionError(f"its answer broke off: {error!r}") from error
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
