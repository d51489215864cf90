"""OLMo 2, 7B, the supervised stage: https://arxiv.org/abs/2501.00656; 8 x H100 (80 GB).

    python -m itjax.main --config=configs/olmo2_7b.py --config.model=FOLDER --config.files='tulu3_olmo2/*.jsonl'

FOLDER is OLMo-2-1124-7B; without it the preset is only a shape, from nothing. As published: rate 1e-5, linear, 3 % warm-up,
2 epochs, 128 examples of up to 4096 tokens per step, with Tulu 3's code. Rows are packed, as in tulu3_8b.
"""

import tulu3_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = tulu3_8b.get_config()
    config.run_dir = "runs/olmo2_7b"
    config.model = "olmo2_7b"
    config.format = "olmo2"
    config.optimizer.learning_rate = 1e-5
    return config
