"""How an attack is computed: goals, PGD, and the engine that runs it on a folded, compiled, captured
replica.
"""
