"""The admin as people use it: a real Chromium on a real server."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from conftest import make_customers, require
from tests import processes

pytestmark = [pytest.mark.whole, pytest.mark.service, pytest.mark.xdist_group("browser")]

USER, PASSWORD = "ada", "correct horse battery"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOW_TO_GET = "Chromium is not installed; get it with: apt-get install chromium"
PRODUCTION = {
    "DEBUG": "0",
    "SECRET_KEY": "a secret of this test, long enough to be taken for one that was made at random",
    "ALLOWED_HOSTS": "127.0.0.1",
    "SECURE_SSL_REDIRECT": "0",
    "SECURE_COOKIES": "0",
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require(CHROMIUM, HOW_TO_GET)
    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield chromium
        chromium.close()


def serve(folder: Path, trained: Path, **settings: str) -> Iterator[processes.Server]:
    settings |= {"BATCH_DIR": str(folder / "batches"), "BATCH_WORKERS": "1"}
    env = processes.environment(f"sqlite:///{folder / 'admin.sqlite3'}", trained, **settings)
    processes.manage("migrate", env=env)
    processes.manage(
        *("createsuperuser", "--noinput", "--username", USER, "--email", "ada@example.org"),
        env={**env, "DJANGO_SUPERUSER_PASSWORD": PASSWORD},
    )
    if settings["DEBUG"] == "0":
        processes.manage("collectstatic", "--noinput", env=env)
    with processes.running(env, folder / "server.log", wait_for="/readyz") as server:
        yield server


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[processes.Server]:
    yield from serve(tmp_path_factory.mktemp("development"), trained, DEBUG="1")


@pytest.fixture(scope="module")
def production_site(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Iterator[processes.Server]:
    folder = tmp_path_factory.mktemp("production")
    yield from serve(folder, trained, **PRODUCTION, STATIC_ROOT=str(folder / "static"))


def logged_in(browser: Browser, server: processes.Server, **screen) -> tuple[Page, list[str]]:
    """A page after the login, and a list that fills with whatever goes wrong on it."""
    page = browser.new_context(base_url=server.url, **screen).new_page()
    troubles: list[str] = []

    def on_request(request) -> None:
        if not request.url.startswith((server.url, "data:", "blob:")):
            troubles.append(f"asked another server: {request.url}")

    def on_response(response) -> None:
        if response.status >= 400:
            troubles.append(f"{response.status} {response.url}")

    page.on("request", on_request)
    page.on("response", on_response)
    page.on("console", lambda message: message.type == "error" and troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto("/admin/")
    page.get_by_label("Username").fill(USER)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    return page, troubles


@pytest.fixture
def page(browser: Browser, site: processes.Server) -> Iterator[Page]:
    page, troubles = logged_in(browser, site, viewport={"width": 1400, "height": 900})
    yield page
    page.context.close()
    assert troubles == []


def row(page: Page, text: str):
    return page.locator("tr.data-row", has_text=text)


def ask(site: processes.Server, customer: dict[str, object], algorithm: str = "random_forest") -> int:
    """The id of a request that was answered."""
    return site.post(f"/api/v1/classifier/predict?algorithm={algorithm}", json=customer).json()["request_id"]


def promote(page: Page, algorithm: str) -> None:
    page.goto("/admin/endpoints/mlalgorithm/")
    row(page, algorithm).get_by_text("more_horiz").click()
    page.get_by_role("link", name="Promote").locator("visible=true").click()
    expect(page.get_by_role("heading", name="Promote to production?")).to_be_visible()
    page.get_by_role("button", name="Promote").click()
    expect(page.get_by_text(f"{algorithm} 1.0.0 has the status Production now.")).to_be_visible()


def test_an_algorithm_is_promoted_and_its_page_shows_who_did_it(page, site):
    promote(page, "decision tree")

    expect(page.get_by_text("random forest 1.0.0 moved from Production to Staging.")).to_be_visible()
    expect(row(page, "decision tree").get_by_text("Production")).to_be_visible()
    expect(row(page, "random forest").get_by_text("Staging")).to_be_visible()
    page.get_by_role("link", name="decision tree").click()
    newest = page.locator("#statuses-group tr", has_text=USER).first
    expect(newest).to_contain_text("Production")
    (serving,) = site.get("/api/v1/mlalgorithms?status=production").json()
    assert serving["name"] == "decision tree"


def test_production_is_rolled_back_on_the_page_of_its_endpoint(page, site):
    (serving,) = site.get("/api/v1/mlalgorithms?status=production").json()
    former = serving["name"]
    successor = "extra trees" if former == "decision tree" else "decision tree"
    promote(page, successor)
    page.goto("/admin/endpoints/endpoint/")
    page.get_by_role("link", name="classifier").click()
    page.get_by_role("link", name="Roll back production").click()
    expect(page.get_by_text(f"Back to: {former} 1.0.0")).to_be_visible()
    page.get_by_label("Reason").fill("Too many vouchers")
    page.get_by_role("button", name="Roll back").click()

    expect(
        page.get_by_text(f"{former} 1.0.0 is in production again; {successor} 1.0.0 moved to testing.")
    ).to_be_visible()
    page.goto("/admin/endpoints/mlalgorithmstatus/")
    expect(page.locator("tr.data-row").first).to_contain_text("Rollback: Too many vouchers")
    (serving,) = site.get("/api/v1/mlalgorithms?status=production").json()
    assert serving["name"] == former


def test_an_algorithm_is_moved_by_the_buttons_of_its_page(page):
    page.goto("/admin/endpoints/mlalgorithm/")
    page.get_by_role("link", name="extra trees").click()
    page.get_by_role("link", name="Retire").click()
    page.get_by_role("link", name="Cancel").click()
    expect(page.get_by_role("heading", name="Retire?")).to_be_hidden()
    page.get_by_role("link", name="Retire").click()
    page.get_by_role("button", name="Retire").click()
    expect(page.get_by_text("extra trees 1.0.0 has the status Retired now.")).to_be_visible()
    page.get_by_role("link", name="Back to testing").click()
    page.get_by_role("button", name="Move").click()
    expect(page.get_by_text("extra trees 1.0.0 has the status Testing now.")).to_be_visible()


def test_a_test_is_started_and_stopped(page):
    page.get_by_role("link", name="A/B tests").click()
    page.locator('a[href*="/abtest/add/"]').first.click()
    page.get_by_label("Title").fill("Forest or trees?")
    forest = page.locator("[name=parent_mlalgorithm_1] option", has_text="random forest").get_attribute("value")
    trees = page.locator("[name=parent_mlalgorithm_2] option", has_text="extra trees").get_attribute("value")
    page.select_option("[name=parent_mlalgorithm_1]", forest)
    page.select_option("[name=parent_mlalgorithm_2]", forest)
    page.get_by_role("button", name="Start the test").click()
    expect(page.get_by_text("An A/B test compares two different algorithms; these are the same.")).to_be_visible()

    page.select_option("[name=parent_mlalgorithm_2]", trees)
    page.get_by_role("button", name="Start the test").click()
    expect(page.get_by_text("Forest or trees? is running.")).to_be_visible()
    page.get_by_role("link", name="Report").click()
    expect(page.get_by_text("Wait: there are 0 of the 100 labelled customers that each arm needs.")).to_be_visible()
    drawn = page.locator(".report-charts img").evaluate_all("charts => charts.map(chart => chart.naturalWidth > 300)")
    assert drawn == [True, True, True]
    for width in (390, 1000, 1400):
        page.set_viewport_size({"width": width, "height": 850})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    with page.expect_download() as slide:
        page.get_by_role("link", name="Download for slides").click()
    assert Path(slide.value.path()).read_bytes().startswith(b"\x89PNG")
    page.get_by_role("link", name="Back to the test").click()
    page.get_by_role("link", name="Stop").click()
    page.get_by_role("button", name="Stop the test").click()
    expect(page.get_by_text("Forest or trees? is stopped.")).to_be_visible()
    expect(page.get_by_text(f"Stopped by {USER}").last).to_be_visible()
    expect(page.get_by_role("link", name="Stop")).to_have_count(0)


def test_a_request_is_found_by_its_id_and_told_its_outcome(page, site, customer):
    wanted, other = (ask(site, customer) for _ in range(2))

    page.get_by_role("link", name="Requests").first.click()
    expect(page.get_by_role("link", name=str(other), exact=True)).to_be_visible()
    page.get_by_placeholder("A request's id, or a customer's key").fill(str(wanted))
    page.keyboard.press("Enter")
    expect(page.locator("tr.data-row")).to_have_count(1)
    page.get_by_role("link", name=str(wanted), exact=True).click()
    page.select_option("[name=feedback]", "1")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("was changed successfully")).to_be_visible()

    page.goto(f"/admin/endpoints/mlrequest/{wanted}/change/")
    expect(page.locator("#feedback_changes-group")).to_contain_text(USER)
    assert site.get(f"/api/v1/mlrequests/{wanted}").json()["feedback"] == "1"


def test_requests_are_filtered(page, site, customer):
    ask(site, customer, "random_forest")
    ask(site, customer, "extra_trees")

    page.goto("/admin/endpoints/mlrequest/")
    page.locator("a", has_text="Filters").click()
    page.select_option("[name=parent_mlalgorithm__id__exact]", label="extra trees 1.0.0")
    page.get_by_role("button", name="Apply Filters").click()
    page.wait_for_url("**parent_mlalgorithm__id__exact=**")

    names = set(page.locator("td.field-parent_mlalgorithm").all_inner_texts())
    assert names == {"extra trees 1.0.0"}


def test_a_token_is_made_and_seen_once(page):
    page.get_by_role("link", name="API tokens").click()
    page.locator('a[href*="/authtoken/add/"]').first.click()
    page.select_option("[name=user]", label=USER)
    page.get_by_role("button", name="Make the token").click()
    shown = page.get_by_text("shown only this once").inner_text()
    token = re.search("[0-9a-f]{64}", shown)[0]

    page.reload()

    expect(row(page, token[:8])).to_be_visible()
    assert token not in page.content()


def drop(page: Page, name: str, content: str) -> None:
    """Let a file fall on the page's drop zone."""
    dropped = page.evaluate_handle(
        """([name, content]) => {
            const dropped = new DataTransfer();
            dropped.items.add(new File([content], name, { type: "text/csv" }));
            return dropped;
        }""",
        [name, content],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(".drop-zone", event, {"dataTransfer": dropped})


def test_a_dropped_file_is_scored_and_its_result_fetched(page):
    page.get_by_role("link", name="Batch jobs").click()
    page.locator('a[href*="/batchjob/add/"]').first.click()
    customers = make_customers(30_000, seed=9)
    drop(page, "shop.csv", customers.to_csv(index=False))
    expect(page.locator(".is-recognised li")).to_have_text(
        ["Plan", "Orders", "RecencyDays", "MeanGapDays", "Newsletter", "CustomerId"]
    )
    expect(page.locator(".is-ignored li")).to_have_text(["IsRetained"])
    page.get_by_role("button", name="Score the file").click()

    page.wait_for_url("**/batchjob/*/change/")
    page.evaluate("window.isTheSamePage = true")
    expect(page.get_by_text("Succeeded")).to_be_visible(timeout=60_000)
    expect(page.locator("[role=progressbar]")).to_have_attribute("aria-valuenow", "100.0")
    expect(page.locator(".job-sentence")).to_contain_text("30,000 of 30,000 rows")
    expect(page.get_by_role("link", name="Cancel")).to_have_count(0)
    assert page.evaluate("window.isTheSamePage")

    with page.expect_download() as download:
        page.get_by_role("link", name="Download the result").click()
    assert download.value.suggested_filename == "shop-scored.csv"
    with download.value.path().open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["CustomerId"] for row in rows] == list(customers["CustomerId"])
    likely = sum(float(row["probability"]) >= 0.9 for row in rows)
    expect(page.locator("tr.data-row", has_text="0.9 to 1.0")).to_contain_text(f"{likely:,}")


