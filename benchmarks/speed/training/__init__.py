"""Learning one task, against the alternatives: `python -m benchmarks.speed.training --help`.

ours.py, lora.py, paper.py: the ways to learn it; each is a function that returns a call which learns the task once.
rows.py: the rivals' inputs and loss. __main__.py: the command.
"""
