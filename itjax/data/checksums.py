"""Numbers that carry their own proof: cards, accounts, wallets and national identity numbers, each with its check digits.

Every function takes the number without spaces or hyphens, letters upper case where the number has letters, and says
whether it is a number that could have been issued.
"""

import hashlib
from collections.abc import Callable, Sequence
from datetime import date

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# https://www.swift.com/standards/data-standards/iban-international-bank-account-number
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BI": 27, "BR": 29,
    "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DJ": 27, "DK": 18, "DO": 28, "EE": 20, "EG": 29,
    "ES": 24, "FI": 18, "FK": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28,
    "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28,
    "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MN": 20,
    "MR": 27, "MT": 31, "MU": 30, "NI": 28, "NL": 18, "NO": 15, "OM": 23, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "RU": 33, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27,
    "SO": 23, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20, "YE": 30,
}  # fmt: skip


# --- money ------------------------------------------------------------------------------------------------------------


def luhn(digits: str) -> bool:
    """Every second digit from the right doubled, its digits added: the sum ends in 0."""
    odd, even = digits[-1::-2], digits[-2::-2]
    return (sum(map(int, odd)) + sum(sum(divmod(2 * int(digit), 10)) for digit in even)) % 10 == 0


def card(digits: str) -> bool:
    """A payment card: the first digits of a network, a length that it issues, and Luhn."""
    two, three, four = int(digits[:2]), int(digits[:3]), int(digits[:4])
    lengths: Sequence[int] = ()
    if digits[0] == "4":  # Visa
        lengths = (13, 16, 19)
    elif 51 <= two <= 55 or 2221 <= four <= 2720:  # Mastercard
        lengths = (16,)
    elif two in (34, 37):  # American Express
        lengths = (15,)
    elif four == 6011 or 644 <= three <= 649 or two in (62, 65):  # Discover, UnionPay
        lengths = (16, 17, 18, 19)
    elif four in (1800, 2131):  # JCB, old
        lengths = (15,)
    elif 3528 <= four <= 3589:  # JCB
        lengths = (16, 17, 18, 19)
    elif 300 <= three <= 305 or two in (36, 38, 39):  # Diners Club
        lengths = (14, 16)
    elif two == 50 or 56 <= two <= 58 or digits[0] == "6":  # Maestro
        lengths = range(12, 20)
    return len(digits) in lengths and luhn(digits)


def iban(number: str) -> bool:
    """A country, its length, and the whole read as one number with the first four at the end: 1 modulo 97."""
    return len(number) == IBAN_LENGTHS.get(number[:2]) and mod97(number[4:] + number[:4])


def mod97(text: str) -> bool:
    return int("".join(str(int(character, 36)) for character in text)) % 97 == 1


def base58(address: str) -> bool:
    """A wallet of Bitcoin's first kind: 21 bytes, and the first 4 of their double SHA-256."""
    number = 0
    for character in address:
        number = number * 58 + "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz".index(character)
    if number >= 1 << 200:
        return False
    raw = number.to_bytes(25)
    return hashlib.sha256(hashlib.sha256(raw[:21]).digest()).digest()[:4] == raw[21:]


def bech32(address: str) -> bool:
    """A wallet of Bitcoin's second kind: https://github.com/bitcoin/bips/blob/master/bip-0173.mediawiki and 0350."""
    prefix, _, data = address.lower().rpartition("1")
    values = [ord(character) >> 5 for character in prefix] + [0] + [ord(character) & 31 for character in prefix]
    check = 1
    for value in values + ["qpzry9x8gf2tvdw0s3jn54khce6mua7l".index(character) for character in data]:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, term in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= term if top >> bit & 1 else 0
    return check in (1, 0x2BC830A3)


# --- people -----------------------------------------------------------------------------------------------------------


