from __future__ import annotations

import json
from pathlib import Path

from modulora_core.tests.fake_site import FakeSite, failing

HEAVY = ("torch", "numpy", "transformers")


def test_list_quantizers_prints_the_promised_object(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha", version="2.3")
    site.install("fake-broken", {"broken": "fake_broken"}, {"fake_broken": failing("no such GPU")})
    code = f"""
        import sys
        from modulora_core.cli import main
        code = main(["list-quantizers", "--json"])
        heavy = [name for name in {HEAVY!r} if name in sys.modules]
        sys.exit(f"imported {{heavy}}" if heavy else code)
    """
    result = site.run(code)
    assert result.returncode == 0, result.stderr
    listed = {row["name"]: row for row in json.loads(result.stdout)["quantizers"]}
    assert listed["alpha"] == {
        "name": "alpha",
        "summary": "alpha for tests",
        "bits": [5],
        "protocol": 1,
        "distribution": "fake-alpha",
        "version": "2.3",
        "devices": ["cpu"],
        "status": "ok",
        "reason": None,
    }
    assert listed["broken"]["status"] == "broken"
    assert listed["broken"]["reason"] == "RuntimeError: no such GPU"


def test_list_quantizers_prints_a_table(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha", version="2.3")
    site.install(
        "fake-broken", {"broken": "fake_broken"}, {"fake_broken": failing("[no] such GPU")}
    )
    result = site.run("from modulora_core.cli import main; main(['list-quantizers'])")
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert rows[0] == "name bits version distribution devices status summary or reason"
    assert "alpha 5 2.3 fake-alpha cpu ok alpha for tests" in rows
    assert "broken 1.0 fake-broken broken RuntimeError: [no] such GPU" in rows
