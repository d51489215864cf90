"""A tiny decoder learns to follow instructions from scratch, on four embedded task families; 3 to 5 minutes on two CPU cores.

    python -m itjax.main --config=configs/quickstart.py

Prints exact match per family before and after, on phrasings that it was trained on and on phrasings that it never saw.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Evaluation, Optimizer, Run, Source


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/quickstart",
            steps=4000,
            sources={
                "triage": Source(task="triage", examples=16000),
                "arithmetic": Source(task="arithmetic", examples=16000),
                "functions": Source(task="functions", examples=16000),
                "support": Source(task="support", examples=16000),
            },
            vocab_size=1536,
            split_digits=False,
            length=256,
            rows=4,
            model="tiny",
            optimizer=Optimizer(learning_rate=3e-3, warmup=0.03, b2=0.98, weight_decay=0.01),
            evaluation=Evaluation(every=2000, examples=96, generate=96, max_tokens=96),
            checkpoint=Checkpoint(every=500),
        )
    )
