"""In every mode the reference is the untouched model, and only what should train does."""

import contextlib
import itertools
import re

import pytest
import tiny
import tiny_modes
import torch
from peft import LoraConfig, get_peft_model
from tiny_modes import MASK, MODES, TOKENS, of_model, of_role, train

from fastrlhf.backbone import LoraSettings, SharedBackbone
from fastrlhf.config import PPOConfig
from fastrlhf.data import PromptSet
from fastrlhf.errors import UserError
from fastrlhf.rollout.decode import DecodeEngine

CRITICS = ("shared", "adapter")
# What a ModuleDict, in which PEFT keeps adapters, cannot hold.
METHODS = ("keys", "values", "type", "train", "forward")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return tiny_modes.Scene(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_reference_is_the_untouched_model_to_the_last_bit(scene, mode, dtype):
    truth = of_model(scene.untouched(mode, dtype), mode.split)
    backbone = scene.backbone(mode, dtype, critic="adapter", reward=True)
    assert torch.equal(of_role(backbone, "reference"), truth)
    policy = of_role(backbone, "policy").detach()
    assert torch.equal(policy, truth) == mode.starts_as_reference
    train(backbone)
    assert torch.equal(of_role(backbone, "reference"), truth)
    assert not torch.allclose(of_role(backbone, "policy"), policy, rtol=1e-3)
    trunk = backbone.trunk(TOKENS, MASK)
    together = backbone.hidden_together(["reference", "policy", "critic", "reward"], trunk, MASK)
    for role, states in together.items():
        with torch.no_grad():
            assert torch.equal(states, backbone.hidden(role, trunk, MASK)), role


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_reference_is_that_of_transformers(scene, mode):
    backbone = scene.backbone(mode)
    theirs = scene.of_transformers(mode)
    torch.testing.assert_close(of_role(backbone, "reference"), theirs, rtol=1e-5, atol=1e-6)


# What is the policy's own, among the names of the model's parameters.
OWN = {
    "lora_all": r"\.default\.",
    "lora_top": r"layers\.[23]\..*\.default\.",
    "hydra": r"layers\.[23]\.|model\.norm\.",
    "hydra_untied": r"layers\.[23]\.|model\.norm\.|lm_head\.",
    "full": "",
    "full_untied": "",
    "full_int8": "",
    "full_nf4": "",
    "int8": r"layers\.[23]\..*\.default\.",
    "nf4": r"layers\.[23]\..*\.default\.",
    "adapter": r"layers\.[23]\..*\.default\.",
}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("name", MODES)
def test_only_what_should_train_gets_gradients(scene, name, critic):
    backbone = scene.backbone(MODES[name], critic=critic, reward=True)
    train(backbone)  # LoRA's first matrices get none before the second have moved
    tiny_modes.loss(backbone).backward()
    got = {n for n, p in backbone.named_parameters() if p.grad is not None and p.grad.any()}
    own = {n for n, _ in backbone.named_parameters()
           if n.startswith("base.model.") and re.search(OWN[name], n)}  # fmt: skip
    assert own and {n for n in got if n.startswith("base.model.") and ".critic." not in n} == own
    rest = got - own
    assert {n for n in rest if n.startswith("value_head")} == {
        "value_head.linear.weight", "value_head.linear.bias",
    }  # fmt: skip
    adapters = {n for n in rest if ".critic." in n}
    assert bool(adapters) == (critic == "adapter")
    assert len(got) == len(own) + len(adapters) + 2
    assert {id(p) for p in backbone.trainable()} == {
        id(p) for n, p in backbone.named_parameters() if n in got
    }


@pytest.mark.parametrize("name", MODES)
def test_every_weight_has_one_name_in_every_role_and_roles_are_left_as_they_were(scene, name):
    mode = MODES[name]
    backbone = scene.backbone(mode, critic="adapter", reward=True)
    train(backbone)
    before = dict(backbone.named_parameters(remove_duplicate=False))
    # A tied head is the embedding under a second name, in transformers too.
    models = 1 + ("full" in name)
    assert len(before) == len(set(map(id, before.values()))) + models * mode.tied
    policy = of_role(backbone, "policy")
    for first, second in itertools.product(backbone.roles, repeat=2):
        with pytest.raises(RuntimeError), backbone.role(first), backbone.role(second):
            within = {id(p) for p in backbone.parameters()}
            assert within == {id(p) for p in before.values()}
            raise RuntimeError
    after = dict(backbone.named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())
    assert torch.equal(of_role(backbone, "policy"), policy)


@pytest.mark.parametrize("name", MODES)
def test_a_role_within_a_role_gives_the_outer_one_back(scene, name):
    backbone = scene.backbone(MODES[name], critic="adapter")
    train(backbone)

    def computed(decoder):
        with torch.no_grad():
            return decoder(TOKENS[1:2], attention_mask=MASK[1:2]).last_hidden_state

    for outer, inner in itertools.permutations(backbone.roles, 2):
        with backbone.role(outer) as decoder:
            before = computed(decoder)
            with contextlib.suppress(RuntimeError), backbone.role(inner) as other:
                assert not torch.equal(computed(other), before)
                raise RuntimeError
            assert torch.equal(computed(decoder), before)


@pytest.mark.parametrize("role", ["policy", "critic"])
@pytest.mark.parametrize("name", ["lora_top", "hydra", "hydra_untied", "full", "nf4", "adapter"])
def test_checkpointed_layers_are_run_again_in_their_role(scene, name, role):
    gradients = []
    for checkpointing in (False, True):
        backbone = scene.backbone(
            MODES[name], critic="adapter", gradient_checkpointing=checkpointing
        )
        train(backbone)
        hidden = backbone.hidden(role, backbone.trunk(TOKENS, MASK), MASK)
        hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and plain
    for parameter in plain:
        torch.testing.assert_close(again[parameter], plain[parameter], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODES)
def test_what_is_sampled_is_the_policy(scene, name):
    backbone = scene.backbone(MODES[name])
    train(backbone)
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": p} for p in ("the film", "a", "no plot")]
    prompts = PromptSet.tokenize(rows, tokenizer, context=64, response_length=6).batch()
    engine = DecodeEngine(backbone, tokenizer, response_length=6)
    rollout = engine.generate(prompts, torch.Generator().manual_seed(0))
    with torch.no_grad():
        trunk = backbone.trunk(rollout.tokens, rollout.attention_mask)
        hidden = backbone.hidden("policy", trunk, rollout.attention_mask)
        scored = backbone.head.logits(hidden).log_softmax(-1)[:, -7:-1]
    picked = scored.gather(-1, rollout.responses[..., None])[..., 0]
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.rollout_logprobs[mask], picked[mask], rtol=1e-4, atol=1e-4)
    # What was kept while sampling is the trunk, where there are layers in it.
    assert (rollout.trunk is None) == (not MODES[name].split)


