"""Train on my files: JSONL, JSON, CSV, TSV, Parquet or ArrayRecord of chat messages, instructions, prompts, trees, ...

    python -m itjax.main --config=configs/sft_files.py --config.files='data/*.jsonl' --config.run_dir=runs/mine

Every file is a source with a held-out loss of its own. The tokenizer is made from the files unless one is named.
The default model (0.4 M parameters with this vocabulary) trains on a laptop; --config.model=small has 5 M, and
itjax/models/families.py the others.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Evaluation, Optimizer, Run


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/sft_files",
            files="",
            eval_files="",
            tokenizer="auto",
            vocab_size=4096,
            format="auto",
            length=1024,
            rows=4,
            steps=400,
            model="tiny",
            optimizer=Optimizer(learning_rate=2e-3, schedule="cosine", warmup=0.05, final=0.1, weight_decay=0.01),
            evaluation=Evaluation(every=100, examples=16, fraction=0.1),
            checkpoint=Checkpoint(every=100),
        )
    )
