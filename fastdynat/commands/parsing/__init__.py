"""From a command's words to its configuration: flags, spelling, defaults and refusals. Nothing here imports
torch.
"""
