"""A tiny decoder learns to follow instructions from scratch, on four embedded task families; about 3 minutes on two CPU cores.

    python -m itjax.main --config=configs/quickstart.py

Prints exact match per family before and after, on phrasings that it was trained on and on phrasings that it never saw.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Architecture, Checkpoint, Evaluation, Loss, Optimizer, Run, Source


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/quickstart",
            steps=1500,
            sources={
                "triage": Source(task="triage", examples=8000),
                "arithmetic": Source(task="arithmetic", examples=8000),
                "functions": Source(task="functions", examples=8000),
                "support": Source(task="support", examples=8000),
            },
            vocab_size=1024,
            length=256,
            rows=8,
            model="tiny",
            architecture=Architecture(),
            loss=Loss(chunk=2048),
            optimizer=Optimizer(learning_rate=6e-3, warmup=0.03, weight_decay=0.0),
            evaluation=Evaluation(every=500, examples=64, generate=64, max_tokens=128),
            checkpoint=Checkpoint(every=250),
        )
    )
