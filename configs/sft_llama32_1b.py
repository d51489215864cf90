"""Llama-3.2-1B on conversations of one's own: all parameters, one GPU of 48 GB or more, or a v5e-8.

    python -m itjax.main --config=configs/sft_llama32_1b.py --config.model=FOLDER --config.files='data/*.jsonl'

FOLDER is the published model; without it the preset is only a shape, from nothing. 16 bytes per parameter are 20 GB. A
step is 16 rows of 2048 packed tokens in 4 micro-batches, about 64 conversations of 500 tokens.
"""

import sft_llama31_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = sft_llama31_8b.get_config()
    config.run_dir = "runs/sft_llama32_1b"
    config.model = "llama32_1b"
    config.length = 2048
    config.rows = 16
    config.accumulate = 4
    config.optimizer.learning_rate = 2e-5
    return config
