"""What PEFT cannot adapt is refused in our words."""

import pytest
from transformers import MambaConfig, MambaForCausalLM

from fastrlhf.backbone import SharedBackbone
from fastrlhf.errors import UserError


def test_a_model_that_peft_has_no_adapter_for_says_what_to_set():
    settings = MambaConfig(vocab_size=28, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UserError, match=r"no adapter for a mamba model .*; set use_peft: false"):
        SharedBackbone(MambaForCausalLM(settings))
