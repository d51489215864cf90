"""What is in the data: duplicates, leaks, personal data, offensive and faulty rows, as manifest, findings and one page.

    python -m itjax.audit --config=configs/sft_files.py --config.files='data/*.jsonl' --out=audit

The same stages filter a run's data by `config.filters`; an audit changes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itjax import cli
from itjax.base import freeze
from itjax.base.freeze import Fault
from itjax.base.schema import Run
from itjax.data import filters, prepare
from itjax.data.filters import Examples, Review
from itjax.data.sources import RowSource
from itjax.evaluation import audit as account

HELP = """Say what is in the data: duplicates, leaks into evaluations, personal data, offensive and faulty rows.

    python -m itjax.audit --config=configs/sft_files.py --config.files='data/*.jsonl' --out=audit

  --out=DIR       write DIR/manifest.json, DIR/findings.jsonl and DIR/report.html
  --stages=a,b    which stages; without it those of config.filters, or all that have what they need:
                  exact_duplicates, near_duplicates, leakage, personal, toxic, quality
  --workers=N     processes that look at rows (1)

What the stages look for is config.audit: --config.audit.personal=tag, --config.audit.word_lists='words/*.txt', ...
"""


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    values = flags.FlagValues()
    flags.DEFINE_string("out", None, "the folder to write to", flag_values=values)
    flags.DEFINE_string("stages", None, "names of stages, separated by commas", flag_values=values)
    flags.DEFINE_integer("workers", 1, "processes that look at rows", flag_values=values)
    run = freeze.load(argv, values)
    if not values.out:
        raise Fault("--out: missing; name a folder for the manifest and the page, e.g. --out=audit")
    if values.workers < 1:
        raise Fault(f"--workers: {values.workers} is out of range; it must be at least 1")
    train, held = sources_of(run)
    names = stages_of(run, values.stages)
    review = reviewed(run, train, held, names, workers=values.workers)
    fingerprints = {source.name: source.fingerprint() for source in train}
    written = account.write(Path(values.out), review, Examples(train, held), fingerprints=fingerprints)
    Console().print(account.table(review))
    for path in written:
        print(path)
    return 0


def sources_of(run: Run) -> tuple[list[RowSource], list[RowSource]]:
    """What the run trains on, and what it holds out."""
    parts, held = prepare._open(run)
    return [part.rows for part in parts], [part.rows for part in held]


def stages_of(run: Run, named: str | None) -> tuple[str, ...]:
    """The stages asked for; else those of the config; else all that have what they need."""
    if named:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return run.filters or filters.possible(run.audit)


def reviewed(
    run: Run, train: Sequence[RowSource], held: Sequence[RowSource], names: Sequence[str], *, workers: int
) -> Review:
    """The review, with a bar on the way."""
    columns = (TextColumn("looking at rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rows", total=sum(map(len, (*train, *held))))
        return filters.review(
            train,
            held,
            names,
            run.audit,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            workers=workers,
        )


if __name__ == "__main__":
    cli.run(command)
