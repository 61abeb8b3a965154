"""The page of a finetuning run::

run.py          the facts of a run, from an adapter's folder
callback.py     the facts of any Trainer, at the end of its training
samples.py      answers without and with the adapter
curves.py       charts as SVG
page.py         the facts as HTML
"""