def test_policies_do_not_influence_each_other(scene):
    backbone = scene.backbone(MODES["lora_top"])
    for name in ("left", "right"):
        backbone.add_policy(name)
    start = of_role(backbone, "reference")
    assert torch.equal(of_role(backbone, "left"), start)
    train(backbone, lambda b: of_role(b, "left").square().sum())
    left = of_role(backbone, "left").detach()
    assert not torch.allclose(left, start)
    for other in ("right", "policy", "reference"):
        assert torch.equal(of_role(backbone, other), start), other
    train(backbone, lambda b: of_role(b, "right").square().sum() * 2)
    assert torch.equal(of_role(backbone, "left"), left)
    assert not torch.allclose(of_role(backbone, "right"), start)


def test_a_further_policy_starts_as_the_reference_that_started_from_an_adapter(scene):
    backbone = scene.backbone(MODES["adapter"])
    train(backbone)
    backbone.add_policy("other")
    assert torch.equal(of_role(backbone, "other"), of_role(backbone, "reference"))
    train(backbone, lambda b: of_role(b, "other").square().sum())
    assert not torch.allclose(of_role(backbone, "other"), of_role(backbone, "reference"))


def test_every_adapter_has_the_rank_and_alpha_that_were_asked_for():
    backbone = SharedBackbone(tiny.model(), lora=LoraSettings(3, 7.0), critic="adapter")
    backbone.add_policy("later")
    made = backbone.adapters.peft.peft_config
    assert {name: (x.r, x.lora_alpha) for name, x in made.items()} == dict.fromkeys(
        ("default", "critic", "later"), (3, 7.0)
    )


@pytest.mark.parametrize("name", ["reference", "default", "left", "a.b", "", *METHODS])
def test_names_that_a_policy_cannot_have(scene, name):
    backbone = scene.backbone(MODES["lora_top"])
    backbone.add_policy("left")
    with pytest.raises(UserError, match="cannot be named"):
        backbone.add_policy(name)


