"""The customer table: reproducible, free of leakage, and described truthfully by its card."""

import os
import re
from datetime import date, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal, assert_series_equal

import prepare_data

DATA = Path(prepare_data.__file__).parent / "data"
START, OBSERVATION_END, LABEL_END = date(1997, 1, 1), date(1997, 1, 31), date(1997, 3, 2)
LENGTH = (OBSERVATION_END - START).days

HAND_MADE_LOG = """\
 customer_id  date number_of_cds  dollar_value
 00001 19970101  1   10.00
 00001 19970111  1   12.00
 00001 19970111  3   20.00
 00001 19970131  2   22.00
 00002 19970115  1    0.00
 00002 19970201  1   99.00
 00003 19970120  4   30.50
 00003 19970120  4   30.50
 00003 19970303  4   30.50
 00004 19970201  1   15.00
"""


@pytest.fixture
def cdnow_log():
    """The real log; where it must not be absent, its absence is a failure."""
    try:
        return prepare_data.locate_log()
    except prepare_data.LogMissing as problem:
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(str(problem))
        pytest.skip(str(problem))


@pytest.fixture
def log_file(tmp_path):
    def write(text):
        path = tmp_path / "log.txt"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def hand_made_table(log_file):
    return build(prepare_data.read_log(log_file(HAND_MADE_LOG))).set_index("CustomerId")


@pytest.fixture(scope="module")
def shipped_table():
    return pd.read_csv(DATA / "processed.csv")


@pytest.fixture(scope="module")
def card():
    return (DATA / "README.md").read_text(encoding="utf-8")


def build(orders):
    return prepare_data.build_table(orders, OBSERVATION_END, LABEL_END)


def as_orders(rows):
    """Rows of (customer, days after START, CDs, cents) as ``read_log`` would return them."""
    dated = [(customer, START + timedelta(days=day), cds, cents) for customer, day, cds, cents in rows]
    orders = pd.DataFrame(dated, columns=["customer", "day", "cds", "cents"])
    return orders.astype({"customer": "int64", "day": "datetime64[s]", "cds": "int64", "cents": "int64"})


def orders_between(first_day, last_day, min_size=0):
    """Small logs: few customers and few days, so that they collide."""
    order = st.tuples(st.integers(1, 5), st.integers(first_day, last_day), st.integers(1, 9), st.integers(0, 20_000))
    return st.lists(order, min_size=min_size, max_size=25)


observed_orders = orders_between(0, LENGTH, min_size=1)
later_orders = orders_between(LENGTH + 1, 3 * LENGTH)


# The table that is shipped


def test_the_shipped_table_is_rebuilt_byte_for_byte(cdnow_log, tmp_path, capsys):
    rebuilt = tmp_path / "processed.csv"
    assert prepare_data.main(["--output", str(rebuilt)]) == 0
    assert rebuilt.read_bytes() == (DATA / "processed.csv").read_bytes()
    assert capsys.readouterr().out == f"Wrote 23,570 customers to {rebuilt}; 29.9% retained.\n"


def test_the_shipped_table_has_one_sorted_row_per_customer(shipped_table):
    assert shipped_table["CustomerId"].is_monotonic_increasing
    assert shipped_table["CustomerId"].is_unique
    assert shipped_table.columns[0] == "CustomerId"
    assert shipped_table.columns[-1] == "IsRetained"


def test_the_card_states_the_size_and_the_class_balance(card, shipped_table):
    retained = shipped_table["IsRetained"].sum()
    lost = len(shipped_table) - retained
    assert f"| Customers (rows) | {len(shipped_table):,} |" in card
    assert f"= 1) | {retained:,} ({retained / len(shipped_table):.1%}) |" in card
    assert f"= 0) | {lost:,} ({lost / len(shipped_table):.1%}) |" in card


def test_the_card_lists_every_column_with_its_missing_share(card, shipped_table):
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+%) \|", card, flags=re.MULTILINE)
    missing = shipped_table.isna().mean()
    assert rows == [(column, f"{missing[column]:.1%}") for column in shipped_table.columns]


def test_the_card_is_right_about_single_orders_and_zero_spend(card, shipped_table):
    single = shipped_table["Orders"] == 1
    came_back = shipped_table.groupby(single)["IsRetained"].mean()
    assert f"{single.sum():,} customers\n({single.mean():.1%}) ordered once" in card
    assert f"{came_back[True]:.1%} of them came back, against {came_back[False]:.1%} of the others" in card
    assert f"{(shipped_table['TotalSpend'] == 0).sum()} customers thus have" in card
    assert f"{shipped_table['Orders'].sum():,} of them in the observation window" in card


