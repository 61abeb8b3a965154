"""Mixed precision: gives each layer the quantizer that keeps the loss smallest within a budget.

search.py        the choices for one model: layers, sizes, errors
layer_errors.py  each layer's error under each quantizer, measured block by block
allocation.py    the knapsack problem
written.py       the assignment as YAML, with its figures in comments
assign.py        the run, with the public function ``assign``
"""
