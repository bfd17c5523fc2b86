"""Measured improvement of a recipe at equal bytes.

frame     the recipe as a knapsack: groups, options, what it uses on every device
probes    single changes around the recipe: parts of a role one step up, one step down
factors   what the probes say of the loss model: measured over predicted change, shrunk
swaps     the knapsack solved again with the measured changes
search    rounds of probes and swaps, then the judgement on chunks that chose nothing
worker    the same in a child process with the real engine; results, resuming
outcome   the new recipe and the JSON
"""
