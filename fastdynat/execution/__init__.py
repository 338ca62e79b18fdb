"""How functions run: compiled by Inductor, captured as CUDA graphs, in true float32; each checked against
eager.
"""
