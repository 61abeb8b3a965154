"""Folders of strangers: each command names the file and the field, in one line, exit code 2."""

import json
import re
import resource
import shutil
import time

import pytest
from transformers import AutoTokenizer

from modulora_core.cli import main
from modulora_core.tests.tiny_tokenizer import write_jsonl


def in_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def in_site(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sites"][0] |= values
    (folder / "config.json").write_text(json.dumps(config))


PACKED = {
    "layers": (
        lambda f: in_json(f, "config.json", num_hidden_layers=10**12),
        "config.json: num_hidden_layers: expected 0 to 512",
    ),
    "experts": (
        lambda f: in_site(f, kind="experts", experts=10**9),
        "config.json: quantization_config: sites: experts: expected 0 to 4096",
    ),
    "eos": (
        lambda f: in_json(f, "generation_config.json", eos_token_id=[[1]]),
        "generation_config.json: eos_token_id",
    ),
    "architectures": (lambda f: in_json(f, "config.json", architectures=7), ""),
}


@pytest.mark.parametrize("case", PACKED)
def test_a_packed_folder_of_a_stranger(case, packed, tmp_path, run):
    edit, message = PACKED[case]
    folder = tmp_path / "folder"
    shutil.copytree(packed, folder)
    edit(folder)
    started = time.process_time()
    for words in (["info", folder], ["generate", folder, "a", "--max-new-tokens", 1]):
        code, found, err = run(*words)
        if code != 0:
            assert (code, message in found["error"]["message"]) == (2, True), err
            assert len(err.strip().splitlines()) == 1
        assert "unexpected" not in err
    assert "unexpected" not in run("plan", folder, "--seq-len", 16)[2]
    assert code == 2 or not message
    assert time.process_time() - started < 20


def test_settings_of_the_folder_do_not_change_an_answer(packed, tmp_path, run):
    folder = tmp_path / "folder"
    shutil.copytree(packed, folder)
    in_json(folder, "generation_config.json", stop_strings=["a"], eos_token_id=10**9)
    words = ["a", "--max-new-tokens", 2]
    code, answer, _ = run("generate", folder, *words)
    assert code == 0
    assert answer["text"] == run("generate", packed, *words)[1]["text"]


def test_control_characters_are_not_printed(packed, tmp_path, capsys):
    folder = tmp_path / "folder"
    shutil.copytree(packed, folder)
    in_json(folder, "config.json", architectures=["\x1b[31mred\x07"])
    assert main(["info", str(folder)]) == 0
    assert r"\x1b[31mred\x07" in capsys.readouterr().out
    in_json(folder, "config.json", model_type="\x1b[31m\r\nred")
    assert main(["plan", str(folder)]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "generate MODEL fox",
        "finetune MODEL OUT --data DATA --seq-len 24 --steps 1",
        "evaluate MODEL --data DATA --seq-len 8",
        "evaluate MODEL --data DATA --metric exact-match --max-new-tokens 1",
        "quantize SOURCE OUT -q toy --calibration DATA --seq-len 8",
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(words, source, packed, tmp_path, run):
    rows = [{"prompt": "a fox", "completion": answer} for answer in "aaaaaaaaab"]
    data = write_jsonl(tmp_path / "data.jsonl", *rows)
    places = {"OUT": tmp_path / "out", "DATA": data}
    for name, model in (("SOURCE", source), ("MODEL", packed)):
        places[name] = tmp_path / name
        shutil.copytree(model, places[name])
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(["fox"])
        tokenizer.save_pretrained(places[name])
    code, found, err = run(*(places.get(word, word) for word in words.split()))
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    assert "from the tokenizer" in found["error"]["message"]


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "MODEL", "a", "--seed", 2**32],
        ["generate", "MODEL", "a", "--temperature", "nan"],
        ["generate", "MODEL", "a", "--device", "meta"],
        ["plan", "MODEL", "--seq-len", 16, "--batch-size", 10**12],
        ["plan", "MODEL", "--seq-len", 16, "--plot", "FOLDER.svg"],
        ["finetune", "MODEL", "OUT", "--data", "pydoc", "--epochs", 1e300],
    ],
    ids=str,
)
def test_requests_that_cannot_be(words, packed, tmp_path, run):
    (tmp_path / "folder.svg").mkdir()
    places = {"MODEL": packed, "OUT": tmp_path / "out", "FOLDER": tmp_path / "folder"}
    filled = [str(word) for word in words]
    for name, place in places.items():
        filled = [word.replace(name, str(place)) for word in filled]
    code, _, err = run(*filled)
    assert code == 2, err
    assert "unexpected" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "quantize SOURCE OUT -q toy",
        "merge MODEL OUT",
        "finetune MODEL OUT --data pydoc[:1%] --seq-len 16 --steps 16 --no-baseline",
    ],
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(words, source, packed, tmp_path, run):
    places = {"SOURCE": source, "MODEL": packed, "OUT": tmp_path / "out"}
    filled = [places.get(word, word) for word in words.split()]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        code, found, err = run(*filled)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, len(err.strip().splitlines())) == (2, 1), err
    refused = r"out(\.partial/tokenizer\.json)?: File too large; raise the limit"
    assert re.search(refused, found["error"]["message"])
    assert not (tmp_path / "out" / "config.json").exists()
    again = ["--resume"] if words.startswith("quantize") else []
    assert run(*filled, *again)[0] == 0
