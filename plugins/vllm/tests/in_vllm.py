"""Run vLLM on folders, in a process of its own: ``python in_vllm.py REQUESTS.json ANSWERS.json``.

A request has ``model``, ``prompts`` (lists of token ids), ``new`` (tokens to generate), perhaps
``adapters`` (the name of each prompt's adapter, or null), ``paths`` (their folders) and ``options``
(of ``vllm.LLM``). The answer has, for each prompt, the ids that vLLM chose greedily and the
log-probability of each, and of the prompt's own ids if there are no adapters; or the error.

Each model has a fork of this process, which has imported vLLM: the import takes longer than a tiny
model, and vLLM 0.32 starts only one CPU worker in a process.
"""

import json
import multiprocessing
import sys
import traceback
from pathlib import Path


def main(requests):
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_worker  # noqa: F401  # else each fork imports it

    context, answers = multiprocessing.get_context("fork"), []
    for request in requests:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=send_answer, args=(request, there))
        process.start()
        there.close()
        try:
            answers.append(here.recv())
        except EOFError:
            answers.append("the process ended without an answer")
        process.join()
    return answers


def send_answer(request, connection):
    try:
        connection.send(answer(request))
    except BaseException as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {error}")


def answer(request):
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    paths = request.get("paths") or {}
    options = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 64,
        "max_num_seqs": 8, "disable_log_stats": True, **request.get("options", {}),
    }  # fmt: skip
    if paths:  # a slot to spare: see modulora_vllm.server
        options |= {"enable_lora": True, "max_loras": len(paths) + 1, "max_lora_rank": 8}
    llm = LLM(model=request["model"], **options)
    sampling = SamplingParams(
        temperature=0, max_tokens=request["new"], logprobs=1, detokenize=False, ignore_eos=True,
        prompt_logprobs=None if paths else 1,
    )  # fmt: skip
    names = request.get("adapters") or [None] * len(request["prompts"])
    adapters = [
        None if name is None else LoRARequest(name, 1 + list(paths).index(name), paths[name])
        for name in names
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    found = llm.generate(prompts, sampling, lora_request=adapters if paths else None)
    answers = []
    for ids, each in zip(request["prompts"], found, strict=True):
        (output,) = each.outputs
        new = list(output.token_ids)
        own = list(zip(ids, each.prompt_logprobs or [], strict=False))[1:]  # the first has none
        answers.append(
            {
                "ids": new,
                "logprobs": [p[i].logprob for i, p in zip(new, output.logprobs, strict=True)],
                "prompt": [p[i].logprob for i, p in own],
            }
        )
    return answers


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps(main(json.loads(source.read_text()))))
