"""Turn the CDNOW purchase log into one row per customer: ``data/processed.csv``.

What is known of a customer on 30 September 1997 becomes the features; whether the customer bought again
in the nine months after that is the label, ``IsRetained``. The card beside the output, ``data/README.md``,
describes every column and every decision.
"""

import argparse
import importlib.metadata
import os
import re
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

OBSERVATION_END = date(1997, 9, 30)
LABEL_END = date(1998, 6, 30)
RECENT_DAYS = 90

OUTPUT = Path(__file__).resolve().parent / "data" / "processed.csv"

PACKAGE = "lifetimes"
LOG_IN_PACKAGE = "lifetimes/datasets/CDNOW_master.txt"
HEADER = ["customer_id", "date", "number_of_cds", "dollar_value"]
ORDER = re.compile(r"\s*(\d{1,9})\s+(\d{8})\s+(\d{1,6})\s+(\d{1,9})\.(\d\d)\s*", re.ASCII)


class PreparationError(Exception):
    """The table cannot be made; the message is one sentence for the person at the keyboard."""


class LogMissing(PreparationError):
    """The package that ships the log is not installed."""


class LogMalformed(PreparationError):
    """A line of the log is not an order; the message names it."""


class NothingObserved(PreparationError):
    """Nobody had bought by the end of the observation window."""


def locate_log():
    """Path of the log inside the installed package, which is never imported: it is unmaintained.

    Raises LogMissing.
    """
    try:
        path = Path(importlib.metadata.distribution(PACKAGE).locate_file(LOG_IN_PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise LogMissing("The CDNOW log is not installed: run `pip install --no-deps lifetimes==0.11.3`.")
    return path


def read_log(path):
    """Read a purchase log: customer, day (YYYYMMDD), CDs and dollars with cents, separated by spaces.

    A first line of column names and blank lines are skipped. Returns one row per order, in the order of
    the file: ``customer`` (int), ``day`` (datetime64), ``cds`` (int), ``cents`` (int, US cents).
    Raises LogMalformed, which names the first line that is not an order, and OSError.
    """
    orders = []
    with Path(path).open(encoding="ascii", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip() or (number == 1 and line.split() == HEADER):
                continue
            orders.append(_parse_order(line, f"{path}, line {number}"))
    orders = pd.DataFrame(orders, columns=["customer", "day", "cds", "cents"])
    return orders.astype({"customer": "int64", "day": "datetime64[s]", "cds": "int64", "cents": "int64"})


def _parse_order(line, place):
    order = ORDER.fullmatch(line)
    if order is None:
        found = line.strip()[:60]
        raise LogMalformed(f"{place}: expected customer, YYYYMMDD, CDs, dollars.cents; found {found!r}.")
    customer, day, cds, dollars, cents = order.groups()
    try:
        day = date.fromisoformat(f"{day[:4]}-{day[4:6]}-{day[6:]}")
    except ValueError:
        raise LogMalformed(f"{place}: {day} is not a date.") from None
    return int(customer), day, int(cds), 100 * int(dollars) + int(cents)


def build_table(orders, observation_end, label_end):
    """One row per customer who bought by ``observation_end``, sorted by customer.

    orders: as ``read_log`` returns them, in any order. observation_end, label_end: dates, both inclusive.
    Orders up to the first make the features, orders after it and up to the second make ``IsRetained``.
    Money is in US dollars. Figures are rounded to two decimals, as in the file; one that needs more orders
    than the customer has is missing.

    All sums are sums of integers, so each figure is the same on every machine and for every order of rows.
    Raises ValueError for an empty label window and NothingObserved for an empty table.
    """
    observation_end, label_end = pd.Timestamp(observation_end), pd.Timestamp(label_end)
    if label_end <= observation_end:
        raise ValueError("The label window must end after the observation window.")

    purchases = _merge_same_day(orders)
    observed = purchases[purchases["day"] <= observation_end]
    if observed.empty:
        raise NothingObserved(f"The log has no order on or before {observation_end:%Y-%m-%d}.")
    in_label_window = purchases["day"].between(observation_end, label_end, inclusive="right")

    table = _features(observed, observation_end)
    table["IsRetained"] = table.index.isin(purchases.loc[in_label_window, "customer"]).astype(int)
    return table.rename_axis("CustomerId").reset_index()


def _merge_same_day(orders):
    """Purchase occasions: all that a customer ordered on one day, sorted by customer and day."""
    return orders.groupby(["customer", "day"], as_index=False, sort=True)[["cds", "cents"]].sum()


def _features(purchases, end):
    purchases = purchases.assign(
        age=(end - purchases["day"]).dt.days,
        gap=purchases.groupby("customer")["day"].diff().dt.days.fillna(0).astype("int64"),
        nth=purchases.groupby("customer").cumcount(),
    )
    by_customer = purchases.groupby("customer")
    count = by_customer.size()
    total = by_customer[["cds", "cents"]].sum()
    oldest, latest = by_customer["age"].max(), by_customer["age"].min()
    recent = purchases["age"] < RECENT_DAYS

    return pd.DataFrame(
        {
            "AcquisitionMonth": by_customer["day"].min().dt.strftime("%Y-%m"),
            "Orders": count,
            "TenureDays": oldest,
            "RecencyDays": latest,
            "MeanGapDays": (oldest - latest) / (count - 1).where(count > 1),
            "GapStdDays": _gap_deviation(purchases, count),
            "OrdersLast90Days": recent.groupby(purchases["customer"]).sum(),
            "TotalSpend": total["cents"] / 100,
            "MeanOrderValue": total["cents"] / (100 * count),
            "OrderValueTrend": _order_value_trend(purchases, count),
            "MeanBasketSize": total["cds"] / count,
        }
    ).round(2)


def _gap_deviation(purchases, count):
    """Sample standard deviation of the days between orders, (customers,); missing below three orders."""
    gaps = count - 1
    total = purchases["gap"].groupby(purchases["customer"]).sum()
    squares = (purchases["gap"] ** 2).groupby(purchases["customer"]).sum()
    return np.sqrt((gaps * squares - total**2) / (gaps * (gaps - 1)).where(gaps > 1))


def _order_value_trend(purchases, count):
    """Least-squares slope of order value over order number, dollars per order; missing for one order.

    With n orders numbered k = 0 .. n-1 the slope is 6 * sum((2k - n + 1) * value) / (n * (n^2 - 1)).
    """
    centred = 2 * purchases["nth"] - purchases["customer"].map(count) + 1
    moment = (centred * purchases["cents"]).groupby(purchases["customer"]).sum()
    slope = 6 * moment / (100 * count * (count**2 - 1)).where(count > 1)
    return slope.round(2) + 0.0  # minus zero becomes zero


def write_table(table, path):
    """Write ``table`` as CSV, whole or not at all: floats with two decimals, missing values empty.

    Raises OSError.
    """
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table.to_csv(unfinished, index=False, float_format="%.2f", lineterminator="\n", encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv=None):
    """Command line. Returns the exit code: 0, or 2 when the table cannot be made."""
    parser = argparse.ArgumentParser(description="Turn the CDNOW purchase log into a table of customers.")
    parser.add_argument("--log", type=Path, metavar="FILE", help="purchase log (default: from lifetimes)")
    parser.add_argument("--output", type=Path, metavar="FILE", default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        table = build_table(read_log(options.log or locate_log()), OBSERVATION_END, LABEL_END)
        write_table(table, options.output)
    except (PreparationError, OSError) as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    retained = table["IsRetained"].mean()
    sys.stdout.write(f"Wrote {len(table):,} customers to {options.output}; {retained:.1%} retained.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
