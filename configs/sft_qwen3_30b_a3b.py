"""Qwen3-30B-A3B, a mixture of 128 experts, on conversations of one's own: all parameters, 64 x TPU v5p.

    python -m itjax.main --config=configs/sft_qwen3_30b_a3b.py --config.model=FOLDER --config.files='data/*.jsonl'

FOLDER is the published model; without it the preset is only a shape, from nothing. 16 bytes per parameter are 490 GB. Eight
devices share the experts of a layer, 16 each. A step is 64 rows of 4096 packed tokens. On 16 x H100 (80 GB) a plan needs 77 GiB
of the 59 GiB that jax takes. metrics.jsonl has `router_balance` and `expert_load`: the fullest expert over the mean.
"""

import sft_llama31_8b
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = sft_llama31_8b.get_config()
    config.run_dir = "runs/sft_qwen3_30b_a3b"
    config.model = "qwen3_30b_a3b"
    config.format = "qwen3"
    config.rows = 64
    config.loss.router_balance = 0.001
    config.parallel.expert = 8
    return config
