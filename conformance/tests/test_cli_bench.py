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


def test_bench_prints_a_table(toy, capsys):
    assert main(["bench", "toy", *SMALL]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "toy (levels=127), 24 x 40, 8.800 bits per weight"
    assert lines[2].startswith("dtype rows ms dense ms × dense")
    rows = [line.split(" ") for line in lines[3:16]]
    assert [words[0] for words in rows] == ["pack", *2 * ["decode", "x", "y", "x", "y", "LoRA"]]
