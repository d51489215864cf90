"""What is in the data: duplicates, leaks, personal data, offensive and faulty rows, as manifest, findings and one page.

    python -m itjax.audit --config=configs/sft_files.py --config.files='data/*.jsonl' --out=audit

The same stages filter a run's data by `config.filters`; an audit changes nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from itjax import __version__, cli
from itjax.base import freeze
from itjax.base.freeze import Fault
from itjax.base.schema import Run
from itjax.data import cache, engine, filters, gather
from itjax.data.filters import Examples
from itjax.evaluation import audit as account

HELP = """Say what is in the data: duplicates, leaks into evaluations, personal data, offensive and faulty rows.

    python -m itjax.audit --config=configs/sft_files.py --config.files='data/*.jsonl' --out=audit

  --out=DIR       write DIR/manifest.json, DIR/findings.jsonl and DIR/report.html
  --stages=a,b    which stages; without it those of config.filters, or all that have what they need:
                  exact_duplicates, near_duplicates, leakage, personal, toxic, quality
  --workers=N     processes that look at rows (1)
  --engine=ray    look at them on the cluster that RAY_ADDRESS names, or on Ray's workers on this machine

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
    flags.DEFINE_string("engine", filters.ENGINES[0], "where rows are looked at", flag_values=values)
    run = freeze.load(argv, values)
    if not values.out:
        raise Fault("--out: missing; name a folder for the manifest and the page, e.g. --out=audit")
    if values.workers < 1:
        raise Fault(f"--workers: {values.workers} is out of range; it must be at least 1")
    if values.engine not in filters.ENGINES:
        raise Fault(f"--engine: {values.engine!r} is unknown; known: {', '.join(filters.ENGINES)}")
    if values.engine == "ray":
        engine.installed()
    with Bar() as bar:
        opened = gather.gather_unfiltered(
            run, folder=Path(run.cache_dir) if run.cache_dir else cache.default_dir(), progress=bar.show
        )
        train, held = opened.train, [part.rows for part in opened.held]
        names = stages_of(run, values.stages)
        review = filters.review(
            train, held, names, gather.options(run), progress=bar.looking, workers=values.workers, on=values.engine
        )
        written = account.write(Path(values.out), review, Examples(train, held), version=__version__, bad=opened.bad)
    Console().print(account.table(review))
    for path in written:
        print(path)
    return 0


def stages_of(run: Run, named: str | None) -> tuple[str, ...]:
    """The stages asked for; else those of the config; else all that have what they need."""
    if named:
        return tuple(name.strip() for name in named.split(",") if name.strip())
    return run.filters or filters.possible(gather.options(run))


class Bar:
    """What goes on, and how far it is, on the way to the terminal's other output."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("opening the data", total=None)

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, what: str, done: int, total: int) -> None:
        self._progress.update(self._task, description=what, completed=done, total=total)

    def looking(self, done: int, total: int) -> None:
        self.show("looking at rows", done, total)


if __name__ == "__main__":
    cli.run(command)
