"""What is personal and what only looks like it, how it is masked, and how long that may take."""

import itertools
import json
import random
import time

import pytest

from itjax.base.records import Conversation, Message, ToolCall
from itjax.base.schema import Filters
from itjax.data import privacy
from itjax.data.privacy import KINDS, Personal, Span
from itjax.data.stages import Example

FOUND = [
    ("email", "Write to anna.lee+news@mail.example.co.uk, please.", "anna.lee+news@mail.example.co.uk"),
    ("email", "我的邮箱是li.wei@example.cn谢谢", "li.wei@example.cn"),
    ("email", "hackers' SophiaAnderson@dayrep.com", "SophiaAnderson@dayrep.com"),
    ("phone", "Ring +41 (0)96 471 07 95 now", "+41 (0)96 471 07 95"),
    ("phone", "(602)272-9781", "(602)272-9781"),
    ("phone", "463-612-6138x036", "463-612-6138x036"),
    ("phone", "Phone: 432 03 163", "432 03 163"),
    ("phone", "28-64-66-98 office", "28-64-66-98"),
    ("phone", "Fax: 9498777106", "9498777106"),
    ("phone", "01.84.17.61.18", "01.84.17.61.18"),
    ("ip", "ping 58.74.121.78.", "58.74.121.78"),
    ("ip", "from 6e40:4041:c617:e898:c11:40d2:c669:2eb4:", "6e40:4041:c617:e898:c11:40d2:c669:2eb4"),
    ("ip", "fe80::1ff:fe23:4567:890a", "fe80::1ff:fe23:4567:890a"),
    ("mac", "eth0 3c:22:fb:9a:01:7e up", "3c:22:fb:9a:01:7e"),
    ("iban", "IBAN DE89 3704 0044 0532 0130 00 and more", "DE89 3704 0044 0532 0130 00"),
    ("iban", "my iban is gb29nwbk60161331926819.", "gb29nwbk60161331926819"),
    ("card", "4111 1111 1111 1111", "4111 1111 1111 1111"),
    ("card", "My card 4222222222222 expires soon", "4222222222222"),
    ("national id", "SSN 531-21-7351", "531-21-7351"),
    ("national id", "social security 531217351", "531217351"),
    ("national id", "her DNI is 54362315K", "54362315K"),
    ("national id", "C.F. RCCMNL83S18D969H", "RCCMNL83S18D969H"),
    ("national id", "CPF 390.533.447-05", "390.533.447-05"),
    ("national id", "NHS number 943 476 5919", "943 476 5919"),
    ("document", "driver's license number is U62928788557186", "U62928788557186"),
    ("birth date", "Date of birth: 12/27/1986", "12/27/1986"),
    ("birth date", "DOB 3 May 1990", "3 May 1990"),
    ("crypto", "send to 1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa"),
    ("crypto", "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq", "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq"),
    ("crypto", "0x52908400098527886E0F7030069857D2E4169EE7", "0x52908400098527886E0F7030069857D2E4169EE7"),
    ("secret", "key AKIAIOSFODNN7EXAMPLA in use", "AKIAIOSFODNN7EXAMPLA"),
    ("secret", "ghp_0123456789abcdefghijABCDEFGHIJ012345", "ghp_0123456789abcdefghijABCDEFGHIJ012345"),
    ("secret", "OPENAI=sk-proj-a1B2c3D4e5F6g7H8i9J0k1L2", "sk-proj-a1B2c3D4e5F6g7H8i9J0k1L2"),
    ("secret", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl"),
    ("secret", 'password = "hunter2!x"', "hunter2!x"),
    ("secret", "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
    ("secret", "The password is Password123!", "Password123!"),
    ("email", "juan@correo.com.py", "juan@correo.com.py"),
    ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", None),
    ("url login", "git clone https://ann:s3cr3tpw@host.example/x.git", "ann:s3cr3tpw"),
    ("url", "(see https://example.org/a?b=c).", "https://example.org/a?b=c"),
]  # fmt: skip
INNOCENT = [
    "Compute 48/2 = 24 and 3.14159265358979 * 2.",
    "There were 12 500 000 people in 1990-2000 and 2001-09-11 was a Tuesday.",
    "ISBN 978-3-16-148410-0, arXiv 2310.11324, order 555-0199-22",
    "Nature (2004) 112-119; pages 100-200, 300-400",
    "version 10.3.2.3 of the program, section 1.2.3.4, netmask 255.255.255.0, localhost 127.0.0.1",
    "std::vector<int> a; Face::add(b); f :: Int -> Int; 12:30:45; 10:20:30:40:50:59",
    "@app.route('/x') @staticmethod user@localhost logo@2x.png git@github.com:a/b.git",
    "0101 1010 0110 and 1000000 and 123456789 and 4111111111111112",
    "password: must be long; your password is required; api_key = os.environ['KEY']; token=<your token>",
    "GB29NWBK60161331926818 is one digit off, as is card 4111111111111112",
    "In 2019-2020 sales rose 12.345.678 to $1,234,567.89 (12%)",
    "commit 52908400098527886e0f7030069857d2e4169ee7",
    "472547338\n+960397912423686\n-------",
]


@pytest.mark.parametrize("kind, text, value", FOUND)
def test_what_is_personal_is_found_where_it_stands(kind, text, value):
    spans = privacy.find(text, frozenset(KINDS))
    assert [(span.kind, text[span.start : span.stop]) for span in spans if span.kind == kind] == [(kind, value or text)]


@pytest.mark.parametrize("text", INNOCENT)
def test_what_only_looks_like_it_is_left(text):
    assert [(span.kind, text[span.start : span.stop]) for span in privacy.find(text)] == []


def test_links_are_looked_for_only_when_asked():
    assert privacy.find("https://example.org/page") == []


def test_one_stretch_is_one_finding():
    text = "mail 4111111111111111@example.org or https://a:4111111111111111@x.org"
    spans = privacy.find(text)
    assert all(one.stop <= other.start for one, other in itertools.pairwise(spans))
    assert [span.kind for span in spans] == ["email", "url login"]


# --- masking ----------------------------------------------------------------------------------------------------------


def conversation(*texts, **last):
    roles = ("user", "assistant")
    messages = [Message(roles[number % 2], text) for number, text in enumerate(texts)]
    if last:
        messages.append(Message("assistant", "", **last))
    return Conversation(tuple(messages), "mine", "mine.jsonl:1")


def masked(given, **options):
    return Personal(Filters(**options)).masked(given)


def test_the_same_value_keeps_its_name_through_a_conversation():
    given = conversation("I am a@x.org, boss is b@x.org", "Hello A@x.org!", "call +1 602 272 9781")
    assert [message.content for message in masked(given).messages] == [
        "I am <EMAIL_1>, boss is <EMAIL_2>",
        "Hello <EMAIL_1>!",
        "call <PHONE_1>",
    ]


def test_reasoning_and_arguments_are_masked_and_json_stays_json():
    call = ToolCall("send", '{"to": ["a@x.org"], "text": "hi \\"you\\"", "retries": 3}')
    other = ToolCall("send", {"to": "a@x.org"})
    given = conversation("mail a@x.org", tool_calls=(call, other), reasoning="They gave a@x.org.")
    turn = masked(given).messages[-1]
    assert turn.reasoning == "They gave <EMAIL_1>."
    assert json.loads(turn.tool_calls[0].arguments) == {"to": ["<EMAIL_1>"], "text": 'hi "you"', "retries": 3}
    assert turn.tool_calls[1].arguments == {"to": "<EMAIL_1>"}


def test_a_turn_of_json_stays_json():
    said = masked(conversation('{"phone": 6022729781, "mails": ["a@x.org, 1"]}')).messages[0].content
    assert json.loads(said) == {"phone": "<PHONE_1>", "mails": ["<EMAIL_1>, 1"]}


def test_findings_say_where_in_a_tool_call():
    given = conversation("go", tool_calls=(ToolCall("send", {"to": ["x", "a@x.org"]}),))
    (finding,) = Personal(Filters()).look(Example(0, "train", given))
    assert (finding.message, finding.part, finding.start, finding.stop) == (1, "tool_calls/0/to/1", 0, 7)
    assert (finding.key, finding.reason, finding.action) == ("mine.jsonl:1", "email", "mask")


def test_a_conversation_without_anything_is_the_same_object():
    given = conversation("What is 2 + 2?", "4")
    assert masked(given) is given


def test_a_value_is_masked_in_the_tags_that_repeat_it():
    given = conversation("Who?", "a@x.org")
    given = Conversation(given.messages, "mine", "k", tags={"references": '["a@x.org"]'})
    assert masked(given).tags == {"references": '["<EMAIL_1>"]'}


def test_a_name_that_the_text_uses_already_is_not_given_again():
    assert masked(conversation("<EMAIL_1> or a@x.org")).messages[0].content == "<EMAIL_1> or <EMAIL_2>"


@pytest.mark.parametrize("kind, text, value", FOUND)
def test_masking_twice_is_masking_once(kind, text, value):
    stage = Personal(Filters(personal_kinds=KINDS))
    once = stage.masked(conversation(text, f"said {text}"))
    assert stage.masked(once) == once
    assert value is None or value not in once.messages[0].content


def test_rows_as_files_have_them_are_masked_at_any_depth():
    row = {"question": "a@x.org?", "options": [{"text": "b@x.org"}, 4], "answer": "a@x.org"}
    assert Personal(Filters()).masked_row(row) == {
        "question": "<EMAIL_1>?",
        "options": [{"text": "<EMAIL_2>"}, 4],
        "answer": "<EMAIL_1>",
    }


# --- settings ---------------------------------------------------------------------------------------------------------


def names(text):
    return [(0, 3, "person")] if text.startswith("Ann") else []


def test_a_finder_of_ones_own_adds_names():
    stage = Personal(Filters(), finder=names)
    assert stage.masked(conversation("Ann is ann@x.org")).messages[0].content == "<PERSON_1> is <EMAIL_1>"
    assert Personal(Filters(personal_finder="tests.data.test_privacy:names")).finder is names


def test_only_the_kinds_asked_for():
    assert masked(conversation("a@x.org 4111111111111111"), personal_kinds=("card",)).messages[0].content == (
        "a@x.org <CARD_1>"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"personal_kinds": ("emial",)}, "'emial' is unknown. Did you mean 'email'"),
        ({"personal_finder": "names"}, "'names' is no function; write module:function"),
        ({"personal_finder": "no.such.module:names"}, "cannot be imported"),
        ({"personal_finder": "json:lods"}, "has no function lods. Did you mean 'loads'"),
    ],
)
def test_a_wrong_setting_is_one_message(options, message):
    with pytest.raises(ValueError, match=r"config\.audit") as error:
        Personal(Filters(**options))
    assert message in str(error.value)


