"""Tasks of a meta-training: dealt evenly, with prompts of their own, refused by name."""

import json
from itertools import islice

import pytest
from test_meta import PROMPTS, TASKS, make, share

from fastrlhf import MetaConfig, MetaTrainer, UserError


def test_tasks_are_dealt_each_once_before_any_twice(tmp_path):
    trainer = make(tmp_path, meta_steps=6)
    turns = list(trainer.batches())
    names = [turn.task.name for turns in turns for turn in turns]
    assert len(names) == 12 and all(set(names[i : i + 3]) == set(TASKS) for i in range(0, 12, 3))
    assert all(len(turn.batches) == 2 and len(turn.batches[0]) == 4 for x in turns for turn in x)
    seen = [
        t
        for x in turns
        for turn in x
        if turn.task.name == "a"
        for b in turn.batches
        for t in b.texts
    ]
    assert len(set(seen)) == len(seen)
    later = [[(t.task.name, t.batches[1].texts) for t in x] for x in trainer.batches(2)]
    assert later == [[(t.task.name, t.batches[1].texts) for t in x] for x in islice(turns, 2, None)]


def test_tasks_bring_prompts_of_their_own(tmp_path):
    own = [{"prompt": x, "answer": x} for x in "qrstuvwxyz"]

    def echo(completions, answer, **_):
        return [float(a in text) for a, text in zip(answer, completions, strict=True)]

    tasks = {"a": share("a"), "echo": {"reward": echo, "dataset": own}}
    trainer = make(tmp_path, tasks, eval_prompts=4)
    texts = {turn.task.name: turn.batches[0].texts for turn in next(trainer.batches())}
    assert set(texts["echo"]) < set("qrstuvwxyz") and all(len(x) == 2 for x in texts["a"])
    trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "run/adaptations.jsonl").read_text().splitlines()]
    asked = [(x["meta_step"], x["task"], x["inner_step"]) for x in lines if x["task"] == "echo"]
    assert asked == [(1, "echo", 1), (1, "echo", 2), (2, "echo", 1), (2, "echo", 2)]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "no tasks"),
        ([], "no tasks"),
        ({"only": share("a")}, "one task, 'only', leaves nothing to meta-learn"),
        ("sentiment", "one task, 'sentiment'"),
        (["sentiment", "sentiment"], "two tasks are named 'sentiment'"),
        ([share("a"), share("b")], "two tasks are named 'reward'"),
        ({"a": share("a"), "b": "sentimen"}, r"task 'b': no reward 'sentimen'.*'sentiment'"),
        ({"a": share("a"), "b": {"dataset": PROMPTS}}, "task 'b' has no reward"),
        ({"a": share("a"), "b": {"reward": share("b"), "data": 1}}, "'b' has a key 'data'"),
        ({"a": share("a"), "b": {"reward": share("b"), "dataset": [{}]}}, "task 'b': .*row 1"),
        ({"a": share("a"), 2: share("b")}, "a name that is no text"),
        ({"a": share("a"), "held": share("b")}, "two tasks are named 'held'"),
    ],
)
def test_bad_tasks(tasks, message):
    held_out = {"held": share("d")}
    with pytest.raises(UserError, match=message):
        MetaTrainer(None, tasks, MetaConfig(model="none"), PROMPTS, eval_tasks=held_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps must be at least 1"),
        ({"meta_steps": 0}, "meta_steps must be at least 1"),
        ({"meta_batch_size": 0}, "meta_batch_size must be at least 1"),
        ({"method": "maml"}, "method: 'maml' does not fit; it must be 'reptile' or 'fomaml'"),
        ({"meta_learning_rate": 0.0}, "meta_learning_rate must be above 0"),
        ({"meta_learning_rate": 2.0}, "at most 1"),
        ({"total_episodes": 64}, "make (5120); leave it out"),
        ({"hacking": "stop"}, "leave them out"),
        ({"inner_steps": "3"}, "inner_steps: '3' does not fit; it must be int"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError) as error:
        MetaConfig(**{"batch_size": 16} | settings)
    assert message in str(error.value)
