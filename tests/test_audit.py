"""An audit of a small corpus whose every number is known: what the manifest says, what the page shows and hides."""

import hashlib
import importlib.util
import json
import subprocess
import sys

import pytest

from itjax.evaluation import audit
from tests.contract import runs
from tests.evaluation.test_report import Reader

CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Tunis", "Accra", "Minsk", "Sofia", "Dakar")
LEAKED = "How many marbles does Tom have left when he gives nine of his forty two marbles to Sue?"
LONG = "Pack a warm coat, good shoes, a map of the old town, some coins for the bus and a small book to read while you wait"


def rows():
    """Ten rows about cities, and the planted ones: (question, answer)."""
    yield from ((f"Where is {city}?", f"{city} is a capital, and many people visit it in spring.") for city in CITIES)
    yield ("Where is Oslo?", "Oslo is a capital, and many people visit it in spring.")  # again, word for word
    yield ("What to pack?", LONG + " there.")
    yield ("What to pack?", LONG + " here.")  # again, nearly
    yield (LEAKED, "Thirty three.")  # an evaluation item
    yield ("Mail?", "Write to ann@example.org, or ann@example.org, or call +1 602 272 9781.")
    yield ("Card?", "Use 4111111111111111.")
    yield ("Rude?", "You utter blockhead, call ann@example.org.")  # a word of the list
    yield ("Help?", "I'm sorry, but I can't assist with that.")
    yield ("JSON?", "```json\n{broken\n```")
    yield ("Say <b>nothing</b>", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("audit")
    lines = [json.dumps({"prompt": asked, "completion": answer}) for asked, answer in rows()]
    (place / "mine.jsonl").write_text("\n".join(lines) + "\n")
    (place / "evaluation.jsonl").write_text(json.dumps({"question": LEAKED}) + "\n")
    (place / "words.txt").write_text("blockhead\n")
    return place


def run(place, *more):
    settings = {
        "files": place / "mine.jsonl",
        "evaluation.examples": 0,
        "audit.word_lists": place / "words.txt",
        "audit.leakage_files": place / "evaluation.jsonl",
    }
    config = ["--config=configs/sft_files.py", *(f"--config.{name}={value}" for name, value in settings.items())]
    return subprocess.run(
        [sys.executable, "-m", "itjax.audit", *config, *more],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def done(place):
    done = run(place, f"--out={place / 'out'}")
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def manifest(done, place):
    return json.loads((place / "out" / "manifest.json").read_text())


@pytest.fixture(scope="module")
def page(done, place):
    return (place / "out" / "report.html").read_text()


def test_the_numbers_are_those_that_were_planted(manifest):
    (source,) = manifest["sources"].values()
    assert (source["rows"], source["kept"]) == (20, 14)
    assert source["dropped"] == {
        "exact_duplicates: repeats an earlier example": 1,
        "near_duplicates: nearly repeats an earlier example": 1,
        "leakage: covers an evaluation item": 1,
        "toxic: word of words.txt": 1,
        "quality: broken json": 1,
        "quality: empty answer": 1,
    }
    assert source["masked"] == {"personal: email": 1, "personal: phone": 1, "personal: card": 1}
    assert source["tagged"] == {"quality: refusal": 1}
    assert manifest["clusters"] == {
        "exact_duplicates": {"clusters": 1, "rows": 2, "largest": 2},
        "near_duplicates": {"clusters": 2, "rows": 4, "largest": 2},
    }
    (leak,) = manifest["contamination"]
    assert (leak["rows_hit"], leak["items_hit"], leak["of_items"]) == (1, 1, 1.0)


def test_the_hashes_are_of_the_files_and_of_the_manifest(manifest, place):
    files = {str(place / "mine.jsonl"): hashlib.sha256((place / "mine.jsonl").read_bytes()).hexdigest()}
    assert manifest["files"] == files
    findings = (place / "out" / "findings.jsonl").read_bytes()
    assert manifest["findings"]["sha256"] == hashlib.sha256(findings).hexdigest()
    assert manifest["findings"]["lines"] == len(findings.splitlines())
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    assert manifest["sha256"] == hashlib.sha256(audit.content(rest).encode()).hexdigest()


def test_nothing_personal_leaves_the_data(done, place, page):
    texts = [done.stdout, done.stderr, page]
    texts += [(place / "out" / name).read_text() for name in ("manifest.json", "findings.jsonl")]
    for secret in ("ann@example.org", "602 272", "4111111111111111"):
        assert not any(secret in text for text in texts), secret


def test_the_page_masks_and_covers(page):
    assert "&lt;EMAIL_1&gt;" in page
    veil = '<span class="veil" tabindex="0" title="offensive: click to read">'
    assert page.count("blockhead") == page.count(f"{veil}blockhead</span>") > 0


def test_the_page_is_whole_and_runs_nothing(page):
    assert Reader(page).tags  # every element is closed
    assert "script-src 'none'" in page
    assert "<b>nothing</b>" not in page  # what data says is text


def test_the_terminal_has_a_line_for_the_source(done):
    assert "mine" in done.stdout
    assert "20" in done.stdout


def test_processes_and_stages_chosen(place):
    out = place / "chosen"
    done = run(place, f"--out={out}", "--stages=personal,quality", "--workers=2")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "manifest.json").read_text())["stages"] == ["personal", "quality"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'itjax[audit-ray]'")
def test_ray_writes_the_same_files(done, place):
    there = place / "ray"
    on_ray = run(place, f"--out={there}", "--engine=ray")
    assert on_ray.returncode == 0, on_ray.stderr
    for name in ("manifest.json", "findings.jsonl", "report.html"):
        assert (there / name).read_text() == (place / "out" / name).read_text()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is there")
def test_without_ray_the_message_says_what_to_install(place):
    missing = run(place, f"--out={place / 'none'}", "--engine=ray")
    assert missing.returncode == 2
    assert "pip install 'itjax[audit-ray]'" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "--out: missing"),
        (["--out=x", "--engine=spark"], "--engine: 'spark' is unknown; known: process, ray"),
        (["--out=x", "--stages=personl"], "'personl' is no stage. Did you mean 'personal'?"),
        (["--out=x", "--workers=0"], "--workers: 0 is out of range"),
        (["--out=x", "--config.audit.word_lists=/nowhere"], "nothing matches '/nowhere'"),
    ],
)
def test_a_mistake_is_one_message(place, more, message):
    done = run(place, *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_shows_an_example():
    done = subprocess.run(
        [sys.executable, "-m", "itjax.audit", "--help"],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "python -m itjax.audit --config=configs/sft_files.py" in done.stdout
