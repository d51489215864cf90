"""LIMA at 7B: a thousand chosen conversations, https://arxiv.org/abs/2305.11206; 4 x A100 or H100 (80 GB).

    python -m itjax.main --config=configs/lima_7b.py --config.model=FOLDER --config.files='lima/*.jsonl'

FOLDER is LLaMA-7B or Llama-2-7B, which have the same shape; without it the preset is only that shape, from nothing. As
published: rate 1e-5 falling straight to 1e-6, no warm-up, 15 epochs, b1 0.9, b2 0.95, weight decay 0.1, 2048 tokens, 64
examples per step for models of this size. Two things are not: they drop residuals (0 at the bottom to 0.3 at the top),
which this decoder cannot, and their turns end with a token of their own, here with the end of text. Rows are single
examples, as theirs are: of a thousand examples few steps would be left if they were packed.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Optimizer, Parallel, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/lima_7b",
            epochs=15.0,
            files="",
            format="plain",
            length=2048,
            rows=64,
            accumulate=4,
            packing=False,
            truncation="keep_start",
            model="llama2_7b",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(
                learning_rate=1e-5, schedule="linear", warmup=0.0, final=0.1, b1=0.9, b2=0.95, weight_decay=0.1
            ),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=100),
        )
    )
