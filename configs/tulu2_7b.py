"""Tulu 2, 7B: Llama 2 on the Tulu 2 mixture, https://arxiv.org/abs/2311.10702; 8 x A100 or H100 (80 GB).

    python -m itjax.main --config=configs/tulu2_7b.py --config.model=FOLDER --config.files='tulu2/*.jsonl'

FOLDER is Llama-2-7B; without it the preset is only a shape, from nothing. As published: rate 2e-5, linear, 3 % warm-up, 3
epochs, no weight decay, 128 examples per step, no clipping. Their rows are single examples of up to 4096 tokens (8192 in
the released model). Ours are packed: 16 rows of 4096 are 128 examples of 500 tokens. For batches to the letter:
--config.packing=False --config.rows=128 --config.accumulate=16. Adam's b2 is PyTorch's default there.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Evaluation, Optimizer, Parallel, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/tulu2_7b",
            epochs=3.0,
            files="",
            format="tulu",
            length=4096,
            rows=16,
            truncation="keep_start",
            model="llama2_7b",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(
                learning_rate=2e-5, schedule="linear", warmup=0.03, b2=0.999, weight_decay=0.0, clip_norm=0.0
            ),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=500),
            evaluation=Evaluation(every=500),
        )
    )
