"""Orders out of a CSV export, however messy.

Nothing is guessed: a row that can be read in two ways is rejected, with its line and the reason,
and no row is dropped without a word. Nothing is kept between calls, so any worker may answer one.
"""

import csv
import difflib
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any, TypedDict
from zoneinfo import ZoneInfo, available_timezones

_COLUMNS = ["order_id", "ordered_at", "time_zone", "customer", "region"]
_COLUMNS += ["quantity", "unit_price", "discount", "currency"]
# Currencies by their decimals (ISO 4217). An order in another one is rejected.
_CURRENCIES = {
    0: "CLP ISK JPY KRW PYG UGX VND XAF XOF",
    2: "AED ARS AUD BGN BRL CAD CHF CNY COP CZK DKK EGP EUR GBP HKD HUF IDR ILS INR KES MAD MXN "
    "MYR NGN NOK NZD PEN PHP PKR PLN QAR RON RSD SAR SEK SGD THB TRY TWD UAH USD ZAR",
    3: "BHD IQD JOD KWD LYD OMR TND",
}
_DECIMALS = {code: digits for digits, codes in _CURRENCIES.items() for code in codes.split()}
_TIME_FORMATS = ("%d.%m.%Y %H:%M", "%m/%d/%Y %I:%M %p")  # and ISO 8601
_TIME_ZONES = available_timezones()
if not _TIME_ZONES:
    raise RuntimeError("this host has no time-zone database; install tzdata")

_LONGEST_NUMBER = 30
_PRECISION = 100  # room for all digits when three such numbers are multiplied
_PLAIN_NUMBER = re.compile(r"\d+(?:[.,](?P<decimals>\d+))?")
_GROUPED_NUMBER = re.compile(
    r"[1-9]\d{0,2}(?P<mark>[ '.,])\d{3}(?:(?P=mark)\d{3})*"
    r"(?:(?!(?P=mark))[.,](?P<decimals>\d+))?"
)
# No-break and thin spaces, the typographer's minus and apostrophe, full-width punctuation.
_SPELLINGS = str.maketrans("\u00a0\u202f\u2009\u2212\u2019\uff0d\uff0c\uff0e", "   -'-,.", "")

# First line, last line, and the fields between them, or why there are none.
Record = tuple[int, int, list[str] | csv.Error]


class Order(TypedDict):
    """A row that could be read. Numbers are decimal digits, never floats."""

    line: int  # where it begins in the file
    order_id: str
    ordered_at: str  # UTC, ISO 8601
    local_time: str  # the same moment on the customer's clock
    customer: str
    region: str
    currency: str
    quantity: str
    unit_price: str
    discount: str  # percent
    amount: str  # quantity times price less discount, rounded half up to the currency's decimals


class _RejectedError(Exception):
    """Why a row is rejected."""


def parse(text: str) -> dict[str, list[Any]]:
    """Read a CSV file (RFC 4180; commas, semicolons or tabs): its `orders` and its `rejected` rows.

    An order is as in `Order`; a rejected row has `lines` ("7" or "7-9"), `order_id` and `reason`.
    Columns that are not needed are ignored. Raises ValueError if one is missing.
    """
    commands: list[Order] = []
    rejected: list[dict[str, Any]] = []
    line_of: dict[str, int] = {}
    records = _records(text.removeprefix("\ufeff"))
    header = _header(next(records, (1, 1, [])))
    for first, last, fields in records:
        row: dict[str, str] = {}
        try:
            if isinstance(fields, csv.Error):
                raise _RejectedError(f"not CSV: {fields}")
            row = dict(zip(header, (field.strip() for field in fields), strict=False))
            if len(fields) != len(header):
                raise _RejectedError(f"{len(fields)} fields instead of {len(header)}")
            command = _order(first, row)
            earlier = line_of.setdefault(command["order_id"], first)
            if earlier != first:
                raise _RejectedError(f"order_id was seen in line {earlier}")
            commands.append(command)
        except _RejectedError as error:
            lines = f"{first}" if first == last else f"{first}-{last}"
            order_id = row.get("order_id", "")
            rejected.append({"lines": lines, "order_id": order_id, "reason": str(error)})
    return {"orders": commands, "rejected": rejected}


def _records(text: str) -> Iterator[Record]:
    """All records that are not blank."""
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, reader.line_num, error
        else:
            if fields:
                yield first, reader.line_num, fields


