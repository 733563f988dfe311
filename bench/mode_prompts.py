"""Two kinds of prompts that want different answers, and the reward that says so.

A question of fact wants its answer and no more: half for naming it, half for at most three words.
A scene wants words, and friendly ones: half for eight words or more, half for VADER's sentiment.
The rows are ours; a fixed draw holds a quarter of each kind out.
"""

import random
from collections.abc import Sequence
from typing import Any

from fastrlhf.rewards.texts import length_band, sentiment

FACTS, SCENES = "question of fact", "scene"
QUESTIONS = {
    "What is the capital of {}?": (
        "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, China Beijing, "
        "Russia Moscow, Egypt Cairo, Greece Athens, Portugal Lisbon, Austria Vienna, "
        "Poland Warsaw, Norway Oslo, Sweden Stockholm, Ireland Dublin, England London, "
        "Canada Ottawa, Cuba Havana, Peru Lima, Kenya Nairobi, Iraq Baghdad, Hungary Budapest, "
        "Denmark Copenhagen, Belgium Brussels"
    ),
    "What is the opposite of {}?": (
        "hot cold, big small, fast slow, up down, happy sad, light dark, young old, early late, "
        "rich poor, hard soft, wet dry, full empty, high low, loud quiet, strong weak, left right"
    ),
    "What colour is {}?": (
        "snow white, grass green, coal black, blood red, milk white, gold yellow, chocolate brown, "
        "spinach green, sugar white, salt white, wheat yellow, broccoli green"
    ),
    "Which animal says {}?": "moo cow, woof dog, meow cat, oink pig, quack duck, neigh horse",
    "What do you call a young {}?": (
        "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, hen chick"
    ),
}
REQUESTS = {
    "Describe {}.": (
        "a garden in spring, a walk on the beach, a village market, a house by the lake, "
        "an old library, a morning in the mountains, a train at night, a harbour at noon, "
        "a street after rain, a kitchen before dinner, a forest in autumn, a field of sunflowers, "
        "a small cafe, a castle on a hill, a winter evening, a busy station, a quiet island, "
        "a sunrise, a summer meadow, a theatre before the play"
    ),
    "Tell me about {}.": (
        "your best friend, a birthday party, a day at the zoo, a long journey, a wedding, "
        "the first day of school, a picnic, a concert, a football match, a visit to grandmother, "
        "a new puppy, a holiday by the sea, a dance, a camping trip, a boat ride, a snowball fight"
    ),
    "Write about {}.": (
        "the moon, a sailor, a baker, a lost letter, an old oak, a blue bicycle, a brave girl, "
        "a lighthouse, a clockmaker, a river, a painter, a red balloon, a gardener, a piano, "
        "a kite, a bridge"
    ),
    "Invent a story of {}.": (
        "a fox, a king, a robot, a pirate, a wizard, a teacher, a whale, a giant, a mouse, "
        "a doctor, a dragon, a postman"
    ),
}  # fmt: skip
# An example says more to a model of this size than an instruction does. Chosen on training prompts.
EXAMPLES = {
    "concise": "Q: What colour is ink?\nA: Blue.\n",
    "informative": "Q: What is rain?\nA: Water that falls from clouds.\n",
    "creative": (
        "Q: Describe a rose.\n"
        "A: A lovely, sweet rose glows with love, joy and the warm summer sun.\n"
    ),
}


def rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out rows, as many of each kind; no subject is in both."""
    facts, scenes = [], []
    for template, pairs in QUESTIONS.items():
        for subject, answer in (pair.split() for pair in pairs.split(", ")):
            facts.append(row(template.format(subject), FACTS, answer))
    for template, subjects in REQUESTS.items():
        for subject in subjects.split(", "):
            scenes.append(row(template.format(subject), SCENES, ""))
    train, held_out = [], []
    for kind in (facts, scenes):
        random.Random(6).shuffle(kind)
        train += kind[16:64]
        held_out += kind[:16]
    return train, held_out


def row(text: str, kind: str, answer: str) -> dict[str, Any]:
    return {"prompt": f"Q: {text}\nA:", "kind": kind, "answer": answer}


def fitting(
    completions: Sequence[str], kind: Sequence[str], answer: Sequence[str], **_: object
) -> list[float]:
    """From 0 to 1; see the module. The answer is the first line with anything in it."""
    completions = [text.strip().split("\n")[0] for text in completions]
    brief = length_band(completions, low=1, high=3)
    long = length_band(completions, low=8, high=60)
    friendly = [max(x, 0.0) for x in sentiment(completions)]
    return [
        (brief[i] + (right.lower() in text.lower())) / 2
        if of == FACTS
        else (long[i] + friendly[i]) / 2
        for i, (text, of, right) in enumerate(zip(completions, kind, answer, strict=True))
    ]
