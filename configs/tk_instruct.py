"""Tk-Instruct's recipe on a decoder of 3B: tasks by their definitions, https://arxiv.org/abs/2204.07705; 8 GPUs of 80 GB.

    python -m itjax.main --config=configs/tk_instruct.py --config.model=FOLDER --config.sources.tasks.files=FOLDER_OF_TASKS

FOLDER is Llama-3.2-3B: theirs is T5, which reads and writes with two stacks, so this is the recipe and not the model. As
published: constant rate 5e-5, 2 epochs, 2 examples per device and step (16 on 8 devices), questions of up to 1024 and
answers of up to 128 tokens, 100 instances of each task. Rows are single examples, as theirs are. A task with more than
100 instances counts as one with 100; over two epochs it then shows up to 200 of them once, rather than 100 twice.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Mixture, Optimizer, Parallel, Run, Source


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/tk_instruct",
            epochs=2.0,
            sources={"tasks": Source(files="natural_instructions/tasks", mixture=Mixture(cap=100, unit="examples"))},
            format="plain",
            length=1152,
            rows=16,
            packing=False,
            model="llama32_3b",
            dtype="bfloat16",
            remat="full",
            optimizer=Optimizer(learning_rate=5e-5, schedule="constant", warmup=0.0, b2=0.999, weight_decay=0.0),
            parallel=Parallel(data=1, fsdp=-1),
            checkpoint=Checkpoint(every=500),
        )
    )
