"""Personal data and secrets in a text: where they stand, and the text without them.

    My IBAN is GB31YGJR46272857822446, call 0496 46 46 70      iban 11-33, phone 40-53
    My IBAN is <IBAN_1>, call <PHONE_1>

A pattern finds what may be meant, a check (digits that must add up, words nearby) decides. Every pattern looks at a
bounded stretch from where it starts, in one way only, so time grows with the text and no faster.
Names and places have no pattern: a finder of one's own adds them.
"""

import bisect
import functools
import ipaddress
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from itjax.base.freeze import nearest
from itjax.base.records import Conversation, Finding, Message, ToolCall
from itjax.base.schema import Filters
from itjax.data import checksums
from itjax.data.named import named_function
from itjax.data.stages import Example

VERSION = 2  # of what is found and how it is masked; a new number makes all filtered data anew
BEFORE, AFTER = 48, 32  # characters around a number in which a word may say what it is
Finder = Callable[[str], Iterable[tuple[int, int, str]]]  # of one's own: text -> (start, stop, kind)


class Span(NamedTuple):
    start: int
    stop: int
    kind: str


class Detector(NamedTuple):
    """One kind of data, looked for where a text shows what it `needs`: see `hints`."""

    kind: str
    needs: int
    spans: Callable[[str], Iterator[Span]]


# --- the letters of numbers -------------------------------------------------------------------------------------------

SEPARATORS = str.maketrans("", "", " -./()+\xa0\u2009\u202f\u2011")


def _bare(text: str) -> str:
    """The digits and letters of a number, upper case."""
    return text.translate(SEPARATORS).upper()


def _near(match: re.Match[str], words: re.Pattern[str], before: int = BEFORE) -> bool:
    """Whether a word just before the match says what it is."""
    return words.search(match.string, max(0, match.start() - before), match.start()) is not None


def _labels(words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_])(?:{words})(?![^\W\d_])", re.IGNORECASE)


# --- addresses on the net ---------------------------------------------------------------------------------------------

WORD = r"0-9A-Za-zÀ-ɏͰ-ϿЀ-ӿ"  # Latin, Greek and Cyrillic: a Chinese sentence may touch an address
EMAIL = re.compile(
    rf"(?<![{WORD}_.+%'-])[{WORD}_][{WORD}_.+%'-]{{0,63}}@(?:[{WORD}-]{{1,63}}\.){{1,8}}[A-Za-zÀ-ɏͰ-ϿЀ-ӿ]{{2,24}}(?![{WORD}_@])"
)
NO_DOMAIN = {"png", "jpg", "jpeg", "gif", "svg", "webp", "pdf", "css", "js", "html", "service"}  # endings of files
URL_LOGIN = re.compile(
    r"(?<![\w+.-])[A-Za-z][A-Za-z0-9+.-]{1,15}://(?P<login>[^\s/@:<>\"'{}$]{1,64}:[^\s/@<>\"'{}$]{1,128})@"
)
URL = re.compile(
    r"(?:(?<![A-Za-z])(?:https?|ftp)://|(?<![\w@.])www\.)[^\s<>\"'`{}|\\^]{0,2047}[^\s<>\"'`{}|\\^.,;:!?)\]]"
)
IPV4 = re.compile(r"[0-9](?<![\w.].)(?<!\d[,-].)\d{0,2}(?:\.\d{1,3}){3}(?!\w)(?!\.\d)(?!-\d)")
IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}+:[0-9A-Fa-f:]{1,39}+(?:\.\d{1,3}){0,3}(?![\w:])")
MAC = re.compile(r"(?<![\w:-])[0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![\w:-])")
VERSION_WORDS = _labels(r"v|ver|versions?|release[sd]?|build|firmware|section|§")


def _is_login(match: re.Match[str]) -> bool:
    return not NO_SECRET.search(match["login"])


def _is_email(match: re.Match[str]) -> bool:
    text, end = match.group(), match.end()
    is_clone = text.startswith("git@") and match.string[end : end + 1] == ":"
    return text.rpartition(".")[2].lower() not in NO_DOMAIN and not is_clone


def _is_ipv4(match: re.Match[str]) -> bool:
    parts = match.group().split(".")
    if any(int(part) > 255 or (len(part) > 1 and part[0] == "0") for part in parts):
        return False
    is_nobody = parts[0] in ("0", "127", "255")  # any, this machine, everybody and netmasks
    is_nobody |= all(len(part) == 1 for part in parts)  # the number of a section, or 8.8.8.8, which is nobody's
    return not is_nobody and not VERSION_WORDS.search(match.string, max(0, match.start() - 12), match.start())


def _ipv6s(text: str) -> Iterator[Span]:
    """Addresses, without the colon of the sentence that may follow."""
    for match in IPV6.finditer(text):
        start, stop = match.span()
        stop -= match.group().endswith(":") and not match.group().endswith("::")
        if _is_ipv6(text[start:stop]):
            yield Span(start, stop, "ip")


