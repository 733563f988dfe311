"""A tiny random language model and tokenizer that behave like real ones: letters are tokens."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def tokenizer() -> PreTrainedTokenizerFast:
    """Every letter is a token; as in SmolLM2, padding is the end-of-sequence token."""
    vocabulary = {"<end>": 0} | {letter: i for i, letter in enumerate(LETTERS, start=1)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")


def config(**changes) -> LlamaConfig:
    settings = dict(
        vocab_size=len(LETTERS) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # A frozen head can only say what its weights allow: large enough to prefer a token.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaConfig(**settings | changes)


def model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(**changes)).eval()


def folder(path: Path) -> Path:
    """The tiny model and tokenizer as save_pretrained writes them."""
    model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path
