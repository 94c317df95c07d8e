"""`python -m dattn_mcore.doctor`: what is installed, what a run would take, and what is missing.

What a run would take is asked of the trainer's own functions, in a process of its own (`choices`),
and packages are imported in others (`imports`): one that ends its process ends no report.
"""