def _is_ipv6(text: str) -> bool:
    """An address of a network; `Face::add` of a program is none."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    num_groups = sum(map(bool, text.split(":")))
    is_somebody = not (address.is_loopback or address.is_unspecified)
    return is_somebody and (num_groups > 3 or (num_groups > 1 and text[0] in "2fF" and any(c.isdigit() for c in text)))


def _is_mac(match: re.Match[str]) -> bool:
    """Six pairs that are not all the same, nor could be times or dates."""
    pairs = re.split("[:-]", match.group())
    is_time = all(pair.isdigit() and int(pair) < 60 for pair in pairs)
    return len(set(pairs)) > 1 and not is_time and (match[1] == ":" or not "".join(pairs).isdigit())


# --- money ------------------------------------------------------------------------------------------------------------

IBAN = re.compile(
    r"(?<![A-Za-z0-9])[A-Za-z]{2}\d\d(?=[A-Za-z0-9 ]{0,8}\d)(?:[ -]?[A-Za-z0-9]{4}){2,7}(?:[ -]?[A-Za-z0-9]{1,4})?"
)
CARD = re.compile(r"(?<![\w.,+-])(?<!\d )\d(?:[ -]?\d){11,18}(?![\w])(?![.,]\d)(?!-\d)")
CARD_WORDS = _labels(
    r"cards?|cc|credit|debit|visa|master ?card|maestro|amex|american express|discover|diners|jcb|atm|karte|kreditkarte|"
    r"carte|tarjeta|cartão|carta"
)
CARD_GROUPS = {(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 3), (4, 4, 4, 2)}
CARD_LABEL_AFTER = re.compile(r"[,;]? {1,2}(?:exp(?:iry|ires|iration)?|valid|cvv|cvc)(?![^\W_])", re.IGNORECASE)
BITCOIN = re.compile(r"(?<![A-Za-z0-9])[13][1-9A-HJ-NP-Za-km-z]{25,34}(?![A-Za-z0-9])")
BECH32 = re.compile(r"(?<![A-Za-z0-9])(?:bc1[02-9ac-hj-np-z]{38,71}|BC1[02-9AC-HJ-NP-Z]{38,71})(?![A-Za-z0-9])")
ETHEREUM = re.compile(r"(?<![A-Za-z0-9])0x[0-9A-Fa-f]{40}(?![A-Za-z0-9])")


def _ibans(text: str) -> Iterator[Span]:
    """The country says how long; what follows the last digit is text again."""
    for match in IBAN.finditer(text):
        length = checksums.IBAN_LENGTHS.get(match.group()[:2].upper(), 0)
        places = [place for place in range(*match.span()) if text[place].isalnum()]
        if 0 < length <= len(places):
            stop = places[length - 1] + 1
            if not text[stop : stop + 1].isalnum() and checksums.iban(_bare(text[match.start() : stop])):
                yield Span(match.start(), stop, "iban")


def _is_card(match: re.Match[str]) -> bool:
    """A network's number grouped as on cards, or any that adds up where a word says that it is a card.

    12 and 13 digits need the word.
    """
    digits = _bare(match.group())
    if _near(match, CARD_WORDS) or CARD_LABEL_AFTER.match(match.string, match.end()):
        return checksums.luhn(digits)
    groups = tuple(map(len, re.split("[ -]", match.group())))
    return len(digits) > 13 and (len(groups) == 1 or groups in CARD_GROUPS) and checksums.card(digits)


# --- people -----------------------------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """A national number: its shape, its check, and words of which one must stand before it where the shape says little."""

    shape: re.Pattern[str]
    holds: Callable[[str], bool]
    words: tuple[str, ...] = ()
    said: re.Pattern[str] | None = None


def _identity(shape: str, holds: Callable[[str], bool], words: str = "") -> Identity:
    return Identity(re.compile(shape), holds, *((tuple(words.split("|")), _labels(words)) if words else ()))


def _is_issued_apart(_: str) -> bool:
    """Taxpayer numbers of people without a social security number have no rule but their shape."""
    return True


SSN_WORDS = "ssn|social security|social sec|itin|taxpayer|tax payer"
IDENTITIES = (
    _identity(r"\d{3}-\d\d-\d{4}", checksums.us_ssn),
    _identity(r"\d{3} \d\d \d{4}|\d{9}", checksums.us_ssn, SSN_WORDS),
    _identity(r"9\d\d-[5-9]\d-\d{4}", _is_issued_apart, SSN_WORDS),
    _identity(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d\d ?\d\d ?\d\d ?[A-D]", checksums.uk_nino),
    _identity(r"\d{3}[ -]?\d{3}[ -]?\d{4}", checksums.uk_nhs, "nhs"),
    _identity(r"\d{3}[ -]?\d{3}[ -]?\d{3}", checksums.canada_sin, "sin|social insurance"),
    _identity(r"\d{8}-?[A-HJ-NP-TV-Z]", checksums.spain_dni),
    _identity(r"[XYZ]-?\d{7}-?[A-HJ-NP-TV-Z]", checksums.spain_dni),
    _identity(r"[12] ?\d\d ?(?:0[1-9]|1[0-2]|[2-9]\d) ?(?:\d\d|2[AB]) ?\d{3} ?\d{3} ?\d\d", checksums.france_nir),
    _identity(
        r"\d\d ?\d{3} ?\d{3} ?\d{3}",
        checksums.germany_tax,
        "steuer-id|steuernummer|steueridentifikationsnummer|idnr|tin",
    ),
    _identity(r"\d{4}\.?\d\d\.?\d{3}", checksums.netherlands_bsn, "bsn|burgerservicenummer|sofinummer"),
    _identity(r"\d{11}", checksums.poland_pesel, "pesel"),
    _identity(r"\d{6}[-+]\d{4}|(?:19|20)\d{6}-\d{4}", checksums.sweden_personnummer),
    _identity(r"[0-3]\d[01]\d{3}[-+ABCDEFYXWVU]\d{3}[0-9A-Y]", checksums.finland_hetu),
    _identity(r"\d{3}\.\d{3}\.\d{3}-\d\d", checksums.brazil_cpf),
    _identity(r"\d{11}", checksums.brazil_cpf, "cpf"),
    _identity(r"[2-9]\d{3} \d{4} \d{4}", checksums.india_aadhaar),
    _identity(r"[2-9]\d{11}", checksums.india_aadhaar, "aadhaar|aadhar|uidai|uid"),
    _identity(r"[1-9]\d{5}(?:19|20)\d\d[01]\d[0-3]\d{4}[\dXx]", checksums.china_resident),
    _identity(r"\d\d[01]\d[0-3]\d-\d{7}", checksums.korea_rrn),
    _identity(r"[STFGM]\d{7}[A-Z]", checksums.singapore_nric),
    _identity(r"\d{3} ?\d{3} ?\d{3}", checksums.australia_tfn, "tfn|tax file"),
)
# Their digits stand in small groups between letters, so that no long run of digits announces them.
LETTERED = (
    _identity(r"[A-Z]{6}\d\d[A-EHLMPRST]\d\d[A-Z]\d{3}[A-Z]", checksums.italy_codice_fiscale),
    _identity(r"[A-Z]{4}\d{6}[HMX][A-Z]{5}[0-9A-Z]\d", checksums.mexico_curp),
)
JOINED_BEFORE = re.compile(r"(?:[\w.,+$€£-]|\d )\Z")
JOINED_AFTER = re.compile(r"\w|[ .,-]\d")


def _identities(kinds: Sequence[Identity]) -> Callable[[str], Iterator[Span]]:
    def spans(text: str) -> Iterator[Span]:
        lower = text.lower()
        for shape, holds, words, said in kinds:
            if words and not any(word in lower for word in words):
                continue
            for match in shape.finditer(text):
                if (said is None or _near(match, said)) and _stands_alone(match) and holds(_bare(match.group())):
                    yield Span(*match.span(), "national id")

    return spans


def _stands_alone(match: re.Match[str]) -> bool:
    """Whether the number is no part of a longer one, of a sum or of a word."""
    text, (start, stop) = match.string, match.span()
    return not JOINED_BEFORE.search(text, max(0, start - 2), start) and not JOINED_AFTER.match(text, stop, stop + 2)


DOCUMENT = re.compile(
    r"(?<![A-Za-z])(?:passport|driver'?s?'? licen[cs]e|driving licen[cs]e|dl|führerschein|reisepass)"
    r"(?: ?(?:number|no\.?|num\.?|nr\.?|id|#)){0,2}(?: is)?[ :#]{1,3}(?P<number>[A-Z]{0,3}\d[\dA-Z-]{4,16})(?!\w)",
    re.IGNORECASE,
)
BIRTH = re.compile(
    r"(?<![A-Za-z])(?:d\.?o\.?b\.?|dates? of birth|birth ?dates?|geburtsdatum|fecha de nacimiento|date de naissance)"
    r"(?: is)?[ :=\"'-]{1,5}"
    r"(?P<date>\d{1,4}[-./ ]{1,2}\d{1,2}[-./ ]{1,2}\d{1,4}|\d{1,2}(?:st|nd|rd|th)?[ .]{1,2}[^\W\d_]{3,12},? \d{4}"
    r"|[^\W\d_]{3,12} \d{1,2}(?:st|nd|rd|th)?,? \d{4})(?!\d)",
    re.IGNORECASE,
)


def _is_document(match: re.Match[str]) -> bool:
    return sum(character.isdigit() for character in match["number"]) >= 5


# --- telephones -------------------------------------------------------------------------------------------------------

EXTENSION = r"(?: ?(?:x|ext\.?|extension) ?\d{1,6})?"
STARTS = r"(?<![\w+$€£¥#*/=^<-])(?<!\d[.,:])(?<!\d )"  # no part of a longer number, sum or word
ENDS = r"(?!\w)(?![.,:/]\d)(?! ?[%€£$°=^*+×])(?! \d)(?!-\d)"
PHONE = re.compile(
    STARTS
    + r"(?:"
    + "|".join(
        (
            # +41 (0)96 471 07 95, (+30) 6963 796110, +447700677662
            r"(?P<world>(?:\+\d{1,3}[ .-]?\(\d{1,4}\)[ .-]?|\(\+\d{1,3}\)[ .-]?|\+)\d{1,14}(?:[ .-]\d{1,12}){0,6})",
            # 001-420-335-7509, 1 (602) 272-9781, 986.291.2294
            r"(?P<america>(?:(?:001|1)[ .-]?)?"
            r"(?:\(\d{3}\)[ -]?\d{3}[ .-]|\d{3}(?P<sign>[.-])\d{3}(?P=sign)|[2-9]\d\d [2-9]\d\d )\d{4})",
            # (07) 5331 0577, (37) 788-063, (0437)-502004
            r"(?P<bracket>\(0\d{1,4}\)[ -]?\d{4,8}|\(0?\d{1,4}\)[ -]?\d{2,5}(?:[ -]\d{2,5}){1,3})",
            # 0496 46 46 70, 01.84.17.61.18, 0393 1144137
            r"(?P<trunk>0\d{1,5}(?:[ ./-]\d{2,8}){1,5})",
            # 432 03 163, 60-56-85-91, 8 (250) 822-08-66, 9498777106: what the words around it say
            r"(?P<vague>(?:\d{2,4}|\d(?= ))(?:[ ./-]\(?\d{2,8}\)?){1,5}|\d{7,12})",
        )
    )
    + r")"
    + EXTENSION
    + ENDS
)
PHONE_WORDS = _labels(
    r"(?:tele|smart|cell)?phones?(?: number| no)?|phoned|tel|mobiles?|cell|fax|call(?:ed|ing|s)?(?! ?center)|dial(?:ed|ling|ing)?|"
    r"ring|sms|whats ?app|contact|hotline|helpline|voicemail|pager|landline|text (?:me|us|him|her|them)|messages? (?:to|on|at)|"
    r"message on|answering at|pick(?:ing|ed)? up at|reach(?:ed)? (?:me|us|him|her|them|you)|desk|"
    r"telefon\w{0,8}|handy|mobil\w{0,6}|rufnummer|tél|téléphone|portable|appel\w{0,4}|teléfono|móvil|celular|llam\w{1,4}|"
    r"telefone|telefoon|puhelin|電話|电话|手机|тел|телефон"
)
PHONE_LABEL_AFTER = re.compile(
    r"[\s(-]{0,3}(?:is (?:my|his|her|our|their|the) (?:new |old |work |home |private )?)?"
    r"(?:office|fax|mobile|cell|home|work|(?:tele)?phone)(?![^\W_])",
    re.IGNORECASE,
)
DATE = re.compile(
    r"(?:19|20)\d\d[-./ ](?:0?\d|1[0-2])[-./ ][0-3]?\d(?: \d\d)?|[0-3]?\d[-./ ][0-3]?\d[-./ ](?:19|20)\d\d(?: \d\d)?|"
    r"(?:1[4-9]|20)\d\d[ -](?:1[4-9]|20)\d\d"
)
THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:[ .]\d{3}){1,4}")
ZIP, STATE = re.compile(r"\d{5}-\d{4}"), re.compile(r"[A-Z]{2},? \Z")  # TX 04783-3785
NUMBER_WORDS = _labels(
    r"part|sku|item|ticket|catalog|isbn(?:-1[03])?|issn|doi|arxiv|invoice|order|tracking|account|id|serial|patent|zip|code|vol"
)


def _is_phone(match: re.Match[str]) -> bool:
    number = match.group()
    shape = match.lastgroup if match.lastgroup else ""
    digits = _bare(re.split("[xe]", number, maxsplit=1)[0])
    if DATE.fullmatch(number) or set(digits) <= {"0", "1"} or not 7 <= len(digits) <= 15:
        return False
    if shape == "vague" or (shape == "trunk" and len(digits) < 9):
        is_sum = THOUSANDS.fullmatch(number) is not None
        is_group = number.count("(") == number.count(")")
        return len(digits) <= 12 and is_group and _is_said_to_be_phone(match, 24 if is_sum else BEFORE)
    if shape == "bracket":  # "(2004) 112-119" is a year with pages
        is_year = re.match(r"\((?:1[89]|20)\d\d\)", number) is not None
        return len(digits) >= 8 and not is_year
    if ZIP.fullmatch(number) and STATE.search(match.string, max(0, match.start() - 4), match.start()):
        return False
    is_addend = len(digits) < 8 or (len(digits) > 12 and number[1:].isdigit())
    if shape == "world" and is_addend:  # could be the second line of a sum
        return _is_said_to_be_phone(match, BEFORE)
    return not NUMBER_WORDS.search(match.string, max(0, match.start() - 16), match.start())


def _is_said_to_be_phone(match: re.Match[str], before: int) -> bool:
    after = PHONE_LABEL_AFTER.match(match.string, match.end(), match.end() + AFTER)
    return after is not None or _near(match, PHONE_WORDS, before)


# --- secrets ----------------------------------------------------------------------------------------------------------

# Shapes as their makers document them: a prefix that nothing else has, then a length.
KEY = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    + "|".join(
        (
            r"(?:AKIA|ASIA|AGPA|AIDA|AROA|ANPA|ABIA|ACCA)[A-Z0-9]{16}",  # AWS
            r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}",  # GitHub
            r"gl(?:pat|ptt|dt|rt|cbt)-[A-Za-z0-9_-]{20,255}",  # GitLab
            r"xox[abeoprs]-[A-Za-z0-9-]{10,255}|xapp-\d-[A-Za-z0-9-]{10,255}",  # Slack
            r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,512}|GOCSPX-[A-Za-z0-9_-]{28}",  # Google
            r"sk-(?:proj-|svcacct-|admin-|ant-(?:api|admin)\d\d-|or-v1-)?[A-Za-z0-9_-]{20,255}",  # OpenAI, Anthropic
            r"hf_[A-Za-z0-9]{30,40}",  # Hugging Face
            r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,255}|whsec_[A-Za-z0-9+/]{20,255}",  # Stripe
            r"SG\.[A-Za-z0-9_-]{16,64}\.[A-Za-z0-9_-]{16,64}",  # SendGrid
            r"(?:AC|SK)[0-9a-f]{32}",  # Twilio
            r"npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,255}|dop_v1_[0-9a-f]{64}|shpat_[0-9a-f]{32}",
            r"\d{8,10}:AA[A-Za-z0-9_-]{33}",  # Telegram
            r"gsk_[A-Za-z0-9]{40,64}|xai-[A-Za-z0-9]{60,100}|r8_[A-Za-z0-9]{37}|nvapi-[A-Za-z0-9_-]{60,80}",  # Groq, ...
            r"lsv2_[a-z]{2}_[0-9a-f]{32}_[0-9a-f]{10}|pplx-[A-Za-z0-9]{40,64}|tvly-[A-Za-z0-9-]{28,64}",  # LangSmith, ...
            r"hv[sb]\.[A-Za-z0-9_-]{24,512}|dckr_pat_[A-Za-z0-9_-]{27}|dapi[0-9a-f]{32}|gls[ac]_[A-Za-z0-9_+/=]{32,255}",
            r"lin_api_[A-Za-z0-9]{40}|ntn_[A-Za-z0-9]{40,50}|sq0(?:csp|atp)-[A-Za-z0-9_-]{22,43}|figd_[A-Za-z0-9_-]{38,48}",
            r"key-[0-9a-f]{32}|[0-9a-f]{32}-us\d{1,2}|ATATT3[A-Za-z0-9_=-]{60,255}|AGE-SECRET-KEY-1[0-9A-Z]{58}",
            r"eyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,4096}(?:\.[A-Za-z0-9_-]{8,4096})?",  # JSON web token
        )
    )
    + r")(?![A-Za-z0-9])"
)
HOOK = re.compile(  # whoever knows the address may write there
    r"hooks\.slack\.com/services/T[A-Z0-9]{6,16}/B[A-Z0-9]{6,16}/[A-Za-z0-9]{16,64}"
    r"|discord(?:app)?\.com/api/webhooks/\d{16,20}/[A-Za-z0-9_-]{60,80}"
)
BEARER = re.compile(r"\bbearer {1,2}(?P<value>[a-z0-9._~+/-]{20,4096}={0,2})")  # in lower case
PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{2,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
PRIVATE_KEY_END = re.compile(r"-----END (?:[A-Z0-9]{2,12} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
ASSIGNED = re.compile(  # in lower case, so that the engine may look for first letters
    r"(?:passw(?:or)?d|passwort|passphrase|pwd|(?:private|account)[_ -]?key|secret|api[_ -]?key|access[_ -]?key(?:[_ -]?id)?|"
    r"auth[_ -]?token|access[_ -]?token|api[_ -]?token|bearer[_ -]?token|refresh[_ -]?token)"
    r"[\"'`*_]{0,3}\s{0,3}(?:[:=]|=>|is)\s{0,3}[\"'`*]{0,3}"
    r"(?P<value>[^\s\"'`,;<>(){}\[\]]{5,255}[^\s\"'`,;<>(){}\[\].:])"
)
NO_SECRET = re.compile(
    r"your|example|placeholder|change_?me|redacted|xxx|\*\*\*|\.\.\.|…|^\$|%s|^https?:|^os\.|^env\.|"
    r"^process\.|^config\.|^self\.|^request\.|^user\.|^this\.|_key$|_id$",
    re.IGNORECASE,
)


def _assigned(text: str) -> Iterator[Span]:
    lower = text.lower()
    if len(lower) != len(text):  # a few letters become two
        lower = "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)
    for match in itertools.chain(ASSIGNED.finditer(lower), BEARER.finditer(lower)):
        if _is_secret(text[slice(*match.span("value"))]):
            yield Span(*match.span("value"), "secret")


def _is_secret(value: str) -> bool:
    """A value that somebody chose or a machine drew, not a word of prose, a name in a program or something to fill in."""
    has_digit, has_letter = any(map(str.isdigit, value)), any(map(str.isalpha, value))
    has_sign = any(character in "!@#$%^&*?~+" for character in value)
    is_drawn = len(value) >= 24 and has_digit and value.lower() != value != value.upper()
    return is_drawn or (has_letter and (has_digit or has_sign) and not NO_SECRET.search(value))


def _is_key(match: re.Match[str]) -> bool:
    """What a machine drew, not a name with dashes, `sk-xxxx` or what a maker's manual shows."""
    value = match.group()
    is_drawn = any(map(str.isdigit, value)) or value.lower() != value
    return is_drawn and len(set(value)) > 8 and "EXAMPLE" not in value


