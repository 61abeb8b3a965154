"""Plan the memory of a model, before anything is downloaded or computed.

::

    request.py      the question: a model, a quantizer, a finetuning run, a device, a budget
    model.py        the model: its config, its layers on the meta device, its packed layout
    ledger.py       counts bytes by item while torch's operations run
    rehearsal.py    a training step and a prompt on fake tensors
    memory.py       the items of training, decoding and quantizing
    fitting.py      plans, and what a budget allows
    remedies.py     settings that save memory, alone and together
    picture.py      the bars

:func:`modulora_core.planner.fitting.plan` is the entry point.
"""
