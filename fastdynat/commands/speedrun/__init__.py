"""`fastdynat speedrun`: the race to a robust accuracy on CIFAR-10.

In reading order:

1. `record_definition`: a record is a YAML file of training flags (`records/`); `race_rules` says which flags
   it may have and which results count.
2. `run_race`: laps of one or more records, seed by seed in alternation; each lap is a process of its own
   (`lap`), which trains with fastdynat or with the loop that people start from (`plain_loop`).
3. `lap_judge`: accuracies of the network of a lap, and signs of masked gradients.
4. `race_results`: the JSON file of a record; `race_log` reads them and makes the table.
"""