def _private_keys(text: str) -> Iterator[Span]:
    """From BEGIN to END, or to the end of a text that was cut."""
    at = 0
    while begin := PRIVATE_KEY.search(text, at):
        end = PRIVATE_KEY_END.search(text, begin.end())
        at = end.end() if end else len(text)
        yield Span(begin.start(), at, "secret")


# --- all together -----------------------------------------------------------------------------------------------------

# What a text shows at a glance. Most texts show nothing, so nothing else is asked of them.
AT, BLOCK, COLON, LINK, DOTS, NUMBERS, TOKEN, BIRTHS, LABEL = (1 << bit for bit in range(9))
SIX_DIGITS = re.compile(r"[0-9](?:[ .()\xa0\u2009\u202f-]{0,2}[0-9]){5}")
THREE_DOTS = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
TWO_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
SHORTEST_TOKEN = 16  # characters of a key, a wallet, a MAC or a number with letters in it
LONG_WORD = re.compile(rf"[0-9A-Za-z_.:/+-]{{{SHORTEST_TOKEN},}}+")
# The same questions by one pass that gives every ASCII character its class: ten times faster than the patterns.
DIGIT_CLASSES = (
    {code: " " for code in range(128)} | {ord(c): "0" for c in "0123456789"} | {ord(c): None for c in " .()-"}
)
WORD_CLASSES = {code: "a" if LONG_WORD.match(chr(code) * SHORTEST_TOKEN) else " " for code in range(128)}


