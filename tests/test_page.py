"""The page of dg-serve, in a headless Chromium: what a person does on it, and what nobody can do to it.

With DGEMMA_SCREENSHOTS=FOLDER each state that is shown is kept as a picture.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models.tidy import tasks
from support.serving import PATIENCE, Live, get, serving

import dgemma
from dgemma.model import bundled
from dgemma.serve.page import page_files

api = pytest.importorskip("playwright.sync_api", reason="no browser is driven: pip install playwright")
expect = api.expect
expect.set_options(timeout=PATIENCE * 1000)
FOLDER = Path(__file__).parent.parent / "runtime" / "dgemma" / "serve" / "page"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        names = ("chromium", "chromium-browser", "google-chrome")
        path = str(own) if own.exists() else next(filter(None, map(shutil.which, names)), None)
        if path is None:
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
        found = playwright.chromium.launch(executable_path=path, args=flags, timeout=PATIENCE * 1000)
        yield found
        found.close()


@pytest.fixture(scope="module")
def tidy() -> Iterator[dgemma.Model]:
    with dgemma.Model(bundled("tidy")) as model:
        yield model


@pytest.fixture(scope="module")
def live(tidy: dgemma.Model) -> Iterator[Live]:
    with serving(tidy, key=None) as found:
        yield found


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, live: Live, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens the page; at the end nothing may have gone wrong in it, and nothing been asked elsewhere."""
    troubles: list[str] = []
    contexts: list[Any] = []

    def open_page(url: str = live.url, ready: bool = True, refused: str = "^$", **given: Any) -> Any:
        """refused: what the browser may say that it did not do."""
        usual = re.compile(f"^Failed to load resource|{refused}")  # an error's status is told by the page as well
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **given})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda told: told.type == "error" and not usual.search(told.text) and troubles.append(told.text),
        )
        page.on("dialog", lambda dialog: troubles.append(f"dialog: {dialog.message}"))
        page.on("request", lambda asked: asked.url.startswith((url, "data:")) or troubles.append(f"asked {asked.url}"))
        page.goto(url)
        if ready:
            expect(page.locator("body")).to_have_class("ready")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def shot(page: Any, name: str) -> None:
    if folder := os.environ.get("DGEMMA_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", animations="disabled")


def ask(page: Any, text: str) -> Any:
    """Sends a message, and returns the place of its answer."""
    page.get_by_role("textbox", name="Your message").fill(text)
    page.keyboard.press("Enter")
    return page.get_by_role("list", name="Conversation").get_by_label("Answer", exact=True).last


def set_to(page: Any, **values: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    dialog = page.get_by_role("dialog", name="Settings")
    for name, value in values.items():
        control = dialog.get_by_label(name.replace("_", " "), exact=True)
        control.check() if value is True else control.fill(str(value))
        control.blur()
    dialog.get_by_role("button", name="Done").click()
    expect(dialog).to_be_hidden()


def right(model: dgemma.Model, task: str) -> tasks.Case:
    """The first held-out case that the model itself gets right from seed 1."""
    for case in tasks.cases(task, 10):
        prompt = model.tokenizer.chat(case.messages, case.tools or None, case.thinking)
        if model.generate(prompt, seed=1).text == case.output:
            return case
    raise AssertionError(f"tidy gets no case of {task} right")


# ---- what a person does ----


def test_an_answer_is_watched_replayed_and_kept(opened: Open, tidy: dgemma.Model) -> None:
    page, case = opened(), right(tidy, "table")
    shot(page, "empty")
    set_to(page, Seed=1)
    answer = ask(page, case.messages[0]["content"])
    expect(answer.get_by_role("list", name="Figures")).to_contain_text("converged")
    cells = answer.get_by_role("region", name="Table").get_by_role("cell")
    rows = [line.strip("| ").split(" | ") for line in case.answer.split("\n")]
    assert cells.all_inner_texts() == [cell for row in rows[2:] for cell in row]
    steps = len([e for e in tidy.stream(list(case.messages), seed=1) if isinstance(e, dgemma.Step)])
    shot(page, "answered")

    answer.get_by_text(f"How it settled: {steps} step").click()
    slider = answer.get_by_role("slider", name="Step")
    assert slider.get_attribute("max") == str(steps - 1)
    slider.fill("0")
    expect(answer.get_by_role("status").or_(answer.locator("output"))).to_contain_text(f"1 of {steps}")
    tokens = answer.get_by_role("group", name="Tokens")
    first = next(e for e in tidy.stream(list(case.messages), seed=1))
    assert tokens.locator(".token").count() == len(first.canvas)
    tokens.focus()
    page.keyboard.press("ArrowRight")
    expect(answer.get_by_text(re.compile(r"^1: .* nats"))).to_be_visible()
    answer.get_by_text(" in all").click()
    expect(answer.get_by_role("img", name="Where the time went")).to_be_visible()
    shot(page, "replayed")
    answer.get_by_role("button", name="Replay").click()
    expect(answer.locator("output")).to_contain_text(f"{steps} of {steps}")

    page.reload()
    expect(page.get_by_role("list", name="Conversation")).to_contain_text(case.messages[0]["content"].split("\n")[0])
    assert page.get_by_role("cell").all_inner_texts() == [cell for row in rows[2:] for cell in row]
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="Written all at once")).to_be_visible()


