"""Zephyr, 7B, the supervised stage: Mistral on UltraChat, https://arxiv.org/abs/2310.16944; 8 x A100 or H100 (80 GB).

    python -m itjax.main --config=configs/zephyr_7b.py --config.model=FOLDER --config.files='ultrachat/*.jsonl'

FOLDER is Mistral-7B-v0.1; without it the preset is only a shape, from nothing. As published: rate 2e-5, cosine, 10 %
warm-up, 1 epoch, 16 rows of 2048 tokens per device: 128 rows on 8 devices, packed there too.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Optimizer, Parallel, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/zephyr_7b",
            epochs=1.0,
            files="",
            format="zephyr",
            length=2048,
            rows=128,
            accumulate=4,
            model="mistral_7b_v01",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(learning_rate=2e-5, schedule="cosine", warmup=0.1, b2=0.999, weight_decay=0.0),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=200),
        )
    )