def _has_six_digits(text: str) -> bool:
    if text.isascii():
        return "000000" in text.translate(DIGIT_CLASSES)
    return SIX_DIGITS.search(text) is not None


def _has_long_word(text: str) -> bool:
    if text.isascii():
        return "a" * SHORTEST_TOKEN in text.translate(WORD_CLASSES)
    return max(map(len, text.split())) >= SHORTEST_TOKEN


def hints(text: str) -> int:
    """What the text shows, by questions that take a tenth of a microsecond each: about 1 for prose, 10 with digits."""
    shown = 0
    if "@" in text:
        shown |= AT
    if "-----BEGIN" in text:
        shown |= BLOCK
    if ":" in text and TWO_COLONS.search(text):
        shown |= COLON
    if ("/" in text and "//" in text) or "www." in text:
        shown |= LINK
    has_digit = (  # a search for one character is many times faster than a pattern
        "1" in text or "2" in text or "0" in text or "5" in text or "3" in text
        or "4" in text or "9" in text or "8" in text or "6" in text or "7" in text
    )  # fmt: skip
    if not has_digit and ("_" in text or "glpat-" in text or "AKIA" in text) and _has_long_word(text):
        shown |= TOKEN  # the makers of these draw letters alone, always or now and then
    if not has_digit and "!" not in text and "$" not in text and "#" not in text:
        return shown
    lower = text.lower()
    if (
        "key" in lower or "passw" in lower or "secret" in lower
        or "token" in lower or "pwd" in lower or "passp" in lower or "bearer" in lower
    ):  # fmt: skip
        shown |= LABEL
    if not has_digit:
        return shown
    if _has_six_digits(text):
        shown |= NUMBERS
    if "." in text and THREE_DOTS.search(text):
        shown |= DOTS
    if (
        "birth" in lower or "dob" in lower or "d.o.b" in lower
        or "geburts" in lower or "nacimiento" in lower or "naissance" in lower
    ):  # fmt: skip
        shown |= BIRTHS
    if _has_long_word(text):
        shown |= TOKEN
    return shown


