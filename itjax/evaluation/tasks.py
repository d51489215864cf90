"""How right an answer to an embedded task is: a few claims about it, each 1 or 0.

Every answer has `exact_match`. What else is claimed depends on the family and on the answer format of the phrasing:
a metric that has no meaning for an answer (valid JSON, where none was asked for) is absent, not 0.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from itjax.data.tasks import FAMILIES, Field
from itjax.data.templates import Template, fill
from itjax.evaluation import sandbox

PRIMARY: dict[str, str] = {
    "triage": "exact_match",
    "arithmetic": "exact_match",
    "functions": "tests_passed",
    "support": "exact_match",
}
LIMITS = sandbox.Limits()
_ANSWER = re.compile(r"(?:Answer:|Result:|The answer is) *([A-Za-z0-9-]+)\.?\s*$")
_log = logging.getLogger(__name__)


def score(family: str, row: Mapping[str, str], template: Template, completion: str) -> dict[str, float]:
    """Metric -> 1.0 or 0.0, for what a model wrote after the template's prompt with this row."""
    reference = fill(template.answer, row, name=f"task {family!r}: template {template.name!r}")
    claims = {"exact_match": completion.strip() == reference.strip()}
    if reference.startswith("{"):
        claims["valid_json"] = is_valid_json(
            completion, keys=set(json.loads(reference)), schema=FAMILIES[family].schema
        )
    if family in _CLAIMS:
        claims |= _CLAIMS[family](row, completion)
    return {metric: float(holds) for metric, holds in claims.items()}


def score_all(family: str, answers: Sequence[tuple[Mapping[str, str], Template, str]]) -> list[dict[str, float]]:
    """`score` of every (row, template, completion), in order; programs run several at a time."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(lambda answer: score(family, *answer), answers))


def is_valid_json(text: str, *, keys: set[str], schema: Mapping[str, Field]) -> bool:
    """One JSON object with exactly these keys, each once, each value of the type, unit and form the schema names."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return False
    if not isinstance(pairs, list) or not text.lstrip().startswith("{"):
        return False
    return sorted(key for key, _ in pairs) == sorted(keys) and all(schema[key].accepts(value) for key, value in pairs)


def passes(row: Mapping[str, str], source: str) -> bool:
    """Whether the program's function returns what each of the row's tests expects, types included."""
    tests = json.loads(row["tests"])
    calls = tuple(tuple(arguments) for arguments, _ in tests)
    outcome = sandbox.run(sandbox.Program(source, row["name"], calls), limits=LIMITS)
    if outcome.status == "broken":
        _log.warning("sandbox: no program could be run (%s); the answer counts as failed", outcome.detail)
    expected = [value for _, value in tests]
    return outcome.status == "returned" and json.dumps(list(outcome.values)) == json.dumps(expected)  # True is not 1


def _arithmetic(row: Mapping[str, str], completion: str) -> dict[str, bool]:
    found = _ANSWER.search(completion)
    return {"final_answer": found is not None and found[1] == row["answer"]}


def _functions(row: Mapping[str, str], completion: str) -> dict[str, bool]:
    return {"tests_passed": passes(row, completion)}


def _support(row: Mapping[str, str], completion: str) -> dict[str, bool]:
    """The reply cites the given article and no other; it carries the ticket, its priority and the customer's name."""
    words = re.findall(r"\w+", completion)
    cited = {word for word in words if re.fullmatch(r"KB\d+", word)}
    return {
        "cites_article": cited == {row["article"]},
        "carries_ticket": {row["ticket"], row["priority"], row["name"]} <= set(words),
    }


_CLAIMS: dict[str, Callable[[Mapping[str, str], str], dict[str, bool]]] = {
    "arithmetic": _arithmetic,
    "functions": _functions,
    "support": _support,
}