def test_a_thought_is_folded(opened: Open, tidy: dgemma.Model) -> None:
    page, case = opened(), right(tidy, "think")
    set_to(page, Seed=1, Think_first=True)
    answer = ask(page, case.messages[0]["content"])
    expect(answer.get_by_role("list", name="Figures")).to_be_visible()
    expect(answer.locator(":scope > .prose")).to_have_text(case.answer)
    thought = answer.get_by_text(case.thought, exact=True)
    expect(thought).to_be_hidden()
    answer.get_by_text("Thought, 3 words").click()
    expect(thought).to_be_visible()
    shot(page, "thought")


def test_a_run_is_stopped_and_drawn_again(opened: Open, live: Live) -> None:
    page = opened()
    set_to(page, Most_steps_per_canvas=100000, Entropy_bound=0)
    answer = ask(page, "Indent:\nfig {\nsea {\nant\n}\n}")
    expect(answer.get_by_text(re.compile(r"Canvas 1, step \d+"))).to_be_visible()
    expect(answer.locator("output")).to_contain_text(re.compile("^[1-9][0-9]+ of"))
    shot(page, "settling")
    page.get_by_role("button", name="Stop").click()
    expect(answer.get_by_text("Stopped.")).to_be_visible()
    set_to(page, Most_steps_per_canvas=4, Entropy_bound=0.1, Most_tokens=20)
    answer.get_by_role("button", name="Another").click()
    expect(answer.get_by_role("list", name="Figures")).to_be_visible()
    assert page.get_by_label("Answer", exact=True).count() == 1


def test_a_passage_is_rewritten_in_place(opened: Open, tidy: dgemma.Model) -> None:
    page = opened()
    set_to(page, Seed=0)
    page.get_by_role("tab", name="Edit").click()
    before, passage, after = "# 🦊 map\n", "sea fig ant", "\nred: 12"
    text = page.get_by_role("textbox", name="Text", exact=True)
    text.fill(before + passage + after)
    start = len(before.encode("utf-16-le")) // 2
    text.evaluate(f"box => {{ box.focus(); box.setSelectionRange({start}, {start + len(passage)}); }}")
    instruction = page.get_by_role("textbox", name="Instruction")
    instruction.fill("Sort:")
    expect(page.get_by_text("11 characters selected")).to_be_visible()
    shot(page, "selected")
    instruction.press("Enter")
    accept = page.get_by_role("button", name="Accept", exact=True)
    expect(accept).to_be_focused()
    whole = before + passage + after
    wanted = tidy.edit(whole, (len(before), len(before + passage)), "Sort:", seed=0)
    assert wanted.passage == "ant fig sea"
    expect(page.get_by_role("group", name="The rewrite, in place")).to_have_text(f"{before}{passage}ant fig sea{after}")
    shot(page, "rewritten")
    page.get_by_role("button", name="Reject").click()
    assert text.input_value() == whole
    instruction.press("Enter")
    expect(accept).to_be_focused()
    page.keyboard.press("Enter")
    assert text.input_value() == wanted.text
    shot(page, "accepted")
    page.reload()
    assert page.get_by_role("textbox", name="Text", exact=True).input_value() == wanted.text
    text.fill("fig")
    instruction.fill("")
    instruction.press("Enter")
    expect(page.get_by_text("Say what is to be done")).to_be_visible()


