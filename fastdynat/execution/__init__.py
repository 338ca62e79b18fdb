"""Execution of functions: by Inductor, CUDA graphs, in true float32; checked against eager.

In reading order:
- `compiling`: torch.compile with one graph per input signature; `compile_check`: its comparison with eager;
- `graphed_call`: a function as CUDA graphs; `graph_capture`: the capture; `graph_check`: replays against
  eager;
- `deviation`: differences of results; `fallbacks`: the reasons why something runs without compiler or graphs;
- `uncompiled`: a context without both; `synchronization`: a context in which waiting for the GPU is allowed;
- `float32`: a context without TF32; `process_state`: a context that restores the process's global state.
"""
