"""Alpaca, 7B: 52,000 instructions by self-instruct, https://github.com/tatsu-lab/stanford_alpaca; 4 x A100 or H100 (80 GB).

    python -m itjax.main --config=configs/alpaca_7b.py --config.model=FOLDER --config.files=alpaca_data.json

FOLDER is LLaMA-7B or Llama-2-7B, which have the same shape; without it the preset is only that shape, from nothing. As
published: rate 2e-5, cosine, 3 % warm-up, 3 epochs, 128 examples per step, 512 tokens, no weight decay (13B: 1e-5, 5
epochs). Their rows are single examples; ours are packed: an example with its prompt is about 215 tokens, so 128 of
them fill 54 rows of 512, here 56 for 4 or 8 devices. For batches to the letter: --config.packing=False --config.rows=128.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Optimizer, Parallel, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/alpaca_7b",
            epochs=3.0,
            files="",
            format="alpaca",
            length=512,
            rows=56,
            truncation="keep_start",
            model="llama2_7b",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(learning_rate=2e-5, schedule="cosine", warmup=0.03, b2=0.999, weight_decay=0.0),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=200),
        )
    )
