"""SmolLM3, 3B, the supervised stage: https://huggingface.co/blog/smollm3; 8 x H100 (80 GB).

    python -m itjax.main --config=configs/smollm3_3b.py --config.model=FOLDER --config.files='smoltalk2/*.jsonl'

FOLDER is SmolLM3-3B-Base; without it the preset is only a shape, from nothing. As published: rate 2e-5, cosine to a floor, 3
% warm-up, 5 epochs, packed rows of 65,536 tokens, assistant turns only. The floor is a tenth of the peak here, and a step
is 8 rows, one per device: their numbers for both are not in the source that we read.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Optimizer, Parallel, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/smollm3_3b",
            epochs=5.0,
            files="",
            format="chatml",
            learn="all",
            length=65536,
            rows=8,
            model="smollm3_3b",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(learning_rate=2e-5, schedule="cosine", warmup=0.03, final=0.1, b2=0.999),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=200),
        )
    )
