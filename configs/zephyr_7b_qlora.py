"""Zephyr, 7B, with adapters over a base in 4 bits, https://github.com/huggingface/alignment-handbook; one GPU of 24 GB or more.

    python -m itjax.main --config=configs/zephyr_7b_qlora.py --config.model=FOLDER --config.files='ultrachat/*.jsonl'

FOLDER is Mistral-7B-v0.1; without it the preset is only a shape, from nothing. As published: rank 16, alpha 16, dropout 0.05,
ten times the rate of zephyr_7b (2e-4), cosine, 10 % warm-up, 1 epoch of rows of 2048. Rows per step: 16, two at a time.
"""

import zephyr_7b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = zephyr_7b.get_config()
    config.run_dir = "runs/zephyr_7b_qlora"
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.lora.base = "nf4"
    config.lora.learning_rate_multiplier = 10.0
    config.rows = 16
    config.accumulate = 8
    return config
