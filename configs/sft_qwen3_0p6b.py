"""Qwen3-0.6B on conversations of one's own: all parameters, one GPU of 24 GB or more.

    python -m itjax.main --config=configs/sft_qwen3_0p6b.py --config.model=FOLDER --config.files='data/*.jsonl'

FOLDER is the published model; without it the preset is only a shape, from nothing. 16 bytes per parameter are 10 GB. A
step is 16 rows of 2048 packed tokens in 8 micro-batches, about 64 conversations of 500 tokens. Qwen3's format drops the
reasoning of earlier turns, and learns a turn only as it would be asked for: the first lines of a run count what is left.
"""

import sft_llama31_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = sft_llama31_8b.get_config()
    config.run_dir = "runs/sft_qwen3_0p6b"
    config.model = "qwen3_0p6b"
    config.format = "qwen3"
    config.length = 2048
    config.rows = 16
    config.accumulate = 8
    config.optimizer.learning_rate = 2e-5
    return config