def test_a_finder_that_points_outside_is_a_fault():
    stage = Personal(Filters(), finder=lambda text: [(0, 99, "person")])
    with pytest.raises(ValueError, match=r"personal_finder: span 0 to 99 in a text of 3 characters"):
        stage.masked(conversation("Ann"))


# --- truth ------------------------------------------------------------------------------------------------------------

CARRIERS = ("Please use {} from now on.", "{}", "It was {}, not the other one.\nThanks", "(see {})")


def test_planted_values_are_all_found_and_nothing_else():
    rng = random.Random(0)
    values = [(kind, value) for kind, text, value in FOUND if value and value == text]
    found = wrong = 0
    for number in range(300):
        kind, value = values[number % len(values)]
        text = rng.choice(CARRIERS).format(value) + "\n" + rng.choice(INNOCENT)
        spans = privacy.find(text, frozenset(KINDS))
        found += any(span.kind == kind and text[span.start : span.stop] == value for span in spans)
        wrong += len(spans) - 1
    assert (found, wrong) == (300, 0)


OURS = {
    "EMAIL_ADDRESS": "email", "PHONE_NUMBER": "phone", "IBAN_CODE": "iban", "CREDIT_CARD": "card", "IP_ADDRESS": "ip",
    "US_SSN": "national id", "DOMAIN_NAME": "url", "US_DRIVER_LICENSE": "document",
}  # fmt: skip


