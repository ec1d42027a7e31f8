"""Mixed-task inference beside what a user would run otherwise: `python -m benchmarks.inference --help`.

texts.py: what is answered. ways.py: by what. sections.py: what is compared and measured. __main__.py: the command.
"""
