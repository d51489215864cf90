"""Llama-3.1-70B on conversations of one's own: all parameters, 64 x H100 (80 GB).

    python -m itjax.main --config=configs/sft_llama31_70b.py --config.model=FOLDER --config.files='data/*.jsonl'

FOLDER is the published model; without it the preset is only a shape, from nothing. 16 bytes per parameter are 1.1 TB, 18 GB
per device; --config.optimizer.moments=int8 makes them 10 bytes, 11 GB per device. A step is 64 rows of 4096 packed tokens,
one per device.
"""

import sft_llama31_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = sft_llama31_8b.get_config()
    config.run_dir = "runs/sft_llama31_70b"
    config.model = "llama31_70b"
    config.rows = 64
    config.optimizer.learning_rate = 5e-6
    return config