def test_the_card_is_right_about_the_raw_log(card, cdnow_log):
    orders = prepare_data.read_log(cdnow_log)
    observed = orders["day"] <= pd.Timestamp(prepare_data.OBSERVATION_END)
    repeated, free = orders.duplicated(), orders["cents"] == 0
    same_day = orders.duplicated(["customer", "day"])
    first_day = orders["day"] == orders.groupby("customer")["day"].transform("min")
    doubled = orders[repeated & observed]

    assert f"The log has {len(orders):,} orders" in card
    assert f"{same_day.sum():,} lines repeat" in card
    assert f"lines are {(~same_day).sum():,} orders" in card
    assert f"{repeated.sum()} exact duplicate lines" in card
    assert f"{(repeated & (orders['cds'] == 1)).sum()} of them are for a single CD" in card
    assert f"{len(doubled)} of the {repeated.sum()} lines" in card
    assert f"concern {doubled['customer'].nunique()} customers" in card
    assert f"{doubled['cents'].sum() / orders.loc[observed, 'cents'].sum():.2%} of the spend" in card
    assert f"{free.sum()} zero-amount orders" in card
    assert f"{(free & first_day).sum()} are on the customer's first day" in card
    assert f"the last of the {(free & observed).sum()} in the observation window is in March 1997" in card
    assert orders.loc[free & observed, "day"].max() < pd.Timestamp(1997, 4, 1)
    assert (orders.loc[free, "cds"] == 1).all()


def test_zero_amount_orders_decide_no_label(cdnow_log):
    orders = prepare_data.read_log(cdnow_log)
    windows = prepare_data.OBSERVATION_END, prepare_data.LABEL_END
    later = orders["day"] > pd.Timestamp(prepare_data.OBSERVATION_END)
    paid = orders[~later | (orders["cents"] > 0)]
    assert_frame_equal(prepare_data.build_table(paid, *windows), prepare_data.build_table(orders, *windows))


# Features, computed by hand


def test_features_agree_with_figures_computed_by_hand(hand_made_table):
    # Orders of 10, 32 and 22 USD after 0, 10 and 30 days: gaps 10 and 20, slope (22 - 10) / 2.
    assert hand_made_table.loc[1].to_dict() == {
        "AcquisitionMonth": "1997-01",
        "Orders": 3,
        "TenureDays": 30,
        "RecencyDays": 0,
        "MeanGapDays": 15.00,
        "GapStdDays": 7.07,
        "OrdersLast90Days": 3,
        "TotalSpend": 64.00,
        "MeanOrderValue": 21.33,
        "OrderValueTrend": 6.00,
        "MeanBasketSize": 2.33,
        "IsRetained": 0,
    }


def test_a_customer_with_one_order_has_no_gap_and_no_trend(hand_made_table):
    single = hand_made_table.loc[2]
    assert single["Orders"] == 1
    assert single[["MeanGapDays", "GapStdDays", "OrderValueTrend"]].isna().all()


def test_a_customer_with_two_orders_has_a_gap_without_deviation():
    pair = build(as_orders([(1, 0, 1, 1000), (1, 7, 1, 1500)])).loc[0]
    assert pair["MeanGapDays"] == 7
    assert pair["OrderValueTrend"] == 5
    assert pd.isna(pair["GapStdDays"])


def test_equal_lines_of_one_day_are_one_order_with_both_amounts(hand_made_table):
    assert hand_made_table.loc[3, ["Orders", "TotalSpend", "MeanBasketSize"]].tolist() == [1, 61.00, 8]


def test_a_zero_amount_order_counts_as_an_order(hand_made_table):
    assert hand_made_table.loc[2, ["Orders", "TotalSpend"]].tolist() == [1, 0]


def test_both_windows_include_their_last_day():
    last_days = [(1, LENGTH, 1, 100), (2, 0, 1, 100), (2, 2 * LENGTH, 1, 100), (3, 0, 1, 100)]
    too_late = [(3, 2 * LENGTH + 1, 1, 100)]
    table = build(as_orders(last_days + too_late)).set_index("CustomerId")
    assert table.loc[1, "RecencyDays"] == 0
    assert table["IsRetained"].to_dict() == {1: 0, 2: 1, 3: 0}


def test_the_last_90_days_are_90_days():
    orders = as_orders([(1, 9, 1, 100), (1, 10, 1, 100), (1, 99, 1, 100)])
    table = prepare_data.build_table(orders, START + timedelta(days=99), START + timedelta(days=199))
    assert table["OrdersLast90Days"].tolist() == [2]


def test_a_customer_who_first_bought_after_the_observation_window_is_absent(hand_made_table):
    assert hand_made_table.index.tolist() == [1, 2, 3]


# No leakage


