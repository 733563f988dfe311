"""Every engine gives a rollout whose log-probabilities are compared with the policy's."""

import sys
import types
from dataclasses import replace

import pytest
import tiny
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from fastrlhf import PPOTrainer
from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.config import PPOConfig
from fastrlhf.data import PromptSet
from fastrlhf.errors import UserError
from fastrlhf.memory import plan
from fastrlhf.rollout.engines import make_engine
from fastrlhf.rollout.importance import importance_weights

TOKENIZER = tiny.tokenizer()
CONFIG = PPOConfig(
    batch_size=4, total_episodes=4, response_length=6, train_layers=2, eval_prompts=2
)
ROWS = [{"prompt": word} for word in ("a", "the film", "no", "plot", "b", "cd", "ef", "gh")]


@pytest.fixture()
def backbone():
    return SharedBackbone(tiny.model(), train_layers=2, tokenizer=TOKENIZER)


def prompts():
    return PromptSet.tokenize(ROWS[:4], TOKENIZER, context=64, response_length=6).batch()


def generate(backbone, **changes):
    engine = make_engine(backbone, TOKENIZER, replace(CONFIG, **changes))
    return engine.generate(prompts(), torch.Generator().manual_seed(0))


def plain_logprobs(backbone, rollout, temperature):
    trunk = backbone.trunk(rollout.tokens, rollout.attention_mask)
    start = rollout.prompts.tokens.shape[1]
    with torch.no_grad():
        hidden = backbone.hidden("policy", trunk, rollout.attention_mask)[:, start - 1 : -1]
        logprobs = (backbone.head.logits(hidden) / temperature).log_softmax(-1)
    return logprobs.gather(-1, rollout.responses[..., None])[..., 0]


@pytest.mark.parametrize("engine", ["fastrlhf", "transformers"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_engines_log_probabilities_are_the_policys(backbone, engine, temperature):
    rollout = generate(backbone, engine=engine, temperature=temperature)
    kept = rollout.response_mask
    assert kept[:, 0].all()
    expected = plain_logprobs(backbone, rollout, temperature)
    torch.testing.assert_close(rollout.rollout_logprobs[kept], expected[kept], rtol=0, atol=1e-3)


def test_transformers_answers_in_the_order_of_the_prompts_and_takes_the_memory_it_needs(
    backbone, monkeypatch
):
    """Greedy answers of twelve prompts that end at different steps are those of our own loop."""
    memory = []
    allocate = PagedAttentionCache.__init__

    def measured(self, *args, **kwargs):
        allocate(self, *args, **kwargs)
        memory.append(sum(t.nbytes for t in vars(self).values() if isinstance(t, torch.Tensor)))

    monkeypatch.setattr(PagedAttentionCache, "__init__", measured)
    with torch.no_grad():
        # The row of a padding token is zero; a stop token must be the likeliest at times.
        backbone.head.weight[0].normal_(std=0.8, generator=torch.Generator().manual_seed(0))
    rows = [{"prompt": "plot of a film"[i % 5 : 4 + i]} for i in range(12)]
    batch = PromptSet.tokenize(rows, TOKENIZER, context=64, response_length=6).batch()
    sampled = [
        make_engine(backbone, TOKENIZER, replace(CONFIG, engine=name, temperature=1e-3)).generate(
            batch, torch.Generator().manual_seed(0)
        )
        for name in ("transformers", "fastrlhf")
    ]
    assert len(set(sampled[0].response_mask.sum(1).tolist())) > 1, "all end at the same step"
    assert sampled[0].completion_ids() == sampled[1].completion_ids()
    # Twelve sequences of a page: 256 tokens, 4 layers of 2 heads of 8 numbers, keys and values.
    assert memory and memory[0] < 2 * 12 * 256 * 4 * 2 * 8 * 2 * 4


def test_transformers_draws_by_the_generator_alone(backbone):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sampled = [
        make_engine(backbone, TOKENIZER, replace(CONFIG, engine="transformers"))
        .generate(prompts(), torch.Generator().manual_seed(seed))
        .tokens
        for seed in (0, 0, 1)
    ]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])
    assert torch.equal(torch.get_rng_state(), before), "the trainer's own random numbers changed"


class FakeModel:
    """Answers with letters 5, 6 and the stop token, all with log-probability -2."""

    def __init__(self, **settings):
        self.settings = settings

    def generate(self, given, settings, lora_request, use_tqdm):
        assert len(settings) == len(given)
        for one in settings:
            assert (one["max_tokens"], one["stop_token_ids"]) == (6, [0])
        # vLLM makes a generator of each request's seed.
        assert len({one["seed"] for one in settings}) == len(given)
        assert self.settings["logprobs_mode"] == "processed_logprobs"
        ids = [5, 6, 0]
        steps = [{i: types.SimpleNamespace(logprob=-2.0)} for i in ids]
        answer = types.SimpleNamespace(token_ids=ids, logprobs=steps)
        assert len(given) in (2, 4) and all(g["prompt_token_ids"] for g in given)
        return [types.SimpleNamespace(outputs=[answer]) for _ in given]


