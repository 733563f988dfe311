"""docs/guide.md has every section of the textbook, and what it points to is there."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from fastrlhf.cli import given, make_parser
from fastrlhf.config import load_config
from fastrlhf.configs import CONFIGS
from fastrlhf.reward_config import RewardConfig

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide.md"

# The textbook's own headings, chapter by chapter.
SECTIONS = {
    "Problem Formulation": [
        "Traditional vs. RL Approaches", "RL Problem Setup", "Sequential Decision Making",
    ],
    "Key Challenges": [
        "Language Generation Specifics", "1. Sequential Decision Making", "2. Long Sequences",
        "3. High Dimensionality", "4. Human Preferences", "Reward Function Challenges",
        "Reward Hacking", "Reward Model Overfitting",
    ],
    "RL Framework for LLMs": [
        "Markov Decision Process (MDP) Formulation", "Value Functions", "State Value Function",
        "Action-Value Function", "Advantage Function",
    ],
    "Mathematical Foundations": [
        "Policy Gradient Theorem", "REINFORCE Algorithm", "Actor-Critic Methods",
        "Proximal Policy Optimization (PPO)",
    ],
    "Practical Considerations": [
        "Baseline Methods", "Entropy Regularization", "KL Divergence Control", "Reward Scaling",
    ],
    "Implementation Examples": [
        "Basic RLHF Pipeline", "Reward Model Implementation", "PPO Implementation",
    ],
    "Advanced Topics": [
        "Multi-Objective Optimization", "Hierarchical RL for Language Models",
        "Meta-RL for Language Models", "Multi-Agent RL for Language Models",
    ],
    "Summary": ["Summary"],
    "Further Reading": [
        "Policy Gradient Methods", "PPO Paper", "RLHF Foundations", "Language Model RL",
    ],
}  # fmt: skip
BESIDE = "Beyond the textbook"
# Headings of the textbook that only hold others.
HOLD_OTHERS = {"Language Generation Specifics", "Reward Function Challenges", "Value Functions"}


@cache
def chapters() -> dict[str, list[list[str]]]:
    """The cells of each chapter's rows."""
    found = {}
    for part in GUIDE.read_text().split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
        found[title] = [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]
    return found


def all_rows() -> list[list[str]]:
    return [row for rows in chapters().values() for row in rows]


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


def test_every_section_is_there_in_its_order():
    ours = {title: [row[0] for row in rows] for title, rows in chapters().items()}
    ours.pop(BESIDE)
    assert ours == SECTIONS
    contents = re.findall(r"^- \[(.+)\]\(#(.+)\)$", GUIDE.read_text(), flags=re.M)
    assert [title for title, _ in contents] == [*SECTIONS, BESIDE]
    for title, anchor in contents:
        assert anchor == title.lower().replace(" ", "-")


def test_every_section_has_a_module_a_command_and_a_test():
    for name, here, *cells in all_rows():
        assert here and len(cells) == 3, name
        if name in HOLD_OTHERS:
            assert not any(cells)
            continue
        for cell in cells:
            assert quoted(cell), name


@pytest.mark.parametrize("row", all_rows(), ids=lambda row: row[0])
def test_modules_tests_and_what_is_named_of_them_exist(row):
    _, _, modules, _, tests = row
    for path in quoted(tests):
        assert re.fullmatch(r"tests/test_\w+\.py", path) and (ROOT / path).is_file(), path
    for path, names in re.findall(r"`([^`]+)`(?: \(([^)]*)\))?", modules):
        if "/" not in path:  # a name in brackets
            continue
        assert (ROOT / path).exists(), path
        files = [ROOT / path] if (ROOT / path).is_file() else [*(ROOT / path).glob("*.py")]
        text = "".join(file.read_text() for file in files)
        for name in quoted(names):
            assert re.search(rf"^(class|def| +def)? *{name}\b[(:\[]", text, flags=re.M), name


def commands() -> list[str]:
    return [command for row in all_rows() for command in quoted(row[3])]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_can_be_given(command):
    program, *words = shlex.split(command)
    if program == "python":
        assert (ROOT / words[0]).is_file()
        return
    assert program == "fastrlhf"
    arguments, rest = make_parser().parse_known_args(words)
    read = given(arguments, rest, 0.0)
    if arguments.verb in ("bench", "xray"):
        return
    kinds = {**CONFIGS, "reward": RewardConfig, "plan": CONFIGS["ppo"], "pareto": CONFIGS["ppo"]}
    if arguments.verb in kinds:
        load_config(arguments.config, read.settings, kinds[arguments.verb])