@settings(deadline=None, max_examples=60)
@given(observed_orders, later_orders, later_orders)
def test_orders_after_the_observation_window_change_no_feature(observed, later, other_later):
    features = build(as_orders(observed + later)).drop(columns="IsRetained")
    for changed in (observed + other_later, observed):
        assert_frame_equal(build(as_orders(changed)).drop(columns="IsRetained"), features)


@settings(deadline=None, max_examples=60)
@given(observed_orders, observed_orders, later_orders)
def test_the_label_depends_only_on_orders_of_the_label_window(observed, other_observed, later):
    labels = build(as_orders(observed + later)).set_index("CustomerId")["IsRetained"]
    others = build(as_orders(other_observed + later)).set_index("CustomerId")["IsRetained"]
    common = labels.index.intersection(others.index)
    assert_series_equal(labels[common], others[common])
    buyers = {customer for customer, day, _, _ in later if day <= 2 * LENGTH}
    assert set(labels.index[labels == 1]) == buyers & set(labels.index)


@settings(deadline=None, max_examples=60)
@given(observed_orders, later_orders, st.randoms(use_true_random=False))
def test_the_order_of_lines_does_not_matter(observed, later, random):
    rows = observed + later
    shuffled = random.sample(rows, len(rows))
    assert_frame_equal(build(as_orders(shuffled)), build(as_orders(rows)))


@settings(deadline=None, max_examples=60)
@given(observed_orders)
def test_figures_agree_with_each_other(observed):
    table = build(as_orders(observed))
    assert table["TotalSpend"].sum() == pytest.approx(sum(cents for *_, cents in observed) / 100)
    assert (table["RecencyDays"] <= table["TenureDays"]).all()
    assert (table["OrdersLast90Days"] <= table["Orders"]).all()
    assert (table["MeanGapDays"].isna() == (table["Orders"] < 2)).all()
    assert (table["OrderValueTrend"].isna() == (table["Orders"] < 2)).all()
    assert (table["GapStdDays"].isna() == (table["Orders"] < 3)).all()


def test_an_empty_label_window_is_refused():
    with pytest.raises(ValueError, match="must end after"):
        prepare_data.build_table(as_orders([(1, 0, 1, 100)]), OBSERVATION_END, OBSERVATION_END)


# Command line


def test_running_twice_gives_the_same_bytes_and_leaves_nothing_else(log_file, tmp_path):
    log, output = log_file(HAND_MADE_LOG), tmp_path / "out" / "table.csv"
    output.parent.mkdir()
    command = ["--log", str(log), "--output", str(output)]
    assert prepare_data.main(command) == 0
    first = output.read_bytes()
    assert prepare_data.main(command) == 0
    assert output.read_bytes() == first
    assert b"\r" not in first
    assert list(output.parent.iterdir()) == [output]


def test_the_file_holds_what_the_table_held(log_file, tmp_path):
    output = tmp_path / "table.csv"
    table = build(prepare_data.read_log(log_file(HAND_MADE_LOG)))
    prepare_data.write_table(table, output)
    assert_frame_equal(pd.read_csv(output), table, check_dtype=False)


def test_a_log_without_column_names_reads_the_same(log_file):
    with_names = prepare_data.read_log(log_file(HAND_MADE_LOG))
    without = prepare_data.read_log(log_file(HAND_MADE_LOG.split("\n", 1)[1]))
    assert_frame_equal(without, with_names)


@pytest.mark.parametrize(
    "line", ["00001 19970102 1", "00001 19970231 1 9.99", "00001 19970102 1 -9.99", "00001 1997-01-02 1 9.99"]
)
def test_a_malformed_line_is_named_and_the_old_table_stays(line, log_file, tmp_path, capsys):
    output = tmp_path / "table.csv"
    output.write_text("the old table")
    log = log_file(f"00001 19970101  1   11.77\n{line}\n")
    assert prepare_data.main(["--log", str(log), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert "line 2: " in captured.err
    assert captured.out == ""
    assert output.read_text() == "the old table"


def test_a_missing_package_is_one_sentence_that_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prepare_data, "PACKAGE", "a-package-that-nobody-installed")
    assert prepare_data.main(["--output", str(tmp_path / "table.csv")]) == 2
    error = capsys.readouterr().err
    assert "`pip install --no-deps lifetimes==0.11.3`" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_log_and_an_empty_log_are_one_sentence(log_file, tmp_path, capsys):
    output = str(tmp_path / "table.csv")
    assert prepare_data.main(["--log", str(tmp_path / "absent.txt"), "--output", output]) == 2
    assert "absent.txt" in capsys.readouterr().err
    assert prepare_data.main(["--log", str(log_file("")), "--output", output]) == 2
    assert capsys.readouterr().err == "The log has no order on or before 1997-09-30.\n"