@pytest.fixture()
def fake_vllm(monkeypatch, backbone):
    monkeypatch.setattr(backbone.model.config, "name_or_path", "a-folder")
    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = FakeModel, dict
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, folder: (name, number)
    for name, module in (("vllm", vllm), ("vllm.lora", types.ModuleType("vllm.lora")),
                         ("vllm.lora.request", request)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)


def test_vllm_gives_a_rollout(backbone, fake_vllm):
    rollout = generate(backbone, engine="vllm")
    assert rollout.completion_ids() == [[5, 6, 0]] * 4 and rollout.ended.all()
    assert (rollout.rollout_logprobs[rollout.response_mask] == -2).all()


@pytest.mark.parametrize(("rank", "taken"), [(1, 1), (4, 8), (12, 16), (320, 320)])
def test_vllm_gets_the_weights_of_the_run(fake_vllm, monkeypatch, rank, taken):
    """Whatever `model` says in the configuration, where a backbone or a name was an argument."""
    backbone = SharedBackbone(tiny.model(), lora=LoraSettings(rank), tokenizer=TOKENIZER)
    backbone.model.config.name_or_path = "elsewhere/model"
    config = replace(
        CONFIG, engine="vllm", model="another", vllm_gpu_memory_utilization=0.5,
        vllm_max_model_length=64,
    )  # fmt: skip
    given = make_engine(backbone, TOKENIZER, config).model.settings
    assert (given["model"], given["dtype"]) == ("elsewhere/model", "float32")
    assert given["max_lora_rank"] == taken
    assert (given["gpu_memory_utilization"], given["max_model_len"]) == (0.5, 64)
    backbone.model.config.name_or_path = ""
    with pytest.raises(UserError, match="came from no folder"):
        make_engine(backbone, TOKENIZER, config)


def test_vllm_that_is_not_there_is_told(backbone, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'fastrlhf\[vllm\]'"):
        make_engine(backbone, TOKENIZER, replace(CONFIG, engine="vllm"))


def test_another_engine_is_planned_as_the_own_loop_and_told(monkeypatch):
    """Without vLLM, too; transformers keeps keys and values in pages of 256 tokens."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    plans = {
        name: plan(replace(CONFIG, engine=name), model_config=tiny.config(), prompt_length=58)
        for name in ("fastrlhf", "transformers", "vllm")
    }
    own, pages, outside = (plans[name].components["KV cache"] for name in plans)
    assert own == outside == pages * 64 // 256
    # Keys and values of 4 layers, 2 heads of 8 numbers, in float32.
    assert pages == CONFIG.batch_size * 256 * 2 * 4 * 2 * 8 * 4
    assert "trunk cache" in plans["fastrlhf"].components, "the own loop keeps the trunk's states"
    assert plans["transformers"].phases["rollout"] > plans["fastrlhf"].phases["rollout"]
    for name, made in plans.items():
        assert (f"engine {name}" in made.table()) == (name != "fastrlhf")


def test_weights_are_truncated_ratios():
    old, sampled = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[-1.0, -1.0, -3.0]])
    weights = importance_weights(old, sampled, 2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.36787944, 2.0]]))


def test_a_run_with_another_engine_reports_its_gap_and_weighs_its_tokens(
    backbone, fake_vllm, tmp_path, monkeypatch
):
    config = replace(CONFIG, engine="vllm", output_dir=str(tmp_path / "run"))
    trainer = PPOTrainer(
        backbone, lambda completions, **_: [float(i) for i in range(len(completions))], config,
        ROWS,
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(trainer, "epochs", lambda experience, *_: seen.append(experience) or 1 / 0)
    learn = trainer.algorithm.advantages
    given = []

    def advantages(*args):
        given.append(learn(*args))
        return given[-1]

    trainer.algorithm = replace(trainer.algorithm, advantages=advantages)
    with pytest.raises(ZeroDivisionError):
        trainer.step(1, trainer.train_prompts.take([0, 1, 2, 3]))
    experience = seen[0]
    weights = (experience.old_logprobs + 2).exp().clamp_max(2.0)
    mask = experience.response_mask
    expected = given[0].advantages * weights
    torch.testing.assert_close(experience.advantages[mask], expected[mask])
    assert not torch.allclose(weights[mask], torch.ones(()))
    assert torch.equal(experience.returns, given[0].returns)