def _matches(
    kind: str, regex: re.Pattern[str], holds: Callable[[re.Match[str]], bool] = bool, group: str | int = 0
) -> Callable[[str], Iterator[Span]]:
    """The spans of a pattern, or of one of its groups, where `holds` is true of the match."""
    return lambda text: (Span(*match.span(group), kind) for match in regex.finditer(text) if holds(match))


def _in_long_words(spans: Callable[[str], Iterator[Span]]) -> Callable[[str], Iterator[Span]]:
    """The same, asked of the long words of a text only."""

    def found(text: str) -> Iterator[Span]:
        for at, word in _long_words(text):
            for start, stop, kind in spans(word):
                yield Span(at + start, at + stop, kind)

    return found


@functools.lru_cache(maxsize=1)  # several detectors ask for the same text, one after the other
def _long_words(text: str) -> list[tuple[int, str]]:
    return [(match.start(), match.group()) for match in LONG_WORD.finditer(text)]


def _crypto(regex: re.Pattern[str], holds: Callable[[str], bool]) -> Callable[[str], Iterator[Span]]:
    return _in_long_words(_matches("crypto", regex, lambda match: holds(match.group())))


# Where two claim the same characters, the earlier has them.
DETECTORS = (
    Detector("secret", BLOCK, _private_keys),
    Detector("secret", TOKEN, _in_long_words(_matches("secret", HOOK))),
    Detector("secret", TOKEN, _in_long_words(_matches("secret", KEY, _is_key))),
    Detector("url login", LINK, _matches("url login", URL_LOGIN, _is_login, "login")),
    Detector("email", AT, _matches("email", EMAIL, _is_email)),
    Detector("crypto", TOKEN, _crypto(BITCOIN, checksums.base58)),
    Detector("crypto", TOKEN, _crypto(BECH32, checksums.bech32)),
    Detector("crypto", TOKEN, _crypto(ETHEREUM, bool)),
    Detector("iban", NUMBERS, _ibans),
    Detector("card", NUMBERS, _matches("card", CARD, _is_card)),
    Detector("national id", NUMBERS, _identities(IDENTITIES)),
    Detector("national id", TOKEN, _in_long_words(_identities(LETTERED))),
    Detector("ip", DOTS, _matches("ip", IPV4, _is_ipv4)),
    Detector("mac", TOKEN, _in_long_words(_matches("mac", MAC, _is_mac))),
    Detector("ip", COLON, _ipv6s),
    Detector("document", NUMBERS, _matches("document", DOCUMENT, _is_document, "number")),
    Detector("birth date", BIRTHS, _matches("birth date", BIRTH, group="date")),
    Detector("secret", LABEL, _assigned),
    Detector("phone", NUMBERS, _matches("phone", PHONE, _is_phone)),
    Detector("url", LINK, _matches("url", URL)),
)
KINDS = tuple(dict.fromkeys(detector.kind for detector in DETECTORS))
DEFAULT_KINDS = frozenset(KINDS) - {"url"}  # a link is seldom about a person


