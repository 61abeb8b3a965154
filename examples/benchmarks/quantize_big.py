"""A model of 7 billion weights quantized in little memory: peak, rate and time of `modulora quantize`.

    python examples/benchmarks/quantize_big.py
    python examples/benchmarks/quantize_big.py --layers 4 --quantizers nf4 --kill-at 0.5
    python examples/benchmarks/quantize_big.py --sizes tiny --folder big

The model has the shapes of Llama 2 7B (Touvron et al. 2023, arXiv 2307.09288) and random weights in bfloat16. It is written to disk in
shards, a tensor at a time: 13.5 GB, kept with --folder. Each quantizer is a run of the command in a process of its own, whose progress bar
is seen here. The peak is the resident set of that process at its largest, interpreter and libraries included. With --kill-at, a run is
killed (SIGKILL) when this share of its parameters has been written, and gone on with by --resume; then the peak is the larger one of the
two, and the seconds are both processes'.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from modulora_core.checkpoints.outputs import partial_name
from modulora_core.checkpoints.shards import JOURNAL, ShardWriter, plan_shards
from modulora_core.models.conversion import build_skeleton
from modulora_core.models.safetensors_store import SafetensorsStore
from modulora_core.spec import TensorLayout

SIZES = {
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "max_position_embeddings": 4096},
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4,
             "num_attention_heads": 4, "max_position_embeddings": 256},
}  # fmt: skip
BOUNDS = {"nf4": 3 * 2**30, "optq": 8 * 2**30}
"""What a run on the 7B model may take."""

STD = 0.02
"""Of the weights, as Llama's are initialised."""

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Run:
    """What one quantizer took."""

    quantizer: str
    peak_bytes: int
    seconds: float
    source_bytes: int
    bytes: int
    resumed_after: int
    """Parameters that had been written when the run was killed; 0 where none was."""

    @property
    def rate(self) -> float:
        """Bytes of the source in a second."""
        return self.source_bytes / self.seconds


