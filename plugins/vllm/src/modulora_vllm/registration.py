"""vLLM's entry point: let vLLM load packed folders.

vLLM calls :func:`register` in each of its processes. It skips a plugin that raises and then says
"Unknown quantization method", so the reason is logged here. Nothing heavy is imported: the class is
loaded when vLLM reads the config of a packed folder.
"""

from __future__ import annotations

from collections.abc import Iterator

from modulora_core import registry

TESTED = "0.32"
"""The version of vLLM that the tests run with. 0.31 needs transformers before 5.18, our oldest."""


def register() -> None:
    """Register our format, and foreign formats that vLLM lacks and an installed plugin reads."""
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.modulora")  # a child of vLLM's own logger, which has a handler
    try:
        if not vllm.__version__.startswith(f"{TESTED}."):
            logger.warning(
                "modulora-vllm: tested with vLLM %s, and this is %s; if it fails, install that one",
                TESTED, vllm.__version__,
            )  # fmt: skip
        from vllm.model_executor.layers.quantization import (
            QUANTIZATION_METHODS,
            register_quantization_config,
        )

        from modulora_vllm.engine.quantization import PackedConfig

        for method in _methods():
            if method not in QUANTIZATION_METHODS:
                register_quantization_config(method)(PackedConfig)
    except Exception as error:
        logger.error("modulora-vllm can't serve packed folders here: %r", error)  # noqa: TRY400


def _methods() -> Iterator[str]:
    """The values of ``quant_method`` in config.json that this project reads."""
    yield "modulora"
    for entry in registry.formats():
        if entry.spec is not None and entry.status == "ok":
            yield from entry.spec.quant_methods
