"""An exported run is a plain model that answers as the policy that was trained."""

import json
from dataclasses import replace

import pytest
import signals
import tiny
import torch
from test_resume import RUN, make
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastrlhf import MultiAgentTrainer, UserError
from fastrlhf.cli import main
from fastrlhf.export import export_run

TOKENS = torch.tensor([[3, 7, 9, 1, 5]])


def policy_logits(backbone):
    with torch.no_grad(), backbone.role("policy") as decoder:
        return backbone.head.logits(decoder(input_ids=TOKENS).last_hidden_state)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic": "adapter"},
        {"bf16": True},
        {"use_peft": False},
        {"use_peft": False, "train_layers": "all"},
    ],
    ids=["adapters", "critic", "bf16", "top", "full"],
)
def test_the_exported_model_answers_as_the_policy(tmp_path, changes, capsys):
    trainer = make(tmp_path, **changes)
    trainer.train()
    expected = policy_logits(trainer.backbone)
    for checkpoint in ("final", "step-000004"):
        out = tmp_path / f"out-{checkpoint}"
        words = ["export", str(tmp_path / "run"), "--checkpoint", checkpoint, "--output", str(out)]
        assert main(words) == 0
        assert capsys.readouterr().out.strip() == str(out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        assert model.dtype == (torch.bfloat16 if changes.get("bf16") else torch.float32)
        with torch.no_grad():
            got = model(input_ids=TOKENS).logits.float()
        slack = 0.3 if changes.get("bf16") else 1e-4
        torch.testing.assert_close(got, expected, rtol=0, atol=slack)
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert (base(input_ids=TOKENS).logits - got).abs().max() > 3 * slack
        assert AutoTokenizer.from_pretrained(out).eos_token == "<end>"
        assert not list(out.glob("*optim*")) and not list(out.glob("*.yaml"))


def test_the_model_is_the_one_that_was_given(tmp_path):
    """Named from Python: the settings name another."""
    trainer = make(tmp_path)
    given = trainer.config.model
    trainer.train()
    config, run = tmp_path / "run/config.yaml", tmp_path / "run"
    config.write_text(config.read_text().replace(given, "smollm2-135m"))
    noted = json.loads((run / "given.json").read_text())
    (run / "given.json").write_text(json.dumps(noted | {"model": given}))
    model = AutoModelForCausalLM.from_pretrained(export_run(run, tmp_path / "out"))
    assert model.config.vocab_size == tiny.config().vocab_size
    (run / "given.json").write_text(json.dumps(noted | {"model": True}))
    with pytest.raises(UserError, match="trained a model given from Python"):
        export_run(run, tmp_path / "other")


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        export_run(tmp_path, tmp_path / "out")
    make(tmp_path, total_episodes=RUN.batch_size, save_steps=None).train()
    with pytest.raises(UserError, match="has no best; it has: final"):
        export_run(tmp_path / "run", tmp_path / "out", "best")
    tiny.folder(tmp_path / "taken")
    with pytest.raises(UserError, match="there already"):
        export_run(tmp_path / "run", tmp_path / "taken")
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/out"):
        with pytest.raises(UserError, match="give another --output"):
            export_run(tmp_path / "run", tmp_path / name)
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"


def test_an_agent_is_exported_by_its_name(tmp_path, capsys):
    tiny.folder(tmp_path / "model")
    run, out = tmp_path / "run", tmp_path / "out"
    config = replace(
        signals.FAST, model=str(tmp_path / "model"), output_dir=str(run), total_episodes=32
    )
    made = MultiAgentTrainer(None, signals.Signals(), config)
    made.train()
    with pytest.raises(UserError, match="give --checkpoint final/listener or final/speaker"):
        export_run(run, out)
    export_run(run, out, "final/speaker")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    with torch.no_grad():
        got = model(input_ids=TOKENS).logits
    with made.backbone.policy_is("speaker"):
        torch.testing.assert_close(got, policy_logits(made.backbone), rtol=0, atol=1e-4)
    with made.backbone.policy_is("listener"):
        assert (got - policy_logits(made.backbone)).abs().max() > 1e-3
    assert main(["eval", str(run)]) == 2
    assert "trained agents, which answer each other" in capsys.readouterr().err