def make_model(folder: Path, sizes: dict[str, int], shard_bytes: int) -> None:
    """Write the model; goes on with what is there. One tensor is in memory at a time."""
    if (folder / "tokenizer.json").is_file():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        **sizes, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16"
    )
    state = build_skeleton(config, torch.bfloat16).state_dict()
    layouts = {
        name: TensorLayout("bfloat16", tuple(tensor.shape)) for name, tensor in state.items()
    }
    writer = ShardWriter(folder, plan_shards(layouts, shard_bytes), resume=True)
    for number, (name, layout) in enumerate(layouts.items()):
        if name not in writer.done:
            writer.write(name, {name: _values(layout.shape, seed=number)})
    writer.finish()
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _values(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = torch.empty(shape, dtype=torch.bfloat16)
    if len(shape) == 1:  # a norm
        return values.fill_(1)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, 2**22 // shape[1])
    for start in range(0, shape[0], rows):
        part = values[start : start + rows]
        part.copy_(torch.randn(part.shape, generator=generator).mul_(STD))
    return values


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: enough to have some ids of text to calibrate on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


class Process:
    """One run of `modulora quantize`."""

    def __init__(
        self, model: Path, out: Path, flags: argparse.Namespace, quantizer: str, *, resume: bool
    ) -> None:
        name, _, options = quantizer.partition(":")
        words = [
            sys.executable,
            "-m",
            "modulora_core.cli",
            "quantize",
            str(model),
            str(out),
            "-q",
            name,
        ]
        for option in filter(None, options.split(",")):
            words += ["-o", option]
        if name not in flags.without_calibration:
            samples, length = str(flags.samples), str(flags.seq_len)
            words += ["--calibration", "pydoc", "--samples", samples, "--seq-len", length]
        if resume:
            words.append("--resume")
        self._command = " ".join(words[1:])
        self._started = time.perf_counter()
        self._process = subprocess.Popen(words)
        self._journal = partial_name(out) / JOURNAL
        self.peak = 0

    def wait(self, kill_after: int | None = None) -> float:
        """Watch it until it ends, or has written so many parameters, when it is killed. Returns its seconds."""
        while self._process.poll() is None:
            self.peak = max(self.peak, _peak_bytes(self._process.pid))
            if kill_after is not None and self.written() >= kill_after:
                self._process.send_signal(signal.SIGKILL)
                self._process.wait()
                return time.perf_counter() - self._started
            # where it is to be killed: a small model is soon written
            time.sleep(POLL_SECONDS if kill_after is None else POLL_SECONDS / 10)
        if self._process.returncode != 0:
            raise SystemExit(f"{self._command}: exit code {self._process.returncode}")
        return time.perf_counter() - self._started

    def written(self) -> int:
        """Parameters that are whole."""
        try:
            return len(self._journal.read_text().splitlines())
        except OSError:  # not yet, or not any more
            return 0


def _peak_bytes(pid: int) -> int:
    """The largest resident set of a process so far (proc(5): VmHWM); 0 where it can't be told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def run(model: Path, out: Path, flags: argparse.Namespace, quantizer: str) -> Run:
    tensors = SafetensorsStore(model).tensors
    process = Process(model, out, flags, quantizer, resume=False)
    count = round(flags.kill_at * len(tensors))
    seconds, peak, written = process.wait(kill_after=count or None), process.peak, process.written()
    if not out.exists():  # killed
        process = Process(model, out, flags, quantizer, resume=True)
        seconds += process.wait()
        peak = max(peak, process.peak)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Run(quantizer, peak, seconds, sum(t.nbytes for t in tensors.values()), size, written)


def table(runs: Sequence[Run], *, bounds: bool) -> str:
    lines = ["| | peak memory | bound | time | rate | from | to |", "|-|-|-|-|-|-|-|"]
    for each in runs:
        bound = BOUNDS.get(each.quantizer.partition(":")[0]) if bounds else None
        told = (
            ""
            if bound is None
            else f"{bound / 2**30:.0f} GiB" + (", broken" if each.peak_bytes > bound else "")
        )
        lines.append(
            f"| {each.quantizer} | {each.peak_bytes / 2**30:.2f} GiB | {told} | {each.seconds:.0f} s | "
            f"{each.rate / 1e6:.0f} MB/s | {each.source_bytes / 1e9:.2f} GB | {each.bytes / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


@contextmanager
def _folder(chosen: Path | None) -> Iterator[Path]:
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def _flags(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", choices=SIZES, default="7b", help="of the model (7b)")
    add("--layers", type=int, help="decoder layers, to make it smaller (32)")
    add("--folder", type=Path, help="keep the model there, and use the one that is there already")
    add("--shard-bytes", type=int, default=10**9, help="of a file of the model (1000000000)")
    add(
        "--quantizers",
        nargs="+",
        default=["nf4", "optq"],
        metavar="NAME[:KEY=VALUE,...]",
        help="(nf4 optq)",
    )
    add(
        "--without-calibration",
        nargs="*",
        default=["nf4", "int8"],
        help="those that take no text (nf4 int8)",
    )
    add("--samples", type=int, default=4, help="of calibration (4)")
    add("--seq-len", type=int, default=128, help="tokens of a calibration sample (128)")
    add(
        "--kill-at",
        type=float,
        default=0.0,
        help="kill each run at this share of it, and go on (0: don't)",
    )
    add("--json", type=Path, help="write the numbers there")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> list[Run]:
    flags = _flags(words)
    sizes = dict(SIZES[flags.sizes])
    if flags.layers is not None:
        sizes["num_hidden_layers"] = flags.layers
    runs = []
    with _folder(flags.folder) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        model = folder / f"{flags.sizes}-{sizes['num_hidden_layers']}-layers"
        print(f"{model}: making the model where it isn't there", file=sys.stderr)
        make_model(model, sizes, flags.shard_bytes)
        for quantizer in flags.quantizers:
            runs.append(run(model, Path(scratch) / quantizer.replace(":", "-"), flags, quantizer))
    print(table(runs, bounds=flags.sizes == "7b"))
    if flags.json is not None:
        flags.json.write_text(
            json.dumps([asdict(each) | {"rate": each.rate} for each in runs], indent=2) + "\n"
        )
    return runs


if __name__ == "__main__":
    main()
