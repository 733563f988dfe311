"""Two halves make the whole, whatever a role does to the layers; unknown families run whole."""

from contextlib import contextmanager, nullcontext

import pytest
import tiny
import tiny_families
import torch
from torch import nn

from fastrlhf.errors import UserError
from fastrlhf.trunk import SplitDecoder, WholeDecoder, checkpointable, positions, split_decoder


def batch():
    torch.manual_seed(1)
    tokens = torch.randint(1, 27, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :4] = mask[1, :1] = False
    return tokens, mask


def split(**settings) -> SplitDecoder:
    halves = split_decoder(tiny.model().get_decoder(), 2, **settings)
    assert isinstance(halves, SplitDecoder)
    return halves


def unknown():
    # Checkpointing must not bring dropout along.
    return tiny_families.unknown(dropout=0.5).get_decoder()


def test_a_wrong_position_would_be_seen():
    decoder = tiny.model().get_decoder()
    tokens, mask = batch()
    with torch.no_grad():
        right = decoder(tokens, attention_mask=mask, position_ids=positions(mask))
        wrong = decoder(tokens, attention_mask=mask, position_ids=positions(mask) * 2)
    gap = (right.last_hidden_state - wrong.last_hidden_state)[mask].abs().max()
    assert gap > 1e-3