def test_a_file_without_a_column_cannot_be_sent(page):
    page.goto("/admin/endpoints/batchjob/add/")
    table = make_customers(5)

    drop(page, "shop.csv", table.rename(columns={"RecencyDays": "Recency_Days"}).to_csv(index=False))
    expect(page.locator(".columns .problem")).to_contain_text("lacks the columns RecencyDays (is it Recency_Days?)")
    expect(page.locator(".is-missing li")).to_have_text(["RecencyDays: is it Recency_Days?"])
    expect(page.get_by_role("button", name="Score the file")).to_be_disabled()

    drop(page, "shop.csv", table.to_csv(index=False))
    expect(page.locator(".columns .problem")).to_have_count(0)
    expect(page.get_by_role("button", name="Score the file")).to_be_enabled()


def test_a_parquet_file_is_looked_into_before_it_is_sent_and_comes_back_as_one(page):
    table = make_customers(300, seed=9)
    content = io.BytesIO()
    table.rename(columns={"RecencyDays": "Recency"}).to_parquet(content)
    page.goto("/admin/endpoints/batchjob/add/")
    chosen = {"name": "shop.parquet", "mimeType": "", "buffer": content.getvalue()}
    page.locator("input[type=file]").set_input_files(chosen)
    expect(page.locator(".is-missing li")).to_have_text(["RecencyDays: is it Recency?"])

    content = io.BytesIO()
    table.to_parquet(content)
    page.locator("input[type=file]").set_input_files({**chosen, "buffer": content.getvalue()})
    expect(page.locator(".is-ignored li")).to_have_text(["IsRetained"])
    page.get_by_role("button", name="Score the file").click()
    expect(page.get_by_text("Succeeded")).to_be_visible(timeout=60_000)

    for link, name, read in [
        ("Download the result", "shop-scored.parquet", pd.read_parquet),
        ("The same as CSV", "shop-scored.csv", pd.read_csv),
    ]:
        with page.expect_download() as download:
            page.get_by_role("link", name=link).click()
        assert download.value.suggested_filename == name
        assert list(read(download.value.path())["CustomerId"]) == list(table["CustomerId"])


