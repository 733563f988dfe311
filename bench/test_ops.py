"""One benchmark a group of candidates: `pytest bench/`, or `fastrlhf bench`.

The rows that count are in bench/results/. pytest-benchmark's own table times the whole rounds of a
group; its JSON (--benchmark-json) has each candidate's times in `extra_info`.
"""

import head_ops
import token_ops
import torch
import vocab_ops
from measure import measure, rows
from plan import HEADS, LOGITS, MUST_SHOW, Group

BUDGET, QUICK_BUDGET = 2.0, 0.7
"""seconds that the rounds of a group take together, if the fewest that count take no longer"""


def test_op(benchmark, group: Group, recorder) -> None:
    option = recorder.config.option
    torch.manual_seed(0)
    module = vocab_ops if group.op in LOGITS else head_ops if group.op in HEADS else token_ops
    problem = module.problem(group, option.device)
    benchmark.group = f"{group.op} {group.mode}"
    budget = QUICK_BUDGET if option.quick else BUDGET
    shown = any(group._replace(without=x.without) == x for x in MUST_SHOW)
    least = 5 if shown else 3
    measured = measure(benchmark, problem, group.without, option.device, budget, least)
    benchmark.extra_info.update(seconds=measured.seconds, skipped=measured.skipped)
    recorder.keep(rows(group, problem, measured), dict(measured.skipped))
