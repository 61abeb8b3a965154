"""How much memory a model needs, before anything is downloaded or computed.

::

    request.py       what is asked: the model's settings of a finetuning run, a device, a budget
    subject.py       the model: its config, its layers on the meta device, and how a quantizer would pack them
    ledger.py        bytes by what they are for, counted while torch's operations run
    stand_ins.py     what runs in the place of a quantizer's product, and of what only numbers could tell
    resident.py      what of the weights is in memory
    workspace.py     what a quantizer's products and packing take beside their results, measured on a small weight
    rehearsal.py     training and decoding on tensors without memory
    timeline.py      the bytes of a step over time, for as many blocks as the model has
    packing.py       quantizing
    overhead.py      what a process takes without any model: measured constants
    jobs.py          the items of the three jobs
    helpful.py       what to change where it does not fit
    fitting.py       plans, and what a budget allows
    picture.py       the bars

:func:`modulora_core.planner.fitting.plan_memory` is the way in. Nothing here has a formula for attention or a norm: the code that trains is
run on fake tensors, and what autograd keeps is counted.
"""
