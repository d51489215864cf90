"""A run as a page: `python -m itjax.report RUN [RUN...]`. One run gives RUN/report.html, several a comparison beside the first."""

from collections.abc import Sequence

from itjax import cli
from itjax.base.freeze import Fault
from itjax.evaluation import report

HELP = """Make report.html of a run, finished or still going; or compare several runs.

    python -m itjax.report runs/quickstart
    python -m itjax.report runs/quickstart runs/quickstart_one_template

One run: RUN/report.html. Several: comparison.html in the folder that holds the first run. The path is printed.
"""


def command(argv: Sequence[str]) -> int:
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return 0
    run_dirs = list(argv[1:])
    if flag := next((argument for argument in run_dirs if argument.startswith("-")), None):
        raise Fault(f"{flag}: there is no such flag; give run folders only, e.g. itjax report runs/quickstart")
    if not run_dirs:
        raise Fault("RUN: missing; name the folder of a run, e.g. python -m itjax.report runs/quickstart")
    if len(run_dirs) == 1:
        print(report.write(run_dirs[0]))
    else:
        print(report.compare(run_dirs, report.default_comparison(run_dirs[0])))
    return 0


if __name__ == "__main__":
    cli.run(command)
