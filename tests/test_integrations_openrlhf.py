"""OpenRLHF's Actor.forward as published in openrlhf 0.11.2 on PyPI, with our head under it.

A stand-in makes the logits and everything from them, as the published forward does; where OpenRLHF
itself is installed, its own Actor runs too.
"""

import inspect
import sys
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from fastrlhf.integrations import openrlhf as integration
from fastrlhf_kernels import VocabTensorError, forbid_vocab_tensors

# openrlhf/models/actor.py: Actor.forward.
FORWARD = {
    "self": inspect.Parameter.empty,
    "sequences": inspect.Parameter.empty,
    "action_mask": None,
    "attention_mask": None,
    "return_output": False,
    "allgather_logits": False,
    "return_logprobs": False,
    "ring_attn_group": None,
    "packed_seq_lens": None,
    "return_entropy": False,
    "mm_inputs": inspect.Parameter.empty,
}
INSTALLED = all(find_spec(x) is not None for x in ("openrlhf", "deepspeed", "flash_attn"))
VOCABULARY = 401


class Actor(nn.Module):
    """The published signature, and what it returns, the plain way."""

    def __init__(self, model, *, temperature=0.7, packing_samples=False):
        super().__init__()
        self.model, self.temperature, self.packing_samples = model, temperature, packing_samples

    def forward(
        self, sequences, action_mask=None, attention_mask=None, return_output=False,
        allgather_logits=False, return_logprobs=False, ring_attn_group=None, packed_seq_lens=None,
        return_entropy=False, **mm_inputs,
    ):  # fmt: skip
        positions = attention_mask.long().cumsum(-1) - 1
        positions.masked_fill_(attention_mask == 0, 1)
        output = self.model(sequences, attention_mask=attention_mask, position_ids=positions)
        output["logits"] = output["logits"].float() / self.temperature
        if return_entropy:
            output.entropy = torch.distributions.Categorical(logits=output["logits"]).entropy()
            output.entropy = output.entropy[:, :-1]
        if action_mask is None and not return_logprobs:
            return output
        logprobs = output["logits"].log_softmax(-1)[:, :-1]
        logprobs = logprobs.gather(-1, sequences[:, 1:, None]).squeeze(-1)
        if action_mask is not None:
            logprobs = logprobs[:, -action_mask.shape[1] :] * action_mask.float()
        return (logprobs, output) if return_output else logprobs


def pad(x, indices, batch, length):
    return x.new_zeros(batch * length).index_copy(0, indices, x[0]).view(batch, length)


@pytest.fixture
def openrlhf(monkeypatch) -> type[Actor]:
    """The stand-in at the place where the adapter looks for the Actor."""
    module = ModuleType("openrlhf.models.actor")
    stand_in = module.Actor = type("Actor", (Actor,), {"forward": Actor.forward})

    def unpad(sequences, attention_mask, group):
        indices = attention_mask.reshape(-1).nonzero().squeeze(-1)
        positions = attention_mask.cumsum(-1) - 1
        rolled = sequences.roll(-1, 1)
        flat = [x.reshape(-1)[indices][None] for x in (sequences, positions, rolled)]
        return *flat, 0, indices

    module.unpad_and_slice_tensor = unpad
    module.gather_and_pad_tensor = lambda x, group, padding, indices, batch, length: pad(
        x, indices, batch, length
    )
    monkeypatch.setitem(sys.modules, "openrlhf", ModuleType("openrlhf"))
    monkeypatch.setitem(sys.modules, "openrlhf.models", ModuleType("openrlhf.models"))
    monkeypatch.setitem(sys.modules, "openrlhf.models.actor", module)
    monkeypatch.setattr(metadata, "version", lambda name: "0.11.2")
    yield stand_in
    integration.unpatch()
    assert stand_in.forward is Actor.forward


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(1, VOCABULARY, (3, 12), generator=generator)
    attention = torch.ones(3, 12, dtype=torch.long)
    attention[0, :2] = 0
    attention[1, 10:] = 0
    actions = torch.ones(3, 5, dtype=torch.bool)
    actions[1, 3:] = False
    return sequences, actions, attention


def model(**changes):
    return tiny.model(vocab_size=VOCABULARY, **changes)


def gradients(actor, loss):
    actor.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in actor.named_parameters() if p.grad is not None}


def compare(actor, forward, batch):
    """PPO's, DPO's and the old log-probabilities' calls, patched and not."""
    sequences, actions, attention = batch
    seen = (attention[:, :-1] * attention[:, 1:]).bool()
    inside = torch.zeros_like(seen)
    inside[:, -actions.shape[1] :] = actions

    def run():
        logprobs, output = actor(
            sequences, actions, attention_mask=attention, return_output=True, return_entropy=True
        )
        entropy = output.entropy.masked_select(inside)
        weights = torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
        made = gradients(actor, (logprobs * weights).sum() + 0.1 * entropy.sum())
        with torch.no_grad():
            old = actor(sequences, actions, attention)
            whole, _ = actor(
                sequences, attention_mask=attention, return_output=True, return_logprobs=True
            )
        return [logprobs, entropy, old, whole.masked_select(seen)], made

    truth, truth_gradients = run()
    with integration.patch():
        assert type(actor).forward is integration.actor_forward
        got, got_gradients = run()
    assert type(actor).forward is forward
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert got_gradients.keys() == truth_gradients.keys()
    for name, b in truth_gradients.items():
        assert (got_gradients[name] - b).norm() <= 1e-5 * b.norm(), name


