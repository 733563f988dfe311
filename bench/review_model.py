"""A language model of 2 million parameters that writes movie reviews, made in minutes.

Trained from a fixed seed on the snippets that Hutto and Gilbert published with VADER (10,605 of
them), with a byte-pair tokenizer of its own, and kept in the user's cache in transformers' format.
The texts belong to their authors: they are fetched, and neither they nor the weights are shipped.

    python bench/review_model.py [SEED]      prints the folder and a few samples
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrlhf.data import SDIST, read_snippets
from fastrlhf.pretrained import cache_dir, replace_folder

__all__ = ["review_model", "review_texts"]

END = "<end>"
VOCABULARY = 2048
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
    num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
EPOCHS = 3
BATCH = 16
LEARNING_RATE = 2e-3


def review_texts() -> list[str]:
    """The snippets, fetched once into the user's cache."""
    kept = cache_dir() / "movie-review-snippets.txt"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as temporary:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            source = ["--no-binary", "vaderSentiment", "--dest", temporary, SDIST]
            subprocess.run([*pip, *source], check=True)
            (archive,) = Path(temporary).glob("*.tar.gz")
            made = Path(temporary) / kept.name
            made.write_text("\n".join(" ".join(x.split()) for x in read_snippets(archive)))
            made.rename(kept)
    return kept.read_text().split("\n")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)


def batches(sequences: list[list[int]], generator: torch.Generator) -> list[list[list[int]]]:
    """Sequences of like length together, the batches shuffled; each sequence once."""
    order = torch.randperm(len(sequences), generator=generator).tolist()
    order.sort(key=lambda i: len(sequences[i]))
    cut = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return [
        [sequences[i] for i in cut[j]]
        for j in torch.randperm(len(cut), generator=generator).tolist()
    ]


def padded(sequences: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Inputs, and labels that ignore the padding, both [B, L]."""
    longest = max(map(len, sequences))
    rows = [pad(torch.tensor(x), (0, longest - len(x)), value=-100) for x in sequences]
    labels = torch.stack(rows)
    return labels.clamp(min=0), labels


def pretrain(sequences: list[list[int]], seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    steps = EPOCHS * -(-len(sequences) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    done = 0
    for _ in range(EPOCHS):
        for batch in batches(sequences, generator):
            tokens, labels = padded(batch)
            # Padding is on the right, where nothing that is judged looks.
            loss = model(input_ids=tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done % 200 == 0:
                print(f"pretraining {done}/{steps}: {loss:.2f} nats a token", file=sys.stderr)
    return model.eval()


def review_model(seed: int = 0) -> Path:
    """The folder of the model of ``seed``, trained on first use."""
    folder = cache_dir() / f"review-model-{seed}"
    if folder.is_dir():
        return folder
    texts = review_texts()
    tokenizer = train_tokenizer(texts)
    sequences = [[*ids, 0] for ids in tokenizer(texts)["input_ids"]]
    model = pretrain(sequences, seed)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        replace_folder(made, folder)
    return folder


def main() -> None:
    folder = review_model(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    print(folder)
    torch.manual_seed(0)
    for opening in ("The film provides some great", "Perhaps no picture ever made"):
        tokens = tokenizer(opening, return_tensors="pt")["input_ids"]
        drawn = model.generate(tokens, do_sample=True, max_new_tokens=24, top_k=0)
        print(tokenizer.decode(drawn[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
