import json

from modulora_core.cli import main

SMALL = ["--shape", "24x40", "--rows", "1", "--rows", "5", "--seconds", "1e-6", "--device", "cpu"]
KEYS = {
    "quantizer", "options", "shape", "device", "device_name", "threads", "bits_per_weight",
    "comparisons",
}  # fmt: skip


def test_bench_prints_the_promised_object(toy, capsys):
    words = [*SMALL, "-o", "levels=7", "--dtype", "float16", "--json"]
    assert main(["bench", "toy", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= KEYS
    assert (found["options"], found["shape"]) == ({"levels": 7}, [24, 40])
    assert {row["dtype"] for row in found["comparisons"][1:]} == {"float16"}
    for row in found["comparisons"]:
        assert min(row["ours"]["seconds"], row["dense"]["seconds"], row["ratio"]) > 0
        if "share_of_copy" in row:
            assert row["kind"] in ("pack", "decode")
            assert row["bytes_per_second"] > 0