def test_left_padding_changes_nothing():
    halves = split()
    tokens = torch.randint(1, 27, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = padded.new_ones(1, 8, dtype=torch.bool)
    mask[:, :3] = False
    whole = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        alone = halves.top(halves.trunk(tokens, whole), whole)
        beside = halves.top(halves.trunk(padded, mask), mask)[:, 3:]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def loss(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A weighted sum: a sum of squares after a norm would have hardly any gradient."""
    torch.manual_seed(4)
    return (hidden * torch.randn_like(hidden))[mask].sum()


def frozen_originals(decoder):
    """The role of a reference whose top layers and norm are not those that train."""
    originals = tiny.model(seed=7).get_decoder()

    @contextmanager
    def role():
        kept = decoder.layers[3], decoder.norm
        decoder.layers[3], decoder.norm = originals.layers[3], originals.norm
        try:
            yield
        finally:
            decoder.layers[3], decoder.norm = kept

    with torch.no_grad():
        originals.norm.weight.mul_(2)
    return role, originals


def test_a_role_may_swap_layers_and_norm():
    halves = split()
    role, originals = frozen_originals(halves.decoder)
    tokens, mask = batch()
    trunk = halves.trunk(tokens, mask)
    with torch.no_grad():
        before = halves.top(trunk, mask)
        ours = halves.top(trunk, mask, role)
        together = halves.top_together(trunk, mask, [role, nullcontext])
        hidden = trunk
        inputs = halves.layer_inputs(trunk, mask, None)
        for layer in (halves.decoder.layers[2], originals.layers[3]):
            hidden = layer(hidden, **inputs[2])
    assert torch.equal(ours, originals.norm(hidden))
    assert not torch.allclose(ours, before)
    assert torch.equal(together[0], ours) and torch.equal(together[1], before)


def test_a_role_may_be_another_decoder():
    halves = split()
    other = tiny.model(seed=7).get_decoder()
    with torch.no_grad():
        other.norm.weight.mul_(2)
    tokens, mask = batch()
    trunk = halves.trunk(tokens, mask)
    with torch.no_grad():
        ours = halves.top(trunk, mask, lambda: nullcontext(other))
        theirs = split_decoder(other, 2).top(trunk, mask)
    assert torch.equal(ours, theirs)
    assert torch.equal(halves.top_together(trunk, mask, [lambda: nullcontext(other)])[0], theirs)


def test_a_layer_is_made_ready_once_for_all_roles():
    ready: list[nn.Module] = []
    open_now: list[nn.Module] = []

    @contextmanager
    def layer_weights(layer):
        ready.append(layer)
        open_now.append(layer)
        yield
        open_now.remove(layer)

    halves = split(layer_weights=layer_weights)
    layers = list(halves.decoder.layers)
    role, originals = frozen_originals(halves.decoder)
    runs = []
    for layer in (*layers, originals.layers[3]):
        layer.register_forward_pre_hook(lambda layer, _: runs.append(layer in open_now))
    tokens, mask = batch()
    trunk = halves.trunk(tokens, mask)
    runs.clear()
    halves.top_together(trunk, mask, [nullcontext, nullcontext, role])
    assert ready == [layers[2], layers[3], originals.layers[3]] and not open_now
    assert runs == [True] * 6


@pytest.mark.parametrize("at", [0, 2, 4])
def test_recorded_is_the_trunk(at):
    halves = split()
    halves.split = at
    tokens, mask = batch()
    with torch.no_grad(), halves.recorded() as outputs:
        halves.decoder(tokens, attention_mask=mask, position_ids=positions(mask))
    assert len(outputs) == 1 and torch.equal(outputs[0], halves.trunk(tokens, mask))
    with torch.no_grad():
        halves.decoder(tokens)
    assert len(outputs) == 1


def test_checkpointing_runs_a_layer_again_in_its_role():
    tokens, mask = batch()
    gradients, runs = [], []
    for checkpointing in (False, True):
        halves = split(gradient_checkpointing=checkpointing)
        role, originals = frozen_originals(halves.decoder)
        originals.layers[3].register_forward_pre_hook(lambda *_: runs.append(1))
        loss(halves.top(halves.trunk(tokens, mask), mask, role), mask).backward()
        gradients.append(originals.layers[3].mlp.up_proj.weight.grad)
        assert halves.decoder.layers[1].mlp.up_proj.weight.grad is None
        assert halves.decoder.layers[3].mlp.up_proj.weight.grad is None
    assert len(runs) == 3, "once as it is, and with checkpointing once more in the backward"
    torch.testing.assert_close(*gradients)


def test_other_families_run_whole():
    decoder = unknown()
    halves = split_decoder(decoder, 1)
    assert isinstance(halves, WholeDecoder)
    tokens, mask = batch()
    assert halves.trunk(tokens, mask) is tokens
    with torch.no_grad():
        ours = halves.top(tokens, mask)
        theirs = decoder(tokens, attention_mask=mask, position_ids=positions(mask))
    assert torch.equal(ours, theirs.last_hidden_state)
    together = halves.top_together(tokens, mask, [nullcontext, nullcontext])
    assert torch.equal(together[0], ours) and torch.equal(together[1], ours)
    with halves.recorded() as outputs:
        halves.top(tokens, mask)
    assert outputs == []


def test_packed_sequences_run_whole_each_in_a_row_of_its_own():
    halves = split_decoder(unknown(), 1)
    lengths = (4, 1, 7)
    tokens = torch.randint(1, 27, (1, sum(lengths)))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        ours = halves.top(halves.trunk(tokens, None, position_ids), None, nullcontext, position_ids)
        theirs = [halves.decoder(part).last_hidden_state for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(ours, torch.cat(theirs, dim=1), rtol=1e-5, atol=1e-5)


def test_layers_that_run_whole_are_checkpointed_in_their_role():
    tokens, mask = batch()
    gradients, runs = [], []
    for checkpointing in (False, True):
        halves = split_decoder(unknown(), 1, gradient_checkpointing=checkpointing)
        layer = halves.decoder.layers[1]
        torch.manual_seed(5)
        other = nn.Linear(32, 48)
        other.register_forward_hook(lambda *_: runs.append(1))

        @contextmanager
        def role(layer=layer, other=other):
            layer.fc1, before = other, layer.fc1
            try:  # what runs a layer again leaves by an exception as soon as it has all it needs
                yield
            finally:
                layer.fc1 = before

        loss(halves.top(tokens, mask, role), mask).backward()
        named = halves.decoder.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.grad is not None})
        gradients[-1]["other"] = other.weight.grad
        assert not any("forward" in vars(layer) for layer in checkpointable(halves.decoder))
    assert len(runs) == 3, "once as it is, and with checkpointing once more in the backward"
    plain, again = gradients
    assert plain.keys() == again.keys() and "layers.1.fc1.weight" not in plain
    assert plain["other"].abs().max() > 0.01
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_checkpointing_is_refused_where_it_would_do_nothing(monkeypatch):
    monkeypatch.setattr("fastrlhf.trunk.checkpointable", lambda decoder: [])
    with pytest.raises(UserError, match="this one is opt"):
        split_decoder(unknown(), 1, gradient_checkpointing=True)