def test_bad_rows_are_listed_on_the_page_of_the_job(page):
    table = make_customers(50).astype({"Orders": str})
    table.loc[3, "Orders"] = "many"
    page.goto("/admin/endpoints/batchjob/add/")
    page.locator("input[type=file]").set_input_files(
        {"name": "bad.csv", "mimeType": "text/csv", "buffer": table.to_csv(index=False).encode()}
    )
    page.get_by_role("button", name="Score the file").click()

    expect(page.get_by_role("alert")).to_contain_text("1 of 50 rows cannot be scored", timeout=60_000)
    expect(page.locator("tr.data-row")).to_contain_text("many")
    expect(page.get_by_role("link", name="Download the errors")).to_be_visible()


def test_a_file_is_sent_without_the_pages_own_script(browser, site):
    page, troubles = logged_in(browser, site)
    page.route("**/score_file.js", lambda route: route.fulfill(body="", content_type="text/javascript"))
    page.goto("/admin/endpoints/batchjob/add/")
    page.locator("input[type=file]").set_input_files(
        {"name": "plain.csv", "mimeType": "text/csv", "buffer": make_customers(5).to_csv(index=False).encode()}
    )
    page.locator("[name=_save]").press("Enter")

    expect(page).to_have_url(re.compile("/batchjob/[0-9]+/change/"))
    expect(page.locator(".facts")).to_contain_text("plain.csv")
    page.context.close()
    assert troubles == []


