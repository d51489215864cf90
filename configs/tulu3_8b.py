"""Tulu 3, 8B, the supervised stage: Llama 3.1 on 939,344 conversations, https://arxiv.org/abs/2411.15124; 8 x H100 (80 GB).

    python -m itjax.main --config=configs/tulu3_8b.py --config.model=FOLDER --config.files='tulu3/*.jsonl'

FOLDER is Llama-3.1-8B; without it the preset is only a shape, from nothing. As published: rate 5e-6 (2e-6 for 70B), linear,
3 % warm-up, 2 epochs, 128 examples of up to 4096 tokens per step, no clipping. They added the loss up over the tokens of
a step, which Adam sees as the same direction as our mean; rows are packed, 16 of 4096 for 128 examples of 500 tokens.
"""

import tulu2_7b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = tulu2_7b.get_config()
    config.run_dir = "runs/tulu3_8b"
    config.model = "llama31_8b"
    config.epochs = 2.0
    config.optimizer.learning_rate = 5e-6
    return config
