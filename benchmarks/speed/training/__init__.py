"""Learning one task beside what a user would run otherwise: `python -m benchmarks.speed.training --help`.

ours.py, lora.py, paper.py: the ways to learn it, each a function that gives a call which learns the task once. rows.py:
what the rivals read and the loss they lower. __main__.py: the command.
"""
