"""Check digits, against numbers that were published and, where it is installed, against python-stdnum."""

import importlib
import random

import pytest

from itjax.data import checksums

# Published as examples by whoever issues or documents them.
VALID = {
    checksums.card: ("4111111111111111", "5555555555554444", "378282246310005", "6011111111111117", "3530111333300000"),
    checksums.iban: (
        "DE89370400440532013000",
        "GB29NWBK60161331926819",
        "FR1420041010050500013M02606",
        "NO9386011117947",
    ),
    checksums.base58: ("1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa", "3J98t1WpEZ73CNmQviecrnyiWrnqRhWNLy"),
    checksums.bech32: (
        "bc1qar0srrr7xfkvy5l643lydnw9re59gtzzwf5mdq",
        "bc1p5cyxnuxmeuwuvkwfem96lqzszd02n6xdcjrs20cac6yqjjwudpxqkedrcr",
    ),
    checksums.uk_nhs: ("9434765919",),
    checksums.canada_sin: ("123456782", "130692544"),
    checksums.spain_dni: ("54362315K", "X2482300W"),
    checksums.italy_codice_fiscale: ("RCCMNL83S18D969H",),
    checksums.france_nir: ("295109912611193",),
    checksums.germany_tax: ("36574261809",),
    checksums.netherlands_bsn: ("111222333",),
    checksums.poland_pesel: ("44051401359",),
    checksums.sweden_personnummer: ("8803200016", "198803200016"),
    checksums.finland_hetu: ("131052-308T", "131052308T"),
    checksums.brazil_cpf: ("39053344705",),
    checksums.india_aadhaar: ("234123412346",),
    checksums.china_resident: ("360426199101010071",),
    checksums.singapore_nric: ("S1234567D", "F1234567N", "M1234567K"),
    checksums.mexico_curp: ("BOXW310820HNERXN09",),
    checksums.australia_tfn: ("123456782",),
}
CASES = [(holds, number) for holds, numbers in VALID.items() for number in numbers]


# Remainders of 11 that are cut to one digit miss a few mistakes, and a century is not part of the check.
MISS_SOME = {checksums.brazil_cpf, checksums.mexico_curp, checksums.sweden_personnummer}


def off_by_one(number, *, last_only):
    """The number with one of its digits one larger, for each of them or for the last."""
    for place in range(len(number) - 1 if last_only else 0, len(number)):
        if number[place].isdigit():
            character = number[place]
            yield number[:place] + str((int(character) + 1) % 10) + number[place + 1 :]


@pytest.mark.parametrize("holds, number", CASES, ids=lambda case: getattr(case, "__name__", case))
def test_a_published_number_holds(holds, number):
    assert holds(number)


@pytest.mark.parametrize("holds, number", CASES, ids=lambda case: getattr(case, "__name__", case))
def test_one_digit_mistyped_is_noticed(holds, number):
    passes = [wrong for wrong in off_by_one(number, last_only=holds in MISS_SOME) if _holds(holds, wrong)]
    assert passes == []


def _holds(holds, number):
    try:
        return holds(number)
    except ValueError:  # 0 is no letter of base 58
        return False


@pytest.mark.parametrize("number", ["4111111111111112", "1111111111111117", "411111111111"])
def test_no_card(number):
    """A wrong last digit; a network that does not exist; a Visa of a length that is not issued."""
    assert not checksums.card(number)


def test_a_korean_number_is_a_date_and_a_century():
    assert checksums.korea_rrn("9710131019902")
    assert not checksums.korea_rrn("9713131019902")
    assert not checksums.korea_rrn("9710139019902")


@pytest.mark.parametrize("number", ["GB29NWBK6016133192681", "XX29NWBK60161331926819"])
def test_an_account_has_a_country_and_its_length(number):
    assert not checksums.iban(number)


ORACLES = {
    "canada_sin": ("ca.sin", "ddddddddd"),
    "us_ssn": ("us.ssn", "ddddddddd"),
    "spain_dni": ("es.dni", "ddddddddL"),
    "france_nir": ("fr.nir", "1dd0ddddddddddd"),
    "germany_tax": ("de.idnr", "ddddddddddd"),
    "netherlands_bsn": ("nl.bsn", "ddddddddd"),
    "poland_pesel": ("pl.pesel", "dd0d1dddddd"),
    "sweden_personnummer": ("se.personnummer", "dd0d1ddddd"),
    "brazil_cpf": ("br.cpf", "ddddddddddd"),
    "india_aadhaar": ("in_.aadhaar", "dddddddddddd"),
    "australia_tfn": ("au.tfn", "ddddddddd"),
    "uk_nhs": ("gb.nhs", "dddddddddd"),
}


@pytest.mark.parametrize("name", ORACLES)
def test_random_numbers_are_judged_as_by_stdnum(name):
    module_name, shape = ORACLES[name]
    pytest.importorskip("stdnum")
    module = importlib.import_module(f"stdnum.{module_name}")
    rng = random.Random(0)
    draw = {"d": lambda: rng.choice(checksums.DIGITS), "L": lambda: rng.choice(checksums.LETTERS)}
    numbers = ["".join(draw.get(c, lambda c=c: c)() for c in shape) for _ in range(3000)]
    judged = [getattr(checksums, name)(number) for number in numbers]
    assert judged == [module.is_valid(number) for number in numbers]
    assert 0 < sum(judged) < len(numbers)
