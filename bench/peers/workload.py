"""What every side is given: one model, one tokenizer, prompts, a reward, settings.

The model has the shape of Qwen2 and random weights: 12 million, 8.2 of them in the embedding, which
is the head too. Words of the first half of the vocabulary share a direction of the embedding, as
words of a kind do in trained models; the reward of a response is the share of them. So there is
something to learn, for adapters under a frozen head as well.

All prompts have as many tokens, and the ids of the tokenizer's end and padding tokens lie beyond
the model's vocabulary: no response ends early and nothing is padded, on any side.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VOCABULARY = 32000
END, PADDING = VOCABULARY, VOCABULARY + 1
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """The settings that all sides share. A step is one rollout and what is learnt from it."""

    algorithm: str
    """ppo or grpo"""
    lora: bool
    """adapters of rank 16 on every linear layer, or all weights"""
    steps: int
    seed: int = 1
    batch: int = 32
    """responses a step"""
    prompt_tokens: int = 16
    response_tokens: int = 64
    generations: int = 8
    """grpo: responses to a prompt"""
    epochs: int = 4
    """ppo: passes over a rollout; grpo has one"""
    micro: int = 8
    """sequences in one forward and backward"""
    bf16: bool = False
    """TRL: autocast; fastrlhf: base weights and activations"""
    checkpointing: bool = False
    learning_rate: float = 1e-3
    kl_coef: float = 0.05
    """ppo: of the k1 estimate in the reward; grpo: 0, its default everywhere"""
    rank: int = 16
    alpha: float = 32.0
    max_grad_norm: float = 1.0
    """grpo; TRL's ppo does not clip"""
    adam_eps: float = 1e-8

    @property
    def optimizer_steps(self) -> int:
        return self.steps * (self.epochs if self.algorithm == "ppo" else 1)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: str | Path) -> Workload:
        return Workload(**json.loads(Path(path).read_text()))


def matrix_work(workload: Workload) -> float:
    """Floating-point operations of the matrix products that a step cannot do without.

    Counted are those with the base weights, once each: of the layers and the head in sampling, for
    the log-probabilities of policy and reference (ppo), and in every epoch's forward and backward,
    which has two products for a weight that trains and one for a frozen one. Not counted: adapters,
    attention, a critic's own layers, softmax, sampling, the optimizer.
    """
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    heads = 1 + SHAPE["num_key_value_heads"] / SHAPE["num_attention_heads"]
    layers = SHAPE["num_hidden_layers"] * width * (2 * width * heads + 3 * inner)
    responses = workload.batch * workload.response_tokens
    tokens = workload.batch * workload.prompt_tokens + responses
    update = 2 if workload.lora else 3
    passes = 3 + workload.epochs * update if workload.algorithm == "ppo" else 1 + update
    return 2.0 * passes * (tokens * layers + responses * width * VOCABULARY)


def make_model(folder: Path, seed: int = 0) -> None:
    """Write the model and its tokenizer as `save_pretrained` does."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    weight = model.get_input_embeddings().weight.data
    direction = torch.randn(SHAPE["hidden_size"])
    kind = torch.where(torch.arange(VOCABULARY) < VOCABULARY // 2, 1.0, -1.0)
    weight.copy_(0.06 * torch.randn(weight.shape) + 0.02 * kind[:, None] * direction)
    model.save_pretrained(folder)

    words = {f"w{i}": i for i in range(VOCABULARY)} | {"<end>": END, "<pad>": PADDING}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", padding_side="left"
    ).save_pretrained(folder)


def load_tokenizer(folder: str):
    """The tokenizer as it was written: `AutoTokenizer` would make it Qwen2's."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def prompts(workload: Workload, count: int = 512) -> list[str]:
    draw = random.Random(workload.seed)
    tokens = workload.prompt_tokens
    return [" ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(tokens)) for _ in range(count)]


class Reward:
    """The share of a response's tokens that lie in the first half of the vocabulary.

    Called as the trainers call their reward functions. `last` is the mean of the latest call.
    """

    __name__ = "first_half"

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, completion_ids: Sequence[Sequence[int]], **others: object) -> list[float]:
        shares = [sum(x < VOCABULARY // 2 for x in ids) / len(ids) for ids in completion_ids]
        self.last = sum(shares) / len(shares)
        return shares
