"""Train: `python -m itjax.main --config=configs/quickstart.py`. Resumes by itself when run_dir holds a checkpoint."""

from collections.abc import Sequence

from absl import flags

from itjax import cli
from itjax.base import freeze
from itjax.base.schema import Run

HELP = """Train a model. Resumes by itself when run_dir holds a checkpoint.

    python -m itjax.main --config=configs/sft_files.py --config.files='data/*.jsonl' --config.run_dir=runs/mine

Every setting of the config can be overridden as --config.name=value; itjax/base/schema.py lists them.
"""


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    train(freeze.load(argv, flags.FlagValues()))
    return 0


def train(run: Run) -> None:
    """The whole run: cluster, data, model, training, evaluation, report."""
    import jax  # here and below, so that --help and mistakes in the config answer at once
    from rich.console import Console

    from itjax.evaluation import instructions, likelihood, report
    from itjax.parallel import cluster
    from itjax.setup import prepare_data, set_up
    from itjax.train import loop

    cluster.start()
    console = Console(quiet=not cluster.writes())
    loop.check_run_dir(run)
    data = prepare_data(run, console=console)
    parts = set_up(run, data)
    console.print(parts.summary(), highlight=False)
    with jax.set_mesh(parts.mesh):
        evaluators = []
        if data.held:
            evaluators.append(
                likelihood.held_out_loss(
                    parts.model,
                    data.held,
                    mesh=parts.mesh,
                    rows=parts.eval_rows,
                    length=run.length,
                    chunk=run.loss.chunk,
                )
            )
        tasks = [held for held in data.held if held.task] if run.evaluation.generate else []
        answers = None
        if tasks:
            answers = instructions.answer_scores(
                parts.model,
                tasks,
                tokenizer=data.tokenizer,
                fmt=data.format,
                mesh=parts.mesh,
                count=run.evaluation.generate,
                max_tokens=run.evaluation.max_tokens,
            )
            evaluators.append(answers)
        loop.train(
            run,
            model=parts.model,
            mesh=parts.mesh,
            loader=parts.loader,
            evaluators=evaluators,
            flops_per_step=parts.flops_per_step,
            console=console,
        )
    if cluster.writes():
        path = report.write(run.run_dir)
        if tasks:
            console.print(report.task_table(run.run_dir))
        console.print(report.next_commands(run.run_dir, path), highlight=False)


if __name__ == "__main__":
    cli.run(command)
