"""The report in a real browser: nothing is wider than the page, no picture is broken, and text can be read."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from helpers import TIMEOUT, call

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>
addEventListener("load", () => {
  const shown = element => element.getClientRects().length > 0;
  const texts = [...document.querySelectorAll("svg text")].filter(shown);
  const found = {
    wide: document.documentElement.scrollWidth, window: innerWidth,
    broken: [...document.images].filter(image => !image.naturalWidth).length, images: document.images.length,
    drawings: [...document.querySelectorAll("svg")].filter(shown).length,
    smallest: Math.min(...texts.map(text => text.getBoundingClientRect().height)),
    background: getComputedStyle(document.body).backgroundColor,
  };
  parent.postMessage(JSON.stringify(found), "*");
});
</script>"""
# A window of headless Chromium is never narrower than 500 pixels; a frame in it is.
FRAME = """<iframe src="{page}" width="{width}" height="900" style="border: 0"></iframe><script>
addEventListener("message", event => {{ document.body.innerText = "FOUND" + event.data + "END"; }});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a made run with everything that a run may have."""
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    load = generator.dirichlet(np.ones(48), 12).round(4).tolist()
    load[3][7] = 0.0
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 401):
            record = {"step": step, "loss": 3 / step**0.3, "lr": 1e-4, "grad_norm": 1.0, "images_per_second": 100.0}
            record |= {"moe_imbalance": 2.0, "expert_load": load} | ({"look_fid": 9.0} if step % 100 == 0 else {})
            file.write(json.dumps(record) + "\n")
    (folder / "config.yaml").write_text("name: dsmoe_s_e16\nglobal_batch_size: 512\nlong: " + "x" * 400 + "\n")
    scores = {"protocol": "diffmoe", "features": "Inception V3", "num_samples": 50_000, "num_reference": None}
    scores |= {"fid": 15.0, "fid_interval": [14.0, 16.0], "inception_score": 90.0, "sampling": {"vae": "a/" * 60}}
    (folder / "scores.json").write_text(json.dumps(scores))
    for kind, place in (("real/a", "x.png"), ("real/b", "y.png"), ("samples/images", "000000_0.png")):
        (folder / kind).mkdir(parents=True)
        for i in range(20 if "real" in kind else 1):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / (f"{i}{place}" if "real" in kind else place))
    Image.new("RGB", (900, 900), "teal").save(folder / "samples" / "samples.png")
    flags = ["--samples", folder / "samples", "--scores", folder / "scores.json", "--real", folder / "real"]
    assert call("eval.report", "--run", folder, *flags, "--out", folder / "report.html") == 0
    return folder / "report.html"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; the system's package chromium brings it")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_its_page(page, tmp_path, width, dark):
    measured = tmp_path / "page.html"
    measured.write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=measured.as_uri(), width=width))
    flags = [
        "--window-size=1400,900",
        "--virtual-time-budget=10000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    found = json.loads(re.search("FOUND(.*)END", done.stdout)[1])
    assert found["window"] == width and found["wide"] <= width
    assert found["broken"] == 0 and found["images"] == 1 + 1 + 3 + 3
    assert found["drawings"] == 7  # loss, rate, norm, speed, imbalance, load, FID of the looks
    assert found["smallest"] >= 9  # pixels of a line of text
    assert found["background"] == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")