def test_the_signature_is_the_published_one():
    parameters = inspect.signature(integration.actor_forward).parameters
    assert {name: x.default for name, x in parameters.items()} == FORWARD
    assert tuple(FORWARD) == integration.SIGNATURE
    assert parameters["mm_inputs"].kind is inspect.Parameter.VAR_KEYWORD


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "engine", "granite"])
def test_the_same_numbers(openrlhf, batch, kind):
    inner = model(tie_word_embeddings=kind != "untied")
    if kind == "lora":
        inner = get_peft_model(
            inner, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        )
    if kind == "granite":
        # Divides its logits after the head.
        shape = tiny.config(vocab_size=VOCABULARY).to_dict() | {"logits_scaling": 3.0}
        inner = GraniteForCausalLM(
            GraniteConfig(**{k: v for k, v in shape.items() if k != "model_type"})
        )
    if kind == "engine":
        # As DeepSpeed's engine, which has the model as `module`.
        inner = nn.DataParallel(inner)
    compare(openrlhf(inner), Actor.forward, batch)


def test_packed_samples(openrlhf, batch):
    """Packed rows attend to each other here; what is compared is where the numbers go."""
    sequences, actions, attention = batch
    actor = openrlhf(model(), packing_samples=True)
    with integration.patch():
        packed, output = actor(
            sequences, actions, attention, return_output=True, return_entropy=True
        )
    indices = attention.reshape(-1).nonzero().squeeze(-1)
    positions = (attention.cumsum(-1) - 1).reshape(-1)[indices][None]
    logits = actor.model(sequences.reshape(-1)[indices][None], position_ids=positions).logits
    log_probs = (logits / actor.temperature).log_softmax(-1)
    targets = sequences.roll(-1, 1).reshape(-1)[indices][None]
    taken = log_probs.gather(-1, targets[..., None]).squeeze(-1)
    want = pad(taken, indices, 3, 12)[:, :-1][:, -5:] * actions
    torch.testing.assert_close(packed, want, rtol=1e-5, atol=1e-5)
    assert output.entropy.shape == (3, 11)


def test_no_logits_are_made(openrlhf, batch):
    sequences, actions, attention = batch
    actor = openrlhf(model())
    exempt = list(actor.parameters())
    row = VOCABULARY * 4

    def run():
        with forbid_vocab_tensors(20 * row, vocab_sizes={VOCABULARY}, exempt=exempt):
            logprobs, output = actor(sequences, actions, attention, return_output=True)
            assert output["logits"] is None
            logprobs.sum().backward()

    with pytest.raises(VocabTensorError):
        run()
    with integration.patch():
        run()


def test_who_wants_logits_gets_them(openrlhf, batch):
    sequences, _, attention = batch
    actor = openrlhf(model())
    with integration.patch():
        output = actor(sequences, attention_mask=attention, return_output=True)
    assert output["logits"].shape == (3, 12, VOCABULARY)


class Scaled(nn.Module):
    """A model that does more after its head than its config says."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        output["logits"] = output["logits"] * 1.5
        return output


def test_what_is_refused(openrlhf, batch, monkeypatch):
    sequences, actions, attention = batch
    integration.patch()

    def raises(actor, error, message, **given):
        with pytest.raises(error, match=message):
            actor(sequences, actions, **dict(attention_mask=attention) | given)

    vision = openrlhf(model())
    vision.is_vlm = True
    raises(vision, RuntimeError, "no vision-language actors")
    monkeypatch.setattr(integration, "get_world_size", lambda group: 2)
    raises(openrlhf(model()), RuntimeError, "over 2 processes", ring_attn_group=object())
    raises(openrlhf(model()), ValueError, "attention_mask", attention_mask=None)
    raises(openrlhf(model()), ValueError, "return_output=True", return_entropy=True)
    raises(openrlhf(Scaled(model())), RuntimeError, "differ from its head's by 50%")
    partitioned = model()
    partitioned.lm_head.weight.ds_status = "NOT_AVAILABLE"
    raises(openrlhf(partitioned), RuntimeError, "ZeRO-3")
    split = model(tie_word_embeddings=False)
    split.lm_head.weight = nn.Parameter(split.lm_head.weight[:200].detach())
    raises(openrlhf(split), RuntimeError, "holds 200 of 401 tokens")
    adapted = get_peft_model(
        model(tie_word_embeddings=False), LoraConfig(target_modules=["lm_head"])
    )
    raises(openrlhf(adapted), TypeError, "carries an adapter")
    around = model()
    around.forward = lambda *_, **__: {"logits": None}
    raises(openrlhf(around), RuntimeError, "called 0 times through its module")


def test_other_versions_and_other_forwards_are_refused(openrlhf, monkeypatch):
    for found in ("0.10.3", "0.12.0"):
        monkeypatch.setattr(metadata, "version", lambda name, found=found: found)
        with pytest.raises(ImportError, match=rf"found openrlhf {found}.*tried with 0\.11\.2"):
            integration.patch()
    monkeypatch.setattr(metadata, "version", lambda name: "0.11.3")
    with monkeypatch.context() as changed:
        changed.setattr(openrlhf, "forward", lambda self, sequences: None)
        with pytest.raises(RuntimeError, match=r"Actor\.forward takes \('self', 'sequences'\)"):
            integration.patch()
    integration.patch()


@pytest.mark.skipif(not INSTALLED, reason="openrlhf, deepspeed or flash-attn is not installed")
@pytest.mark.parametrize("packing", [False, True])
def test_beside_openrlhf_itself(tmp_path, batch, packing):
    from openrlhf.models.actor import Actor as Theirs

    assert tuple(inspect.signature(Theirs.forward).parameters) == tuple(FORWARD)
    model().save_pretrained(tmp_path)
    actor = Theirs(
        str(tmp_path), attn_implementation="eager", param_dtype="bf16", temperature=0.7,
        packing_samples=packing,
    )  # fmt: skip
    actor.float()
    compare(actor, Theirs.forward, batch)
