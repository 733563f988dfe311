"""Judges that answer late: asked again when that may help, and named when it does not."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastrlhf.errors import UserError
from fastrlhf.reward_settings import RewardSettings
from fastrlhf.rewards import remote
from fastrlhf.rewards.functions import RewardScorer, load_objectives
from fastrlhf.rewards.remote import RemoteReward, attempts, wait_for


@pytest.fixture
def judge():
    """An address, what it was asked, and the answers it gives, one after the other."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body, wait = replies.pop(0) if len(replies) > 1 else replies[0]
            time.sleep(wait)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())
            except BrokenPipeError:
                pass  # the asker has gone

        def log_message(self, *_):
            pass

    asked, replies = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/judge", asked, replies
    server.shutdown()
    server.server_close()
    thread.join()


def ask(function, **settings):
    scorer = RewardScorer(function, RewardSettings(**settings))
    return scorer.judge(["p"], ["good"], [[1]], [{"answer": 3}])


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)


def test_an_address_is_a_reward(judge):
    url, asked, replies = judge
    replies.append((200, '{"scores": [0.25]}', 0))
    assert ask(url) == [0.25]
    assert asked == [{"prompts": ["p"], "completions": ["good"], "answer": [3]}]
    replies[0] = (200, "[null]", 0)
    assert ask(url) == [None]


def test_what_may_pass_is_tried_again(judge):
    url, asked, replies = judge
    replies += [(503, "", 0), (429, "", 0), (200, "[1]", 0)]
    assert ask(url) == [1.0] and len(asked) == 3


def test_what_does_not_pass_is_named(judge):
    url, asked, replies = judge
    replies.append((500, "", 0))
    with pytest.raises(UserError, match=r"judge.*failed \(status 500\), 3 times"):
        ask(url)
    assert len(asked) == 3
    for reply, message in (
        ((404, "", 0), "answered with status 404"),
        ((200, "<html>", 0), "did not answer with JSON"),
        ((200, '{"score": 1}', 0), "answered without scores"),
        ((200, "[1, 2]", 0), "returned 2 scores for 1 completions"),
    ):
        replies[0] = reply
        with pytest.raises(UserError, match=message):
            ask(url)
    with pytest.raises(UserError, match=r"failed .*, 1 times"):
        ask("http://127.0.0.1:9/", reward_retries=0)


def test_a_judge_that_is_late(monkeypatch, judge):
    url, _, replies = judge
    monkeypatch.undo()
    replies.append((200, "[1]", 0.6))
    with pytest.raises(UserError, match=r"did not answer within 0.1 s, 1 times; raise reward_time"):
        ask(url, reward_timeout=0.1, reward_retries=0)


def test_coroutines(monkeypatch):
    calls = []

    async def slow_at_first(completions, **_):
        calls.append(1)
        await asyncio.sleep(5 if len(calls) == 1 else 0)
        return [0.5] * len(completions)

    assert ask(slow_at_first, reward_timeout=0.1) == [0.5] and len(calls) == 2

    async def never(**_):
        await asyncio.sleep(60)

    with pytest.raises(UserError, match=r"the judge 'never' did not answer within 0.05 s, 2 times"):
        ask(never, reward_timeout=0.05, reward_retries=1)


def test_within_an_event_loop():
    async def answer():
        return 3

    async def outer():
        return wait_for(answer(), 1.0)

    assert asyncio.run(outer()) == 3


def test_errors_of_the_judge_itself_are_not_tried_again():
    calls = []

    def wrong():
        calls.append(1)
        raise KeyError("x")

    with pytest.raises(KeyError):
        attempts(wrong, "wrong", timeout=1, retries=3)
    assert len(calls) == 1


def test_the_timeout_reaches_the_address():
    (objective,) = load_objectives("https://example.org/judge", timeout=7.0)
    assert isinstance(objective.function, RemoteReward) and objective.function.timeout == 7.0
