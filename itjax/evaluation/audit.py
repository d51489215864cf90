"""What an audit has to tell: a manifest that can be checked, and one page to read.

No text of the data reaches the page but short samples. In those everything personal is masked, and offensive words are
covered until the reader uncovers them.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import markup
from rich.table import Table

from itjax.base.files import write_whole
from itjax.base.records import Conversation, Finding
from itjax.base.schema import Filters
from itjax.data import filters, privacy, quality, toxicity
from itjax.data.filters import Examples, Review, Reviewed
from itjax.data.privacy import Names, Span
from itjax.data.sources import BadRow
from itjax.evaluation import page
from itjax.evaluation.chart import percent
from itjax.evaluation.page import escape

MANIFEST, FINDINGS, PAGE = "manifest.json", "findings.jsonl", "report.html"
SAMPLES, CLUSTERS, MEMBERS = 5, 20, 6  # shown of each reason; clusters; rows of a cluster
AROUND, LONGEST = 160, 320  # characters of a sample before and after what was found; of what was found
DUPLICATES = ("exact_duplicates", "near_duplicates")
BLOCK = 1 << 20

# How far the detectors can be trusted, measured on public data: docs/audit.md says how to repeat it.
TRUST: tuple[tuple[str, str, int, float | None, float], ...] = (  # kind, on what, marked, precision, recall
    ("email", "presidio-research", 51, 1.0, 1.0),
    ("phone", "presidio-research", 102, 0.99, 1.0),
    ("phone", "Faker, 22 countries", 2200, None, 0.995),
    ("card", "presidio-research", 146, 1.0, 1.0),
    ("iban", "presidio-research", 21, 1.0, 1.0),
    ("ip", "presidio-research", 16, 1.0, 1.0),
    ("national id (US)", "presidio-research", 19, 1.0, 1.0),
    ("document", "presidio-research", 6, 1.0, 1.0),
    ("url (off by default)", "presidio-research", 40, 1.0, 1.0),
    ("toxic, English list", "hate and offensive tweets", 3351, 0.989, 0.750),
)
STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 12px; margin-top: 18px; }
.tile b { display: block; font-size: 21px; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile > span { color: var(--soft); font-size: 13px; }
details.card { margin-bottom: 12px; } details > summary .soft { font-weight: 400; }
.sample { border-top: 1px solid var(--line); margin-top: 10px; padding-top: 8px; }
.sample code { color: var(--soft); font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
mark { background: var(--bar); color: inherit; border-radius: 3px; padding: 0 2px; }
.masked { background: var(--chip); color: var(--good); border-radius: 3px; padding: 0 3px; }
.veil { background: var(--soft); color: transparent; border-radius: 3px; cursor: pointer; user-select: none; }
.veil:focus { background: var(--chip); color: inherit; outline: 1px solid var(--bad); user-select: text; }
.action { display: inline-block; min-width: 42px; text-align: center; border-radius: 4px; padding: 0 6px; font-size: 12px;
  background: var(--chip); } .drop { color: var(--bad); } .mask { color: var(--good); } .tag { color: var(--soft); }
"""


@dataclass(frozen=True)
class Cluster:
    """A row that is kept and those that repeat it."""

    stage: str
    first: str  # its key
    repeats: tuple[Finding, ...]


def clusters(findings: Iterable[Finding]) -> list[Cluster]:
    """All clusters of duplicates, the largest first."""
    found: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        if finding.stage in DUPLICATES:
            found.setdefault((finding.stage, finding.other), []).append(finding)
    every = [Cluster(stage, first, tuple(repeats)) for (stage, first), repeats in found.items()]
    return sorted(every, key=lambda cluster: -len(cluster.repeats))


# --- the manifest -----------------------------------------------------------------------------------------------------


def manifest(review: Review, *, version: str, bad: Iterable[BadRow] = ()) -> dict[str, Any]:
    """The whole account, ready for JSON. `bad` rows were skipped; `sha256` is of the rest, as `content` writes it."""
    account = {
        "itjax": version,
        "versions": {
            "filters": filters.VERSION,
            "personal": privacy.VERSION,
            "quality": quality.VERSION,
            "toxic": toxicity.VERSION,
        },
        "stages": list(review.names),
        "options": dataclasses.asdict(review.options),
        "sources": review.counts(),
        "skipped": dict(Counter(row.reason for row in bad).most_common()),
        "held_out": [
            {"source": one.name, "rows": one.rows, "tagged": dict(one.tagged), "unreadable": dict(one.unreadable)}
            for one in review.reviewed
            if one.split == "eval"
        ],
        "totals": _totals(review),
        "clusters": _clusters(review),
        "contamination": [
            dataclasses.asdict(one) | {"of_rows": one.of_rows, "of_items": one.of_items} for one in review.contamination
        ],
        "files": _file_hashes(review),
        "findings": {
            "file": FINDINGS,
            "lines": len(review.findings),
            "sha256": _sha256_of(filters.lines(review.findings)),
        },
    }
    return {**account, "sha256": hashlib.sha256(content(account).encode()).hexdigest()}


