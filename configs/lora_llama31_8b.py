"""Llama-3.1-8B with adapters on every linear layer: one H100 (80 GB).

    python -m itjax.main --config=configs/lora_llama31_8b.py --config.model=FOLDER --config.files='data/*.jsonl'

FOLDER is the published model; without it the preset is only a shape, from nothing. The base is kept in bfloat16 (16 GB);
only adapters have a gradient and moments. Rank 256 on all layers, alpha 32 and ten times the rate of full fine-tuning are
what "LoRA Without Regret" found for instruction data, and batches below 32: https://thinkingmachines.ai/blog/lora/
A step is 4 rows of 4096 packed tokens, about 32 conversations of 500 tokens, one row at a time.
"""

import sft_llama31_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = sft_llama31_8b.get_config()
    config.run_dir = "runs/lora_llama31_8b"
    config.lora.rank = 256
    config.lora.alpha = 32.0
    config.lora.learning_rate_multiplier = 10.0
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "constant"
    config.rows = 4
    config.accumulate = 4
    return config
