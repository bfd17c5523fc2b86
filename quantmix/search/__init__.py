"""From a palette and a rig to types and homes: the searches, each on top of the ones before it.

choices    a placement as a knapsack, and its answer back as types and homes
placement  which layers on which GPU: contiguous splits
timing     seconds per token of a choice, from the speed model
rows       the choices of any placement, from those with all layers in one place
base       what every search on a rig needs
least      whether anything fits at all, in closed form
leading    what every number of leading layers in RAM promises, all bounded at once
splits     what contiguous splits promise, GPU by GPU, with whole layers
frame      one number of layers in RAM: relaxed, then rounded to whole layers
whole      the splits that promise most, solved and polished
hybrid     GPUs with RAM behind them
planner    any rig: the one to call
filesize   no rig, but a file of a given size
"""
