"""Llama-3.1-8B on conversations of one's own: all parameters, 8 x H100 (80 GB).

    python -m itjax.main --config=configs/sft_llama31_8b.py --config.model=FOLDER --config.files='data/*.jsonl'

FOLDER is the published model (config.json, *.safetensors, tokenizer); without it the preset is only a shape, from nothing.
Parameters, gradient and two moments in float32 are 16 bytes each, 128 GB in all and 16 GB per device. A step is 16 rows
of 4096 packed tokens, about 128 conversations of 500 tokens; the run's first lines say what it is with your data.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Evaluation, Optimizer, Parallel, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/sft_llama31_8b",
            epochs=2.0,
            files="",
            format="llama3",
            length=4096,
            rows=16,
            model="llama31_8b",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(learning_rate=1e-5, schedule="cosine", warmup=0.03, b2=0.95, clip_norm=1.0),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=200),
            evaluation=Evaluation(every=200),
        )
    )