def test_what_goes_wrong_is_told(opened: Open) -> None:
    page = opened()
    answer = ask(page, "fig " * 3000)
    expect(answer.get_by_role("alert")).to_contain_text("more than 2048")
    shot(page, "refused")
    page.get_by_role("tab", name="Edit").click()
    page.get_by_role("textbox", name="Text", exact=True).fill("fig " * 3000)
    page.get_by_role("textbox", name="Instruction").fill("Sort:")
    page.get_by_role("button", name="Rewrite").click()
    expect(page.get_by_role("alert").last).to_contain_text("more than 2048")


def test_a_server_that_is_busy_or_gone_is_told(opened: Open) -> None:
    page = opened()
    error = {"error": {"message": "3 requests wait already; try again later", "code": "queue_full"}}
    page.route(
        "**/v1/chat/completions", lambda r: r.fulfill(status=429, headers={"Retry-After": "1"}, body=json.dumps(error))
    )
    answer = ask(page, "Sort:\nsea fig ant")
    expect(answer.get_by_role("alert")).to_contain_text("try again later")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda r: r.abort())
    answer.get_by_role("button", name="Try again", exact=True).click()
    expect(answer.get_by_role("alert")).to_contain_text("does not answer")
    page.unroute("**/v1/chat/completions")
    answer.get_by_role("button", name="Try again").click()
    expect(answer.get_by_role("list", name="Figures")).to_be_visible()


