"""The page of a run: whole without a network, and nothing that was generated is markup in it."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
from run_folders import make_run

from fastrlhf import report
from fastrlhf.cli import main
from fastrlhf.errors import UserError

HOSTILE = "<script>alert('x')</script> & \"<img src=http://a.b/c>\""


class Page(HTMLParser):
    """The tags, what they point to, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.texts, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, text):
        self.texts.append(text)

    @property
    def text(self):
        return " ".join(self.texts)


def written(folder):
    return Page(report.write_report(folder).read_text())


def test_what_is_on_the_page(tmp_path):
    extra = {"monitor/distinct_2": 0.25}
    found = written(make_run(tmp_path / "mine", 5, **extra))
    for shown in ("mine", "the run has not ended", "Curves", "None was seen", "step 5", "0.500"):
        assert shown in found.text, shown
    # Two prompts, each with the first and the last answer, which are markup in the data.
    assert found.text.count("<b>0</b>") == found.text.count("<b>5</b>") == 2
    assert "b" not in found.tags and "+0.50" in found.text
    assert "batch_size" in found.text and "monitor/distinct_2" in found.text


def test_nothing_is_fetched(tmp_path):
    pytest.importorskip("matplotlib")
    found = written(make_run(tmp_path / "mine", 2))
    (image,) = found.sources
    kind, data = image.split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data).startswith(b"\x89PNG")
    text = (tmp_path / "mine/report.html").read_text()
    assert not re.search(r"https?://|@import|url\(", text)


def test_texts_are_escaped(tmp_path):
    folder = make_run(tmp_path / "mine", 2)
    lines = [{"step": 0, "prompt": HOSTILE, "completion": HOSTILE, "score": None}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    finding = {"step": 2, "finding": HOSTILE, "example": HOSTILE}
    (folder / "findings.jsonl").write_text(json.dumps(finding) + "\n")
    (folder / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "model": HOSTILE}))
    found = written(folder)
    assert "script" not in found.tags and found.tags.count("img") == 1
    # The sample, the finding, the heading's model, and the settings.
    assert found.text.count(HOSTILE) == 2 + 2 + 1 + 3
    assert "n/a" in found.text and "Step 2" in found.text


def test_what_came_from_python_is_not_what_the_settings_name(tmp_path):
    folder = make_run(tmp_path / "mine", 2)
    settings = {"algorithm": "ppo", "model": "some-model", "dataset": "movies", "reward": "mine"}
    (folder / "config.yaml").write_text(json.dumps(settings))
    heading = "ppo · some-model · movies · mine · 2 steps"
    assert heading in written(folder).text
    given = {"model": None, "train_dataset": True, "eval_dataset": None, "reward": "sentiment"}
    (folder / "given.json").write_text(json.dumps(given))
    heading = "ppo · some-model · a dataset given from Python · sentiment · 2 steps"
    assert heading in written(folder).text


def test_the_first_the_middle_and_the_last_answer(tmp_path):
    folder = make_run(tmp_path / "mine", 9)
    lines = [
        {"step": step, "prompt": "The", "completion": f"said {step}", "score": 0.0}
        for step in (0, 3, 6, 6, 9)
    ]
    lines[2]["completion"] = "said before the run went on"
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = written(folder)
    assert [x for x in (0, 3, 6, 9) if f"said {x}" in found.text] == [0, 3, 9]
    assert report.spread([1]) == [1] and report.spread([1, 2]) == [1, 2] and report.spread([]) == []


def test_a_prompt_of_several_tasks_is_shown_for_each(tmp_path):
    folder = make_run(tmp_path / "mine", 2)
    line = {"step": 0, "prompt": "The", "score": 0.5}
    lines = [line | {"task": task, "completion": f"as {task}"} for task in ("glad", "short")]
    (folder / "samples.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = written(folder).text
    assert all(x in found for x in ("glad: The", "short: The", "as glad", "as short"))


def test_a_run_that_nobody_watched_says_nothing_of_hacking(tmp_path):
    assert "hacking" not in written(make_run(tmp_path / "mine", 2)).text


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "can_plot", lambda: False)
    found = written(make_run(tmp_path / "mine", 2))
    assert "img" not in found.tags and "pip install matplotlib" in found.text


def test_the_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "mine", 2)
    assert main(["report", "mine"]) == 0
    assert main(["report", "mine", "--output", "page.html"]) == 0
    assert capsys.readouterr().out.split() == ["mine/report.html", "page.html"]
    assert main(["report", "none"]) == 2 and "no run none" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be written"):
        report.write_report("mine", tmp_path / "no/page.html")
