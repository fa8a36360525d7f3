"""A report in headless Chromium: what its script does when somebody points, types and chooses."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WATCH = "<script>window.wrong = []; window.onerror = (text) => { window.wrong.push(text); };</script>"
PROBE = """<script>
const seen = { wrong: window.wrong, errors: [], width: window.innerWidth, wide: document.documentElement.scrollWidth };
const told = () => document.getElementById("tip").hidden ? "" : document.getElementById("tip").textContent;
function point(id, x, y) {
  const element = document.querySelector(id), box = element.getBoundingClientRect();
  element.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + x, clientY: box.top + y }));
  return told();
}
function press(id, key) {
  document.querySelector(id).dispatchEvent(new KeyboardEvent("keydown", { key }));
  return told();
}
function choose(id, value) {
  const select = document.getElementById(id);
  select.value = value;
  select.dispatchEvent(new Event("change"));
}
seen.dark = getComputedStyle(document.body).backgroundColor;
seen.cell = point("#heat", 54 + 4, 4);
seen.key = press("#heat", "ArrowRight");
seen.curve = point("#curve svg", 200, 100);
if (document.querySelector("#strips svg")) seen.strip = point("#strips svg", 8, 40);
if (document.querySelector("#by-position svg")) seen.bucket = point("#by-position svg", 60, 40);
seen.pairs = point("#lift", 54 + 4, 4);
const cell = document.getElementById("alike").offsetHeight / 7;
seen.alike = point("#alike", 54 + 1.5 * cell, 4);
seen.domains = point("#domain-heat", 54 + 4, 4);
seen.before = document.getElementById("experts").textContent;
choose("layer", 1);
seen.layer = document.querySelector("[data-layer]").textContent;
seen.after = document.getElementById("experts").textContent;
const plans = document.getElementById("plan").options;
if (plans.length) choose("plan", plans[plans.length - 1].value);
choose("value", document.getElementById("value").options[1].value);
for (const scale of ["log", "layer", "rank"]) choose("scale", scale);
seen.other = point("#heat", 54 + 4, 4);
console.info("probe " + JSON.stringify(seen));
</script>"""


def probed(page: Path, *, width: int, dark: bool = False) -> tuple[dict[str, Any], list[str]]:
    """What the page showed, and the lines of its console. `page` is opened in a copy beside it."""
    assert CHROMIUM is not None
    copy = page.with_name(f"probed-{width}-{dark}.html")
    text = page.read_text().replace("<head>", f"<head>{WATCH}", 1)
    inner = html.escape(text.replace("</body>", f"{PROBE}</body>", 1))  # a window has 500 pixels at the least
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{inner}"></iframe>'
    copy.write_text(f'<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">{frame}')
    scheme = 0 if dark else 1
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1400,1000",
         f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=3000",
         f"--screenshot={copy.with_suffix('.png')}", f"--user-data-dir={page.parent / 'profile'}", copy.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = [match[1] for line in lines if (match := re.search(r'"probe (\{.*\})", source: ', line))]
    assert found, done.stderr
    return json.loads(found[0]), [line for line in lines if '"probe {' not in line]