def test_a_key_is_asked_for_and_not_kept(opened: Open, tidy: dgemma.Model) -> None:
    with serving(tidy) as guarded:
        page = opened(guarded.url, ready=False)
        dialog = page.get_by_role("dialog", name="This server needs a key")
        dialog.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("did not take that key")
        shot(page, "key")
        dialog.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.locator("body")).to_have_class("ready")
        expect(ask(page, "Sort:\nsea fig ant").get_by_role("list", name="Figures")).to_be_visible()
        kept = page.evaluate("() => JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert "secret" not in kept
        page.reload()
        expect(dialog).to_be_visible()
        page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(opened: Open, tidy: dgemma.Model, scheme: str) -> None:
    page = opened(viewport={"width": 360, "height": 720}, color_scheme=scheme, has_touch=True)
    answer = ask(page, right(tidy, "json").messages[0]["content"])
    expect(answer.get_by_role("list", name="Figures")).to_be_visible()
    answer.get_by_text("How it settled").click()
    shot(page, f"phone-{scheme}")
    for name in ("Edit", "Chat"):
        page.get_by_role("tab", name=name).click()
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
        shot(page, f"phone-{scheme}-{name.lower()}")
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")


def test_the_theme_can_be_chosen(opened: Open) -> None:
    page = opened(color_scheme="light")
    for _ in range(2):
        page.get_by_role("button", name="Light or dark").click()
    page.reload()
    expect(page.locator("body")).to_have_class("ready")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(19, 20, 22)"
    shot(page, "dark")


# ---- what nobody can do to it ----

HOSTILE = """# A heading

| a | b |
|---|--:|
| 1 | `x` |

<img src="https://evil.example/pixel" onerror="document.title='taken'"><script>document.title='taken'</script>
[a](javascript:document.title='taken') <a href="https://evil.example" onclick="document.title='taken'">b</a>
![p](https://evil.example/p.png) <iframe src="https://evil.example"></iframe><form action="https://evil.example">
<svg><a xlink:href="javascript:alert(1)"><text>x</text></a></svg> <div style="position:fixed;inset:0">y</div>

```python
print("<b>")
```

```html
<!doctype html><title>t</title><meta http-equiv="refresh" content="0;url=https://evil.example">
<style>p { color: rgb(1, 2, 3) }</style><link rel="stylesheet" href="https://evil.example/s.css">
<p onclick="fetch('https://evil.example')">shown</p><img src="https://evil.example/q.png">
<script>fetch("https://evil.example"); top.location = "https://evil.example"; parent.document.title = "taken"</script>
```
"""


def said(text: str) -> str:
    """A stream that says a text."""
    head = {"id": "1", "created": 1, "model": "m", "object": "chat.completion.chunk"}
    seconds = {"waiting": 0, "prompt": 0, "steps": 1}
    figures = {"seed": 1, "steps": 1, "converged": True, "fault": None, "seconds": seconds}
    end = {"index": 0, "delta": {}, "finish_reason": "stop", "diffusion": figures}
    chunks = [
        *({**head, "choices": [{"index": 0, "delta": {"content": part}}]} for part in re.findall(r"(?s).{1,40}", text)),
        {**head, "choices": [end]},
        {**head, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def test_an_answer_is_shown_and_never_obeyed(opened: Open) -> None:
    page = opened(refused="inline (event handler|style)")
    page.route(
        "**/v1/chat/completions", lambda r: r.fulfill(headers={"Content-Type": "text/event-stream"}, body=said(HOSTILE))
    )
    answer = ask(page, "why")
    expect(answer.get_by_role("list", name="Figures")).to_be_visible()
    expect(answer.get_by_role("heading", name="A heading")).to_be_visible()
    prose = answer.locator(":scope > .prose")
    expect(prose.locator("pre code").first).to_have_text('print("<b>")')
    assert prose.locator("img, script, iframe, form, svg, style, [onclick], [onerror], [style]").count() == 0
    links = prose.locator("a")
    assert all(re.match("https?:", str(link.get_attribute("href") or "https:")) for link in links.all())
    frame = answer.frame_locator("iframe")
    paragraph = frame.get_by_text("shown")
    expect(paragraph).to_have_css("color", "rgb(1, 2, 3)")
    paragraph.click()
    assert frame.locator("script, link, meta[http-equiv]").count() == 0
    assert answer.locator("iframe").get_attribute("sandbox") == "allow-scripts"
    assert page.title() == "tidy-q8_0 · dgemma"
    shot(page, "html")


def test_every_file_says_what_it_may() -> None:
    found = page_files()
    on_disk = {str(file.relative_to(FOLDER)) for file in FOLDER.rglob("*") if file.is_file()}
    assert set(found) == {"", *on_disk}, "files that are not served"
    for name, file in found.items():
        policy = file.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none';") and "unsafe-eval" not in policy and "http" not in policy
        assert "script-src 'self'" in policy or name == "preview.html"
        if "vendor" not in name:  # nothing is fetched from elsewhere
            text = file.body.decode().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"(?:src|href|url|import|fetch)\W{1,4}(?:https?:)?//", text), name
    assert "'unsafe-inline'" not in found[""].headers["Content-Security-Policy"]
    assert "sandbox allow-scripts" in found["preview.html"].headers["Content-Security-Policy"]


def test_the_page_is_served_without_a_key_and_only_itself(tidy: dgemma.Model) -> None:
    with serving(tidy) as live:
        first = get(live.url)
        assert first.status_code == 200 and "text/html" in first.headers["content-type"]
        again = get(live.url, headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code == 304 and not again.content
        for path in ("/page.py", "/vendor/../../page.py", "/%2e%2e/page.py", "/vendor"):
            assert get(live.url + path).status_code in (401, 404)
