"""Train: `python -m itjax.main --config=configs/quickstart.py`. Resumes by itself when run_dir holds a checkpoint."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from itjax import cli
from itjax.base import freeze
from itjax.base.schema import Run

if TYPE_CHECKING:
    from itjax.data.prepare import Data
    from itjax.parts import Parts
    from itjax.train.loop import Evaluator

ANSWERS_AT_ONCE = 64  # prompts that are answered together in an evaluation

HELP = """Train a model. Resumes by itself when run_dir holds a checkpoint.

    python -m itjax.main --config=configs/sft_files.py --config.files='data/*.jsonl' --config.run_dir=runs/mine

Every setting of the config can be overridden as --config.name=value; itjax/base/schema.py lists them.
"""


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    run = freeze.load(argv, flags.FlagValues())
    overrides = [shlex.quote(argument) for argument in argv if argument.startswith("--config.")]
    from itjax.parallel import cluster  # imports jax: after --help and mistakes in the config, which answer at once

    config = " ".join([freeze.config_file(argv), *overrides])
    return cluster.together(lambda: train(run, config=config), explain=cli.explain)


def train(run: Run, *, config: str) -> None:
    """The whole run, inside `cluster.together`: data, model, training, evaluation, report.

    `config` is the file with its overrides, as the commands to try next name them.
    """
    import jax  # here and below, so that --help and mistakes in the config answer at once
    from rich.console import Console

    from itjax import alike, parts
    from itjax.base.files import write_whole
    from itjax.data import manifest
    from itjax.evaluation import report
    from itjax.parallel import cluster
    from itjax.train import loop

    cluster.agree(alike.settings(run), seconds=alike.SETTINGS_WAIT)
    console = Console(quiet=not cluster.writes())
    parts.check_model(run)
    loop.check_run_dir(run)
    data = parts.prepare_data(run, console=console)
    for note in data.notes():
        console.print(f"data   {note}", highlight=False, markup=False, soft_wrap=True)
    built = parts.set_up(run, data)
    console.print(built.summary(), highlight=False, markup=False, soft_wrap=True)
    base = built.folder.fingerprint() if built.folder else ""
    cluster.agree(alike.beginning(run, built.loader, base=base), seconds=cluster.LONGEST_WAIT)
    account = manifest.manifest(data, built.loader)
    if cluster.writes():
        manifest.write(run.run_dir, account)
        data.gathered.save(Path(run.run_dir))
        write_whole(Path(run.run_dir) / data.tokenizer.file_name, data.tokenizer.model)
    with jax.set_mesh(built.mesh):
        loop.train(
            built.run,
            model=built.model,
            mesh=built.mesh,
            loader=built.loader,
            weights=built.weights,
            base=base,
            evaluators=evaluators(run, data, built),
            flops=built.flops,
            data_manifest=account,
            console=console,
        )
    if cluster.writes():
        console.print(report.task_table(run.run_dir) if run.evaluation.generate else report.loss_table(run.run_dir))
        console.print(f"report: {report.write(run.run_dir)}\n", highlight=False, soft_wrap=True)
        console.print(report.next_commands(run.run_dir, config=config), highlight=False, soft_wrap=True)


def evaluators(run: Run, data: "Data", built: "Parts") -> "list[Evaluator]":
    """Held-out loss per source, and scored answers where rows come from embedded tasks."""
    from itjax import parts
    from itjax.evaluation import instructions, likelihood, report, sampler
    from itjax.parallel import cluster
    from itjax.text import chat

    if not data.held:
        return []
    rows = parts.eval_rows(run)
    chosen = [
        likelihood.held_out_loss(
            built.model, data.held, mesh=built.mesh, rows=rows, length=run.length, chunk=run.loss.chunk
        )
    ]
    if run.evaluation.generate and any(part.task for part in data.held):
        generate = sampler.make_sampler(
            built.model,
            stop_ids=sorted(
                chat.stop_ids(data.format, data.tokenizer) | (built.folder.stop_ids if built.folder else set())
            ),
            max_tokens=run.evaluation.max_tokens,
            pad_id=0,
            vocab=data.tokenizer.size,
        )
        chosen.append(
            instructions.answer_scores(
                lambda params, prompts: generate(params, prompts, ANSWERS_AT_ONCE),
                data.held,
                tokenizer=data.tokenizer,
                fmt=data.format,
                count=run.evaluation.generate,
                keep=lambda step, answers: (
                    report.save_samples(run.run_dir, step, answers) if cluster.writes() else None
                ),
            )
        )
    return chosen


if __name__ == "__main__":
    cli.run(command)
