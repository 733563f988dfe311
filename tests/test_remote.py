"""Judges that answer late: asked again when that may help, and named when it does not."""

import asyncio
import contextlib
import json
import socket
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


def test_a_lost_line_is_asked_again_whatever_its_client_calls_it():
    class ConnectError(Exception):
        """As httpx's: neither a ConnectionError nor a TimeoutError."""

    calls = []

    async def flaky(completions, **_):
        calls.append(1)
        if len(calls) == 1:
            raise ConnectError("no route")
        return [0.5] * len(completions)

    async def wrong(**_):
        calls.append(1)
        raise KeyError("x")

    assert ask(flaky) == [0.5] and len(calls) == 2
    with pytest.raises(UserError, match="raised KeyError"):
        ask(wrong)
    assert len(calls) == 3


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


def test_coroutines_share_one_event_loop():
    """A session that one call opened serves the next."""
    loops = []

    async def judged(completions, **_):
        loops.append(asyncio.get_running_loop())
        return [1.0] * len(completions)

    assert ask(judged) == ask(judged) == [1.0]
    assert loops[0] is loops[1] and not loops[0].is_closed()


def test_a_coroutine_that_blocks_is_late_and_holds_up_no_other(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(remote, "BLOCKED", 0.1)
    freed = threading.Event()

    async def blocks(**_):
        freed.wait(30)

    async def answers(completions, **_):
        return [1.0] * len(completions)

    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"'blocks' did not answer within 0.1 s, 1 times"):
        ask(blocks, reward_timeout=0.1, reward_retries=0)
    assert ask(answers, reward_timeout=10) == [1.0]
    freed.set()
    assert time.perf_counter() - begin < 10


def test_waits_between_attempts_double(monkeypatch):
    waits = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def fails():
        raise ConnectionError("gone")

    with pytest.raises(UserError, match=r"failed \(gone\), 4 times"):
        attempts(fails, "judge", timeout=1, retries=3)
    assert waits == [0.5, 1, 2]


@pytest.fixture
def raw_server():
    """Of what an address sends, byte for byte: `serve(pieces, wait)` gives its URL."""
    opened, closing = [], threading.Event()

    def serve(pieces, wait):
        listening = socket.create_server(("127.0.0.1", 0))
        opened.append(listening)

        def work():
            while True:
                try:
                    asker, _ = listening.accept()
                except OSError:
                    return
                with asker, contextlib.suppress(OSError):
                    asker.recv(65536)
                    for piece in pieces:
                        asker.sendall(piece)
                        if closing.wait(wait):
                            break
                    # Closed with a part of the question unread, the answer would be lost as well.
                    asker.shutdown(socket.SHUT_WR)
                    while asker.recv(65536):
                        pass

        threading.Thread(target=work, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/"

    yield serve
    closing.set()
    for listening in opened:
        listening.close()


def test_an_answer_that_drips_in_is_late(raw_server, monkeypatch):
    monkeypatch.undo()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n"
    url = raw_server([head, *[b" "] * 300], 0.1)
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"did not answer within 0.5 s, 1 times"):
        ask(url, reward_timeout=0.5, reward_retries=0)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\n[1", b"nonsense\r\n\r\n"]
)
def test_an_answer_that_breaks_off_is_tried_again(raw_server, answer):
    with pytest.raises(UserError, match=r"failed \(its answer broke off: .*\), 2 times"):
        ask(raw_server([answer], 0), reward_retries=1)