def find(text: str, kinds: frozenset[str] = DEFAULT_KINDS) -> list[Span]:
    """What stands where, in the order of the text; no two overlap."""
    shown = hints(text)
    if not shown:
        return []
    found: list[Span] = []
    for kind, needs, spans in DETECTORS:
        if needs & shown and kind in kinds:
            found.extend(spans(text))
    return apart(found) if found else found


def apart(found: Iterable[Span]) -> list[Span]:
    """Spans without those that overlap an earlier one."""
    taken: list[Span] = []
    for span in found:
        at = bisect.bisect(taken, span.start, key=lambda other: other.start)
        is_free = (at == 0 or taken[at - 1].stop <= span.start) and (at == len(taken) or span.stop <= taken[at].start)
        if is_free and span.start < span.stop:
            taken.insert(at, span)
    return taken


# --- without them -----------------------------------------------------------------------------------------------------

Change = Callable[[int, str, str], str]  # (turn, part of it, text) -> text
PLACEHOLDER = re.compile(r"<[A-Z][A-Z_]{1,30}_\d{1,6}>")


class Names:
    """Placeholders of one conversation: the same value has the same name, and no text had that name before."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._taken = {name for text in texts for name in PLACEHOLDER.findall(text)}
        self._names: dict[tuple[str, str], str] = {}
        self._counts: dict[str, int] = {}
        self.of_value: dict[str, str] = {}

    def name(self, kind: str, value: str) -> str:
        same = (kind, value.casefold() if "@" in value else _bare(value))
        if same not in self._names:
            self._names[same] = self._next(kind)
        self.of_value[value] = self._names[same]
        return self._names[same]

    def _next(self, kind: str) -> str:
        while True:
            self._counts[kind] = self._counts.get(kind, 0) + 1
            name = f"<{re.sub('[^A-Z]+', '_', kind.upper())}_{self._counts[kind]}>"
            if name not in self._taken:
                return name


def masked(text: str, spans: Sequence[Span], names: Names | None = None) -> str:
    """The text with a placeholder for every span: `<EMAIL_1>`. Where a number of JSON was, it is in quotes."""
    names = names or Names([text])
    is_json = bool(spans) and text.lstrip()[:1] in ("{", "[") and not isinstance(_parsed(text), str)
    parts, at = [], 0
    for start, stop, kind in spans:
        name = names.name(kind, text[start:stop])
        parts += [text[at:start], f'"{name}"' if is_json and _is_bare(text, start, stop) else name]
        at = stop
    return "".join([*parts, text[at:]])


def _is_bare(text: str, start: int, stop: int) -> bool:
    """Whether a stretch of JSON is a value without quotes."""
    before, after = text[max(0, start - 8) : start].rstrip(), text[stop : stop + 8].lstrip()
    return before[-1:] in (":", "[", ",") and after[:1] in (",", "]", "}")


def mask(conversation: Conversation, findings: Iterable[Finding]) -> Conversation:
    """The conversation with a placeholder for every finding of action "mask", numbered as they come.

    Content, reasoning and the texts inside tool calls' arguments are covered, and the values found there wherever tags
    repeat them; numbers in arguments, names of tools and declared tools are left as they are.
    """
    spans: dict[tuple[int, str], list[Span]] = {}
    for finding in findings:
        if finding.action == "mask" and finding.message is not None:
            span = Span(finding.start, finding.stop, finding.reason)
            spans.setdefault((finding.message, finding.part), []).append(span)
    if not spans:
        return conversation
    names = Names(text for _, _, text in texts(conversation))

    def change(turn: int, part: str, text: str) -> str:
        found = spans.get((turn, part))
        return masked(text, sorted(found), names) if found else text

    messages = tuple(_changed(turn, message, change) for turn, message in enumerate(conversation.messages))
    tags = {name: _without(value, names.of_value) for name, value in conversation.tags.items()}
    return replace(conversation, messages=messages, tags=tags)


def masked_row(row: Any, kinds: frozenset[str] = DEFAULT_KINDS, finder: Finder | None = None) -> Any:
    """A row as the file has it, with a placeholder for everything personal in its texts, at any depth."""
    found: list[str] = []
    _map(row, "", lambda _, text: found.append(text) or text)  # type: ignore[func-returns-value]
    names = Names(found)
    return _map(row, "", lambda _, text: masked(text, find_all(text, kinds, finder), names))


def texts(conversation: Conversation) -> Iterator[tuple[int, str, str]]:
    """(turn, part of it, text) of everything that is looked at."""
    for turn, message in enumerate(conversation.messages):
        yield turn, "content", message.content
        if message.reasoning or message.tool_calls:
            yield from _other_texts(turn, message)


def _other_texts(turn: int, message: Message) -> list[tuple[int, str, str]]:
    """Reasoning, and the texts in the arguments of tool calls."""
    found: list[tuple[int, str, str]] = []

    def note(turn: int, part: str, text: str) -> str:
        found.append((turn, part, text))
        return text

    _changed(turn, message, note)
    return found[1:]  # without the content


def _without(text: str, names: Mapping[str, str]) -> str:
    for value in sorted(names, key=len, reverse=True):
        text = text.replace(value, names[value])
    return text


def _changed(turn: int, message: Message, change: Change) -> Message:
    """The message with its texts changed; the same object if none was."""
    content = change(turn, "content", message.content)
    reasoning = change(turn, "reasoning", message.reasoning) if message.reasoning else message.reasoning
    calls = tuple(
        _changed_call(call, lambda part, text: change(turn, part, text), f"tool_calls/{number}")
        for number, call in enumerate(message.tool_calls)
    )
    if (content, reasoning, calls) == (message.content, message.reasoning, message.tool_calls):
        return message
    return replace(message, content=content, reasoning=reasoning, tool_calls=calls)


def _changed_call(call: ToolCall, change: Callable[[str, str], str], path: str) -> ToolCall:
    """Arguments that are JSON in a text are changed inside and written again, so that they stay JSON."""
    given = call.arguments
    parsed = _parsed(given) if isinstance(given, str) else given
    arguments = _map(parsed, path, change)
    if arguments == parsed:
        return call
    is_written = isinstance(given, str) and not isinstance(parsed, str)
    return replace(call, arguments=json.dumps(arguments, ensure_ascii=False) if is_written else arguments)


def _parsed(text: str) -> Any:
    """What the text says in JSON; the text itself where it says nothing."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _map(value: Any, path: str, change: Callable[[str, str], str]) -> Any:
    """The value with every text in it changed, at any depth; `path` leads to it. Keys stay."""
    if isinstance(value, str):
        return change(path, value)
    if isinstance(value, Mapping):
        return {key: _map(member, f"{path}/{key}", change) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(member, f"{path}/{number}", change) for number, member in enumerate(value))
    return value


