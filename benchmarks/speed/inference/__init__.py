"""Mixed-task inference against its alternatives: `python -m benchmarks.speed.inference --help`.

ways.py: the ways to answer. sections.py: what is compared and measured. __main__.py: the command.
"""
