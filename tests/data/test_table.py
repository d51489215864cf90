"""What the table of a mixture shows: the rule and its unit, every share twice, every stage, every row that is missing."""

import io

from rich.console import Console

from itjax.data import table

SHARES = {
    "examples": 40,
    "tokens": 400,
    "trained_tokens": 90,
    "planned_share": {"examples": 0.5, "tokens": 0.875, "trained_tokens": 0.9},
    "realised_share": {"examples": 0.501, "tokens": 0.87, "trained_tokens": 0.91},
}
TOLD = {
    "plan": {
        "unit": "trained_tokens", "rule": "equal", "examples": 1234, "tokens": 56789, "trained_share": 0.25,
        "num_rows": 99, "num_steps": 50, "epochs": 1.5, "fill": 0.987,
    },
    "sources": {
        "[mails]": SHARES | {"kept": 980, "rows_read": 516, "epochs": 2.041, "max_epochs": 3.0, "editions": 2,
                             "dropped": {"leakage: covers an item": 6, "too long": 17, "empty": 3}, "truncated": 5},
    },
    "stages": [{"stage": "late", "first_step": 11, "last_step": 50, "sources": {"[mails]": SHARES}}],
    "filters": {"[mails]": {"dropped": {"leakage: covers an item": 6}, "masked": {"personal: email": 2}, "tagged": {}}},
    "warnings": ["mails is seen often"],
}  # fmt: skip


def shown(width=120):
    out = io.StringIO()
    table.show(TOLD, Console(file=out, width=width))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_the_rule_and_the_unit_stand_first():
    assert shown()[0] == "equal. Weights are shares of the trained tokens."
    assert shown()[1] == "1,234 examples, 56,789 tokens (25.0% trained) in 99 rows, 50 steps, 1.50 epochs; fill 98.7%"


def test_a_source_is_a_line_with_planned_and_realised_shares():
    line = "[mails] 980/1,006 2.04 of 3 in 2 phrasings 50.0% → 50.1% 87.5% → 87.0% 90.0% → 91.0%"
    assert line in shown()
    assert "source kept/read epochs examples tokens trained tokens" in shown()


def test_a_name_is_not_broken_in_a_narrow_terminal():
    assert "[mails] 980/1,006 2.04 of 3 50.0% → 50.1% 87.5% → 87.0% 90.0% → 91.0%" in shown(80)


def test_a_stage_has_its_own_shares():
    at = shown().index("late, steps 11 to 50")
    assert shown()[at + 2] == "[mails] 40 50.0% → 50.1% 87.5% → 87.0% 90.0% → 91.0%"


def test_missing_rows_have_reasons_and_warnings_stand_last():
    assert shown()[-3:] == [
        "[mails]: 6 dropped: leakage: covers an item, 17 dropped: too long, 3 dropped: empty, 5 truncated",
        "[mails]: 2 masked: personal: email",
        "! mails is seen often",
    ]


def test_of_very_many_sources_those_of_a_group_are_one_line():
    """40 examples of each file; 15 files have 10 rows and 14 have 20: 1,160 of 430 is 2.70 passes."""
    one = TOLD["sources"]["[mails]"] | {"realised_share": dict.fromkeys(SHARES["planned_share"], 1 / 30), "dropped": {}}
    one |= {"planned_share": one["realised_share"], "truncated": 0, "editions": 1}
    files = {f"files/{number}": one | {"epochs": 2.0 if number % 2 else 4.0} for number in range(29)}
    out = io.StringIO()
    told = TOLD | {"sources": files | {"[mails]": one}, "stages": []}
    table.show(told, Console(file=out, width=140))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert sum("files" in line for line in lines) == 1
    assert any(line.startswith("files (29 sources) 28,420/28,420 2.70 96.7% → 96.7%") for line in lines)
    assert any(line.startswith("[mails] 980/980 2.04 of 3 3.3% → 3.3%") for line in lines)