@pytest.mark.parametrize("width", [390, 1000, 1400])
def test_every_page_fits_its_screen(browser, site, customer, width):
    logged = ask(site, customer)
    customers = {"file": ("shop.csv", make_customers(50).to_csv(index=False))}
    job = site.post("/api/v1/batch-predict?mode=async", files=customers).json()["id"]
    page, troubles = logged_in(browser, site, viewport={"width": width, "height": 850})
    paths = [
        "/admin/",
        *(f"/admin/endpoints/{model}/" for model in ("endpoint", "mlalgorithm", "mlalgorithmstatus", "abtest")),
        *("/admin/endpoints/mlrequest/", f"/admin/endpoints/mlrequest/{logged}/change/"),
        *("/admin/endpoints/endpoint/1/change/", "/admin/endpoints/mlalgorithm/1/change/"),
        "/admin/endpoints/abtest/add/",
        *("/admin/endpoints/batchjob/", "/admin/endpoints/batchjob/add/", f"/admin/endpoints/batchjob/{job}/change/"),
        *("/admin/knox/authtoken/", "/admin/knox/authtoken/add/", "/admin/auth/user/", "/admin/auth/user/1/change/"),
    ]
    too_wide = []
    for path in paths:
        page.goto(path)
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            too_wide.append(path)
    page.context.close()

    assert too_wide == []
    assert troubles == []


def test_in_production_the_pages_come_with_their_styles_and_scripts(browser, production_site):
    page, troubles = logged_in(browser, production_site, viewport={"width": 1400, "height": 900})

    promote(page, "extra trees")

    styles = page.locator("link[rel=stylesheet]").evaluate_all("links => links.map(link => link.href)")
    assert styles
    assert all(re.search(r"\.[0-9a-f]{12}\.css$", style) for style in styles)
    assert page.locator("body").evaluate("body => getComputedStyle(body).fontFamily").startswith("Inter")
    assert page.evaluate("document.fonts.check('16px Inter')")
    favicon = page.locator("link[rel=icon]").get_attribute("href")
    assert production_site.get(favicon).headers["Content-Type"] == "image/svg+xml"
    page.context.close()
    assert troubles == []
