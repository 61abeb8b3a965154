import json

from modulora_core.registry import entries
from modulora_core.tests.fake_site import FakeSite, failing

ROW = {
    "name": "alpha", "summary": "alpha for tests", "bits": [5], "protocol": 2,
    "distribution": "fake-alpha", "version": "2.3", "devices": ["cpu"], "status": "ok",
    "reason": None,
}  # fmt: skip


def test_list_quantizers_prints_an_object_or_a_table(tmp_path):
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


LIST = "from modulora_core.cli import main; print(main(['list-quantizers', {}'--json']))"


def listed(site, *flags):
    """The rows by name, and the exit code. Other plugins are blocked: ``--check`` imports all."""
    code = LIST.format("".join(f"{flag!r}, " for flag in flags))
    others = ",".join(entry.name for entry in entries())
    text, code = site.run(code, MODULORA_BLOCK=others).stdout.splitlines()
    return {row["name"]: row for row in json.loads(text)["quantizers"]}, int(code)


def test_check_imports_each_class_and_marks_a_broken_one(tmp_path):
    site = FakeSite(tmp_path)
    site.install_quantizer("alpha", distribution="fake-alpha", module="fake_alpha")
    file = tmp_path / "fake_alpha_quantizer.py"
    file.write_text(file.read_text() + "\nimport json.no_such_part\n")
    before, zero = listed(site)
    after, one = listed(site, "--check")
    assert (zero, one) == (0, 1)
    assert before["alpha"]["status"] == "ok"
    assert after["alpha"]["status"] == "broken"
    assert "no_such_part" in str(after["alpha"]["reason"])