def us_ssn(digits: str) -> bool:
    """No check digit: an area, a group and a serial number that are given out."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def uk_nino(number: str) -> bool:
    """No check digit: two letters that are given out."""
    return number[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")


def uk_nhs(digits: str) -> bool:
    return -_weighted(digits[:9], range(10, 1, -1)) % 11 == int(digits[9])


def canada_sin(digits: str) -> bool:
    return digits[0] not in "08" and luhn(digits)


def spain_dni(number: str) -> bool:
    """DNI, or NIE with X, Y or Z for the first digit."""
    digits = str("XYZ".find(number[0])) + number[1:8] if number[0] in "XYZ" else number[:8]
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == number[8]


def italy_codice_fiscale(number: str) -> bool:
    odd = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
    places = [DIGITS.find(character) if character in DIGITS else LETTERS.find(character) for character in number]
    total = sum(odd[place] for place in places[0:15:2]) + sum(places[1:15:2])
    return LETTERS[total % 26] == number[15]


def france_nir(number: str) -> bool:
    digits = number[:13].replace("2A", "19", 1).replace("2B", "18", 1)
    return digits.isdigit() and 97 - int(digits) % 97 == int(number[13:])


def germany_tax(digits: str) -> bool:
    """Ten digits and one of ISO 7064 MOD 11,10; exactly one of the ten stands again, once or twice."""
    product = 10
    for digit in digits[:10]:
        product = ((int(digit) + product) % 10 or 10) * 2 % 11
    repeated = [count for count in map(digits[:10].count, DIGITS) if count > 1]
    return digits[0] != "0" and repeated in ([2], [3]) and (11 - product) % 10 == int(digits[10])


def netherlands_bsn(digits: str) -> bool:
    return _weighted(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11 == 0 and digits != "000000000"


def poland_pesel(digits: str) -> bool:
    month = int(digits[2:4]) % 20
    born = _is_date(digits[:2], month, digits[4:6])
    return born and -_weighted(digits[:10], (1, 3, 7, 9, 1, 3, 7, 9, 1, 3)) % 10 == int(digits[10])


def sweden_personnummer(digits: str) -> bool:
    """Ten digits, or twelve with the century; of a coordination number the day is 60 too large."""
    digits = digits[-10:]
    day = int(digits[4:6])
    return _is_date(digits[:2], digits[2:4], day - 60 if day > 60 else day) and luhn(digits)


def finland_hetu(number: str) -> bool:
    """ddmmyy, a sign of the century (a hyphen may be left out), three digits, a check character."""
    check = "0123456789ABCDEFHJKLMNPRSTUVWXY"[int(number[:6] + number[-4:-1]) % 31]
    return _is_date(number[4:6], number[2:4], number[:2]) and check == number[-1]


def brazil_cpf(digits: str) -> bool:
    first = -_weighted(digits[:9], range(10, 1, -1)) % 11 % 10
    second = -_weighted(digits[:10], range(11, 1, -1)) % 11 % 10
    return len(set(digits)) > 1 and digits[9:] == f"{first}{second}"


def india_aadhaar(digits: str) -> bool:
    """Verhoeff: the digits permuted by their place and multiplied in the group of the pentagon give 0."""
    permuted = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)
    check = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit)
        for _ in range(place % 8):
            value = permuted[value]
        check = _pentagon(check, value)
    return digits[0] not in "01" and check == 0


def china_resident(number: str) -> bool:
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    return (
        _is_date(number[6:10], number[10:12], number[12:14])
        and "10X98765432"[_weighted(number[:17], weights) % 11] == number[17]
    )


def korea_rrn(digits: str) -> bool:
    """A date and a century. Since October 2020 the last digits are drawn by lot, so the old check digit tells nothing."""
    return digits[6] in "12345678" and _is_date(digits[:2], digits[2:4], digits[4:6])


def singapore_nric(number: str) -> bool:
    total = _weighted(number[1:8], (2, 7, 6, 5, 4, 3, 2)) + {"S": 0, "F": 0, "T": 4, "G": 4, "M": 3}[number[0]]
    checks = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "F": "XWUTRQPNMLK", "G": "XWUTRQPNMLK", "M": "XWUTRQPNJLK"}
    return checks[number[0]][total % 11] == number[8]


def mexico_curp(number: str) -> bool:
    alphabet = "0123456789ABCDEFGHIJKLMN&OPQRSTUVWXYZ"
    total = sum(alphabet.index(character) * weight for character, weight in zip(number, range(18, 1, -1), strict=False))
    return _is_date(number[4:6], number[6:8], number[8:10]) and -total % 10 == int(number[17])


def australia_tfn(digits: str) -> bool:
    return _weighted(digits, (1, 4, 3, 7, 5, 8, 6, 9, 10)) % 11 == 0


Check = Callable[[str], bool]


def _weighted(digits: str, weights: Sequence[int]) -> int:
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=True))


def _is_date(year: str, month: str | int, day: str | int) -> bool:
    """Whether the day exists; a year of two digits may be of the 20th or 21st century."""
    try:
        date(int(year) if len(year) == 4 else 2000 + int(year), int(month), int(day))  # 2000 and 1900 + year leap alike
    except ValueError:
        return False
    return len(year) == 2 or 1850 <= int(year) <= 2100


def _pentagon(a: int, b: int) -> int:
    """The product of two symmetries of a pentagon: 0 to 4 turn it, 5 to 9 turn it over first."""
    if a < 5:
        return (a + b) % 5 if b < 5 else 5 + (a + b) % 5
    return 5 + (a - b) % 5 if b < 5 else (a - b) % 5