def test_marked_spans_of_presidio_are_found(shared_data):
    """Precision and recall by kind; a span counts when it is found from its first to its last character."""
    right, marked, said = ({kind: 0 for kind in OURS.values()} for _ in range(3))
    for name in ("generated_small.json", "synth_dataset_v2.json"):
        for row in json.loads((shared_data / "presidio" / name).read_text()):
            spans = [
                Span(span["start_position"], span["end_position"], OURS[span["entity_type"]])
                for span in row["spans"]
                if span["entity_type"] in OURS
            ]
            found = [span for span in privacy.find(row["full_text"], frozenset(KINDS)) if span.kind in marked]
            for span in spans:
                marked[span.kind] += 1
                right[span.kind] += span in found
            for span in found:
                said[span.kind] += 1
    assert sum(marked.values()) == 401
    for kind in marked:
        assert right[kind] / marked[kind] >= 0.95, (kind, "recall")
        assert right[kind] / said[kind] >= 0.95, (kind, "precision")


# --- time -------------------------------------------------------------------------------------------------------------

ONES = "1" * 40
BAD = (
    "a@", "a@a.", "a.", "1", "1-1-", "1 ", "+1 ", "+111111111111111 ", f"+{ONES}x", f"(01){ONES}x", f"0{'123 ' * 9}x",
    "(1", "0 1 2 ", "12:", "ab:", "::", "a:b::", "1a", "AB12 ", "GB00 0000 ", "eyJaaaaaaaa.", "sk-", "://", "a://b:c",
    "http://a:", "www.", "-----BEGIN ", "password=", "password is ", "passport ", "date of birth is 1 1 ", "bc1q",
    "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "call 12 ", "phone 1", "ssn ", "555-123-", "411111111111", "1.1.", "{{a ", "[",
    " ", "\n", "é", "漢", "İ",
)  # fmt: skip


def seconds(text):
    started = time.process_time()
    privacy.find(text, frozenset(KINDS))
    return time.process_time() - started


@pytest.mark.parametrize("seed", BAD)
def test_time_grows_with_the_text_and_no_faster(seed):
    """Four times the text takes about four times as long; a pattern that backtracks would take sixteen times."""
    short, long = ((seed * size)[:size] + "!" for size in (25_000, 100_000))
    times = [min(seconds(text) for _ in range(2)) for text in (short, long)]
    assert times[1] < 1
    assert times[1] < 9 * times[0] + 0.01


LETTERS = "qWeRtYuIoPaSdFgHjKlZxCvBnMqWeRtYuI"  # drawn without a digit, as some makers do


@pytest.mark.parametrize(
    "key",
    [
        f"hf_{LETTERS}",
        f"glpat-{LETTERS[:20]}",
        "AKIA" + "QWERTYUIOPASDFGH",
        f"https://discord.com/api/webhooks/123456789012345678/{LETTERS * 2}",
        f"gsk_1{LETTERS}{LETTERS[:17]}",
        f"hvs.9{LETTERS}",
        f"dckr_pat_{LETTERS[:26]}7",
        "key-0123456789abcdef0123456789abcdef",
        "0123456789abcdef0123456789abcdef-us12",
        "dapi0123456789abcdef0123456789abcdef",
    ],
)
def test_keys_are_known_by_their_makers_shape(key):
    text = f"I lost it: {key}, sorry."
    assert [text[s.start : s.stop] for s in privacy.find(text) if s.kind == "secret"] == [key.removeprefix("https://")]


@pytest.mark.parametrize(
    "text",
    [
        f"Authorization: Bearer {LETTERS}9",
        f"AccountName=me;AccountKey={LETTERS * 2}+/9abcdefgABCDEFG==;EndpointSuffix=core",
    ],
)
def test_tokens_in_headers_and_connection_strings_are_secrets(text):
    assert [s.kind for s in privacy.find(text)] == ["secret"]


@pytest.mark.parametrize(
    "text",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "Set it to sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx1 first.",
        "The bearer of this letter is 42 years old; a bearer bond is paid to bearer no. 12",
        "7.3.4.9 Results and discussion",
        "Ask 8.8.8.8, everybody does.",
        "part no. 203-885-6701",
        "Sandratown, TX 07392-2120",
        "65 483 681 734 46 571 799 402",  # adds up as a card does, but no card is written so
        "Order 670-2191102-2371282",
    ],
)
def test_manuals_sections_parts_and_lists_are_nobodys(text):
    assert privacy.find(text) == []


def test_a_telephone_in_three_threes_needs_its_word_not_too_far():
    assert [s.kind for s in privacy.find("My mobile number is 888 952 562")] == ["phone"]
    assert privacy.find("The mobile operators of this country have 888 952 562 clients") == []
