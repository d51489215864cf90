"""Llama-3.1-8B on conversations of up to 131,072 tokens: all parameters, 64 x TPU v5p or 64 x H200.

    python -m itjax.main --config=configs/sft_llama31_8b_128k.py --config.model=FOLDER --config.files='data/*.jsonl'
    python -m itjax.plan --config=configs/sft_llama31_8b_128k.py --devices=v5p:4x4x4

FOLDER is the published model; without it the preset is only a shape, from nothing. Eight devices share a row, 16,384
positions each in stripes of 512; a step is 8 rows, a million tokens. Shorter conversations are packed into the same rows.
"""

import sft_llama31_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = sft_llama31_8b.get_config()
    config.run_dir = "runs/sft_llama31_8b_128k"
    config.length = 131072
    config.rows = 8
    config.window = 100
    config.remat = "full"
    config.parallel.context = 8
    return config