# --- the stage --------------------------------------------------------------------------------------------------------


def find_all(text: str, kinds: frozenset[str], finder: Finder | None) -> list[Span]:
    """What the patterns find, and a finder of one's own beside them."""
    found = find(text, kinds)
    if finder is None:
        return found
    more = [Span(int(start), int(stop), str(kind)) for start, stop, kind in finder(text)]
    if outside := next((span for span in more if not 0 <= span.start <= span.stop <= len(text)), None):
        raise ValueError(
            f"config.audit.personal_finder: span {outside.start} to {outside.stop} in a text of {len(text)} characters; "
            "give (start, stop, kind) with offsets in characters"
        )
    return apart([*found, *more])


class Personal:
    """The stage that looks for personal data and secrets in all turns."""

    name = "personal"

    def __init__(self, options: Filters, finder: Finder | None = None) -> None:
        for kind in options.personal_kinds:
            if kind not in KINDS:
                raise ValueError(
                    f"config.audit.personal_kinds: {kind!r} is unknown.{nearest(kind, KINDS)} Known: {', '.join(KINDS)}"
                )
        self.action = options.personal
        self.kinds = frozenset(options.personal_kinds or DEFAULT_KINDS)
        self.finder = finder or named_function(options.personal_finder, "config.audit.personal_finder")

    def look(self, example: Example) -> list[Finding]:
        return self.findings(example.conversation)

    def findings(self, conversation: Conversation) -> list[Finding]:
        key, source = conversation.key, conversation.source
        return [
            Finding(key, source, self.name, kind, self.action, turn, part, start, stop)
            for turn, part, text in texts(conversation)
            for start, stop, kind in find_all(text, self.kinds, self.finder)
        ]

    def masked(self, conversation: Conversation) -> Conversation:
        """The conversation without what the stage finds."""
        return mask(conversation, self.findings(conversation))

    def masked_row(self, row: Any) -> Any:
        return masked_row(row, self.kinds, self.finder)
