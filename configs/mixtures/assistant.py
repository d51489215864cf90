"""One assistant from eleven kinds of real data: chat, tools, math, tasks and safety; weights are shares of the tokens.

    python -m itjax.audit --config=configs/mixtures/assistant.py --config.data_dir=DATA --out=audit
    python -m itjax.show --config=configs/mixtures/assistant.py --config.data_dir=DATA --mixture
    python -m itjax.main --config=configs/mixtures/assistant.py --config.data_dir=DATA

DATA holds public files under the names below (docs/mixtures.md says where they are from). Half of the tokens are chat and tools;
math and tasks are asked in many phrasings, and a file of Natural-Instructions counts as 200 rows at most. Repeats and
near-repeats, leaks into four evaluations and faulty rows are dropped, personal data is masked, and offensive rows are only
tagged: the safety part is about them. 300 steps of the tiny model (0.67 M parameters) take about 5 minutes on two CPU cores;
the mean of 73 held-out losses falls from 9.5 to 6.0.
"""

from ml_collections import ConfigDict

from itjax.base.freeze import thaw
from itjax.base.schema import Checkpoint, Evaluation, Filters, Mixture, Optimizer, Run, Source


def get_config() -> ConfigDict:
    return thaw(
        Run(
            run_dir="runs/assistant",
            data_dir="data",
            sources={
                "chat": Source(
                    weight=0.3,
                    sources={
                        "oasst": Source(files="oasst/en_100_tree.jsonl"),
                        "alpaca": Source(files="llama_factory/alpaca_en_demo.json"),
                        "vicuna": Source(files="fastchat/dummy_conversation.json"),
                        "seeds": Source(
                            files="self_instruct/seed_tasks.jsonl",
                            columns={"input": "instances.0.input", "output": "instances.0.output"},
                        ),
                    },
                ),
                "tools": Source(weight=0.2, files="llama_factory/glaive_toolcall_en_demo.json"),
                "math": Source(
                    weight=0.2,
                    kind="reasoning",
                    files="flan_cot/gsm8k_train.tsv",
                    columns={"question": "0", "answer": "1", "steps": "2"},
                    few_shot=1,
                ),
                "tasks": Source(
                    weight=0.2,
                    mixture=Mixture(rates="equal"),
                    sources={
                        "instructions": Source(
                            files="natural_instructions/train", mixture=Mixture(cap=200, unit="examples")
                        ),
                        "science": Source(
                            kind="reasoning",
                            files="flan_cot/qasc_train.tsv",
                            columns={"question": "0", "answer": "1", "steps": "2"},
                        ),
                        "sql": Source(files="mlx_wikisql/train.jsonl", columns={"completion": "text"}),
                    },
                ),
                "safety": Source(
                    weight=0.1,
                    sources={
                        "harmless": Source(
                            files="hh_rlhf/harmless_base_test_part1.jsonl", columns={"transcript": "chosen"}
                        ),
                        "moderation": Source(
                            templates="configs/mixtures/moderation.toml",
                            files="hate_speech/labeled_part1.csv",
                            columns={"text": "tweet", "label": "class"},
                            inverted=0.1,
                        ),
                    },
                ),
            },
            mixture=Mixture(unit="tokens"),
            filters=("exact_duplicates", "near_duplicates", "leakage", "personal", "toxic", "quality"),
            audit=Filters(
                leakage_files="ifeval/*.jsonl,human_eval/HumanEval.jsonl.gz,bfcl/*.json,xstest/*.csv",
                word_lists="bad_words/en.txt",
                toxic="tag",
            ),
            bad_rows="skip",
            max_bad_rows=0.02,
            vocab_size=8192,
            format="qwen2",
            length=1024,
            rows=8,
            steps=300,
            model="tiny",
            optimizer=Optimizer(learning_rate=2e-3, warmup=0.05, final=0.1, weight_decay=0.01),
            evaluation=Evaluation(every=100, examples=16, fraction=0.1),
            checkpoint=Checkpoint(every=100),
        )
    )
