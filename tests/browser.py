"""Every page of the site, or of a folder of reports, in headless Chromium: python tests/browser.py FOLDER

A page must say nothing on the console, ask no other host, show its formulas, and not scroll sideways at 390 px,
with all that is folded open; the site's search must find. Only the standard library is needed, and a Chromium
(CHROMIUM names another)."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

WIDTH = 390
SECONDS = 900
HARNESS = """<!doctype html><meta charset="utf-8"><title>check</title><body><script>
const pause = ms => new Promise(done => setTimeout(done, ms));
async function opened(page) {
  const frame = document.createElement('iframe');
  frame.style.cssText = 'width: WIDTHpx; height: 800px; border: 0';
  const loaded = new Promise(done => { frame.onload = done });
  frame.src = page; document.body.append(frame);
  await loaded; await pause(150);
  return frame;
}
function prose(doc) {
  const copy = doc.body.cloneNode(true);
  copy.querySelectorAll('pre, code, script, style').forEach(x => x.remove());
  return copy.textContent;
}
async function look(page) {
  const frame = await opened(page), doc = frame.contentDocument, root = doc.documentElement;
  doc.querySelectorAll('details').forEach(d => { d.open = true });
  await pause(50);
  const wide = root.scrollWidth <= root.clientWidth ? [] : [...doc.querySelectorAll('body *')]
    .filter(x => x.getBoundingClientRect().right > root.clientWidth + 1).slice(0, 3)
    .map(x => x.tagName + '.' + x.className + ' ' + x.textContent.trim().slice(0, 60));
  const asked = frame.contentWindow.performance.getEntriesByType('resource').map(e => new URL(e.name).host);
  const math = [...doc.querySelectorAll('math')];
  const found = {
    page, width: root.scrollWidth, room: root.clientWidth, wide,
    hosts: [...new Set(asked)].filter(h => h && h != location.host),
    raw: (prose(doc).match(/\\$[^$\\n]{1,80}\\$/g) || []).slice(0, 3),
    formulas: math.length, invisible: math.filter(m => !m.getBoundingClientRect().height).length,
    dead: [...doc.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute('href').slice(1))
      .filter(id => id && !doc.getElementById(id) && !doc.getElementById(decodeURIComponent(id))).slice(0, 3),
  };
  frame.remove();
  return found;
}
async function search(page, words) {
  const frame = await opened(page), doc = frame.contentDocument, field = doc.querySelector('.md-search__input');
  if (!field) return null;
  doc.querySelector('#__search').click(); field.focus();
  field.value = words; field.dispatchEvent(new frame.contentWindow.KeyboardEvent('keyup', {bubbles: true}));
  field.dispatchEvent(new Event('input', {bubbles: true}));
  for (let i = 0; i < 100; i++) {
    await pause(100);
    const hits = doc.querySelectorAll('.md-search-result__item').length;
    if (hits) return hits;
  }
  return 0;
}
(async () => {
  const pages = PAGES, said = {pages: []};
  try {
    for (const p of pages) said.pages.push(await look(p));
    said.search = await search('index.html', 'magnitude mask');
  } catch (e) { said.failed = String(e) }
  await fetch('/said', {method: 'POST', body: JSON.stringify(said)});
})();
</script>"""


class Server(http.server.SimpleHTTPRequestHandler):
    "The folder, the harness at /check, and what it says."

    def do_GET(self):
        if self.path != "/check":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.harness.encode())

    def do_POST(self):
        self.server.said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        pass


def chromium():
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome"]
    found = next((at for n in names if n and (at := shutil.which(n))), None)
    if not found:
        sys.exit(
            "No Chromium found: install it (on Debian and Ubuntu: apt install chromium) or name it with CHROMIUM=..."
        )
    return found


def look_at(folder):
    "What the browser says of each page of the folder, and what it wrote on the console."
    listed = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.html") if p.name != "404.html")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder)))
    server.harness = HARNESS.replace("PAGES", json.dumps(listed)).replace("WIDTH", str(WIDTH))
    server.said, server.done = {}, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(Path(profile, "log"), "w+") as log:
        quiet = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        command = [chromium(), *quiet.split()]
        command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0", "--window-size=1000,900"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        browser = subprocess.Popen(
            [*command, f"http://127.0.0.1:{server.server_port}/check"], stdout=subprocess.DEVNULL, stderr=log
        )
        ended = server.done.wait(SECONDS)
        browser.terminate()
        browser.wait(20)
        log.seek(0)
        console = [line.strip() for line in log if "CONSOLE" in line]
    server.shutdown()
    if not ended:
        sys.exit(f"The browser gave no answer within {SECONDS} seconds")
    return server.said, console


def faults(said, console):
    "One line for each thing that is not as it should be."
    if "failed" in said:
        yield f"the check itself failed: {said['failed']}"
    for p in said["pages"]:
        if p["width"] > p["room"]:
            yield f"{p['page']}: {p['width']} px wide in {p['room']} px: {p['wide']}"
        if p["hosts"]:
            yield f"{p['page']}: asks {', '.join(p['hosts'])}"
        if p["raw"]:
            yield f"{p['page']}: raw formulas {p['raw']}"
        if p["invisible"]:
            yield f"{p['page']}: {p['invisible']} formulas without height"
        if p["dead"]:
            yield f"{p['page']}: links to what is not there: {p['dead']}"
    if said.get("search") == 0:
        yield "the search finds nothing"
    yield from (f"console: {re.sub(r'^.*?CONSOLE', '', line)}" for line in console)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs").resolve()
    said, console = look_at(folder)
    wrong = list(faults(said, console))
    print(*wrong, sep="\n")
    formulas = sum(p["formulas"] for p in said["pages"])
    searched = "" if said.get("search") is None else f", search: {said['search']} hits"
    print(f"{len(said['pages'])} pages, {formulas} formulas{searched}, {len(wrong)} faults")
    sys.exit(bool(wrong) or not said["pages"])