def content(account: Mapping[str, Any]) -> str:
    """What a manifest's own hash is taken of: its JSON in order of names without spaces."""
    return json.dumps(account, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _totals(review: Review) -> dict[str, Any]:
    train = [one for one in review.reviewed if one.split == "train"]
    sums = {
        words: dict(sum((Counter(getattr(one, words)) for one in train), Counter()).most_common())
        for words in ("dropped", "masked", "tagged", "unreadable")
    }
    return {"rows": sum(one.rows for one in train), "kept": sum(len(one.kept) for one in train), **sums}


def _clusters(review: Review) -> dict[str, Any]:
    found = clusters(review.findings)
    of_stage = {stage: [cluster for cluster in found if cluster.stage == stage] for stage in DUPLICATES}
    return {
        stage: {
            "clusters": len(members),
            "rows": sum(1 + len(cluster.repeats) for cluster in members),
            "largest": max((1 + len(cluster.repeats) for cluster in members), default=0),
        }
        for stage, members in of_stage.items()
        if stage in review.names
    }


def _file_hashes(review: Review) -> dict[str, str]:
    """Files on this machine and the hash of their bytes; of others the fingerprint of the source tells."""
    names = sorted({name for one in review.reviewed for name in one.files})
    return {name: _sha256_of(_blocks(Path(name))) for name in names if Path(name).is_file()}


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _sha256_of(parts: Iterable[bytes | str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def write(folder: Path, review: Review, examples: Examples, *, version: str, bad: Iterable[BadRow] = ()) -> list[Path]:
    """folder/findings.jsonl, manifest.json and report.html."""
    account = manifest(review, version=version, bad=bad)
    write_whole(folder / FINDINGS, "".join(filters.lines(review.findings)))
    write_whole(folder / MANIFEST, json.dumps(account, indent=1, ensure_ascii=False) + "\n")
    write_whole(folder / PAGE, as_page(review, examples, account))
    return [folder / MANIFEST, folder / FINDINGS, folder / PAGE]


# --- the terminal -----------------------------------------------------------------------------------------------------


def table(review: Review) -> Table:
    """A line for each source to train on."""
    shown = Table(title="audit", title_justify="left")
    shown.add_column("source")
    for title in ("rows", "kept", "dropped", "masked", "tagged"):
        shown.add_column(title, justify="right")
    shown.add_column("most")
    for one in review.reviewed:
        if one.split == "train":
            shown.add_row(*_line(one))
    return shown


def _line(one: Reviewed) -> list[str]:
    counts = [f"{one.rows:,}", f"{len(one.kept):,}", f"{one.rows - len(one.kept):,}"]
    counts += [f"{sum(found.values()):,}" for found in (one.masked, one.tagged)]
    most = Counter({**one.tagged, **one.masked, **one.dropped}).most_common(1)
    words = [f"{count:,} {reason.partition(':')[0]}" for reason, count in most]
    return [markup.escape(one.name), *counts, *map(markup.escape, words or [""])]


# --- samples ----------------------------------------------------------------------------------------------------------


class Shown:
    """Texts as the page may show them: personal data masked, words of the lists covered, a little around a place."""

    def __init__(self, options: Filters) -> None:
        self.kinds = frozenset(options.personal_kinds) | privacy.DEFAULT_KINDS
        self.finder = privacy.named_function(options.personal_finder, "config.audit.personal_finder")
        self.lists = toxicity.read_word_lists(options.word_lists)

    def around(self, text: str, start: int, stop: int, *, veil: bool = False) -> str:
        """HTML of a stretch of text; `veil` covers what was found, because a classifier says that it is offensive."""
        stop = min(stop, start + LONGEST)
        personal = privacy.find_all(text, self.kinds, self.finder)
        hidden = privacy.apart([*personal, *self._offensive(text), *_found(start, stop, veil)])
        first, last = max(0, start - AROUND), min(len(text), stop + AROUND)
        names, parts, at = Names([]), ["…" if first else ""], first
        for span in hidden:
            if span.stop <= first or span.start >= last:
                continue
            parts += [escape(text[at : max(at, span.start)]), self._hidden(text, span, names, last)]
            at = span.stop
        return "".join([*parts, escape(text[at:last]), "…" if last < len(text) else ""])

    def _offensive(self, text: str) -> Iterator[Span]:
        text_words = list(toxicity.words(text)) if self.lists else []
        for word_list in self.lists:
            yield from (Span(hit.start, hit.stop, "veil") for hit in word_list.hits(text_words))

    def _hidden(self, text: str, span: Span, names: Names, last: int) -> str:
        shown = text[span.start : min(span.stop, last)]
        if span.kind == "veil":
            return f'<span class="veil" tabindex="0" title="offensive: click to read">{escape(shown)}</span>'
        if span.kind == "mark":
            return f"<mark>{escape(shown)}</mark>"
        return f'<span class="masked">{escape(names.name(span.kind, text[span.start : span.stop]))}</span>'


def _found(start: int, stop: int, veil: bool) -> list[Span]:
    return [Span(start, stop, "veil" if veil else "mark")] if start < stop else []


def _text_of(conversation: Conversation, finding: Finding) -> tuple[str, int, int]:
    """The text that a finding is of, and where; of a whole conversation its turns one after the other."""
    if finding.message is None:
        return "\n".join(f"{message.role}: {message.content}" for message in conversation.messages), 0, 0
    for turn, part, text in privacy.texts(conversation):
        if (turn, part) == (finding.message, finding.part):
            return text, finding.start, finding.stop
    return "", 0, 0


# --- the page ---------------------------------------------------------------------------------------------------------


def as_page(review: Review, examples: Examples, account: Mapping[str, Any]) -> str:
    """The whole page. `examples` are those reviewed, to read the few that are shown."""
    parts = [
        _header(account),
        _sources(review),
        _reasons(review),
        _contaminated(review),
        _cluster_samples(review, examples),
        _samples(review, examples),
        _trust(),
        _settings(account),
    ]
    return page.document("Data audit", "\n".join(parts), style=STYLE)


def _header(account: Mapping[str, Any]) -> str:
    totals = account["totals"]
    tiles = {
        "rows": totals["rows"],
        "kept": totals["kept"],
        "dropped": totals["rows"] - totals["kept"],
        "findings to mask": sum(totals["masked"].values()),
        "findings tagged": sum(totals["tagged"].values()),
        "unreadable": sum(totals["unreadable"].values()),
    }
    cards = "".join(
        f'<div class="card tile"><b>{count:,}</b><span>{words}</span></div>' for words, count in tiles.items()
    )
    return (
        f'<h1>Data audit</h1><p class="soft">stages: {escape(", ".join(account["stages"]) or "none")} · '
        f'manifest {escape(account["sha256"][:16])}</p><div class="tiles">{cards}</div>'
    )


def _sources(review: Review) -> str:
    train = [one for one in review.reviewed if one.split == "train"]
    outcomes = [
        name for name in ("dropped", "masked", "tagged", "unreadable") if any(getattr(one, name) for one in train)
    ]
    rows = [
        [escape(one.name), f"{one.rows:,}", f"{len(one.kept):,}", *(_listed(getattr(one, name)) for name in outcomes)]
        for one in train
    ]
    words = "Every row that is not kept is counted once, under the first reason to drop it."
    return _section("Sources", page.table(["source", "rows", "kept", *outcomes], rows), words)


def _listed(counts: Mapping[str, int]) -> str:
    return "<br>".join(f"{count:,} {escape(reason)}" for reason, count in counts.items()) or "–"


def _reasons(review: Review) -> str:
    counts = Counter((finding.stage, finding.reason, finding.action) for finding in review.findings)
    if not counts:
        return _section("Findings", '<p class="soft">None.</p>')
    rows = [
        [escape(stage), escape(reason), f'<span class="action {action}">{action}</span>', f"{count:,}"]
        for (stage, reason, action), count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    return _section("Findings", page.table(["stage", "reason", "action", "findings"], rows, left=3))


def _contaminated(review: Review) -> str:
    if "leakage" not in review.names:
        return ""
    rows = [
        [
            escape(one.source),
            escape(one.evaluation),
            f"{one.rows_hit:,} of {one.rows:,}",
            percent(one.of_rows),
            f"{one.items_hit:,} of {one.items:,}",
            percent(one.of_items),
        ]
        for one in sorted(review.contamination, key=lambda one: -one.items_hit)
        if one.items_hit or one.rows_hit
    ]
    clean = len(review.contamination) - len(rows)
    head = ["source", "evaluation", "rows that leak", "of the source", "items leaked", "of the evaluation"]
    share = percent(review.options.coverage)
    words = f"Items of which more than {share} is covered by shared 8-grams, and short items repeated whole."
    words += f" Of {len(review.contamination):,} pairs of a source and an evaluation {clean:,} share nothing."
    return _section("Contamination", page.table(head, rows, left=2) if rows else "", words)


def _cluster_samples(review: Review, examples: Examples) -> str:
    found = clusters(review.findings)
    if not found:
        return ""
    telling = [
        one for one in found if one.stage != DUPLICATES[1] or min(repeat.score or 0 for repeat in one.repeats) < 1
    ]
    shown, numbers = Shown(review.options), dict(zip(map(id, review.findings), review.numbers, strict=True))
    cards = []
    for cluster in telling[:CLUSTERS]:
        first = cluster.repeats[0]
        conversation = examples[numbers[id(first)]].conversation
        listed = "".join(f"<br><code>{escape(one.key)}</code> {_score(one)}" for one in cluster.repeats[:MEMBERS])
        more = len(cluster.repeats) - MEMBERS
        cards.append(
            f'<details class="card"><summary>{1 + len(cluster.repeats):,} rows '
            f'<span class="soft">· {escape(cluster.stage.replace("_", " "))} of {escape(cluster.first)}</span></summary>'
            f'<div class="sample"><pre>{shown.around(*_text_of(conversation, dataclasses.replace(first, message=None)))}</pre>'
            f"{listed}{f'<br><span class=soft>and {more:,} more</span>' if more > 0 else ''}</div></details>"
        )
    return _section(
        "Clusters", "".join(cards), f"{len(found):,} clusters of rows that repeat each other, the largest first."
    )


def _samples(review: Review, examples: Examples) -> str:
    """A few of each reason, spread over all; duplicates are shown as clusters."""
    by_reason: dict[tuple[str, str, str], list[int]] = {}
    for place, finding in enumerate(review.findings):
        if finding.stage not in DUPLICATES:
            by_reason.setdefault((finding.stage, finding.reason, finding.action), []).append(place)
    shown, cards = Shown(review.options), []
    for (stage, reason, action), places in sorted(by_reason.items(), key=lambda item: (item[0][0], -len(item[1]))):
        few = places[:: max(1, len(places) // SAMPLES)][:SAMPLES]
        samples = "".join(
            _sample(review.findings[place], examples[review.numbers[place]].conversation, shown) for place in few
        )
        cards.append(
            f'<details class="card"><summary>{escape(stage)}: {escape(reason)} <span class="soft">· {len(places):,}</span> '
            f'<span class="action {action}">{action}</span></summary>{samples}</details>'
        )
    words = "Personal data is masked in every sample. Offensive words are covered; click one to read it."
    return _section("Samples", "".join(cards), words) if cards else ""


def _sample(finding: Finding, conversation: Conversation, shown: Shown) -> str:
    text, start, stop = _text_of(conversation, finding)
    veil = finding.stage == "toxic"
    other = f" → <code>{escape(finding.other)}</code>" if finding.other else ""
    return (
        f'<div class="sample"><code>{escape(finding.key)}</code>{other} {_score(finding)}'
        f"<pre>{shown.around(text, start, stop, veil=veil)}</pre></div>"
    )


def _score(finding: Finding) -> str:
    return "" if finding.score is None else f'<span class="soft">{finding.score:.3g}</span>'


def _trust() -> str:
    rows = [
        [escape(kind), escape(data), f"{count:,}", _share(precision), _share(recall)]
        for kind, data, count, precision, recall in TRUST
    ]
    words = "What the detectors found of what people had marked. Names and places are not looked for unless a finder is given."
    return _section(
        "How far to trust it", page.table(["kind", "measured on", "marked", "precision", "recall"], rows, left=2), words
    )


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)


def _settings(account: Mapping[str, Any]) -> str:
    rows = [[escape(name), escape(json.dumps(value, ensure_ascii=False))] for name, value in account["options"].items()]
    rows += [[escape(name), f"<code>{digest}</code>"] for name, digest in account["files"].items()]
    table = page.table(["setting or file", "value or sha256"], rows, left=2)
    return _section("Settings and files", f"<details><summary>{len(rows):,} lines</summary>{table}</details>")


def _section(title: str, body: str, words: str = "") -> str:
    return f"<h2>{escape(title)}</h2>" + (f'<p class="soft">{escape(words)}</p>' if words else "") + body