def test_the_reward_role_trains_when_it_is_told_to(scene):
    backbone = scene.backbone(MODES["lora_top"], critic=None, reward=True)
    backbone.train_roles("reward")
    backbone.reward_scores(TOKENS, MASK).sum().backward()
    got = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert got and all(".reward." in n or n.startswith("reward_head") for n in got)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": None, "quantization": "nf4", "train_layers": 2}, "use_peft: true"),
        ({"lora": None, "reference": False, "critic": "adapter"}, "critic='shared'"),
        ({"train_layers": 5}, "4 layers"),
        ({"lora": None, "train_layers": 2, "adapter": "somewhere"}, "use_peft: true"),
        ({"reference_quantization": "nf4"}, "leave it out"),
        ({"lora": None, "train_layers": 2, "reference_quantization": "nf4"}, "leave it out"),
        ({"lora": None, "reference": False, "reference_quantization": "nf4"}, "leave it out"),
        ({"reference_model": tiny.model()}, "leave it out"),
        ({"lora": None, "train_layers": 4, "reference_model": tiny.model()}, "leave it out"),
        ({"lora": None, "reference": False, "reference_model": tiny.model()}, "leave it out"),
        ({"train_layers": 0}, "set it to 'all' or at least 1"),
        ({"train_layers": -1}, "set it to 'all' or at least 1"),
        ({"train_layers": True}, "set it to 'all' or at least 1"),
        ({"train_layers": 1.5}, "set it to 'all' or at least 1"),
        ({"train_layers": "top"}, "set it to 'all' or at least 1"),
        ({"critic": "own"}, "set it to 'shared', 'adapter' or None"),
        ({"critic": False}, "set it to 'shared', 'adapter' or None"),
    ],
)
def test_settings_that_exclude_each_other(scene, settings, message, monkeypatch):
    if "quantization" not in settings and "reference_quantization" not in settings:
        with pytest.raises(UserError, match=message):
            SharedBackbone(tiny.model(**tiny_modes.WIDE), **settings)
    # Before weights are read.
    monkeypatch.setattr("fastrlhf.pretrained.AutoModelForCausalLM", None)
    with pytest.raises(UserError, match=message):
        SharedBackbone.from_pretrained(str(scene.folders[True]), **settings)


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"vocab_size": 40}])
def test_a_second_model_of_another_shape(changes):
    with pytest.raises(UserError, match="give one of the same family and size"):
        SharedBackbone(tiny.model(), lora=None, reference_model=tiny.model(**changes))


def test_a_model_that_has_adapters_already(scene):
    adapted = tiny_modes.adapted(tiny.model(**tiny_modes.WIDE), scene.adapter)
    for model in (adapted, get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(UserError, match=r"load the model anew, or pass .*adapter="):
            SharedBackbone(model)
    with pytest.raises(UserError, match="load the model anew"):
        SharedBackbone(tiny.model(**tiny_modes.WIDE), lora=None, reference_model=adapted)


@pytest.mark.parametrize("role", ["reference", "reward", "polisy"])
def test_roles_that_cannot_train(scene, role):
    backbone = scene.backbone(MODES["adapter"])
    before = [id(p) for p in backbone.trainable()]
    with pytest.raises(UserError, match="no role that this backbone can train"):
        backbone.train_roles("policy", role)
    assert [id(p) for p in backbone.trainable()] == before
    backbone.train_roles("critic")


def test_heads_that_are_not_there(scene):
    backbone = scene.backbone(MODES["lora_top"], critic=None)
    trunk = backbone.trunk(TOKENS, MASK)
    with pytest.raises(UserError, match="critic='shared'"):
        backbone.values(trunk, trunk, MASK)
    with pytest.raises(UserError, match="reward=True"):
        backbone.reward_scores(TOKENS, MASK)


@pytest.mark.parametrize("settings", [{"lora": None}, {"lora": None, "train_layers": 2}])
def test_without_a_reference_no_original_is_kept(settings):
    model = tiny.model()
    size = sum(p.numel() for p in model.parameters())
    backbone = SharedBackbone(model, reference=False, critic=None, **settings)
    assert not backbone.has_reference
    assert sum(p.numel() for p in backbone.parameters()) == size
    with pytest.raises(UserError, match="kl_coef above 0"):
        of_role(backbone, "reference")
    with pytest.raises(UserError, match="kl_coef above 0"):
        _ = backbone.reference_head
    with pytest.raises(UserError, match="did you mean 'policy'"):
        backbone.hidden("polisy", TOKENS, MASK)
    with pytest.raises(UserError, match="full training has none"):
        backbone.add_policy("left")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "nf4", "use_peft": False}, "set use_peft: true or quantization: null"),
        ({"reference_quantization": "nf4"}, "set it to null"),
        (
            {"reference_quantization": "nf4", "use_peft": False, "train_layers": "all",
             "kl_coef": 0.0},
            "set it to null",
        ),
        (
            {"use_peft": False, "train_layers": "all", "critic": "adapter", "kl_coef": 0.0},
            "set critic: shared",
        ),
    ],
)  # fmt: skip
def test_configurations_that_contradict_themselves(settings, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(**settings)


def test_configurations_that_do_not():
    PPOConfig(quantization="int8")
    PPOConfig(use_peft=False, train_layers="all", reference_quantization="nf4", critic="adapter")
    PPOConfig(use_peft=False, train_layers=4, critic="adapter", kl_coef=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_roles_in_little_more_than_the_memory_of_one(dtype):
    """At SmolLM2-135M's shape, without values: memory does not depend on them."""
    shape = dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    with torch.device("meta"):
        model = tiny.model(**shape).to(dtype)
    base = storage_bytes(model)
    backbone = SharedBackbone(
        model, lora=LoraSettings(16), train_layers=8, critic="adapter", reward=True
    )
    assert set(backbone.roles) == {"policy", "reference", "critic", "reward"}
    assert base < storage_bytes(backbone) <= 1.1 * base


def storage_bytes(module) -> int:
    """Over every storage that a parameter or buffer is in, each once."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())
