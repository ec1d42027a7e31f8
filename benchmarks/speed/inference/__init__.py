"""Mixed-task inference beside what a user would run otherwise: `python -m benchmarks.speed.inference --help`.

ways.py: the ways to answer. sections.py: what is compared and measured. __main__.py: the command.
"""
