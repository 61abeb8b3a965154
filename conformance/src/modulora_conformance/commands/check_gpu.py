"""``modulora check-gpu``, which ``modulora doctor --gpu`` runs too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from modulora_conformance.findings import Finding, reason, report_of
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import OptionError, RequestError

if TYPE_CHECKING:
    from modulora_core.registry import Entry
    from modulora_core.spec import QuantizerSpec

MOST_FAULTS = 5
"""Wrong results of one plugin that are listed: one fault of a kernel causes many."""

Devices = Annotated[
    list[str], option("--device DEVICE", "cuda or cpu. Repeatable.", default="cuda")
]


def command(device: Devices = []) -> Report:
    """Compare every quantizer's kernels with plain torch on a GPU, and measure it.

    It measures how fast the GPU copies. For each quantizer it measures products of one row and of
    many, a LoRA step and decoding. On an H100, A100 or RTX 4090 each product has the time beside
    it that arithmetic predicts. It takes minutes. --device cpu tries the CPU's kernels. The exit
    code is 1 if a result is wrong.

    Examples:
        modulora check-gpu
        modulora check-gpu --device cpu --json
        modulora doctor --gpu
    """
    return report_of(list(findings(device)))


def findings(device: list[str]) -> Iterator[Finding]:
    """The findings on these devices, by default on a GPU."""
    import torch

    from modulora_core.distributed import pick_device
    from modulora_core.registry import entries

    if not (device or torch.cuda.is_available()):
        raise RequestError(
            f"check-gpu: expected a GPU that torch sees, got none (torch {torch.__version__}); "
            "install torch for your card, or give --device cpu to try the CPU's kernels"
        )
    devices = device or ["cuda"]
    for name in devices:
        if pick_device(name).type not in ("cuda", "cpu"):
            raise OptionError(f"check-gpu: expected --device cuda or cpu, got {name}")
    from modulora_conformance.gpu import bandwidth

    for name in devices:
        yield Finding(name, bandwidth(torch.device(name)))
    plugins = [entry for entry in entries() if entry.status == "ok"]
    with terminal().progress("measuring", "quantizers") as show:
        for done, entry in enumerate(plugins):
            show(f"measuring {entry.name}", done, len(plugins))
            yield from _measured(entry, devices)
            show(f"measured {entry.name}", done + 1, len(plugins))


def _measured(entry: Entry[QuantizerSpec], devices: list[str]) -> Iterator[Finding]:
    """The kernels beside plain torch; then figures, which mean little if a kernel is wrong."""
    import torch

    from modulora_conformance import gpu

    assert entry.spec is not None
    for name in devices:
        place = torch.device(name)
        subject = f"{entry.name} on {name}"
        try:
            results = list(gpu.comparisons(entry, place))
        except Exception as failure:  # of the plugin, where it uses no kernel
            yield Finding(subject, "fails", "fault", reason(failure)[:300])
            continue
        wrong = [each for each in results if not each.passed]
        passed = f"{len(results) - len(wrong)} of {len(results)} results of kernels are right"
        yield Finding(subject, passed if results else "no kernels, plain torch")
        for each in wrong[:MOST_FAULTS]:
            yield Finding(subject, "wrong", "fault", str(each))
        card = gpu.card_of(place)
        try:
            for found in gpu.products(entry.name, place, card):
                yield Finding(subject, found)
            if entry.spec.calibration != "required":
                yield Finding(subject, gpu.training_and_decoding(entry.name, place))
        except Exception as failure:  # of a kernel or its compiler, which may raise anything
            yield Finding(subject, "fails", "fault", reason(failure)[:300])
