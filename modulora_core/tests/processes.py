"""Jobs for several processes on the CPU, started as torchrun starts them."""

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import socket
import sys
import weakref

import torch

PATIENCE = 600
"""Seconds until processes that wait for each other in vain are ended."""


def run_in_processes(number, job, *arguments):
    """``job(*arguments)`` in each of ``number`` processes; their results by rank."""
    launcher = _launcher()
    launcher.send((number, job, arguments, sys.path, dict(os.environ)))
    return launcher.recv()


@functools.cache
def _launcher():
    """A connection to a clean process, which imports transformers once and forks for each rank."""
    # not forkserver: the kit has it, and its children must not know transformers or Triton
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_launch, args=(there,)).start()
    there.close()
    atexit.register(here.close)  # ends it
    return here


def _launch(requests):
    for module in ("quantization.quantize", "training.finetune"):
        importlib.import_module(f"modulora_core.{module}")
    with contextlib.suppress(EOFError):
        while True:
            requests.send(_forked(*requests.recv()))


def _forked(number, job, arguments, path, given):
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    readers, started = [], []
    for rank in range(number):
        reader, writer = context.Pipe(duplex=False)
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "MASTER_PORT": port}
        environment = given | {name: str(value) for name, value in values.items()}
        words = (path, environment, writer, job, *arguments)
        process = context.Process(target=_run, args=words)
        process.start()
        writer.close()
        readers.append(reader)
        started.append(process)
    try:
        return [reader.recv() if reader.poll(PATIENCE) else "no answer" for reader in readers]
    finally:
        for process in started:
            process.join(5)
            process.kill()


def _run(path, environment, out, job, *args):
    sys.path[:] = path
    os.environ |= {**environment, "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        out.send(job(*args))
    except Exception as error:
        out.send(f"{type(error).__name__}: {error}")


def finetuned(**options):
    """The losses of a run, and its loss on the evaluation data."""
    from modulora_core.training.config import FinetuneConfig
    from modulora_core.training.finetune import finetune

    resume = options.pop("resume", False)
    result = finetune(FinetuneConfig.build(options), resume=resume)
    assert result.eval_loss is not None
    return [*result.losses, result.eval_loss]


def trained_by_hand(folder, ids, *, split):
    """Losses of a loop with torch's ``fully_shard``, and this process's bytes of packed tensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from modulora_core import distributed
    from modulora_core.hf.load_model import load_model
    from modulora_core.lora.adapting import add_lora
    from modulora_core.lora.settings import LoRASettings
    from modulora_core.training.chunked_loss import chunked_loss
    from modulora_core.training.gradient_checkpointing import checkpoint_activations

    model = load_model(folder, device="cpu")
    add_lora(model, LoRASettings(rank=2, dropout=0.0))
    checkpoint_activations(model.train())
    if split:
        distributed.join()
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        whole = [weakref.ref(tensor) for tensor in packed_tensors(model)]
        for part in (*model.model.layers, model.lm_head):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert not any(reference() for reference in whole), "the whole tensors are freed"
        ids = ids.chunk(distributed.world_size())[distributed.rank()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(3):
        with chunked_loss(model):
            output = model(input_ids=ids, labels=ids, use_cache=False)
        assert output.logits.shape[1] == 1, "the loss needed no whole logits"
        loss = output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    found = torch.stack(losses)
    if split:
        torch.distributed.all_reduce(found)
        found /= distributed.world_size()
    return found.tolist(), packed_bytes(model)


def packed_bytes(model):
    """Bytes of this process's part of the packed tensors."""
    from torch.distributed.tensor import DTensor

    tensors = packed_tensors(model)
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.untyped_storage().nbytes() for part in parts)


def packed_tensors(model):
    from modulora_core.packed_parameters import PackedParameter

    modules = [module for module in model.modules() if isinstance(module, PackedParameter)]
    return [tensor for module in modules for tensor in module.parameters()]


def quantized(model, out, quantizer, text, weighting=None):
    """Quantize with calibration; the experts that no token reached."""
    from modulora_core.calibration import CalibrationConfig
    from modulora_core.quantization.quantize import quantize

    calibration = CalibrationConfig(str(text), samples=5, seq_len=16, weighting=weighting)
    result = quantize(str(model), out, quantizer, calibration=calibration, progress=False)
    return list(result.unreached)