def _header(record: Record) -> list[str]:
    line, _, fields = record
    if isinstance(fields, csv.Error):
        raise ValueError(f"line {line}: not CSV: {fields}")
    header = [field.strip().lower() for field in fields]
    if missing := [name for name in _COLUMNS if name not in header]:
        found = ", ".join(header) or "nothing"
        raise ValueError(f"line {line}: no column {', '.join(missing)}; found: {found}")
    return header


def _order(line: int, row: dict[str, str]) -> Order:
    for name in ("order_id", "customer", "region"):
        if not row[name]:
            raise _RejectedError(f"no {name}")
    currency = row["currency"].upper()
    if currency not in _DECIMALS:
        raise _RejectedError(f"unknown currency {currency!r}{_hint(currency, _DECIMALS)}")
    digits = _DECIMALS[currency]
    moment = _moment(row["ordered_at"], row["time_zone"])
    with localcontext(prec=_PRECISION):
        quantity = _number("quantity", row["quantity"], whole=True)
        price = _number("unit_price", row["unit_price"], whole=digits == 0)
        discount = _number("discount", row["discount"].removesuffix("%").strip() or "0")
        if not 0 <= discount <= 100:
            raise _RejectedError(f"discount of {discount:f} %")
        exact = quantity * price * (100 - discount).scaleb(-2)
        amount = exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return Order(
        line=line,
        order_id=row["order_id"],
        ordered_at=moment.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        local_time=moment.isoformat(),
        customer=unicodedata.normalize("NFC", row["customer"]),
        region=row["region"],
        currency=currency,
        quantity=f"{quantity:f}",
        unit_price=f"{price:f}",
        discount=f"{discount:f}",
        amount=f"{amount:f}",
    )


def _moment(text: str, zone_name: str) -> datetime:
    """The one moment that a local time means, by its own offset or else by its time zone."""
    moment = _time(text)
    if not 1900 <= moment.year <= 2200:
        raise _RejectedError(f"ordered_at {text!r}: year {moment.year}")
    if not zone_name:
        if moment.tzinfo is None:
            raise _RejectedError(f"{text!r} has neither time_zone nor offset")
        return moment
    if zone_name not in _TIME_ZONES:
        raise _RejectedError(f"unknown time_zone {zone_name!r}{_hint(zone_name, _TIME_ZONES)}")
    zone = ZoneInfo(zone_name)
    if moment.tzinfo is not None:
        return moment.astimezone(zone)
    # PEP 495: the two readings of a local time differ only where the clocks are changed.
    first, second = (moment.replace(tzinfo=zone, fold=fold) for fold in (0, 1))
    if first.timestamp() > second.timestamp():
        raise _RejectedError(f"{text} never was in {zone_name}: clocks went forward")
    if first.timestamp() < second.timestamp():
        raise _RejectedError(f"{text} came twice in {zone_name}: clocks went back")
    return first


def _time(text: str) -> datetime:
    for time_format in _TIME_FORMATS:
        try:
            return datetime.strptime(text, time_format)
        except ValueError:
            continue
    if ":" not in text:
        raise _RejectedError(f"ordered_at {text!r} has no time of day")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise _RejectedError(f"ordered_at {text!r} is not a date and time") from None


def _number(column: str, text: str, *, whole: bool = False) -> Decimal:
    """A number as people write it: 1234.5, 1.234,50, 1 234,50, 1'234.50, $12, -3, (3.00)."""
    if len(text) > _LONGEST_NUMBER:
        raise _RejectedError(f"{column} has more than {_LONGEST_NUMBER} characters")
    plain = "".join(c for c in text if unicodedata.category(c) != "Sc")  # currency signs
    plain = plain.translate(_SPELLINGS).strip()
    if negative := plain.startswith("(") and plain.endswith(")"):  # an accountant's minus
        plain = plain[1:-1].strip()
    elif negative := plain.startswith("-"):
        plain = plain[1:].strip()
    ungrouped, grouped = _PLAIN_NUMBER.fullmatch(plain), _GROUPED_NUMBER.fullmatch(plain)
    if ungrouped and grouped and grouped["mark"] and not whole:
        raise _RejectedError(f"{column} {text!r} is ambiguous: decimals or thousands?")
    match = grouped or ungrouped
    if match is None:
        raise _RejectedError(f"{column} {text!r} is not a number")
    decimals = match["decimals"] or ""
    if whole and decimals:
        raise _RejectedError(f"{column} {text!r} is not a whole number")
    number = Decimal(re.sub(r"\D", "", plain)).scaleb(-len(decimals))
    return -number if negative else number


def _hint(wrong: str, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(allowed), 1)
    return f"; did you mean {close[0]}?" if close else ""
