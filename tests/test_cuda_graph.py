"""Steps in buckets sample what steps of their own size do; on a GPU, as graphs."""

from copy import deepcopy

import pytest
import tiny
import torch

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.data import PromptSet
from fastrlhf.rollout import cuda_graph
from fastrlhf.rollout.cuda_graph import GraphedSteps, can_record
from fastrlhf.rollout.decode import DecodeEngine

TOKENIZER = tiny.tokenizer()
ROWS = [{"prompt": p} for p in ("the film", "a", "no plot", "b", "a", "cd")] * 2


@pytest.fixture(scope="module")
def backbone() -> SharedBackbone:
    b = SharedBackbone(tiny.model(), lora=LoraSettings(rank=4), train_layers=2)
    with torch.no_grad():
        b.head.weight[0] = 2 * b.head.weight[5]  # a stop token that is likely enough
    return b


def generate(backbone, slots, **settings):
    prompts = PromptSet.tokenize(ROWS, TOKENIZER, context=64, response_length=12)
    engine = DecodeEngine(
        backbone, TOKENIZER, response_length=12, temperature=3.0, slots=slots, **settings
    )
    generator = torch.Generator(backbone.device).manual_seed(0)
    return engine.generate(prompts.batch(backbone.device), generator)


def again(run):
    """Stands in for a graph: the function itself, into the memory of its first states."""
    states = run()

    def replay():
        for kept, new in zip(states, run(), strict=True):
            if kept is not None:
                kept.copy_(new)

    return states, replay


@pytest.mark.parametrize("slots", [None, 5])
def test_buckets_change_no_sequence(backbone, slots, monkeypatch):
    """Rows and columns too many; slots that such rows wrote to are given to prompts later."""
    precise = deepcopy(backbone).double()
    plain = generate(precise, slots)
    monkeypatch.setattr(cuda_graph, "COLUMNS", 5)
    monkeypatch.setattr("fastrlhf.rollout.decode.can_record", lambda backbone: True)
    made = []

    def graphed(steps):
        made.append(GraphedSteps(steps, again))
        return made[-1]

    monkeypatch.setattr("fastrlhf.rollout.decode.GraphedSteps", graphed)
    rollout = generate(precise, slots, cuda_graphs=True)
    rows = {rows for rows, _ in made[0].graphs}
    assert len(rows) > 2 and rows <= {1, 2, 4, 8, slots or 12}
    assert len({width for _, width in made[0].graphs}) > 2
    assert plain.ended.any() and torch.equal(rollout.tokens, plain.tokens)
    torch.testing.assert_close(rollout.rollout_logprobs, plain.rollout_logprobs)
    kept = plain.sequences.inputs
    states = [r.trunk.device_rows[kept] for r in (rollout, plain)]
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9)


def test_nothing_is_recorded_on_a_cpu(backbone):
    assert not can_record(backbone)
    plain, asked = generate(backbone, 5), generate(backbone, 5, cuda_graphs=True)
    assert torch.equal(plain.tokens, asked.tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [None, 5])
def test_graphs_sample_what_the_steps_do(backbone, slots):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    here = deepcopy(backbone).double().to("cuda")
    assert can_record(here)
    plain, graphed = generate(here, slots), generate(here, slots, cuda_graphs=True)
    assert torch.equal(graphed.tokens, plain.tokens)
    torch.testing.assert_close(graphed.rollout_logprobs, plain.rollout_logprobs)
