from __future__ import annotations

import json
from pathlib import Path

from modulora_core.tests.fake_site import FakeSite, failing

ROW = {
    "name": "alpha", "summary": "alpha for tests", "bits": [5], "protocol": 1,
    "distribution": "fake-alpha", "version": "2.3", "devices": ["cpu"], "status": "ok",
    "reason": None,
}  # fmt: skip


def test_list_quantizers_prints_an_object_or_a_table(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha", version="2.3")
    broken = {"fake_broken": failing("[no] such GPU")}
    site.install("fake-broken", {"broken": "fake_broken"}, broken)
    code = """
        import sys
        from modulora_core.cli import main
        main(["list-quantizers", "--json"])
        main(["list-quantizers"])
        sys.exit(str({"torch", "numpy", "transformers"} & set(sys.modules)))
    """
    result = site.run(code)
    assert result.stderr.strip() == "set()"
    first, *lines = result.stdout.splitlines()
    listed = {row["name"]: row for row in json.loads(first)["quantizers"]}
    assert listed["alpha"] == ROW
    assert listed["broken"]["status"] == "broken"
    assert listed["broken"]["reason"] == "RuntimeError: [no] such GPU"
    rows = [" ".join(line.split()) for line in lines]
    assert rows[0] == "name bits kernels package status"
    assert rows[rows.index("alpha 5 cpu fake-alpha 2.3 ok") + 1] == "alpha for tests"
    assert rows[rows.index("broken fake-broken 1.0 broken") + 1] == "RuntimeError: [no] such GPU"


def test_check_imports_each_class_and_marks_a_broken_one(tmp_path: Path) -> None:
    site = FakeSite(tmp_path)
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    (tmp_path / "fake_alpha_quantizer.py").write_text("import no_such_module\n")
    code = "from modulora_core.cli import main; print(main(['list-quantizers', {}'--json']))"
    results = [site.run(code.format(flag)).stdout.splitlines() for flag in ("", "'--check', ")]
    (unchecked, zero), (checked, one) = results
    assert (zero, one) == ("0", "1")
    before, after = (
        {row["name"]: row for row in json.loads(text)["quantizers"]}
        for text in (unchecked, checked)
    )
    assert before["alpha"]["status"] == "ok"
    assert after["alpha"]["status"] == "broken"
    assert after["alpha"]["reason"].endswith("No module named 'no_such_module'")
