"""A person in the Prefect UI, played by a headless Chromium: ``make ui``.

Needs a ``chromium`` on the PATH and playwright (requirements-ui.lock). Screenshots go to
``.rollflow/ui``.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from rollflow.storage.manifests import batch_steps
from rollflow.storage.steps import step_numbers

from .operated import Stack

SHOTS = Path(os.environ.get("ROLLFLOW_SHOTS", ".rollflow/ui")).resolve()
LOAD_S = 3.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    stack = Stack(tmp_path_factory.mktemp("ui"))
    stack.rollflow("deploy", "run.toml")
    yield stack
    stack.rollflow("down")


@pytest.fixture(scope="module")
def page(stack) -> Iterator[Page]:
    chromium = shutil.which("chromium") or pytest.skip("no chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            base_url=stack.server["url"], viewport={"width": 1400, "height": 1200}
        )
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        yield page
        browser.close()


def shot(page: Page, name: str) -> None:
    page.screenshot(path=str(SHOTS / f"{name}.png"), full_page=True)


def confirm(page: Page) -> None:
    """Push the button that does what the dialog asks about."""
    buttons = page.locator(".p-modal__footer").get_by_role("button")
    buttons.filter(has_not_text="Close").click()


def deployment(stack: Stack) -> str:
    found = stack.post("deployments/filter", deployments={"name": {"any_": ["run"]}})
    return next(d["id"] for d in found if "preset" in d["tags"])


def flow_run(stack: Stack, name: str) -> str:
    return stack.flow_runs(name)[0]["id"]


def test_a_run_is_started_from_the_form(stack, page):
    page.goto("/deployments")
    expect(page.get_by_text("arithmetic_cpu").first).to_be_visible()
    shot(page, "1-deployments")
    page.goto(f"/deployments/deployment/{deployment(stack)}/run")
    expect(page.get_by_text("Name of the run: its folder in the store").first).to_be_visible()
    shot(page, "2-form")
    fields = page.locator("textarea")
    name = next(f for f in fields.all() if f.input_value() == "null")
    name.fill("ui")
    shot(page, "3-form-filled")
    page.get_by_role("button", name="Submit").click()
    stack.wait("step 3", lambda: stack.status("ui")["step"] >= 3)
    page.goto(f"/runs/flow-run/{flow_run(stack, 'ui')}")
    expect(page.get_by_text("Running").first).to_be_visible()
    shot(page, "4-running")


def test_it_is_suspended_and_resumed_by_its_buttons(stack, page):
    page.goto(f"/runs/flow-run/{flow_run(stack, 'ui')}")
    page.get_by_role("button", name="Suspend").first.click()
    shot(page, "5-suspend")
    confirm(page)
    stack.wait("suspension", lambda: stack.status("ui")["phase"] == "suspended")
    store, run = stack.stored("ui")
    before = step_numbers(store, run)
    assert before == batch_steps(store, run)
    page.goto(f"/runs/flow-run/{flow_run(stack, 'ui')}")
    expect(page.get_by_text("Suspended").first).to_be_visible()
    shot(page, "6-suspended")
    page.get_by_role("button", name="Resume").first.click()
    shot(page, "7-resume")
    confirm(page)
    stack.wait("new steps", lambda: len(step_numbers(store, run)) > len(before) + 3)


def test_the_artifact_of_an_iteration_can_be_read(stack, page):
    page.goto("/artifacts/key/ui-iteration")
    expect(page.get_by_text("ui-iteration").first).to_be_visible()
    shot(page, "8-artifact-key")
    found = stack.post(
        "artifacts/filter", artifacts={"key": {"any_": ["ui-iteration"]}}, sort="CREATED_DESC"
    )
    page.goto(f"/artifacts/artifact/{found[0]['id']}")
    expect(page.get_by_text("Worst").first).to_be_visible()
    shot(page, "9-iteration")


def test_the_page_of_the_run_shows_its_plots(stack, page):
    found = stack.post("artifacts/filter", artifacts={"key": {"any_": ["ui-run"]}})
    page.goto(f"/artifacts/artifact/{found[0]['id']}")
    picture = page.locator("img[src^='data:image/png']").first
    expect(picture).to_be_visible()
    shot(page, "10-run-page")


def test_it_is_cancelled_by_its_button(stack, page):
    page.goto(f"/runs/flow-run/{flow_run(stack, 'ui')}")
    page.get_by_role("button", name="Cancel").first.click()
    shot(page, "11-cancel")
    confirm(page)
    stack.wait("cancellation", lambda: stack.state("ui") == "Cancelled")
    page.goto(f"/runs/flow-run/{flow_run(stack, 'ui')}")
    expect(page.get_by_text("Cancelled").first).to_be_visible()
    shot(page, "12-cancelled")
